"""Sound in, words out as they become certain."""

from speechattn.live.events import Event, Word
from speechattn.live.session import Session

__all__ = ["Event", "Session", "Word"]
