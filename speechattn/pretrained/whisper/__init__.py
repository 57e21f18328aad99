"""Whisper in this library's modules, from any of the three layouts it is found in."""

from speechattn.pretrained.whisper.config import WhisperConfig
from speechattn.pretrained.whisper.load import WhisperModel, find, load
from speechattn.pretrained.whisper.model import Whisper

__all__ = ["Whisper", "WhisperConfig", "WhisperModel", "find", "load"]
