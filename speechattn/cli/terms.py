"""`--terms FILE`: names and rare words that may be said, and what became of them."""

from __future__ import annotations

import argparse
import sys
from functools import cache
from pathlib import Path
from typing import Any

from speechattn.errors import InputError, ModelError
from speechattn.live.session import Session
from speechattn.live.terms import Terms, TermUse
from speechattn.model.load import DEFAULT, located
from speechattn.model.matcher import load_matcher
from speechattn.terms.bank import Bank
from speechattn.terms.vector import VectorIndex

__all__ = ["OPTIONS", "add_terms_options", "build_terms", "read_bank", "retriever_of", "tell_terms"]

OPTIONS = ("terms", "terms_model", "terms_top_k", "terms_threshold")
TOP_K, THRESHOLD = Terms.top_k, Terms.threshold
KIN = {"tiny.en": DEFAULT}  # whose encoder was taught to say what that of the other says
SHOWN = 10  # terms that were not said
FOLDER = "terms"  # of a model, with a matcher for its encoder


def add_terms_options(group: Any) -> None:
    """Which terms, and how many of them."""
    group.add_argument(
        "--terms", metavar="FILE",
        help="names and rare words, one a line (`source => target` to translate): those that are heard are preferred",
    )  # fmt: skip
    group.add_argument("--terms-top-k", type=int, metavar="K", help=f"at most so many at a time (default {TOP_K})")
    group.add_argument(
        "--terms-threshold", type=float, metavar="P", help=f"whose probability is P or more (default {THRESHOLD:g})"
    )
    group.add_argument(
        "--terms-model", metavar="FOLDER", help=f"a retriever for this model's encoder (default: its folder {FOLDER})"
    )


def build_terms(options: argparse.Namespace) -> Terms | None:
    """The terms that the options name, if they do; InputError for settings without terms, and for no retriever."""
    if options.terms is None:
        for name in OPTIONS:
            if getattr(options, name) is not None:
                raise InputError(f"--{name.replace('_', '-')} needs --terms")
        return None
    folder = retriever_of(options.model, options.terms_model)
    bank, encoder = read_bank(folder, options.terms)
    if options.terms_model is not None and not any(
        same(encoder, name) for name in (options.model, KIN.get(options.model, options.model))
    ):
        raise InputError(f"--terms-model {folder}: made for the encoder of {encoder}, not for that of {options.model}")
    given = {"top_k": options.terms_top_k, "threshold": options.terms_threshold}
    return Terms(bank, **{name: value for name, value in given.items() if value is not None})


def retriever_of(model: str, named: str | Path | None = None) -> Path:
    """The folder of a retriever for a model: the one that is `named`, or that in the model's own folder.

    InputError where there is none.
    """
    if named is not None:
        return Path(named)
    folder = located(KIN.get(model, model)) / FOLDER
    if not folder.is_dir():
        raise InputError(
            f"{model} has no retriever of terms: name one by --terms-model (docs/terms.md), or give phrases by "
            "--hotwords-file"
        )
    return folder


@cache
def read_bank(folder: Path, file: str) -> tuple[Bank, str]:
    """The terms of a file with the retriever of a folder, and the name of the model whose encoder it hears."""
    matcher, encoder = load_matcher(folder)
    if isinstance(matcher, VectorIndex):
        raise InputError(f"{folder}: an index of vectors reads whole utterances: live terms need a Retriever")
    return Bank.read(matcher, file), encoder


def same(one: str, other: str) -> bool:
    """Two names of one model."""
    try:
        return located(one).resolve() == located(other).resolve()
    except ModelError:
        return one == other


def tell_terms(session: Session, path: Path | None = None, *, name: str = "") -> None:
    """What became of the terms of a session that has some: on standard error (of the source `name`), or as TSV in a
    file. InputError where that cannot be written.
    """
    uses = session.terms()
    if uses is None:
        return
    if path is not None:
        lines = ["term\tretrieved\tsaid\tmissed\ttimes", *map(line, uses)]
        try:
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        except OSError as error:
            raise InputError(f"{path}: {error.strerror or error}") from error
        return
    said, rest = [use for use in uses if use.said], [use.term for use in uses if not use.said]
    where = f"{name}: " if name else ""
    print(f"speechattn: {where}terms: {len(uses)} retrieved, {len(said)} of them said", file=sys.stderr)
    for use in said:
        print(f"  {use.term}: {', '.join(f'{start:.1f} s' for start, _ in use.said)}", file=sys.stderr)
    if rest:
        print(f"  not said: {', '.join(rest[:SHOWN])}{', ...' if len(rest) > SHOWN else ''}", file=sys.stderr)


def line(use: TermUse) -> str:
    """Of the table."""
    times = " ".join(f"{start:.2f}-{end:.2f}" for start, end in use.said)
    return f"{use.term}\t{use.retrieved}\t{len(use.said)}\t{use.missed}\t{times}"
