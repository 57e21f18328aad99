"""Distillation: what a teacher says of the same sound is a target, beside the text."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW

from speechattn.attention.pattern import Span
from speechattn.attention.self_attention import Spanned, set_backend, set_span
from speechattn.data.batch import Batch
from speechattn.decoder.attention import AttentionDecoder
from speechattn.decoder.ctc import CTC
from speechattn.errors import InputError, ModelError
from speechattn.frames import Frames, Memory
from speechattn.model import Recognizer, load_model
from speechattn.pretrained.whisper import Whisper, WhisperModel, load
from speechattn.pretrained.whisper.features import HOP, SAMPLE_RATE, scaled
from speechattn.pretrained.whisper.streaming import front_end, streaming, turn
from speechattn.task.base import Task, seeded
from speechattn.task.checkpoint import FORMAT, weights_of
from speechattn.task.chunks import Spans
from speechattn.task.objectives import Heard, Objective, Said, ending, head_of
from speechattn.text.pieces import MARK

__all__ = ["AttentionDistillation", "CTCDistillation", "Distillation", "DualModeDistillation", "EncoderDistillation",
           "WhisperDistillation", "apartness", "divergence"]  # fmt: skip


def divergence(theirs: Tensor, mine: Tensor, mask: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) of scores [B, N, V], summed over the places in `mask` [B, N] -> [B].

    Both are softened by the temperature, and gradients kept at their size by its square (arXiv 1503.02531, section 2).
    """
    exact = torch.promote_types(mine.dtype, torch.float32)
    p, q = ((scores.to(exact) / temperature).log_softmax(-1) for scores in (theirs, mine))
    each = F.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    return each.masked_fill(~mask, 0.0).sum(1) * temperature**2


class Distillation(Objective):
    """A student that agrees with the model in the folder `teacher`, which hears the whole utterance, not augmented.

    The teacher has the same tokens; it is not trained, and is a part of no checkpoint. Law: a student that is the
    teacher has loss and gradient 0.
    """

    def __init__(self, head: str, weight: float, teacher: str, temperature: float = 1.0) -> None:
        super().__init__(f"{head}_distillation", weight, heads=(head,))
        if not temperature > 0:
            raise ValueError(f"temperature {temperature}: wanted more than 0")
        self.folder, self.temperature = teacher, temperature
        self.teachers: tuple[Recognizer, ...] = ()  # in a tuple: no part of the task's weights

    def fit(self, model: Recognizer) -> None:
        teacher = load_model(Path(self.folder))
        if not isinstance(teacher, Recognizer):
            raise ModelError(f"{self.folder}: a teacher is a model folder with an encoder and heads")
        if teacher.tokenizer.pieces != model.tokenizer.pieces:
            raise ModelError(f"{self.folder}: the teacher has other tokens than the model that it teaches")
        if teacher.sample_rate != model.sample_rate:
            raise ModelError(f"{self.folder}: the teacher hears {teacher.sample_rate} Hz, not {model.sample_rate}")
        self.teachers = (teacher.eval().requires_grad_(False),)

    def losses(self, model: Recognizer, heard: Heard, said: Said) -> Tensor:
        place = heard.frames.values.device
        teacher = self.teachers[0].to(place)
        with torch.no_grad(), torch.autocast(place.type, enabled=False):
            frames = teacher.listening(heard.sound)
        return self.apart(teacher, frames, model, heard, said)

    @abstractmethod
    def apart(self, teacher: Recognizer, frames: Frames, model: Recognizer, heard: Heard, said: Said) -> Tensor:
        """How far the model is from the teacher, whose encoder says `frames`, in each utterance [B]."""


class CTCDistillation(Distillation):
    """Frame by frame, by the head `ctc` (or `source`) of both, whose frames are equally long."""

    def __init__(self, weight: float, teacher: str, head: str = "ctc", temperature: float = 1.0) -> None:
        super().__init__(head, weight, teacher, temperature)
        self.head = head

    def fit(self, model: Recognizer) -> None:
        super().fit(model)
        for one in (model, self.teachers[0]):
            head_of(one, self.head, CTC)
        theirs, mine = (round(1000 * one.frame_s, 3) for one in (self.teachers[0], model))
        if theirs != mine:
            raise ModelError(f"{self.folder}: frames of the teacher last {theirs:g} ms, those of the model {mine:g} ms")

    def apart(self, teacher: Recognizer, frames: Frames, model: Recognizer, heard: Heard, said: Said) -> Tensor:
        return frame_by_frame(head_of(teacher, self.head, CTC), frames, head_of(model, self.head, CTC), heard.frames,
                              self.temperature)  # fmt: skip


