"""Training of what retrieves terms: the encoder is frozen, and what it says of each utterance is kept."""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim import AdamW

from speechattn.data.batch import Batch
from speechattn.errors import InputError
from speechattn.model import Recognizer, load_model
from speechattn.model.matcher import save_matcher
from speechattn.score.terms import recall_at
from speechattn.task.base import Task, seeded
from speechattn.task.checkpoint import FORMAT
from speechattn.task.kept import Kept
from speechattn.terms import (
    Bank,
    Retriever,
    Term,
    VectorIndex,
    calibration,
    contrastive,
    in_batch,
    presence_loss,
    read_terms,
)

__all__ = ["Curriculum", "TermRetrieval", "said_in", "worded"]

SHORT = 4  # letters of the words that are terms in the first stages


def worded(text: str) -> str:
    """Words in lower case with a space between them, letters and apostrophes alone."""
    return " ".join(re.findall(r"[a-z]+(?:'[a-z]+)*", text.lower()))


def said_in(term: str, text: str) -> bool:
    """A term is a part of a text, word by word; both are `worded`."""
    return f" {term} " in f" {text} "


@dataclass(frozen=True)
class Curriculum:
    """What is a term in which step (arXiv 2508.18701): the first `words` steps single words, the next `phrases` spans
    of 2 to 4 words around one, and then the words of a list and as many others. `each` utterance has so many.
    """

    words: int
    phrases: int
    each: int = 6

    def terms(self, text: str, step: int, rare: frozenset[str], lots: random.Random) -> list[str]:
        """Of a `worded` text, none twice."""
        words = text.split()
        long = [i for i, word in enumerate(words) if len(word) >= SHORT] or [*range(len(words))]
        chosen = lots.sample(long, min(self.each, len(long)))
        if step < self.words:
            return [*dict.fromkeys(words[i] for i in chosen)]
        if step < self.words + self.phrases:
            return [*dict.fromkeys(self.span(words, i, lots) for i in chosen)]
        listed = [word for word in dict.fromkeys(words) if word in rare]
        return [*dict.fromkeys([*listed, *(words[i] for i in chosen[: max(1, len(listed))])])]

    @staticmethod
    def span(words: Sequence[str], i: int, lots: random.Random) -> str:
        """2 to 4 words with word i among them, as far as there are any."""
        size = lots.randint(2, 4)
        first = max(0, i - lots.randint(0, size - 1))
        return " ".join(words[first : first + size])


