"""`speechattn tokenizer unigram|bpe|char|byte|phoneme TEXT... FOLDER`."""

from __future__ import annotations

import argparse
import gzip
import zlib
from collections.abc import Callable, Iterator
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from speechattn.errors import InputError
from speechattn.text.lexicon import Lexicon
from speechattn.text.make import make_bytes, make_characters, make_phones, make_subwords, unspelled
from speechattn.text.normal import NORMALISERS, normaliser
from speechattn.text.pieces import Pieces

__all__ = ["add_parser", "read_lines"]

MANIFEST = (".jsonl", ".jsonl.gz")
SHOWN = 10  # of the words that cannot be spelled
Kinds = dict[str, tuple[str, Callable[[list[str], argparse.Namespace], Pieces]]]


def add_parser(commands: Any) -> None:
    """Options of the command."""
    parser = commands.add_parser("tokenizer", help="a vocabulary made of text", allow_abbrev=False)
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    for name, (what, make) in KINDS.items():
        kind = kinds.add_parser(name, help=what, description=f"{what}: written to FOLDER.", allow_abbrev=False)
        kind.add_argument(
            "text", metavar="TEXT", nargs="*" if name == "byte" else "+",
            help="text file, one sentence a line, or a manifest of cuts or supervisions (.jsonl, .jsonl.gz)",
        )  # fmt: skip
        kind.add_argument("folder", metavar="FOLDER", help="where tokens.txt and what belongs to it are written")
        kind.add_argument("--normalise", default="none", choices=sorted(NORMALISERS), help="what is done to the text")
        which = kind.add_mutually_exclusive_group()
        which.add_argument("--translations", action="store_true", help="of manifests: text and translation, as one")
        which.add_argument("--translations-only", action="store_true", help="of manifests: the translation alone")
        kind.set_defaults(run=run, make=make)
        if name in ("unigram", "bpe"):
            kind.add_argument("--vocab-size", type=int, required=True, metavar="N", help="how many, with special ones")
            kind.add_argument(
                "--coverage", type=float, default=1.0, metavar="SHARE",
                help="letters are pieces until they make this share of the text (default 1)",
            )  # fmt: skip
            kind.add_argument("--byte-fallback", action="store_true", help="spell all other letters in bytes")
        if name == "char":
            kind.add_argument("--least", type=int, default=1, metavar="N", help="rarer letters become <unk>")
        if name == "phoneme":
            kind.add_argument(
                "--lexicon", metavar="FILE", action="append",
                help="words and their phones, a word a line; cmu: the CMU dictionary (default); of several the first "
                "that has a word counts",
            )  # fmt: skip


def subwords(kind: Literal["unigram", "bpe"]) -> Callable[[list[str], argparse.Namespace], Pieces]:
    """SentencePiece's, unigram or bpe."""

    def make(lines: list[str], options: argparse.Namespace) -> Pieces:
        if not 0.98 <= options.coverage <= 1:  # SentencePiece takes no other
            raise InputError(f"--coverage {options.coverage}: wanted from 0.98 to 1")
        if options.vocab_size < 4:
            raise InputError(f"--vocab-size {options.vocab_size}: wanted at least 4")
        return make_subwords(
            lines, Path(options.folder), kind, options.vocab_size, coverage=options.coverage,
            byte_fallback=options.byte_fallback,
        )  # fmt: skip

    return make


def phones(lines: list[str], options: argparse.Namespace) -> Pieces:
    """Of the dictionaries asked for."""
    named = options.lexicon or ["cmu"]
    lexicons = [Lexicon.cmu() if name == "cmu" else Lexicon.load(Path(name)) for name in named]
    return make_phones(reduce(or_, reversed(lexicons)))


KINDS: Kinds = {
    "unigram": ("SentencePiece's pieces, by a unigram model", subwords("unigram")),
    "bpe": ("SentencePiece's pieces, by pair merges", subwords("bpe")),
    "char": ("the letters of the text", lambda lines, options: make_characters(lines, least=options.least)),
    "byte": ("the 256 bytes, for any text", lambda lines, options: make_bytes()),
    "phoneme": ("the phones of the CMU dictionary (English)", phones),
}


def read_lines(name: str, *, text: bool = True, translations: bool = False) -> Iterator[str]:
    """The lines of a text file; of a lhotse manifest what is said (`text`), its `translations`, or both."""
    if not name.endswith(MANIFEST):
        try:
            with Path(name).open(encoding="utf-8") as file:
                yield from file
        except UnicodeDecodeError as error:
            raise InputError(f"{name}: not UTF-8 text") from error
        except OSError as error:
            raise InputError(f"{name}: {error.strerror or error}") from error
        return
    for supervision in read_supervisions(name):
        if text:
            yield supervision.text or ""
        if translations:
            said = (supervision.custom or {}).get("translation")
            if not isinstance(said, str):
                raise InputError(f"{name}: {supervision.id} has no translation")
            yield said


def read_supervisions(name: str) -> Iterator[Any]:
    """Those of a manifest of cuts or of supervisions."""
    if not Path(name).is_file():
        raise InputError(f"{name}: No such file or directory")
    try:
        from lhotse import load_manifest_lazy
    except ImportError as error:
        raise InputError(f"{name}: manifests need lhotse: pip install 'speechattn[train]'") from error
    try:
        for item in load_manifest_lazy(name):
            yield from [item] if hasattr(item, "text") else item.supervisions
    except (
        ValueError, TypeError, LookupError, AttributeError, AssertionError, EOFError, gzip.BadGzipFile, zlib.error,
    ) as error:  # fmt: skip
        raise InputError(f"{name}: not a lhotse manifest of cuts or supervisions ({str(error)[:100]})") from error


def run(options: argparse.Namespace) -> int:
    """Read, normalise, make, write; then say what the text becomes."""
    clean = normaliser(options.normalise)
    lines: list[str] = []
    empty = 0
    for name in options.text:
        both = options.translations or options.translations_only
        read = read_lines(name, text=not options.translations_only, translations=both)
        for line in tqdm(read, desc=name, unit=" lines", disable=None):
            text = clean(line)
            empty += not text
            lines += [text] if text else []
    if options.text and not lines:
        raise InputError(f"{', '.join(options.text)}: no text" + (" is left by --normalise" if empty else ""))
    pieces = options.make(lines, options)
    pieces.save(Path(options.folder))
    print(f"{options.folder}: {pieces.size} tokens" + report(lines, empty, pieces))
    return 0


def report(lines: list[str], empty: int, pieces: Pieces) -> str:
    """How the text is spelled: what a user has to know before training."""
    if not lines:
        return ""
    some = lines[:: -(-len(lines) // 1000)]
    words = sum(len(line.split()) for line in some)
    said = f"; {sum(len(pieces.encode(line)) for line in some) / words:.2f} a word"
    said += f"; {len(lines)} lines" + (f", {empty} more are empty" if empty else "")
    if wrong := unspelled(lines, pieces):
        shown = ", ".join(word for word, _ in wrong.most_common(SHOWN)) + (", ..." if len(wrong) > SHOWN else "")
        share = sum(wrong.values()) / sum(len(line.split()) for line in lines)
        said += f"\n{len(wrong)} words ({100 * share:.2f} % of those said) have an <unk>: {shown}"
    return said
