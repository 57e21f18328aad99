"""Sound: reading, resampling, features, voice activity, the microphone."""

__all__: list[str] = []
