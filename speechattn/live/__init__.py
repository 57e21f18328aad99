"""Sound in, words out as they become certain."""

from speechattn.live.endings import StreamSettings
from speechattn.live.events import Event, Trace, Word
from speechattn.live.pool import Pool
from speechattn.live.session import Session
from speechattn.live.terms import Terms, TermUse
from speechattn.live.windowed import Settings

__all__ = ["Event", "Pool", "Session", "Settings", "StreamSettings", "TermUse", "Terms", "Trace", "Word"]
