"""Training of a recogniser: sound and text -> weights; its validation decodes offline and streamed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import AdamW

from speechattn.attention.self_attention import Spanned, set_span
from speechattn.audio.augment import SpecAugment
from speechattn.audio.normal import GlobalCMVN
from speechattn.data.batch import Batch
from speechattn.encoder import Encoder
from speechattn.frames import Frames
from speechattn.model import Recognizer as Model
from speechattn.stream import Stream
from speechattn.task.checkpoint import packed, start_from, tokenizer_of
from speechattn.task.chunks import Spans
from speechattn.task.objectives import Heard, Objective, Said
from speechattn.task.tally import Tally, WordTally, streamed

__all__ = ["Recognizer"]

STATISTICS = 64  # batches from which mean and deviation of the features are estimated


class Recognizer(LightningModule):
    """Trains `heads` over `encoder` over `front_end`, each told by `objectives` what was said.

    The loss is the sum of weight * loss over objectives and utterances, divided by the tokens of the global batch: two
    processes do what one does with the same batch. The randomness of a step (dropout, SpecAugment, `spans`) comes from
    (`seed`, step, rank): a run that was killed and resumed goes on as if it had not been.

    Validation decodes with `search` offline and, in the blocks of the encoder's own span, streamed: `wer` and
    `wer_streamed`, and `cer` likewise. `tokenizer` is the folder of its `tokens.txt`.
    """

    def __init__(
        self, front_end: Stream, encoder: Encoder, heads: dict[str, nn.Module], tokenizer: str,
        objectives: list[Objective], *, sample_rate: int = 16000, language: str | None = None, spaceless: bool = False,
        augment: SpecAugment | None = None, spans: Spans | None = None, optimizer: OptimizerCallable = AdamW,
        scheduler: LRSchedulerCallable | None = None, search: str | None = None, beam_size: int = 1,
        streamed_batches: int | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.model = Model(
            front_end, encoder, heads, tokenizer_of(tokenizer),
            sample_rate=sample_rate, language=language, spaceless=spaceless,
        )  # fmt: skip
        self.objectives: Sequence[Objective] = nn.ModuleList(objectives)  # type: ignore[assignment]
        for objective in objectives:
            objective.fit(self.model)
        self.augment, self.spans = augment, spans
        self.optimizer, self.scheduler = optimizer, scheduler
        self.search, self.beam_size, self.streamed_batches, self.seed = search, beam_size, streamed_batches, seed
        self.own_spans = [(module, module.span) for module in encoder.modules() if isinstance(module, Spanned)]
        self.tallies: dict[str, Tally] = {}
        self.config: dict[str, Any] | None = None  # of the model, where it was made from YAML

    def init_from(self, path: Path) -> None:
        """Start with the weights of a model folder or a checkpoint, as far as they fit."""
        if kept := start_from(self.model, path):
            rank_zero_warn(f"not in {path}, or of another shape, and so trained from the beginning: {', '.join(kept)}")

    def configure_optimizers(self) -> Any:
        """The optimizer, and its schedule step by step."""
        optimizer = self.optimizer([p for p in self.parameters() if p.requires_grad])
        if self.scheduler is None:
            return optimizer
        schedule = self.scheduler(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_fit_start(self) -> None:
        """Features are normalised by statistics of the training data, unless they are known."""
        normal = next((m for m in self.model.front_end.modules() if isinstance(m, GlobalCMVN)), None)
        if normal is not None and not known(normal):
            self.estimate(normal)

    @torch.no_grad()
    def estimate(self, normal: GlobalCMVN) -> None:
        """Mean and deviation from the first batches, the same in all processes."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        batches = data.first(STATISTICS)
        found = GlobalCMVN.estimate(self.model.front_end(batch.sound.to(self.device)) for batch in batches)
        normal.load_state_dict(found.state_dict())

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed the step."""
        done = self.trainer.fit_loop.epoch_loop.total_batch_idx
        torch.manual_seed(hash((self.seed, done, self.global_rank)) % 2**63)
        if self.spans is not None:
            shared = torch.Generator().manual_seed(hash((self.seed, done)) % 2**63)  # all processes see alike
            set_span(self.model.encoder, self.spans.draw(shared))

    def hear(self, sound: Frames) -> Heard:
        """Samples [B, N] through front-end and encoder."""
        with torch.no_grad():
            features = self.model.front_end(sound)
        if self.augment is not None:
            features = self.augment(features)
        wanted = sorted({layer for objective in self.objectives for layer in objective.layers})
        encoder: Any = self.model.encoder
        if not wanted:
            return Heard(sound, features, encoder(features))
        frames, layers = encoder.intermediate(features, wanted)
        return Heard(sound, features, frames, dict(zip(wanted, layers, strict=True)))

    def tokens(self, texts: Sequence[str]) -> Said:
        """What should come out for these texts."""
        rows = [torch.tensor(self.model.tokenizer.encode(text), dtype=torch.long) for text in texts]
        tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])
        return Said(tokens.to(self.device), lengths.to(self.device))

    def tally(self) -> Tally:
        """What counts errors."""
        return WordTally()

    def said(self, batch: Batch) -> Said:
        """What the batch should give."""
        return self.tokens(batch.texts)

    def references(self, batch: Batch) -> tuple[str, ...]:
        """Texts that validation compares with."""
        return batch.texts

    def losses(self, batch: Batch) -> tuple[dict[str, Tensor], Said]:
        """Of each objective the loss of each utterance [B]."""
        said, heard = self.said(batch), self.hear(batch.sound)
        return {o.name: o.losses(self.model, heard, said) for o in self.objectives}, said

    def weighed(self, found: dict[str, Tensor], count: Tensor) -> Tensor:
        """The loss of a step, for each of `count` tokens."""
        weights = [o.weight for o in self.objectives]
        total = torch.stack([w * loss.sum() for w, loss in zip(weights, found.values(), strict=True)]).sum()
        return total / count

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of the batch for each token; gradients are averaged over processes, so their number is in it."""
        found, said = self.losses(batch)
        count = self.mean(said.lengths.sum())
        loss = self.weighed(found, count)
        shown = self.mean(torch.stack([loss.detach(), *(part.detach().sum() / count for part in found.values())]))
        self.log("train/loss", shown[0], prog_bar=True, batch_size=len(batch.ids))
        for name, value in zip(found, shown[1:], strict=True):
            self.log(f"train/{name}", value, batch_size=len(batch.ids))
        if self.scheduler is not None:
            self.log("train/lr", self.optimizers().param_groups[0]["lr"])  # type: ignore[union-attr]
        return loss

    def mean(self, x: Tensor) -> Tensor:
        """Over processes."""
        x = x.to(torch.float32)
        return x if self.trainer.world_size == 1 else self.trainer.strategy.reduce(x, reduce_op="mean")

    def on_validation_epoch_start(self) -> None:
        """The encoder's own span again: that is the one with which it will stream."""
        for module, span in self.own_spans:
            module.span = span
        self.tallies = {}

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Loss, and what is recognised."""
        name = self.trainer.datamodule.names[dataloader_idx]  # type: ignore[attr-defined]
        tally = self.tallies.setdefault(name, self.tally())
        found, said = self.losses(batch)
        tally.add("loss", float(self.weighed(found, torch.ones((), device=self.device))), int(said.lengths.sum()))
        search = self.model.search(self.search, beam_size=self.beam_size)
        frames = self.model.listening(batch.sound)
        tally.compare("", self.references(batch), self.texts(search.decode(frames)))
        few = self.streamed_batches
        if self.model.listening.plan().block is not None and (few is None or batch_idx < few):
            said_live = self.texts(streamed(self.model.listening, search, batch.sound))
            tally.compare("_streamed", self.references(batch), said_live)

    def texts(self, answers: Sequence[Sequence[Any]]) -> list[str]:
        """The best answer of each row as text."""
        return [self.model.tokenizer.decode(row[0].tokens) if row else "" for row in answers]

    def on_validation_epoch_end(self) -> None:
        """Log all; the bar shows both error rates of the first set."""
        for i, (name, tally) in enumerate(self.tallies.items()):
            for key, value in tally.result().items():
                place = f"valid/{key}" if i == 0 else f"valid/{name}/{key}"
                self.log(place, value, prog_bar=i == 0 and key.startswith(tally.shown))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A checkpoint knows its model and its tokens: `speechattn export` needs nothing else."""
        checkpoint["speechattn"] = packed(self.config, self.model.tokenizer)


def known(normal: GlobalCMVN) -> bool:
    """Statistics were estimated or loaded."""
    return bool((normal.mean != 0).any() or (normal.std != 1).any())
