"""The tokens of a language model of Hugging Face: what `Pieces` offers, over a `tokenizer.json`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from speechattn.errors import InputError, ModelError
from speechattn.text.pieces import LIST, MARK, Pieces, plain

__all__ = ["HuggingFaceTokens", "load_tokenizer"]

TOKENIZER, SETTINGS = "tokenizer.json", "tokenizer_config.json"
BYTE_SPACE = "Ġ"  # a space in GPT-2's spelling of bytes


class HuggingFaceTokens:
    """Ids of the tokens of a `tokenizer.json`, of which `end` ends a text. Nothing is put around a text.

    `size` ids in all, where a model has room for more than there are (None: as many as there are); those above spell
    nothing. Law: `decode` gives a text back, up to spaces, where the normaliser changes nothing and none is `unknown`.
    InputError without such a token, ModelError for a file that is no tokenizer.
    """

    lexicon = None

    def __init__(self, path: Path, end: str, *, size: int | None = None) -> None:
        from tokenizers import Tokenizer

        try:
            self.backend = Tokenizer.from_file(str(path))
            said: dict[str, Any] = json.loads(self.backend.to_str())
        except Exception as error:
            raise ModelError(f"{path}: cannot be read as a tokenizer ({str(error)[:200]})") from error
        known = self.backend.get_vocab(with_added_tokens=True)
        least = max(known.values()) + 1
        self.size = least if size is None else size
        if self.size < least:
            raise InputError(f"{path}: {least} tokens: they are no part of {self.size}")
        if end not in known:
            raise InputError(f"{path}: no token {end!r} to end a text")
        self.end: int = known[end]
        named = {i: piece for piece, i in known.items()}
        self.pieces = tuple(named.get(i, "") for i in range(self.size))
        self.unknown: int | None = known.get(said["model"].get("unk_token") or "")
        added = {token["id"] for token in said["added_tokens"] if token["special"]}
        unused = {i for i, piece in enumerate(self.pieces) if not piece}
        self.special = {*added, *unused, self.end} | ({self.unknown} - {None})
        marks = {mark: sum(piece.startswith(mark) for piece in known) for mark in (MARK, BYTE_SPACE)}
        self.space = max(marks, key=lambda mark: marks[mark]) if any(marks.values()) else ""
        self.spaces = {i for i, piece in enumerate(self.pieces) if piece and piece == self.space}
        self.bytewise = bool(said["model"].get("byte_fallback")) or self.space == BYTE_SPACE

    def encode(self, text: str) -> list[int]:
        """Text -> ids, without special tokens. What no token spells is `unknown`."""
        return list(self.backend.encode(plain(text), add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Ids -> text; special tokens spell nothing, bytes that are no UTF-8 are U+FFFD."""
        said: str = self.backend.decode([i for i in ids if i not in self.special], skip_special_tokens=True)
        return " ".join(said.split())

    @cached_property
    def begins(self) -> tuple[bool, ...]:
        """For every id: a word begins with it, because its first letter is a space."""
        return tuple(
            bool(self.space) and i not in self.special and piece.startswith(self.space)
            for i, piece in enumerate(self.pieces)
        )

    def words(self, ids: Sequence[int], *, spaceless: bool = False) -> list[int]:
        """How many tokens each word has; they add up to all. Without spaces (or `spaceless`) every token is a word.

        Bytes of one character stay together, and so do a space that is a token of its own and what follows it.
        """
        sizes: list[int] = []
        alone = spaceless or not self.space
        for at, i in enumerate(ids):
            said = ids[at - sizes[-1] : at] if sizes else []
            whole = alone and i not in self.special and not {*said} <= self.spaces and "\ufffd" not in self.decode(said)
            if not sizes or self.begins[i] or whole:
                sizes.append(1)
            else:
                sizes[-1] += 1
        return sizes

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` and, in `tokenizer_config.json`, which token ends a text and how many there are.

        A `tokens.txt` of another vocabulary that was there goes.
        """
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LIST).unlink(missing_ok=True)
        self.backend.save(str(folder / TOKENIZER))
        said = {"eos_token": self.pieces[self.end], "vocab_size": self.size}
        (folder / SETTINGS).write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> HuggingFaceTokens:
        """What `save` wrote, or a folder of Hugging Face that says which token is its end."""
        path = folder / SETTINGS
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
            end = said.get("eos_token")
        except (OSError, ValueError, AttributeError) as error:
            raise ModelError(f"{path}: cannot be read ({error})") from error
        end = end.get("content") if isinstance(end, dict) else end
        if not isinstance(end, str):
            raise ModelError(f"{path}: says no eos_token, which ends a text")
        return cls(folder / TOKENIZER, end, size=said.get("vocab_size"))


def load_tokenizer(folder: Path) -> Pieces:
    """The tokenizer of a folder: ours where it has a `tokens.txt`, else that of its `tokenizer.json`.

    ModelError where it has neither, or one that cannot be read.
    """
    if (folder / TOKENIZER).is_file() and not (folder / LIST).is_file():
        return HuggingFaceTokens.load(folder)  # type: ignore[return-value] # which offers the same
    return Pieces.load(folder)
