"""When an utterance ends, and when a word is certain, where no voice detection says so."""

from __future__ import annotations

from dataclasses import dataclass

from speechattn.errors import InputError

__all__ = ["Glimpse", "Limits", "StreamSettings", "at_least"]


MOST_S = 1e9


def at_least(settings: object, **least_s: float) -> None:
    """InputError names the first of the settings that is less than so many seconds, no number, or endless."""
    for name, least in least_s.items():
        value = getattr(settings, name)
        if not value >= least:
            raise InputError(f"{name} is {value}: at least {least} s are needed")
        if value > MOST_S:
            raise InputError(f"{name} is {value}: at most {MOST_S:g} s")


@dataclass(frozen=True)
class StreamSettings:
    """How a session listens without voice detection; times in seconds.

    After `pause_s` in which nothing is said the last word is whole. After `silence_s` the utterance ends: all of it is
    committed and the search begins anew, but not before `guard_s` since the last time (arXiv 2107.07509, section 3).
    An utterance of `longest_s` ends at the next pause, of twice that between two labels.

    Words are committed when hypotheses with a share of `certainty` of the beam's probability agree on them, and
    `patience_s` after they were said as the best hypothesis has them.
    """

    pause_s: float = 0.24
    silence_s: float = 0.6
    guard_s: float = 0.0
    longest_s: float = 30.0
    patience_s: float = 2.0
    certainty: float = 0.95

    def __post_init__(self) -> None:
        at_least(self, pause_s=0.04, silence_s=0.04, guard_s=0.0, longest_s=1.0, patience_s=0.0)
        if not 0.5 <= self.certainty <= 1:
            raise InputError(f"certainty is {self.certainty}: from 0.5 to 1")


@dataclass(frozen=True)
class Glimpse:
    """Where a stream stands with what it sees ahead: `frames` of it, `quiet` since something was said, and how many
    `spoke` since the search began. As far as one sees, the utterance will end before frame `end`, or not (None)."""

    frames: int
    quiet: int
    spoke: int
    end: int | None


@dataclass
class Limits:
    """Settings in frames."""

    pause: int
    silence: int
    guard: int
    longest: int
    patience: int

    @classmethod
    def of(cls, settings: StreamSettings, frame_s: float) -> Limits:
        """At least one frame each."""
        names = ("pause_s", "silence_s", "guard_s", "longest_s", "patience_s")
        return cls(*(max(1, round(getattr(settings, name) / frame_s)) for name in names))

    def weary(self, room: float) -> int:
        """As how old a search counts that has this share of its room left: it ends at the next pause, or sooner."""
        return next((times * self.longest for least, times in ((0.125, 4), (0.25, 2), (0.5, 1)) if room < least), 0)

    def until_end(self, nothing: list[bool], valid: list[bool], at: int, counts: list[int]) -> tuple[int, bool]:
        """Count (quiet, since, spoke) on from frame `at` to where an utterance ends: behind which frame, and if.

        Where nothing was said for so long the search begins anew as well: it has nothing to remember.
        """
        for t in range(at, len(valid)):
            if not valid[t]:
                continue
            quiet, since, spoke = counts
            quiet, since, spoke = (quiet + 1 if nothing[t] else 0), since + 1, spoke + (not nothing[t])
            counts[:] = quiet, since, spoke
            silent = quiet >= self.silence and since >= (self.guard if spoke else self.silence)
            tired = since >= 4 * self.longest or (since >= 2 * self.longest and nothing[t])
            if silent or tired or (since >= self.longest and quiet >= self.pause):
                return t + 1, True
        return len(valid), False

    def glimpse(self, frames: int, nothing: list[bool], valid: list[bool], counts: list[int]) -> Glimpse:
        """Behind `frames` with `counts` (quiet, since, spoke): `nothing` is said in some of the `valid` ones ahead."""
        stop, over = self.until_end(nothing, valid, 0, list(counts))
        quiet, spoke = counts[0], counts[2]
        for silent in (n for n, there in zip(nothing, valid, strict=True) if there):
            quiet, spoke = (quiet + 1 if silent else 0), spoke + (not silent)
        return Glimpse(frames + sum(valid), quiet, spoke, frames + sum(valid[:stop]) if over else None)
