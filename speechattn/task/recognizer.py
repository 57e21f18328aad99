"""Training of a recogniser: sound and text -> weights; its validation decodes offline and streamed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch import _dynamo as dynamo
from torch.optim import AdamW

from speechattn.attention.self_attention import Spanned, set_backend, set_span
from speechattn.audio.augment import SpecAugment
from speechattn.audio.clip import eyes
from speechattn.audio.normal import GlobalCMVN
from speechattn.data.batch import Batch
from speechattn.encoder import Encoder
from speechattn.errors import InputError
from speechattn.frames import Frames
from speechattn.model import Recognizer as Model
from speechattn.model.folder import try_out
from speechattn.pretrained.whisper.streaming import circle, turn
from speechattn.stream import Serial, Stream
from speechattn.task.base import Task, seeded
from speechattn.task.checkpoint import start_from, tokenizer_of
from speechattn.task.chunks import Spans
from speechattn.task.kept import Kept
from speechattn.task.objectives import Heard, Objective, Said
from speechattn.task.tally import Tally, WordTally, streamed
from speechattn.text.pieces import Pieces

__all__ = ["Recognizer"]

SPANS = 64  # with each of which the encoder may be compiled
STATISTICS = 64  # batches from which mean and deviation of the features are estimated


class Recognizer(Task):
    """Trains `heads` over `encoder` over `front_end`, each told by `objectives` what was said.

    The loss is the sum of weight * loss over objectives and utterances, divided by the tokens of the global batch: two
    processes do what one does with the same batch.

    Validation decodes with `search` offline and, in the blocks of the encoder's own span, streamed: `wer` and
    `wer_streamed`, and `cer` likewise. `tokenizer` is the folder of its `tokens.txt`, `backend` who computes attention.
    The `frozen` ones of `parts` stay as they are; `keep` is a folder for what a frozen encoder says of each utterance,
    as a live session hears it, so that it is computed once.
    """

    def __init__(
        self, front_end: Stream, encoder: Encoder, heads: dict[str, nn.Module], tokenizer: str,
        objectives: list[Objective], *, sample_rate: int = 16000, language: str | None = None,
        target_language: str | None = None, spaceless: bool = False,
        augment: SpecAugment | None = None, spans: Spans | None = None, optimizer: OptimizerCallable = AdamW,
        scheduler: LRSchedulerCallable | None = None, search: str | None = None, beam_size: int = 1,
        streamed_batches: int | None = None, seed: int = 0, compile: str | None = None, backend: str = "auto",
        frozen: Sequence[str] = (), keep: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(optimizer=optimizer, scheduler=scheduler, seed=seed)
        self.model = Model(
            front_end, encoder, heads, tokenizer_of(tokenizer),
            sample_rate=sample_rate, language=language, target_language=target_language, spaceless=spaceless,
        )  # fmt: skip
        try_out(self.model, "model")
        if backend != "auto":
            set_backend(self.model, backend)
        self.objectives: Sequence[Objective] = nn.ModuleList(objectives)  # type: ignore[assignment]
        names = [objective.name for objective in objectives]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"objectives {', '.join(names) or 'none'}: wanted some, each once")
        for objective in objectives:
            objective.fit(self.model)
        self.leave_idle(frozen)
        if augment is not None and eyes(front_end) is not None:
            raise ValueError("augment: not over sound and pictures side by side; Ears and Eyes have an `augment` each")
        self.augment, self.spans = augment, spans
        self.kept = Kept.of(keep, self, frozen) if keep is not None else None
        self.search, self.beam_size, self.streamed_batches = search, beam_size, streamed_batches
        self.compiler = compile
        self.model.search(search, beam_size=beam_size)  # says now what is wrong with it
        self.own_spans = [(module, module.span) for module in encoder.modules() if isinstance(module, Spanned)]
        if compile is not None and any(objective.layers for objective in objectives):
            raise ValueError(f"compile {compile}: not with an objective that looks inside the encoder")
        if compile is not None and encoder.revise:
            raise ValueError(f"compile {compile}: not with an encoder whose chunks are read again (revise)")
        if spans is not None and not self.own_spans:
            raise ValueError(f"spans: {type(encoder).__name__} has nothing that a span governs")
        if spans is not None:  # says now which span the encoder cannot honour, not in the step that draws it
            for span in {spans.draw(torch.Generator().manual_seed(seed)) for seed in range(100)}:
                set_span(encoder, span)
                if encoder.revise:
                    self.model.listening.plan()
            for module, own in self.own_spans:
                module.span = own

    @property
    def spelling(self) -> Pieces:
        """The tokens of the model."""
        tokenizer: Pieces = self.model.tokenizer
        return tokenizer

    @property
    def parts(self) -> Mapping[str, nn.Module]:
        """Encoder and heads."""
        return {"encoder": self.model.encoder, **self.model.heads}

    def leave_idle(self, frozen: Sequence[str]) -> None:
        """A head that no objective trains stays as it is, and the `frozen` parts."""
        if unknown := [name for name in frozen if name not in self.parts]:
            raise ValueError(f"frozen {', '.join(unknown)}: there are {', '.join(self.parts)}")
        self.frozen = tuple(frozen)
        for name in frozen:
            self.parts[name].requires_grad_(False).eval()
        told = {head for objective in self.objectives for head in objective.heads}
        idle = [name for name in self.model.heads if name not in told]
        for name in idle:
            self.model.heads[name].requires_grad_(False)
        if idle:
            rank_zero_warn(f"no objective trains the head {', '.join(idle)}: it stays as it is")

    def train(self, mode: bool = True) -> Recognizer:
        """What is frozen does nothing at random."""
        super().train(mode)
        for name in self.frozen:
            self.parts[name].eval()
        return self

    def init_from(self, path: Path, plugins: Sequence[str] = ()) -> None:
        """Start with the weights of a model folder or a checkpoint, as far as they fit."""
        if kept := start_from(self.model, path, plugins):
            parts = dict.fromkeys(".".join(name.split(".")[:2]) for name in kept)
            rank_zero_warn(f"not in {path}, or of another shape, and so trained from the beginning: {', '.join(parts)}")

    def setup(self, stage: str) -> None:
        """The front-end stays in float32, also where Lightning is about to round all weights to half precision."""
        super().setup(stage)
        data = getattr(self.trainer, "datamodule", None)
        if (rate := getattr(data, "rate", self.model.sample_rate)) != self.model.sample_rate:
            raise InputError(f"data.rate {rate}: the model hears {self.model.sample_rate} samples a second")
        sees, size = eyes(self.model.front_end), getattr(data, "video_size", None)
        if sees is not None and size is not None and getattr(data, "video", False) and size != sees.size:
            raise InputError(f"data.video_size {size}: the model sees pictures of {sees.size} x {sees.size} pixels")
        self.exact = {name: tensor.clone() for name, tensor in self.model.front_end.state_dict().items()}
        if self.kept is not None:
            self.kept.fit(data)

    def on_fit_start(self) -> None:
        """Features are normalised by statistics of the training data, unless they are known."""
        front = self.model.front_end.float()
        front.load_state_dict(self.exact)
        normal = next((m for m in front.modules() if isinstance(m, GlobalCMVN)), None)
        if normal is not None and not known(normal):
            self.estimate(normal)
        if self.compiler is not None:
            dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, SPANS)
            try:
                self.model.encoder.compile(backend=dynamo.lookup_backend(self.compiler))
            except dynamo.exc.InvalidBackend as error:
                raise InputError(f"compile: {str(error).splitlines()[0]}") from error

    @torch.no_grad()
    def estimate(self, normal: GlobalCMVN) -> None:
        """Mean and deviation over the first batches of all processes, the same in each."""
        whole = self.model.front_end
        members = whole.members if isinstance(whole, Serial) else []
        if normal not in members and normal is not whole:
            raise InputError("a GlobalCMVN whose statistics are not known stands in the front-end's own series, not in "
                             "another part of it")  # fmt: skip
        before = Serial(*members[: members.index(normal)]) if normal in members else whole
        count = torch.zeros((), dtype=torch.float64)

        def features() -> Iterator[Frames]:
            for batch in islice(self.trainer.datamodule.train_dataloader(), STATISTICS):  # type: ignore[attr-defined]
                x = before(batch.to(self.device).sound)
                count.add_(x.mask.sum().cpu())
                yield x

        found = GlobalCMVN.estimate(features())
        if self.trainer.world_size > 1:
            mean, square = found.mean.double(), found.std.double().square() + found.mean.double().square()
            sums = count * torch.stack([torch.ones_like(mean), mean, square]).cpu()
            n, mean, square = self.trainer.strategy.reduce(sums.to(self.device), reduce_op="sum")
            mean = mean / n
            found = GlobalCMVN(mean.float(), (square / n - mean.square()).clamp(min=0).sqrt().float())
        normal.load_state_dict(found.state_dict())
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, WeightAveraging):
                callback.setup(self.trainer, self, "fit")  # its copy was made before

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed the step, and draw its span and first position, which all processes see alike."""
        shared = torch.Generator().manual_seed(seeded(self.seed, self.begun, 0))
        if self.spans is not None:
            set_span(self.model.encoder, self.spans.draw(shared))
        if (period := circle(self.model.encoder)) is not None:
            turn(self.model.encoder, int(torch.randint(period, (), generator=shared)))
        super().on_train_batch_start(batch, batch_idx)

    def hear(self, sound: Frames) -> Heard:
        """Samples [B, N] through front-end and encoder."""
        encoder: Any = self.model.encoder
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            features = self.model.front_end(sound)
            features = Frames(features.values.to(next(encoder.parameters()).dtype), features.mask)
        if self.augment is not None:
            features = self.augment(features)
        wanted = sorted({layer for objective in self.objectives for layer in objective.layers})
        if not wanted:
            return Heard(sound, features, encoder.heard(features))
        frames, layers = encoder.intermediate(features, wanted)
        return Heard(sound, features, frames, dict(zip(wanted, layers, strict=True)))

    def tokens(self, texts: Sequence[str], pieces: Pieces | None = None) -> Said:
        """What should come out for these texts, in the model's tokens or in these `pieces`."""
        if not texts:
            nothing = torch.zeros(0, 0, dtype=torch.long, device=self.device)
            return Said(nothing, nothing.sum(1))
        rows = [torch.tensor((pieces or self.spelling).encode(text), dtype=torch.long) for text in texts]
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

    def losses(self, batch: Batch) -> tuple[dict[str, Tensor], Said, Tensor]:
        """Of each objective the loss of each utterance [B]; and which are `impossible` for one of them [B]."""
        said, kept = self.said(batch), self.training and self.kept  # ids are unique among training manifests alone
        heard = kept(batch) if kept else self.hear(batch.sound)
        lost = torch.stack([o.impossible(heard, said) for o in self.objectives]).any(0)
        return {o.name: o.losses(self.model, heard, said) for o in self.objectives}, said, lost

    def weighed(self, found: dict[str, Tensor], count: Tensor) -> Tensor:
        """The loss of a step, for each of `count` tokens."""
        weights = [o.weight for o in self.objectives]
        total = torch.stack([w * loss.sum() for w, loss in zip(weights, found.values(), strict=True)]).sum()
        return total / count

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of the batch for each token; gradients are averaged over processes, so their number is in it.

        `train/impossible` is the share of utterances with too few frames for their text.
        """
        found, said, lost = self.losses(batch)
        count = self.mean(said.lengths.sum()).clamp(min=1)
        loss = self.weighed(found, count)
        figures = [loss.detach(), lost.float().mean(), *(part.detach().sum() / count for part in found.values())]
        shown = self.mean(torch.stack(figures))
        self.watch(shown[0], batch.ids)
        for name, value in zip(("loss", "impossible", *found), shown, strict=True):
            self.log(f"train/{name}", value, prog_bar=name == "loss", batch_size=len(batch.ids))
        return loss

    def on_validation_epoch_start(self) -> None:
        """The encoder's own span again: that is the one with which it will stream."""
        super().on_validation_epoch_start()
        self.hear_as_told()

    def on_train_end(self) -> None:
        """The encoder's own span again, with which it will stream."""
        super().on_train_end()
        self.hear_as_told()

    def hear_as_told(self) -> None:
        """With the span of the recipe, not that of the last step, and from the first position."""
        for module, span in self.own_spans:
            module.span = span
        if circle(self.model.encoder) is not None:
            turn(self.model.encoder, 0)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Loss, and what is recognised."""
        tally = self.counted(dataloader_idx)
        found, said, _ = self.losses(batch)
        tally.add("loss", float(self.weighed(found, torch.ones((), device=self.device))), int(said.lengths.sum()))
        with torch.autocast(self.device.type, enabled=False):  # as a session hears
            self.recognise(batch, tally, live=self.streamed_batches is None or batch_idx < self.streamed_batches)

    def recognise(self, batch: Batch, tally: Tally, *, live: bool) -> None:
        """Count errors offline and, with `live`, streamed."""
        search = self.model.search(self.search, beam_size=self.beam_size)
        tally.compare("", self.references(batch), self.texts(search.decode(self.model.listening(batch.sound))))
        if live and self.model.listening.plan().block is not None:
            said = self.texts(streamed(self.model.listening, search, batch.sound))
            tally.compare("_streamed", self.references(batch), said)

    def texts(self, answers: Sequence[Sequence[Any]]) -> list[str]:
        """The best answer of each row as text."""
        return [self.model.tokenizer.decode(row[0].tokens) if row else "" for row in answers]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on as if nothing had been."""
        super().on_load_checkpoint(checkpoint)
        self.exact = {name: checkpoint["state_dict"][f"model.front_end.{name}"].clone() for name in self.exact}


def known(normal: GlobalCMVN) -> bool:
    """Statistics were estimated or loaded."""
    return bool((normal.mean != 0).any() or (normal.std != 1).any())
