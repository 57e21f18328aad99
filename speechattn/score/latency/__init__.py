"""Latency of simultaneous translation and transcription, in the definitions of its evaluators."""

__all__: list[str] = []
