"""What can go wrong outside the code: the message is for the user, and says what to do."""

__all__ = ["InputError", "ModelError", "SpeechAttnError"]


class SpeechAttnError(Exception):
    """Something the user gave or asked for cannot be used; commands print it and exit with code 2."""


class InputError(SpeechAttnError):
    """A recording, a manifest or an option that cannot be used."""


class ModelError(SpeechAttnError):
    """A model that cannot be found, read or asked for this."""
