"""A speech processor of simulstream 1.0: `type: speechattn.evaluators.simulstream.SpeechAttnProcessor` in its YAML."""

from __future__ import annotations

from types import SimpleNamespace
from typing import ClassVar

from simulstream.server.speech_processors import SpeechProcessor
from simulstream.server.speech_processors.incremental_output import IncrementalOutput

from speechattn.audio.resample import Samples
from speechattn.errors import InputError
from speechattn.evaluators.shown import Output
from speechattn.evaluators.talk import Talk, add_talk_options
from speechattn.evaluators.voice import Strict, Voice, add_voice_options, options_of

__all__ = ["SpeechAttnProcessor"]

OWN = ("type", "detokenizer_type")  # what simulstream reads


class SpeechAttnProcessor(SpeechProcessor):  # type: ignore[misc]  # simulstream has no types
    """Our sessions as simulstream runs them. All processors of one configuration share the model.

    The settings are the options of `speechattn stream` and of `add_talk_options` by their names (`beam_size: 4`); any
    other is an error.
    """

    voices: ClassVar[list[tuple[SimpleNamespace, Voice]]] = []

    @classmethod
    def load_model(cls, config: SimpleNamespace) -> None:
        """Once for a configuration; InputError for one that cannot be honoured, or whose log nobody could score."""
        if any(known == config for known, _ in cls.voices):
            return
        settings = dict(vars(config))
        if settings.get("detokenizer_type") != "simuleval" or "latency_unit" not in settings:
            raise InputError("scoring needs detokenizer_type: simuleval, and latency_unit: spm, word or char")
        parser = Strict(allow_abbrev=False, add_help=False)
        add_voice_options(parser)
        add_talk_options(parser)
        options = options_of({name: value for name, value in settings.items() if name not in OWN}, parser)
        cls.voices.append((SimpleNamespace(**settings), Voice(options)))

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__(config)
        self.load_model(config)
        self.talk = Talk(next(voice for known, voice in self.voices if known == config))

    @property
    def speech_chunk_size(self) -> float:
        """Seconds."""
        return self.talk.chunk_s

    def process_chunk(self, waveform: Samples) -> IncrementalOutput:
        """What more sound at 16 kHz leads to."""
        return incremental(self.talk.hear(waveform))

    def end_of_stream(self) -> IncrementalOutput:
        """All that remains is committed."""
        return incremental(self.talk.end())

    def set_source_language(self, language: str) -> None:
        """InputError for one that the model does not hear."""
        self.talk.speak(source=language)

    def set_target_language(self, language: str) -> None:
        """InputError for one that the model does not write."""
        self.talk.speak(target=language)

    def tokens_to_string(self, tokens: list[str]) -> str:
        """The text of tokens."""
        return self.talk.text(tokens)

    def clear(self) -> None:
        """For the next recording."""
        self.talk.clear()


def incremental(output: Output) -> IncrementalOutput:
    """In simulstream's own class."""
    return IncrementalOutput(**vars(output))