class AttentionDistillation(Distillation):
    """Token by token behind the true text, by the head `attention` of both."""

    def __init__(self, weight: float, teacher: str, temperature: float = 1.0) -> None:
        super().__init__("attention", weight, teacher, temperature)

    def fit(self, model: Recognizer) -> None:
        super().fit(model)
        ending(model)
        for one in (model, self.teachers[0]):
            head_of(one, "attention", AttentionDecoder)

    def apart(self, teacher: Recognizer, frames: Frames, model: Recognizer, heard: Heard, said: Said) -> Tensor:
        with torch.no_grad():
            theirs, _ = forced(teacher, frames, said)
        mine, counts = forced(model, heard.frames, said)
        return divergence(theirs, mine, counts, self.temperature)


class WhisperDistillation(Objective):
    """Token by token behind the true text, by the head `attention`: what Whisper says of the whole utterance.

    It hears what the student hears, noise and all, and silence behind it. The student's tokens are some of Whisper's;
    both are compared on these alone. Where nobody speaks Whisper is no teacher: it says "you" of silence. It is not
    trained, and is a part of no checkpoint.
    """

    def __init__(self, weight: float, teacher: str = "tiny.en", temperature: float = 1.0) -> None:
        super().__init__("attention_distillation", weight, heads=("attention",))
        if not temperature > 0:
            raise ValueError(f"temperature {temperature}: wanted more than 0")
        self.teacher, self.temperature = teacher, temperature
        self.whispers: tuple[WhisperModel, ...] = ()  # in a tuple: no part of the task's weights
        self.same: Tensor = torch.zeros(0, dtype=torch.long)  # their numbers for our tokens, -1 where there is none

    def fit(self, model: Recognizer) -> None:
        head_of(model, "attention", AttentionDecoder)
        end, whisper = ending(model), load(self.teacher)
        theirs = {piece: i for i, piece in enumerate(whisper.tokenizer.pieces)}
        ours = [piece.replace(MARK, " ").encode() for piece in model.tokenizer.pieces]
        same = [-1 if i in model.tokenizer.special else theirs.get(piece, -2) for i, piece in enumerate(ours)]
        same[end] = whisper.tokenizer.end_of_text
        if -2 in same:
            raise ModelError(f"{self.teacher} has no token {model.tokenizer.pieces[same.index(-2)]!r}")
        self.whispers, self.same = (whisper,), torch.tensor(same)

    def losses(self, model: Recognizer, heard: Heard, said: Said) -> Tensor:
        mine, counts = forced(model, heard.frames, said)
        counts, place = counts & (said.lengths > 0)[:, None], mine.device
        both = (self.same >= 0).to(place)
        with torch.no_grad():
            theirs = self.taught(heard.sound, said)
        return divergence(theirs[..., self.same[self.same >= 0].to(place)], mine[..., both], counts, self.temperature)

    def taught(self, sound: Frames, said: Said) -> Tensor:
        """The teacher's scores [B, U + 1, its V]."""
        whisper, place = self.whispers[0], sound.values.device
        network = whisper.network.to(place)
        with torch.autocast(place.type, enabled=False):
            mel = whisper.front_end.to(place)(Frames(sound.values, torch.ones_like(sound.mask))).values
        samples = min(sound.mask.shape[1], network.max_samples)
        frames = network.encode(mel[:, : samples // HOP], samples=samples, pad=round(whisper.pad_s * SAMPLE_RATE))
        first = [whisper.tokenizer.id("<|startoftranscript|>"), whisper.tokenizer.id("<|notimestamps|>")]
        prompt = torch.tensor(first, device=place).expand(len(said.tokens), -1)
        tokens = self.same.to(place)[said.tokens].clamp(min=0)
        state = network.decoder.start(Memory.of(frames, finished=True), behind=network.silence())
        hidden, _, _ = network.decoder.step(torch.cat([prompt, tokens], 1), state)
        return network.decoder.logits(hidden[:, 1:])


class DualModeDistillation(Objective):
    """What the model says when it hears the whole utterance teaches what it says in the span of the step.

    Dual mode (arXiv 2010.06030, section 3.3): one set of weights, frame by frame by its CTC head; nothing flows back
    into the teaching pass. A step that hears everything costs nothing; such steps train the teacher, so draw them, too
    (`DynamicChunks`).
    """

    def __init__(self, weight: float, head: str = "ctc", temperature: float = 1.0) -> None:
        super().__init__(f"{head}_dual_mode", weight, heads=(head,))
        if not temperature > 0:
            raise ValueError(f"temperature {temperature}: wanted more than 0")
        self.head, self.temperature = head, temperature

    def fit(self, model: Recognizer) -> None:
        head_of(model, self.head, CTC)
        if not any(isinstance(module, Spanned) for module in model.encoder.modules()):
            raise ModelError("dual mode needs an encoder whose attention has a span")

    def losses(self, model: Recognizer, heard: Heard, said: Said) -> Tensor:
        head, spans = head_of(model, self.head, CTC), [m for m in model.encoder.modules() if isinstance(m, Spanned)]
        before = [module.span for module in spans]
        set_span(model.encoder, Span.full())
        try:
            if [module.span for module in spans] == before:
                return heard.frames.values.new_zeros(len(said.lengths))
            with torch.no_grad():
                frames = model.encoder(heard.features)
        finally:
            for module, span in zip(spans, before, strict=True):
                module.span = span
        return frame_by_frame(head, frames, head, heard.frames, self.temperature)


def frame_by_frame(theirs: CTC, frames: Frames, mine: CTC, heard: Frames, temperature: float) -> Tensor:
    """`divergence` of two CTC heads [B]; a frame at the end that one encoder lacks does not count."""
    with torch.no_grad():
        target = theirs(frames).values
    n = min(target.shape[1], heard.mask.shape[1])
    mask = frames.mask[:, :n] & heard.mask[:, :n]
    return divergence(target[:, :n], mine(heard).values[:, :n], mask, temperature)


def forced(model: Recognizer, frames: Frames, said: Said) -> tuple[Tensor, Tensor]:
    """Scores [B, U + 1, V] behind the true tokens, and which of them count."""
    head, end = head_of(model, "attention", AttentionDecoder), ending(model)
    scores, _, counts, _ = head.forced(
        head.start(Memory.of(frames, finished=True)), said.tokens, said.lengths, sos=end, eos=end
    )
    return scores, counts


def apartness(theirs: Tensor, mine: Tensor, mask: Tensor) -> Tensor:
    """Squared distance of [B, T, D] where `mask` [B, T] is True, as a share of the variance of `theirs` over time.

    Law: 0 for the same, 1 for who always says the mean.
    """
    exact = torch.promote_types(mine.dtype, torch.float32)
    theirs, mine = theirs.to(exact)[mask], mine.to(exact)[mask]
    return (mine - theirs).square().sum() / (theirs - theirs.mean(0)).square().sum().clamp(min=1e-9)


class EncoderDistillation(Task):
    """Teaches Whisper's encoder to say in the span of the step what it says when it hears everything; no text.

    The student begins with the teacher's weights. The loss is the `apartness` of what both say, and `layer_weight`
    times the mean of that of the layers. A recording is read as a circle as long as Whisper's window: with `turning`
    the student begins at a random position, and the teacher hears the sound turned as far, so that each frame has the
    same position for both, and the seam of the positions is learnt wherever it falls.
    """

    def __init__(
        self, teacher: str = "tiny.en", span: Span | None = None, spans: Spans | None = None, *,
        layer_weight: float = 0.1, turning: bool = True, backend: str = "auto", optimizer: OptimizerCallable = AdamW,
        scheduler: LRSchedulerCallable | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(optimizer=optimizer, scheduler=scheduler, seed=seed)
        if not layer_weight >= 0:
            raise ValueError(f"layer_weight {layer_weight}: wanted 0 or more")
        whisper = load(teacher)
        self.whispers: tuple[Whisper, ...] = (whisper.network,)  # in a tuple: no part of the task's weights
        self.own, self.spans = span or Span.chunked(400, 32), spans
        self.model = streaming(whisper.network, self.own).train().requires_grad_(True)
        self.hearing: Any = front_end(whisper.network.config.mels)
        self.layer_weight, self.turning, self.backend = layer_weight, turning, backend
        for encoder in (self.model, whisper.network.encoder):
            set_backend(encoder, backend)

    @property
    def parts(self) -> Mapping[str, nn.Module]:
        """The encoder."""
        return {"encoder": self.model}

    @property
    def monitor(self) -> tuple[str, str]:
        """How far it is from the teacher, in its own span."""
        return "valid/loss", "min"

    def setup(self, stage: str) -> None:
        """Texts are not read, so the data is asked nothing of them."""

    def init_from(self, path: Path, plugins: Sequence[str] = ()) -> None:
        """Start with the weights of a checkpoint of this task."""
        self.model.load_state_dict(weights_of(path, plugins))

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Draw the span and the first position, which all processes see alike."""
        lots = torch.Generator().manual_seed(seeded(self.seed, self.begun, 0))
        if self.spans is not None:
            set_span(self.model, self.spans.draw(lots))
        if self.turning:
            turn(self.model, int(torch.randint(self.whispers[0].config.audio_context, (), generator=lots)))
        super().on_train_batch_start(batch, batch_idx)

    def both(self, sound: Frames, first: int = 0) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """What each layer and the whole encoder say [B, T, D], of the teacher and of the student; which are there."""
        teacher = self.whispers[0].to(sound.values.device).encoder
        with torch.no_grad():
            with torch.autocast(self.device.type, enabled=False):
                mel = self.hearing.mel(sound)
                turned = Frames(scaled(mel.values).roll(2 * first, 1), mel.mask.roll(2 * first, 1))
                features = self.hearing.level(mel)
            theirs: list[Tensor] = []
            hooks = [layer.register_forward_hook(lambda _, x, y: theirs.append(y.values)) for layer in teacher.layers]
            theirs.append(teacher(turned).values)
            for hook in hooks:
                hook.remove()
            theirs = [values.roll(-first, 1) for values in theirs]
        said, layers = self.model.intermediate(features, range(len(self.model.layers.members)))
        return theirs, [*(layer.values for layer in layers), said.values], said.mask

    def figures(self, sound: Frames, first: int = 0) -> dict[str, Tensor]:
        """The loss, and how far `output` and `layers` are from the teacher's."""
        theirs, mine, mask = self.both(sound, first)
        *layers, output = [apartness(a, b, mask) for a, b in zip(theirs, mine, strict=True)]
        deep = torch.stack(layers).mean()
        return {"loss": output + self.layer_weight * deep, "output": output, "layers": deep}

    def circle(self, sound: Frames) -> Frames:
        """Silence behind, up to the length of the circle. InputError for what is longer."""
        samples = 2 * HOP * self.whispers[0].config.audio_context
        room = samples - sound.mask.shape[1]
        if room < 0:
            raise InputError(f"sound of {sound.mask.shape[1]} samples: at most {samples} are turned; lower join.most_s")
        return Frames(F.pad(sound.values, [0, room]), torch.ones_like(F.pad(sound.mask, [0, room])))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """How far the student is from the teacher, in the span of the step."""
        sound = self.circle(batch.sound) if self.turning else batch.sound
        first = self.model.subsample.positions.first if self.turning else 0
        found = self.figures(sound, first)
        self.watch(found["loss"].detach(), batch.ids)
        for name, value in found.items():
            self.log(f"train/{name}", value.detach(), prog_bar=name == "loss", batch_size=len(batch))
        return found["loss"]

    def on_validation_epoch_start(self) -> None:
        """The encoder's own span, from the first position."""
        set_span(self.model, self.own)
        turn(self.model, 0)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """The same figures in the encoder's own span."""
        for name, value in self.figures(batch.sound).items():
            self.log(f"valid/{name}", value, prog_bar=name == "loss", batch_size=len(batch), add_dataloader_idx=False)

    def on_validation_epoch_end(self) -> None:
        """Lightning has the means."""

    def on_train_end(self) -> None:
        """The encoder's own span, with which it will stream."""
        super().on_train_end()
        self.on_validation_epoch_start()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A checkpoint knows its place in the training; it has no tokens."""
        self.look()
        score = self.trainer.callback_metrics.get(self.monitor[0])
        checkpoint["speechattn"] = {
            "format": FORMAT, "config": None, "files": {}, "batches": self.begun,
            "score": None if score is None else float(score), "mode": self.monitor[1],
        }  # fmt: skip
