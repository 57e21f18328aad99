"""Vocabularies of pieces: characters, bytes, phones or SentencePiece's subwords; how phrases are spelled in them."""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import chain, pairwise
from math import exp
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from speechattn.errors import InputError, ModelError, SpeechAttnError
from speechattn.text.lexicon import Lexicon

__all__ = ["BLANK", "BYTES", "END", "MARK", "UNKNOWN", "Encodes", "Phrase", "Pieces", "plain", "spelled"]

BLANK = "<blank>"
UNKNOWN = "<unk>"
END = "<sos/eos>"
MARK = "▁"  # SentencePiece's space
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))  # as SentencePiece writes them
LIST = "tokens.txt"
BACKEND = "bpe.model"
LEXICON = "lexicon.txt"
MERGES = "merges.txt"
RANKED = "by rank\n"  # all that this file says
RUNS = re.compile(rf"'(?:s|t|re|ve|m|ll|d)|{MARK}?(?:[^\W\d_]+|\d+|(?:[^\w{MARK}]|_)+)|{MARK}")  # none of two kinds


class Pieces:
    """Ids of the pieces that text is put together from: id 0 is `<blank>`, the last one may be `<sos/eos>`.

    A piece that begins with "▁" (or with a space) begins a word; where no piece has either, text has no spaces.
    `encode` takes the longest piece that fits, again and again, or asks the SentencePiece `model` that made the
    pieces. Those that are `ranked` stand in the order in which byte pair encoding found them: the two neighbours whose
    piece stands first become one, again and again, within a run of letters, digits or signs (GPT-2's, and Whisper's).
    Where all of `BYTES` are pieces, a letter that no piece spells is its UTF-8 bytes; if they are all there
    is, a word begins with the byte of its space, and so does the first. With a `lexicon`, text is what it says of its
    words. Law: where `encode` finds no `<unk>`, `decode` gives the text back (with a lexicon, its phones), up to
    spaces: those at its ends go and several become one.
    """

    def __init__(
        self, pieces: Sequence[str], *, model: Path | None = None, lexicon: Lexicon | None = None, ranked: bool = False
    ) -> None:  # fmt: skip
        if not pieces or pieces[0] != BLANK:
            raise ModelError(f"the first of the {len(pieces)} pieces is not {BLANK}")
        if len({*pieces}) < len(pieces):
            twice = next(piece for i, piece in enumerate(pieces) if piece in pieces[:i])
            raise ModelError(f"the piece {twice!r} is there twice")
        if wrong := [i for i, piece in enumerate(pieces) if not piece or "\n" in piece]:
            raise ModelError(f"piece {wrong[0]} is empty or has a line break")
        if END in pieces[:-1]:
            raise ModelError(f"{END} is piece {pieces.index(END)}, but must be the last")
        self.pieces = tuple(pieces)
        if ranked and (model is not None or {*BYTES} <= {*pieces}):
            raise ModelError("ranked pieces need no SentencePiece model, and no bytes")
        self.model, self.lexicon, self.ranked = model, lexicon, ranked
        self._ids = {piece: i for i, piece in enumerate(pieces)}
        self.unknown = self._ids.get(UNKNOWN)
        self.end = self._ids.get(END)
        self.special = {i for i in (0, self.unknown, self.end) if i is not None}
        self._bytes = {self._ids[piece]: i for i, piece in enumerate(BYTES)} if {*BYTES} <= {*pieces} else {}
        self._letters = [piece for i, piece in enumerate(pieces) if i not in self.special and i not in self._bytes]
        text = "".join(self._letters)
        self.space = MARK if MARK in text else " " if " " in text or self._bytes else ""
        self.spaces = {i for i, piece in enumerate(pieces) if piece == self.space or self._bytes.get(i) == ord(" ")}
        self._longest = max(map(len, self._letters), default=1)

    @property
    def bytewise(self) -> bool:
        """Bytes spell what no other piece does."""
        return bool(self._bytes)

    @property
    def size(self) -> int:
        """The number of ids, V."""
        return len(self.pieces)

    @cached_property
    def _backend(self) -> Any:
        """The SentencePiece model. ModelError when it cannot be read."""
        try:
            import sentencepiece
        except ImportError as error:
            raise ModelError(f"{self.model} needs sentencepiece: pip install sentencepiece") from error
        try:
            return sentencepiece.SentencePieceProcessor(model_file=str(self.model))
        except Exception as error:
            raise ModelError(f"{self.model}: cannot be read as a SentencePiece model ({str(error)[:200]})") from error

    def encode(self, text: str) -> list[int]:
        """Text -> ids. What no piece spells is `<unk>`; InputError naming it where there is none."""
        if self.lexicon is not None:
            said = ((word, self.lexicon.said(word)) for word in text.split())
            return [i for word, phones in said for i in (self._cut(phones) if phones else [self._id(word, text)])]
        if self.model is not None:
            return [self._id(piece, text) for piece in self._backend.encode(plain(text), out_type=str)]
        return self._cut(text)

    def _cut(self, text: str) -> list[int]:
        """Ids of the longest pieces, or of the ranked ones."""
        spelled = self._spelled(text)
        if self.ranked:
            return [self._id(piece, text) for run in RUNS.findall(spelled) for piece in self._merged(run)]
        ids: list[int] = []
        at = 0
        while at < len(spelled):
            longest = range(min(self._longest, len(spelled) - at), 0, -1)
            piece = next((spelled[at : at + n] for n in longest if self._text(spelled[at : at + n])), spelled[at])
            ids += self._spell(piece, text)
            at += len(piece)
        return ids

    def _merged(self, run: str) -> list[str]:
        """The pieces of a run of letters: the two neighbours whose piece stands first become one, again and again."""
        pieces = list(run)
        while len(pieces) > 1:
            ranks = [self._ids.get(a + b, self.size) for a, b in pairwise(pieces)]
            best = min(ranks)
            if best == self.size:
                break
            at = ranks.index(best)
            pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
        return pieces

    def letters(self, text: str) -> list[int]:
        """Text -> ids of its letters and of the marks before words; InputError for one that is no piece."""
        if self.lexicon is not None:
            return self.encode(text)
        return [i for letter in self._spelled(text) for i in self._spell(letter, text)]

    def sample(self, text: str, seed: int | str, *, alpha: float = 0.2, best: int = 64) -> list[int]:
        """Text -> ids of one of its `best` spellings, by chance: p(x)^alpha, normalised (arXiv 1804.10959, 3.2).

        A pure function of its arguments. InputError where the pieces are not those of a unigram model.
        """
        try:
            found = self._backend.nbest_encode_as_pieces(plain(text), best) if self.model is not None else []
        except RuntimeError:  # of BPE, which has no probabilities
            found = []
        if not found:
            raise InputError("only the pieces of a SentencePiece unigram model can be sampled")
        backend = self._backend
        scores = [sum(backend.get_score(backend.piece_to_id(piece)) for piece in pieces) for pieces in found]
        weights = [exp(alpha * (score - max(scores))) for score in scores]
        return [self._id(piece, text) for piece in random.Random(seed).choices(found, weights)[0]]

    def _spelled(self, text: str) -> str:
        """The letters of a text; every word begins with the mark, or words have spaces between them."""
        words = text.split()
        return "".join(self.space + word for word in words) if self._marked else self.space.join(words)

    @property
    def _marked(self) -> bool:
        """The first word begins as all others do."""
        return self.space == MARK or bool(self._bytes)

    def _spell(self, piece: str, text: str) -> list[int]:
        """A piece, or a letter that may be none, in `text`."""
        if not self._bytes or self._text(piece) or "\ud800" <= piece <= "\udfff":
            return [self._id(piece, text)]
        return [self._ids[BYTES[byte]] for byte in (" " if piece == self.space else piece).encode()]

    def _text(self, piece: str) -> bool:
        """It is a piece, and neither a special one nor a byte."""
        i = self._ids.get(piece, 0)
        return i not in self.special and i not in self._bytes

    def _id(self, piece: str, text: str) -> int:
        """Of a piece in `text`."""
        i = self._ids.get(piece, 0)
        if i not in self.special:
            return i
        if self.unknown is None:
            raise InputError(f"{piece!r} of {text!r} is not in the vocabulary of {self.size} pieces")
        return self.unknown

    def decode(self, ids: Sequence[int]) -> str:
        """Ids -> text. `<blank>` and `<sos/eos>` spell nothing; bytes that are no UTF-8 are U+FFFD."""
        if self._bytes:
            spelled = b"".join(self._utf8[i] for i in ids).decode(errors="replace")
            return " ".join(spelled.split())
        spelled = "".join(self._said[i] for i in ids)
        return " ".join((spelled.replace(self.space, " ") if self.space else spelled).split())

    @cached_property
    def _said(self) -> tuple[str, ...]:
        """What each id spells. With a lexicon, `<unk>` is a word."""
        unknown = MARK + UNKNOWN if self.lexicon is not None else UNKNOWN
        own = {0: "", self.end: "", self.unknown: unknown}
        return tuple(own.get(i, piece) for i, piece in enumerate(self.pieces))

    @cached_property
    def _utf8(self) -> tuple[bytes, ...]:
        """What each id spells, in bytes."""
        return tuple(
            bytes([self._bytes[i]]) if i in self._bytes else said.replace(self.space, " ").encode(errors="replace")
            for i, said in enumerate(self._said)
        )

    @cached_property
    def begins(self) -> tuple[bool, ...]:
        """For every id: a word begins with it, because its first letter is a space."""
        return tuple(
            self._bytes[i] == ord(" ") if i in self._bytes else said != "" and said.startswith(self.space)
            for i, said in enumerate(self._said)
        )

    def words(self, ids: Sequence[int], *, spaceless: bool = False) -> list[int]:
        """How many tokens each word has; they add up to all. Without spaces (or `spaceless`) every piece is a word.

        A word begins with a piece whose first letter is a space. Bytes of one character stay together, and so do a
        space that is a piece of its own and what follows it.
        """
        sizes: list[int] = []
        for before, i in zip([0, *ids], ids, strict=False):
            alone = spaceless and i not in (0, self.end) and before not in self.spaces
            inside = self._bytes.get(i, 0) & 0xC0 == 0x80
            if self.begins[i] or (alone and not inside) or not sizes:
                sizes.append(1)
            else:
                sizes[-1] += 1
        return sizes

    def save(self, folder: Path) -> None:
        """Write `tokens.txt` (a piece and its id a line), and the SentencePiece model and the lexicon, if any.

        `merges.txt` says that the pieces are ranked.

        Those of another vocabulary that was there go.
        """
        folder.mkdir(parents=True, exist_ok=True)
        lines = [f"{piece} {i}\n" for i, piece in enumerate(self.pieces)]
        (folder / LIST).write_text("".join(lines), encoding="utf-8", newline="\n")
        if self.model is not None and self.model.resolve() != (folder / BACKEND).resolve():
            shutil.copyfile(self.model, folder / BACKEND)
        if self.model is None:
            (folder / BACKEND).unlink(missing_ok=True)
        if self.ranked:
            (folder / MERGES).write_text(RANKED, encoding="utf-8", newline="\n")
        else:
            (folder / MERGES).unlink(missing_ok=True)
        if self.lexicon is not None:
            self.lexicon.save(folder / LEXICON)
        else:
            (folder / LEXICON).unlink(missing_ok=True)

    @classmethod
    def load(cls, folder: Path) -> Pieces:
        """What `save` wrote, or any `tokens.txt` of lines that are a piece and its id, or a piece alone.

        ModelError when there is none, or when the ids are not 0, 1, 2, ... in order.
        """
        path = folder / LIST
        try:
            lines = path.read_bytes().decode("utf-8").removesuffix("\n").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"{path}: cannot be read ({error})") from error
        lines = [line.removesuffix("\r") for line in lines]
        parts = [line.rpartition(" ") for line in lines]
        if all(piece and number.isdecimal() for piece, _, number in parts):
            for i, (_, _, number) in enumerate(parts):
                if int(number) != i:
                    raise ModelError(f"{path}, line {i + 1}: the id of {lines[i]!r} is not {i}")
            lines = [piece for piece, _, _ in parts]
        return cls(
            lines, model=folder / BACKEND if (folder / BACKEND).exists() else None,
            lexicon=Lexicon.load(folder / LEXICON) if (folder / LEXICON).exists() else None,
            ranked=ranked(folder),
        )  # fmt: skip


