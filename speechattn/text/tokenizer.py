"""Byte-level BPE tokens of Whisper: ids to bytes, text to ids, and which tokens belong to one word."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from speechattn.errors import ModelError

__all__ = ["Tokenizer"]

# Languages written without spaces: there, every whole character may be committed on its own.
SPACELESS = frozenset({"zh", "ja", "th", "lo", "my", "yue"})


@cache
def byte_of_letter() -> dict[str, int]:
    """GPT-2's reversible spelling of bytes: printable ones stand for themselves, the rest for letters from 256 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


class Tokenizer:
    """The vocabulary of a `tokenizer.json`.

    Text tokens come before `<|endoftext|>`; everything from it on is special and never part of the text.
    """

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as Backend

        try:
            said = json.loads(path.read_text(encoding="utf-8"))
            vocabulary: dict[str, int] = said["model"]["vocab"]
            self.special = {entry["content"]: int(entry["id"]) for entry in said["added_tokens"]}
            self.backend = Backend.from_file(str(path))
        except Exception as error:
            raise ModelError(f"{path}: cannot be read as a tokenizer ({str(error)[:200]})") from error
        letters = byte_of_letter()
        self.end_of_text = self.id("<|endoftext|>")
        self.pieces = [b""] * self.end_of_text
        for piece, index in vocabulary.items():
            if index < self.end_of_text:
                self.pieces[index] = bytes(letters[letter] for letter in piece)

    @property
    def begins(self) -> list[bool]:
        """Which text tokens begin a word, as a space before it shows."""
        return [piece.startswith(b" ") for piece in self.pieces]

    def id(self, special: str) -> int:
        """Id of a special token; ModelError when the vocabulary lacks it."""
        if special not in self.special:
            raise ModelError(f"the vocabulary has no {special}")
        return self.special[special]

    @property
    def languages(self) -> dict[str, int]:
        """Language codes, in the order of their tokens."""
        first, last = self.id("<|startoftranscript|>"), self.special.get("<|translate|>", 0)
        return {name[2:-2]: i for name, i in self.special.items() if first < i < last}

    def prompt(self, language: str | None, task: str) -> list[int]:
        """Start of transcript, language and task for multilingual models, no timestamps."""
        tags = [] if language is None else [f"<|{language}|>", f"<|{task}|>"]
        return [self.id(name) for name in ["<|startoftranscript|>", *tags, "<|notimestamps|>"]]

    def encode(self, text: str) -> list[int]:
        """Text -> ids, without special tokens."""
        return list(self.backend.encode(text, add_special_tokens=False).ids)

    def bytes(self, tokens: Sequence[int]) -> bytes:
        """The bytes that text tokens spell; special tokens spell nothing."""
        return b"".join(self.pieces[t] for t in tokens if t < self.end_of_text)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of the tokens; an unfinished character at the end shows as U+FFFD."""
        return self.bytes(tokens).decode(errors="replace")

    def words(self, tokens: Sequence[int], *, spaceless: bool = False) -> list[int]:
        """How many tokens each word has; they add up to all tokens.

        A word starts at a space and keeps the punctuation behind it. Without spaces every whole character is one.
        """
        sizes: list[int] = []
        for token in tokens:
            piece = self.pieces[token]
            if spaceless:
                starts = not sizes or whole(self.bytes(tokens[sum(sizes) - sizes[-1] : sum(sizes)]))
            else:
                starts = not sizes or piece.startswith(b" ")
            if starts:
                sizes.append(1)
            else:
                sizes[-1] += 1
        return sizes

    def continuing(self) -> list[int]:
        """Ids whose text, put behind a word, makes another word of it: they begin with a letter or digit."""
        return [i for i, piece in enumerate(self.pieces) if piece[:1].isalnum() or piece[:1] >= b"\x80"]


def whole(text: bytes) -> bool:
    """No character is cut at the end."""
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True
