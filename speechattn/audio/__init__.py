"""Sound: reading, resampling, features, voice activity, the microphone. And lips: videos, their features."""

__all__: list[str] = []