class TermRetrieval(Task):
    """Trains a `matcher` (`Retriever` or `VectorIndex`) on frames of the frozen encoder of the model `encoder`.

    `terms` is a text file of those that the last stage of the `curriculum` asks for, `bank` one that validation
    retrieves from. Terms of a batch are one another's negatives, cut to `most`; a term that another utterance happens
    to say is a positive there, too. The loss of a retriever is `presence_loss` of its odds, and with the weight
    `contrast` `contrastive` of them: that is what queries and keys meet by, which a speech language model has brought
    into one space before (arXiv 2508.18701, frozen projector). For the first `align` steps both are of `alike` instead.
    An index learns by `contrastive` alone. `prior` is the log-odds of presence, whatever is heard, before anything is
    learnt: most pairs are of a term that was not said (arXiv 2303.15343). What the encoder says is computed once, into
    the folder `keep`; the trained matcher is written beside the log, and what a retriever's odds are there is a
    probability on the validation sets (`calibration`).
    """

    def __init__(
        self, matcher: nn.Module, encoder: str, terms: str, bank: str, keep: str, curriculum: Curriculum, *,
        align: int = 0, contrast: float = 0.0, most: int = 100, smoothing: float = 0.1, prior: float = 0.0,
        optimizer: OptimizerCallable = AdamW, scheduler: LRSchedulerCallable | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(optimizer=optimizer, scheduler=scheduler, seed=seed)
        if not isinstance(matcher, Retriever | VectorIndex):
            raise ValueError(f"matcher {type(matcher).__name__}: wanted a Retriever or a VectorIndex")
        if align < 0 or most < 1 or not 0 <= smoothing < 1 or not contrast >= 0:
            raise ValueError(f"align {align}, most {most}, smoothing {smoothing}, contrast {contrast}: out of range")
        if isinstance(matcher, Retriever):
            matcher.calibrate(1.0, prior)
        elif align or contrast or prior:
            raise ValueError("align, contrast, prior: not with an index, which learns by contrast alone")
        self.model, self.encoder = matcher, encoder
        self.rare = frozenset(worded(term.source) for term in read_terms(terms))
        self.bank = [worded(term.source) for term in read_terms(bank)]
        self.curriculum, self.align, self.contrast = curriculum, align, contrast
        self.most, self.smoothing = most, smoothing
        model = load_model(encoder)
        if not isinstance(model, Recognizer):
            raise ValueError(f"encoder {encoder}: wanted a recogniser that streams; {type(model).__name__} is none")
        self.kept = (Kept(Path(keep), model),)  # in a tuple: no part of the task's weights
        self.found: dict[str, list[float]] = {}

    @property
    def parts(self) -> Mapping[str, nn.Module]:
        """The matcher."""
        return {"matcher": self.model}

    @property
    def monitor(self) -> tuple[str, str]:
        """Recall@10 of the first validation set."""
        return "valid/recall@10", "max"

    def setup(self, stage: str) -> None:
        """Texts need not be spelled; sound must be the same in every epoch."""
        self.kept[0].fit(getattr(self.trainer, "datamodule", None))

    def init_from(self, path: Path, plugins: Any = ()) -> None:
        """No other training to go on from."""
        raise InputError("init_from: a matcher of terms is trained from the beginning; --resume goes on")

    def loss(self, batch: Batch, step: int) -> Tensor:
        """Of one step."""
        lots = random.Random(seeded(self.seed, step, 0))
        texts = [worded(text) for text in batch.texts]
        said = [self.curriculum.terms(text, step, self.rare, lots) if text else [] for text in texts]
        generator = torch.Generator().manual_seed(seeded(self.seed, step, 1))
        terms, _ = in_batch(said, self.most, generator)
        label = self.label(terms, batch.texts)
        x = self.kept[0](batch).frames
        bank = self.model.embed(terms)
        if isinstance(self.model, VectorIndex):
            return contrastive(self.model.odds(x, bank), label)
        heard = self.model.frames(x)
        odds = self.model.alike(heard, bank) if step < self.align else self.model.present(heard, bank)
        return presence_loss(odds, label, self.smoothing) + self.contrast * contrastive(odds, label)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of the batch."""
        loss = self.loss(batch, self.begun - 1)
        self.watch(loss.detach(), batch.ids)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(batch))
        return loss

    def on_validation_epoch_start(self) -> None:
        """Embed the bank, and count anew."""
        self.found = {}
        self.whole = Bank(self.model, [Term(term) for term in self.bank])

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Recall of the terms of the bank that were said."""
        odds = self.whole.odds(self.kept[0](batch).frames)
        gold = [row.nonzero()[:, 0].tolist() for row in self.label(self.bank, batch.texts)]
        for k in (1, 10, 50):
            self.found.setdefault(f"valid/recall@{k}", []).extend(recall_at(odds, gold, k))

    def on_validation_epoch_end(self) -> None:
        """Means over utterances."""
        for name, values in self.found.items():
            self.log(name, sum(values) / max(1, len(values)), prog_bar=name.endswith("@10"))

    def on_train_end(self) -> None:
        """Write the folder of the matcher."""
        super().on_train_end()
        if self.config is not None:
            folder = Path(self.trainer.default_root_dir) / "model"
            save_matcher(self.calibrated(), self.config["matcher"], self.encoder, folder)

    @torch.no_grad()
    def calibrated(self) -> Retriever | VectorIndex:
        """The matcher whose odds are probabilities on the validation sets; as it is, if it is an index."""
        matcher: Retriever | VectorIndex = deepcopy(self.model).eval()
        if not isinstance(matcher, Retriever):
            return matcher
        bank, odds, label = Bank(matcher, [Term(term) for term in self.bank]), [], []
        for batch in (batch for loader in self.trainer.val_dataloaders or [] for batch in loader):
            odds.append(bank.odds(self.kept[0](batch.to(self.device)).frames))
            label.append(self.label(self.bank, batch.texts))
        if not label or not torch.cat(label).any():
            warnings.warn("no term of the bank is said in a validation set: odds are as they were learnt", stacklevel=2)
            return matcher
        matcher.calibrate(*calibration(torch.cat(odds), torch.cat(label)))
        return matcher

    def label(self, terms: Sequence[str], texts: Sequence[str]) -> Tensor:
        """Which terms the texts say [B, N]."""
        spoken = [worded(text) for text in texts]
        return torch.tensor([[said_in(term, text) for term in terms] for text in spoken], device=self.device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A checkpoint knows its place in the training; it has no tokens."""
        self.look()
        score = self.trainer.callback_metrics.get(self.monitor[0])
        checkpoint["speechattn"] = {
            "format": FORMAT, "config": None, "files": {}, "batches": self.begun,
            "score": None if score is None else float(score), "mode": self.monitor[1],
        }  # fmt: skip
