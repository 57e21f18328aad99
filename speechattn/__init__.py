"""Speech attention that streams: recognise, translate and train with the same weights and the same code path."""

from speechattn.errors import InputError, ModelError, SpeechAttnError
from speechattn.frames import Frames, Memory
from speechattn.live import Event, Session, Word
from speechattn.model import load_model
from speechattn.policy.align_att import AlignAtt
from speechattn.policy.local_agreement import LocalAgreement
from speechattn.version import __version__

__all__ = [
    "AlignAtt",
    "Event",
    "Frames",
    "InputError",
    "LocalAgreement",
    "Memory",
    "ModelError",
    "Session",
    "SpeechAttnError",
    "Word",
    "__version__",
    "load_model",
]