def ranked(folder: Path) -> bool:
    """The pieces stand in the order in which they were found. ModelError for a file that says something else."""
    path = folder / MERGES
    if not path.exists():
        return False
    if path.read_bytes()[: len(RANKED) + 9].decode(errors="replace").replace("\r", "") != RANKED:
        raise ModelError(f"{path}: wanted the line {RANKED.strip()!r} alone")
    return True


def plain(text: str) -> str:
    """Words with a space between them, and "?" for half a surrogate pair, which no UTF-8 can spell."""
    return " ".join(text.split()).encode(errors="replace").decode()


class Encodes(Protocol):
    """A tokenizer. One with an id `unknown` gives it for what it cannot spell; others raise an error."""

    def encode(self, text: str) -> list[int]: ...


class Phrase(NamedTuple):
    """What a user wrote, and the token sequences that spell it."""

    text: str
    spellings: tuple[tuple[int, ...], ...]


def spelled(lines: Sequence[str], tokenizer: Encodes, *, spaceless: bool = False) -> list[Phrase]:
    """Plain text -> tokens, as at the beginning of a text, as behind a space, and of `Pieces` letter by letter.

    A model need not spell a rare word with the longest pieces. Where the vocabulary cannot spell a phrase as it is
    written, in lower case; else in upper case. Bytes spell everything, also what is never said: all three then.
    In `spaceless` text no mark is said before a phrase: it goes, where it is a piece. InputError naming the phrases
    that cannot be spelled at all.
    """
    if isinstance(lines, str):
        raise InputError(f"phrases are a list of texts, not one text ({lines[:40]!r})")
    by_letter = tokenizer.letters if isinstance(tokenizer, Pieces) else tokenizer.encode

    def encoded(text: str, encode: Callable[[str], list[int]] = tokenizer.encode) -> tuple[int, ...]:
        try:
            tokens = tuple(encode(text))
        except (SpeechAttnError, ValueError):
            return ()
        marked = spaceless and len(tokens) > 1 and tokens[0] in getattr(tokenizer, "spaces", ())
        return () if getattr(tokenizer, "unknown", None) in tokens else tokens[marked:]

    found = []
    for line in lines:
        text = " ".join(line.split())
        forms = [
            {encoded(form), encoded(f" {form}"), encoded(form, by_letter)} - {()}
            for form in (text, text.lower(), text.upper())
            if text and encoded(form)
        ]
        known = {*chain(*forms)} if getattr(tokenizer, "bytewise", False) else next(filter(None, forms), set())
        found.append(Phrase(line, tuple(sorted(known))))
    if wrong := [phrase.text for phrase in found if not phrase.spellings]:
        raise InputError(f"phrases that the model's vocabulary cannot spell: {', '.join(map(repr, wrong))}")
    return found
