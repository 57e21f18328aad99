"""Vocabularies of pieces: characters, or SentencePiece's subwords; and how phrases are spelled in them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from speechattn.errors import InputError, ModelError, SpeechAttnError

__all__ = ["Encodes", "Phrase", "Pieces", "spelled"]

BLANK, UNKNOWN, END = "<blank>", "<unk>", "<sos/eos>"
MARK = "▁"  # SentencePiece's space
LIST, BACKEND = "tokens.txt", "bpe.model"


class Pieces:
    """Ids of the pieces that text is put together from: id 0 is `<blank>`, the last one may be `<sos/eos>`.

    A piece that begins with "▁" (or with a space) begins a word; where no piece has either, text has no spaces.
    `encode` takes the longest piece that fits, again and again, or asks the SentencePiece `model` that made the
    pieces. Law: where it finds no `<unk>`, `decode` gives the text back, up to spaces: those at its ends go and several
    become one.
    """

    def __init__(self, pieces: Sequence[str], *, model: Path | None = None) -> None:
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
        self.model = model
        self._ids = {piece: i for i, piece in enumerate(pieces)}
        self.unknown = self._ids.get(UNKNOWN)
        self.end = self._ids.get(END)
        self.special = {i for i in (0, self.unknown, self.end) if i is not None}
        text = "".join(piece for i, piece in enumerate(pieces) if i not in self.special)
        self.space = MARK if MARK in text else " " if " " in text else ""
        self._longest = max(map(len, pieces))

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
        if self.model is not None:
            return [self._id(piece, text) for piece in self._backend.encode(text, out_type=str)]
        words = text.split()
        spelled = "".join(MARK + word for word in words) if self.space == MARK else self.space.join(words)
        ids: list[int] = []
        at = 0
        while at < len(spelled):
            longest = range(min(self._longest, len(spelled) - at), 0, -1)
            piece = next((spelled[at : at + n] for n in longest if self._text(spelled[at : at + n])), spelled[at])
            ids.append(self._id(piece, text))
            at += len(piece)
        return ids

    def letters(self, text: str) -> list[int]:
        """Text -> ids of its letters and of the marks before words; InputError for one that is no piece."""
        words = text.split()
        spelled = "".join(MARK + word for word in words) if self.space == MARK else self.space.join(words)
        return [self._id(letter, text) for letter in spelled]

    def _text(self, piece: str) -> bool:
        """It is a piece, and not a special one."""
        return self._ids.get(piece, 0) not in self.special

    def _id(self, piece: str, text: str) -> int:
        """Of a piece in `text`."""
        if self._text(piece):
            return self._ids[piece]
        if self.unknown is None:
            raise InputError(f"{piece!r} of {text!r} is not in the vocabulary of {self.size} pieces")
        return self.unknown

    def decode(self, ids: Sequence[int]) -> str:
        """Ids -> text. `<blank>` and `<sos/eos>` spell nothing."""
        spelled = "".join(self.pieces[i] for i in ids if i not in (0, self.end))
        return " ".join((spelled.replace(self.space, " ") if self.space else spelled).split())

    @cached_property
    def begins(self) -> tuple[bool, ...]:
        """For every id: a word begins with it, because its first letter is a space."""
        return tuple(i not in (0, self.end) and piece.startswith(self.space) for i, piece in enumerate(self.pieces))

    def words(self, ids: Sequence[int], *, spaceless: bool = False) -> list[int]:
        """How many tokens each word has; they add up to all. Without spaces (or `spaceless`) every piece is a word.

        A word begins with a piece whose first letter is a space.
        """
        sizes: list[int] = []
        for i in ids:
            begins = i not in (0, self.end) and self.pieces[i].startswith(self.space)
            if begins or not sizes:
                sizes.append(1)
            else:
                sizes[-1] += 1
        return sizes

    def save(self, folder: Path) -> None:
        """Write `tokens.txt` (a piece and its id a line) and the SentencePiece model, if there is one."""
        folder.mkdir(parents=True, exist_ok=True)
        lines = [f"{piece} {i}\n" for i, piece in enumerate(self.pieces)]
        (folder / LIST).write_text("".join(lines), encoding="utf-8", newline="\n")
        if self.model is not None and self.model.resolve() != (folder / BACKEND).resolve():
            shutil.copyfile(self.model, folder / BACKEND)

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
        return cls(lines, model=folder / BACKEND if (folder / BACKEND).exists() else None)


class Encodes(Protocol):
    """A tokenizer. One with an id `unknown` gives it for what it cannot spell; others raise an error."""

    def encode(self, text: str) -> list[int]: ...


class Phrase(NamedTuple):
    """What a user wrote, and the token sequences that spell it."""

    text: str
    spellings: tuple[tuple[int, ...], ...]


def spelled(lines: Sequence[str], tokenizer: Encodes) -> list[Phrase]:
    """Plain text -> tokens, as at the beginning of a text, as behind a space, and of `Pieces` letter by letter.

    A model need not spell a rare word with the longest pieces. Where the vocabulary cannot spell a phrase as it is
    written, in lower case; else in upper case. InputError naming the phrases that cannot be spelled at all.
    """

    if isinstance(lines, str):
        raise InputError(f"phrases are a list of texts, not one text ({lines[:40]!r})")
    by_letter = tokenizer.letters if isinstance(tokenizer, Pieces) else tokenizer.encode

    def encoded(text: str, encode: Callable[[str], list[int]] = tokenizer.encode) -> tuple[int, ...]:
        try:
            tokens = tuple(encode(text))
        except (SpeechAttnError, ValueError):
            return ()
        return () if getattr(tokenizer, "unknown", None) in tokens else tokens

    found = []
    for line in lines:
        text = " ".join(line.split())
        forms = (
            {encoded(form), encoded(f" {form}"), encoded(form, by_letter)} - {()}
            for form in (text, text.lower(), text.upper())
            if text and encoded(form)
        )
        found.append(Phrase(line, tuple(sorted(next(filter(None, forms), ())))))
    if wrong := [phrase.text for phrase in found if not phrase.spellings]:
        raise InputError(f"phrases that the model's vocabulary cannot spell: {', '.join(map(repr, wrong))}")
    return found
