"""What our doors need of SimulEval 1.1 and simulstream 1.0, with their contracts, where these are not installed."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass, field
from inspect import signature
from math import ceil
from types import ModuleType
from typing import Any

import numpy as np
import pytest


@dataclass
class Segment:
    """A piece of the source; SimulEval's default for `tgt_lang` is no text, and so is this one."""

    content: list[Any] = field(default_factory=list)
    finished: bool = False
    sample_rate: int = -1
    tgt_lang: Any = object
    config: dict[str, Any] = field(default_factory=dict)


class AgentStates:
    """As in simuleval/agents/states.py."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.source: list[Any] = []
        self.source_finished = self.target_finished = False
        self.source_sample_rate, self.tgt_lang = 0, None
        self.upstream_states: list[Any] = []

    def update_source(self, segment: Segment) -> None:
        self.source_finished = segment.finished
        if segment.content:
            self.source += segment.content
            self.source_sample_rate, self.tgt_lang = segment.sample_rate, segment.tgt_lang


class Action:
    """READ or WRITE."""


class ReadAction(Action):
    """READ."""


@dataclass
class WriteAction(Action):
    """WRITE."""

    content: str
    finished: bool


class SpeechToTextAgent:
    """As in simuleval/agents/agent.py; `policy` with an argument is that of an agent without a state of its own."""

    def __init__(self, args: Namespace) -> None:
        self.args, self.states = args, self.build_states()  # type: ignore[attr-defined]
        self.reset()

    def reset(self) -> None:
        self.states.reset()

    def pushpop(self, segment: Segment, states: Any = None) -> tuple[str, bool]:
        used = self.states if states is None else states
        used.update_source(segment)
        assert len(signature(self.policy).parameters) == 1  # type: ignore[attr-defined]
        if used.target_finished:
            return "", True
        action = self.policy(used)  # type: ignore[attr-defined]
        assert isinstance(action, Action)
        if not isinstance(action, WriteAction):
            return "", False
        used.target_finished = action.finished
        return action.content, action.finished


def evaluate(agent: Any, recordings: list[tuple[Any, int]], segment_ms: float) -> list[list[tuple[str, float]]]:
    """As SimulEval's evaluator: each word with its delay. An agent that does not finish is not reset."""
    said = []
    agent.reset()
    for samples, rate in recordings:
        words, at, step = list[tuple[str, float]](), 0, ceil(segment_ms / 1000 * rate)
        while at < len(samples) or not at:
            finished = at + step >= len(samples)
            text, done = agent.pushpop(Segment(samples[at : at + step].tolist(), finished, rate))
            at = min(at + step, len(samples)) or 1
            words += [(word, at * 1000 / rate) for word in text.split()]
            assert done == finished
            if done:
                agent.reset()
        said.append(words)
    return said


class SpeechProcessor(ABC):
    """As in simulstream/server/speech_processors/__init__.py."""

    def __init__(self, config: Any) -> None:
        self.config = config

    @classmethod
    @abstractmethod
    def load_model(cls, config: Any) -> None: ...

    @abstractmethod
    def process_chunk(self, waveform: Any) -> Any: ...

    @abstractmethod
    def set_source_language(self, language: str) -> None: ...

    @abstractmethod
    def set_target_language(self, language: str) -> None: ...

    @abstractmethod
    def end_of_stream(self) -> Any: ...

    @abstractmethod
    def tokens_to_string(self, tokens: list[str]) -> str: ...

    @abstractmethod
    def clear(self) -> None: ...


@dataclass
class IncrementalOutput:
    """As in simulstream."""

    new_tokens: list[str]
    new_string: str
    deleted_tokens: list[str]
    deleted_string: str


def merged(outputs: list[Any], text: Any) -> IncrementalOutput:
    """simulstream's merge of outputs, word for word: it adds to the lists of the first one, and loses what is deleted
    where nothing was new before."""
    if len(outputs) == 1:
        return IncrementalOutput(**vars(outputs[0]))
    new, deleted = outputs[0].new_tokens, outputs[0].deleted_tokens
    for output in outputs[1:]:
        n = len(output.deleted_tokens)
        if n > 0:
            if n < len(new):
                assert output.deleted_tokens == new[-n:]
                new = new[:-n]
            else:
                deleted = output.deleted_tokens[: -len(new)] + deleted
                new = []
        new += output.new_tokens
    return IncrementalOutput(new, text(new), deleted, text(deleted))


def process(processor: Any, samples: Any) -> list[tuple[float, IncrementalOutput]]:
    """A recording at 16 kHz as simulstream's inference runs it: each output and the seconds of sound before it."""
    step = int(16000 * processor.speech_chunk_size)
    found, at = list[tuple[float, IncrementalOutput]](), 0
    while at + step <= len(samples):
        at += step
        found.append((at / 16000, processor.process_chunk(samples[at - step : at].astype(np.float32))))
    rest = [processor.process_chunk(samples[at:].astype(np.float32))] if at < len(samples) else []
    found.append((len(samples) / 16000, merged([*rest, processor.end_of_stream()], processor.tokens_to_string)))
    processor.clear()
    return found


def parser() -> ArgumentParser:
    """SimulEval's own options that ours meet."""
    made = ArgumentParser(add_help=False, conflict_handler="resolve")
    made.add_argument("--source-segment-size", type=int, default=1)
    made.add_argument("--device", default="cpu")
    group = made.add_mutually_exclusive_group()
    group.add_argument("--dtype", choices=["fp16", "fp32"])
    group.add_argument("--fp16", action="store_true")
    return made


def install(patch: pytest.MonkeyPatch) -> None:
    """The doubles under the names of the tools, and our modules that import these anew."""
    names = {
        "simuleval": {}, "simuleval.agents": {"SpeechToTextAgent": SpeechToTextAgent},
        "simuleval.agents.actions": {"Action": Action, "ReadAction": ReadAction, "WriteAction": WriteAction},
        "simuleval.agents.states": {"AgentStates": AgentStates},
        "simulstream": {}, "simulstream.server": {},
        "simulstream.server.speech_processors": {"SpeechProcessor": SpeechProcessor},
        "simulstream.server.speech_processors.incremental_output": {"IncrementalOutput": IncrementalOutput},
    }  # fmt: skip
    for name, values in names.items():
        module = ModuleType(name)
        vars(module).update(values)
        patch.setitem(sys.modules, name, module)
    for ours in ("simuleval", "simulstream"):
        patch.delitem(sys.modules, f"speechattn.evaluators.{ours}", raising=False)
