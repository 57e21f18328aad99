"""Terms as a user writes them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from speechattn.errors import InputError

__all__ = ["ARROW", "Term", "parse_terms", "read_terms", "written"]

ARROW = "=>"


@dataclass(frozen=True)
class Term:
    """What may be said, and its translation if it has one of its own."""

    source: str
    target: str | None = None

    def __str__(self) -> str:
        return self.source if self.target is None else f"{self.source} {ARROW} {self.target}"


def parse_terms(lines: Iterable[str], *, where: str = "terms") -> list[Term]:
    """One term a line, `source` or `source => target`; empty lines and those that begin with # do not count.

    InputError names the line that has no source or no target beside its arrow, two arrows, or a source that was there
    (in whatever case).
    """
    found: dict[str, Term] = {}
    for number, line in enumerate(lines, 1):
        parts = [" ".join(part.split()) for part in line.split(ARROW)]
        if parts[0].startswith("#") or parts == [""]:
            continue
        if len(parts) > 2 or not all(parts):
            said = f"{where}, line {number}: {line.strip()!r}"
            raise InputError(f"{said} is not a term, or a term {ARROW} its translation")
        term = Term(*parts)
        if known(term) in found:
            raise InputError(f"{where}, line {number}: the term {term.source!r} is there twice")
        found[known(term)] = term
    return [*found.values()]


def known(term: Term) -> str:
    """By what two terms are the same."""
    return term.source.casefold()


def read_terms(path: str | Path) -> list[Term]:
    """Those of a UTF-8 file; InputError when it is none."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text") from error
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    return parse_terms(text.split("\n"), where=str(path))


def written(terms: Sequence[Term]) -> str:
    """The text of a file. Law: `parse_terms` of its lines gives the terms back."""
    return "".join(f"{term}\n" for term in terms)
