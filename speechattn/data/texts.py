"""Text files -> batches of texts, for language models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from lightning.pytorch import LightningDataModule

from speechattn.data.corpus import Paths, named, repeated
from speechattn.data.loader import SILENCE, Broken, Check, Loader, progress
from speechattn.data.plan import Indices, Plan
from speechattn.errors import InputError
from speechattn.text.normal import normaliser

__all__ = ["TextBatch", "TextCorpus", "Texts"]


class TextBatch:
    """Texts and their ids (`FILE:LINE`). Not to be changed."""

    __slots__ = ("ids", "texts")

    def __init__(self, *, texts: tuple[str, ...], ids: tuple[str, ...]) -> None:
        self.texts, self.ids = texts, ids

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Texts:
    """Normalised texts, with ids."""

    texts: tuple[str, ...]
    ids: tuple[str, ...]
    check: Check | None = None

    @property
    def sizes(self) -> np.ndarray:
        """Characters and an end, of each."""
        return np.array([len(text) + 1 for text in self.texts], np.float64)

    def batch(self, rows: Indices, epoch: int) -> tuple[TextBatch, list[Broken]]:
        """The rows, but for those that cannot be spelled; nothing at all is a text without words."""
        whole, broken = list[int](), list[Broken]()
        for i in rows:
            try:
                if self.check is not None:
                    self.check(self.texts[i], None)
                whole.append(i)
            except InputError as error:
                broken.append(Broken(self.ids[i], str(error)))
        if not whole:
            return TextBatch(texts=("",), ids=(SILENCE,)), broken
        return TextBatch(texts=tuple(self.texts[i] for i in whole), ids=tuple(self.ids[i] for i in whole)), broken

    @classmethod
    def read(cls, paths: Mapping[Path, int], *, normalise: str = "none", longest: int | None = None) -> Texts:
        """The lines of UTF-8 files, each file as often as it says; a line longer than `longest` is cut between words.

        Lines that are empty when normalised are left out. InputError for a file that is missing or not UTF-8.
        """
        clean, texts, ids = normaliser(normalise), list[str](), list[str]()
        for path, times in paths.items():
            try:
                lines = path.read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(f"{path}: not a UTF-8 text file that can be read ({error})") from error
            pieces = [(piece, n) for n, line in enumerate(lines, 1) for piece in cut(clean(line), longest)]
            texts += [piece for piece, _ in pieces] * times
            ids += [f"{path.name}:{n}" for _, n in pieces] * times
        if not texts:
            raise InputError(f"no text in {', '.join(map(str, paths)) or 'no file'}")
        return cls(tuple(texts), tuple(ids))


def cut(text: str, longest: int | None) -> list[str]:
    """A text in pieces of at most `longest` characters, between words where there is a space in time."""
    pieces = []
    while longest is not None and len(text) > longest:
        at = text.rfind(" ", 1, longest + 1)
        at = at if at > 0 else longest
        pieces.append(text[:at].rstrip())
        text = text[at:].lstrip()
    return [*pieces, text] if text else pieces


class TextCorpus(LightningDataModule):
    """Batches of up to `max_characters` of padded text for each device; `train`, `valid` and `test` are text files.

    One text a line, which passes the text normaliser `normalise`; longer ones than `longest` characters are cut
    between words. The laws of `Corpus` hold: the batches of an epoch are a function of (files, seed, epoch), each text
    is in one of them, each device has equally many, and a checkpoint goes on with the next one.
    """

    def __init__(
        self, train: Sequence[str | Path] | Mapping[str, int] = (), valid: Paths = (), test: Paths = (), *,
        max_characters: int = 10000, longest: int = 1000, normalise: str = "none", workers: int = 0, seed: int = 0,
        shares: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.train_paths, self.valid_paths, self.test_paths = repeated(train), named(valid), named(test)
        self.max_characters, self.longest, self.normalise = max_characters, longest, normalise
        self.workers, self.seed, self.shares = workers, seed, shares
        self.check: Check | None = None

    @property
    def valid_names(self) -> tuple[str, ...]:
        """Names of the validation sets, in the order of the data loaders."""
        return tuple(self.valid_paths)

    def setup(self, stage: str) -> None:
        """Without `valid` nothing is validated."""
        if self.trainer is not None and not self.valid_paths:
            self.trainer.limit_val_batches = 0

    def train_dataloader(self) -> Loader[TextBatch]:
        """Epoch after epoch, from where the checkpoint says."""
        return self.loader(self.train_paths, self.seed)

    def val_dataloader(self) -> list[Loader[TextBatch]]:
        """One for each of `valid`."""
        return [self.loader({path: 1}, None) for path in self.valid_paths.values()]

    def test_dataloader(self) -> list[Loader[TextBatch]]:
        """One for each of `test`."""
        return [self.loader({path: 1}, None) for path in self.test_paths.values()]

    def loader(self, paths: Mapping[Path, int], seed: int | None) -> Loader[TextBatch]:
        """The share of this device; shuffled where there is a seed."""
        texts = Texts.read(paths, normalise=self.normalise, longest=self.longest)
        texts = replace(texts, check=self.check)
        world = self.trainer.world_size if self.trainer is not None else 1
        shares = (self.shares if seed is not None else None) or world
        plan = Plan(texts.sizes, self.max_characters, shares=shares, seed=seed)
        return Loader(
            texts, plan, rank=self.trainer.global_rank if self.trainer is not None else 0, world=world,
            workers=self.workers, done=progress(self.trainer, len(plan)) if seed is not None else None,
        )  # fmt: skip
