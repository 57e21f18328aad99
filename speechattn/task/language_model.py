"""Training of a language model: texts -> weights that a search can weigh."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim import AdamW

from speechattn.errors import InputError, ModelError
from speechattn.model.folder import build_language_model, load_language_model, save_language_model
from speechattn.search.language_model import LanguageModel as Network
from speechattn.task.base import Task
from speechattn.task.checkpoint import about_of, average, tokenizer_of, unpacked, weights_of
from speechattn.task.tally import Tally, TextTally
from speechattn.text.pieces import Pieces

__all__ = ["LanguageModel", "Texts", "export_language_model"]


class Texts(Protocol):
    """A batch, as far as it matters here."""

    @property
    def texts(self) -> Sequence[str]:
        """Sentences."""


class LanguageModel(Task):
    """Trains `network` on the texts of batches, in tokens of the folder `tokenizer`, whose last one ends a text.

    The loss is minus the log-probability for each token of the global batch, ends included. Validation gives
    `perplexity` for each token and `perplexity_word` for each word, ends included in both: the second one compares
    models of different tokens.
    """

    def __init__(
        self, network: Network, tokenizer: str, *, optimizer: OptimizerCallable = AdamW,
        scheduler: LRSchedulerCallable | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(optimizer=optimizer, scheduler=scheduler, seed=seed)
        self.model, self.tokenizer = network, tokenizer_of(tokenizer)
        fitting(network, self.tokenizer.size, self.tokenizer.end, tokenizer)

    @property
    def spelling(self) -> Pieces:
        """The tokens of the model."""
        return self.tokenizer

    @property
    def parts(self) -> Mapping[str, nn.Module]:
        """The network."""
        return {"network": self.model}

    def tally(self) -> Tally:
        """Perplexities."""
        return TextTally()

    def init_from(self, path: Path, plugins: Sequence[str] = ()) -> None:
        """Start with the weights of a language model's folder or checkpoint; InputError where they do not fit."""
        theirs = load_language_model(path, plugins)[0].state_dict() if path.is_dir() else weights_of(path, plugins)
        try:
            self.model.load_state_dict(theirs)
        except RuntimeError as error:
            raise InputError(f"{path}: another language model ({str(error)[:300]})") from error

    def surprise(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Minus the log-probability of each text [B], and how many tokens it has, the end included [B]."""
        if not texts:
            return torch.zeros(0, device=self.device), torch.zeros(0, dtype=torch.long, device=self.device)
        rows = [torch.tensor(self.tokenizer.encode(text), dtype=torch.long) for text in texts]
        tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])
        found: tuple[Tensor, Tensor] = self.model.surprise(tokens.to(self.device), lengths.to(self.device))
        return found

    def training_step(self, batch: Texts, batch_idx: int) -> Tensor:
        """The loss for each token; gradients are averaged over processes, so their number is in it."""
        cost, tokens = self.surprise(batch.texts)
        loss = cost.sum() / self.mean(tokens.sum())
        shown = self.mean(loss.detach())
        self.watch(shown, getattr(batch, "ids", ()))
        self.log("train/loss", shown, prog_bar=True, batch_size=len(batch.texts))
        return loss

    def validation_step(self, batch: Texts, batch_idx: int, dataloader_idx: int = 0) -> None:
        """What the texts cost, for each token and for each word."""
        tally = self.counted(dataloader_idx)
        cost, tokens = self.surprise(batch.texts)
        total = float(cost.double().sum())
        tally.add("perplexity", total, int(tokens.sum()))
        tally.add("perplexity_word", total, sum(len(text.split()) + 1 for text in batch.texts))


def fitting(network: Network, size: int, end: int | None, where: str) -> None:
    """ModelError where the tokens are not those of the network."""
    if (network.vocab, network.end) != (size, end):
        theirs = f"{network.vocab}, of which {network.end} is the end"
        raise ModelError(f"{where}: {size} tokens, of which {end} is the end; the language model has {theirs}")


def export_language_model(
    paths: Sequence[Path], folder: Path, plugins: Sequence[str] = (), *, ema: bool | None = None
) -> Network:  # fmt: skip
    """Write the language model of a checkpoint, or the average of several, as a folder; returns it.

    `ema` as in `weights_of`. InputError for what is no such checkpoint; ModelError where its model cannot be made.
    """
    if not paths:
        raise InputError("no checkpoint was given")
    about = about_of(paths[-1])
    network = build_language_model(about["config"], where=str(paths[-1]), plugins=plugins)
    try:
        network.load_state_dict(average([weights_of(path, plugins, ema=ema) for path in paths]))
    except RuntimeError as error:
        raise InputError(f"{paths[-1]}: its weights do not fit its configuration ({str(error)[:300]})") from error
    network.eval().requires_grad_(False)
    save_language_model(network, about["config"], unpacked(about, folder), folder, plugins)
    return network
