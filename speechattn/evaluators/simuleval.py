"""An agent of SimulEval 1.1: `simuleval --agent-class speechattn.evaluators.simuleval.SpeechAttnAgent`."""

from __future__ import annotations

import argparse
from argparse import Namespace

import numpy as np
from simuleval.agents import SpeechToTextAgent
from simuleval.agents.actions import Action, ReadAction, WriteAction
from simuleval.agents.states import AgentStates

from speechattn.errors import InputError
from speechattn.evaluators.voice import Voice, add_voice_options
from speechattn.live.events import Event

__all__ = ["SpeechAttnAgent", "States"]

DTYPES = {None: "float32", "fp32": "float32", "fp16": "float16"}


class States(AgentStates):  # type: ignore[misc]  # SimulEval has no types
    """A recording: `source` are the samples that were not heard yet, the rest is in a session of its own."""

    def __init__(self, voice: Voice) -> None:
        self.voice = voice
        super().__init__()

    def reset(self) -> None:
        """The next recording."""
        super().reset()
        self.session = self.voice.session()


class SpeechAttnAgent(SpeechToTextAgent):  # type: ignore[misc]
    """Hears segments of any length, writes words when they are committed, and all that remain when the source ends.

    SimulEval tells how much it had read then, and counts the time of computing. The options of `speechattn stream` are
    those of `simuleval` too, but for `--dtype`, which is SimulEval's (fp16, fp32).
    """

    def __init__(self, args: Namespace) -> None:
        dtype = "fp16" if args.dtype is None and args.fp16 else args.dtype
        self.voice = Voice(Namespace(**{**vars(args), "dtype": DTYPES[dtype]}))
        self.accepted: set[str] = set()  # lines of `--tgt-lang` that are what the model writes
        super().__init__(args)

    @staticmethod
    def add_args(parser: argparse.ArgumentParser) -> None:
        """SimulEval's parser lets the later of two options of one name win: its own `--dtype` does again."""
        add_voice_options(parser)
        parser.add_argument("--dtype", choices=("fp16", "fp32"), help="floating point format (default fp32)")

    def build_states(self) -> States:
        """All that belongs to one recording; the agent itself has no state."""
        return States(self.voice)

    def policy(self, states: States | None = None) -> Action:
        """Hear what is new: WRITE what it led to, or READ on."""
        states = self.states if states is None else states
        assert states is not None
        if isinstance(states.tgt_lang, str) and states.tgt_lang not in self.accepted:
            self.voice.session(target=states.tgt_lang)
            self.accepted.add(states.tgt_lang)
        heard, states.source = states.source, []
        events: list[Event] = []
        if heard:
            events += states.session.feed(np.array(heard, np.float32), states.source_sample_rate)
        if states.source_finished:
            events += states.session.finish()
        text = "".join(event.committed for event in events)
        return WriteAction(text, finished=states.source_finished) if text or states.source_finished else ReadAction()

    def to(self, device: str, fp16: bool = False) -> None:
        """The model was built where `--device` says; InputError for anything else afterwards."""
        if device != self.args.device or fp16 != (self.voice.options.dtype == "float16"):
            raise InputError(f"the agent was built for {self.args.device}; give --device and --dtype at its start")
