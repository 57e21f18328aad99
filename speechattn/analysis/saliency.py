"""Attention against saliency: how much of what a token depends on does cross-attention show?

"Half explanation" (Papi et al., arXiv 2509.18010): averaged over heads and layers, cross-attention agrees best with
the relevance of the input, and covers about half of it. Their relevance is that of perturbations; here it is gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from speechattn import tree
from speechattn.analysis.weights import LayerWeights, cross_weights, layer_weights
from speechattn.audio.hearing import hear
from speechattn.audio.resample import Samples
from speechattn.decoder.attention import AttentionDecoder, DecoderState
from speechattn.decoder.ctc import CTC
from speechattn.decoder.segmental import Segmental
from speechattn.decoder.two_way import TwoWay
from speechattn.errors import InputError
from speechattn.frames import Frames, Memory
from speechattn.model import Recognizer
from speechattn.pretrained.whisper import WhisperModel
from speechattn.pretrained.whisper.features import HOP
from speechattn.pretrained.whisper.model import STRIDE

__all__ = ["Attribution", "Correlation", "Reading", "gradients", "half_explanation", "integrated", "pearson", "pooled",
           "relevance", "smoothed"]  # fmt: skip

Attribution = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]


def gradients(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The gradient of each of f(x) [U] by x [...] -> [U, ...]."""
    with torch.inference_mode(False), torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        y = f(x)
        rows = [torch.autograd.grad(y[u], x, retain_graph=u + 1 < len(y))[0] for u in range(len(y))]
    return torch.stack(rows) if rows else x.new_zeros(0, *x.shape)


def integrated(
    f: Callable[[Tensor], Tensor], x: Tensor, *, baseline: Tensor | None = None, steps: int = 16
) -> Tensor:  # fmt: skip
    """Integrated gradients (arXiv 1703.01365, eq. 1) from a baseline (zeros) to x [...] -> [U, ...].

    Law: they add up to f(x) - f(baseline), as exactly as `steps` midpoints integrate.
    """
    base = torch.zeros_like(x) if baseline is None else baseline
    total = sum(gradients(f, base + (x - base) * (i + 0.5) / steps) for i in range(steps))
    return (x - base) * total / steps


def smoothed(
    f: Callable[[Tensor], Tensor], x: Tensor, *, deviation: float = 0.15, samples: int = 16, seed: int = 0
) -> Tensor:  # fmt: skip
    """SmoothGrad (arXiv 1706.03825): mean gradient under noise; its `deviation` is a share of the range of x [...]."""
    chance = torch.Generator().manual_seed(seed)
    size = deviation * (x.max() - x.min())
    noises = (torch.randn(x.shape, generator=chance).to(x) * size for _ in range(samples))
    return sum((gradients(f, x + noise) for noise in noises), start=x.new_zeros(())) / samples


def relevance(attributions: Tensor) -> Tensor:
    """Attributions [U, B, T, F] -> of frames [U, T]: sizes, summed over features; each token's sum to 1."""
    size = attributions.abs().sum((1, 3))
    return size / size.sum(-1, keepdim=True).clamp(min=torch.finfo(size.dtype).tiny)


def pooled(saliency: Tensor, frames: int, ratio: float) -> Tensor:
    """Of features [U, T'] to encoder frames [U, T]: sum over the `ratio` features of each; the rest is dropped."""
    at = (torch.arange(saliency.shape[1], device=saliency.device) / ratio).long()
    found = saliency.new_zeros(len(saliency), max(frames, int(at.max()) + 1 if len(at) else 0))
    return found.index_add(1, at, saliency)[:, :frames]


def pearson(a: Tensor, b: Tensor) -> float:
    """Correlation of two maps of one shape: 1 for equal ones; NaN where one is flat."""
    a, b = (x.flatten().double() - x.double().mean() for x in (a, b))
    return float((a @ b) / (a.norm() * b.norm()))


@dataclass(frozen=True)
class Reading:
    """A short utterance as a model reads it, and the text that it said.

    `run(network, features)` gives encoder frames; `network` is the encoder, or what holds it. `frames` of them hear
    sound, `labels` are the texts of `tokens`. `lacking` says why there is no `decoder`. Everything works on batches of
    one.
    """

    network: nn.Module
    run: Callable[[Any, Frames], Frames]
    features: Frames
    ratio: float  # features for each encoder frame
    frames: int
    frame_s: float
    tokens: tuple[int, ...]
    labels: tuple[str, ...]
    prompt: tuple[int, ...] = ()
    decoder: AttentionDecoder | None = None
    behind: DecoderState | None = None
    ctc: CTC | None = None
    shared: tuple[object, ...] = ()
    lacking: str = "no attention decoder"

    @classmethod
    def of(cls, model: Recognizer | WhisperModel, samples: Samples, text: str) -> Reading:
        """Samples [N] at the model's rate and what is said in them. InputError where that is nothing."""
        spaced = isinstance(model, WhisperModel) and not model.spaceless and not text.startswith(" ")
        tokens = tuple(model.tokenizer.encode(f" {text}" if spaced and text.strip() else text))
        if not tokens or not len(samples):
            raise InputError("nothing is said here: there is no attention to show")
        labels = tuple(model.tokenizer.decode([token]) or " " for token in tokens)
        frames = ceil(len(samples) / model.sample_rate / model.frame_s)
        if isinstance(model, Recognizer):
            return cls._of_recognizer(model, samples, frames, tokens, labels)
        values = hear(model.front_end, samples).to(model.device)
        pad, network = round(model.pad_s * model.sample_rate), model.network
        return cls(
            network, lambda net, x: net.encode(x.values, samples=len(samples), pad=pad),
            Frames(values, values.new_ones(values.shape[:2], dtype=torch.bool)), STRIDE / HOP, frames, model.frame_s,
            tokens, labels, tuple(model.prompt(model.encode(values, samples=len(samples), finished=True), ())),
            model.decoder, unlocked(model.behind()), shared=(network._silence, network.decoder),
        )  # fmt: skip

    @classmethod
    def _of_recognizer(
        cls, model: Recognizer, samples: Samples, frames: int, tokens: tuple[int, ...], labels: tuple[str, ...]
    ) -> Reading:  # fmt: skip
        heads, end = dict(model.heads), model.tokenizer.end
        decoder, ctc = heads.get("attention", heads.get("monotonic")), heads.get("ctc")
        decoder = decoder.forth if isinstance(decoder, TwoWay) else decoder
        able = isinstance(decoder, AttentionDecoder) and end is not None
        segments = isinstance(heads.get("segmental"), Segmental)
        x = model.sound(samples)
        with torch.no_grad():
            heard: Frames = model.front_end(Frames(x, torch.ones_like(x, dtype=torch.bool)))
        like = next(model.encoder.parameters())
        return cls(
            model.encoder, lambda net, x: net(x), Frames(heard.values.to(like.dtype), heard.mask),
            float(1 / model.encoder.plan().ratio), frames, model.frame_s, tokens, labels,
            (end,) if able and end is not None else (),
            decoder if able and isinstance(decoder, AttentionDecoder) else None,
            ctc=ctc if isinstance(ctc, CTC) else None,
            lacking="segmental decoder: its cross-attention is its segments" if segments else "no attention decoder",
        )  # fmt: skip

    def memory(self) -> Frames:
        """What the encoder says [1, T, D]."""
        with torch.no_grad():
            return self.run(self.network, self.features)

    def self_weights(self) -> list[LayerWeights]:
        """Where the encoder's layers look."""
        return layer_weights(self.network, lambda twin: self.run(twin, self.features), shared=self.shared)

    def cross_weights(self, memory: Frames | None = None) -> Tensor:
        """Where each layer and head of the decoder looks when it says each token [L, H, U, T], silence included."""
        read = torch.tensor([[*self.prompt, *self.tokens[:-1]]], device=self.features.mask.device)
        heard = Memory.of(self.memory() if memory is None else memory, finished=True)
        seen = cross_weights(self._decoder(read.shape[1]), heard, read, behind=self.behind)
        return seen[0, :, :, len(self.prompt) - 1 :]

    def log_probs(self, memory: Frames) -> Tensor:
        """Log-probability of each token [U] over encoder frames [1, T, D], with gradients."""
        read = torch.tensor([[*self.prompt, *self.tokens[:-1]]], device=memory.mask.device)
        decoder = self._decoder(read.shape[1])
        hidden, _, _ = decoder.step(read, decoder.start(Memory.of(memory, finished=True), behind=self.behind))
        scores = decoder.logits(hidden[0, len(self.prompt) - 1 :]).float().log_softmax(-1)
        return scores.gather(1, torch.tensor(self.tokens, device=scores.device)[:, None])[:, 0]

    def by_input(self, attribution: Attribution = gradients) -> Tensor:
        """How much each token depends on each stretch of features, by encoder frames [U, T]."""

        def f(values: Tensor) -> Tensor:
            return self.log_probs(self.run(self.network, Frames(values, self.features.mask)))

        return pooled(relevance(attribution(f, self.features.values)), self.frames, self.ratio)

    def by_frames(self, attribution: Attribution = gradients) -> Tensor:
        """How much each token depends on each encoder frame [U, T]."""
        memory = self.memory()
        found = attribution(lambda values: self.log_probs(Frames(values, memory.mask)), memory.values)
        return relevance(found)[:, : self.frames]

    def _decoder(self, tokens: int) -> AttentionDecoder:
        if self.decoder is None:
            raise InputError(f"there is no cross-attention to show ({self.lacking})")
        if tokens > self.decoder.context:
            raise InputError(f"{tokens} tokens do not fit into the decoder's context of {self.decoder.context}")
        return self.decoder


def unlocked(state: DecoderState) -> DecoderState:
    """A copy of what was computed for inference, through which gradients may pass."""
    with torch.inference_mode(False):
        copy: DecoderState = tree.clone(state)
    return copy


@dataclass(frozen=True)
class Correlation:
    """Of a map of cross-attention with the saliency of the input and that of the encoder's output."""

    attention: str
    input: float
    output: float


def half_explanation(
    model: Recognizer | WhisperModel, samples: Samples, *, text: str | None = None,
    attribution: Attribution = gradients, seed: int = 0,
) -> list[Correlation]:  # fmt: skip
    """How well cross-attention agrees with saliency for an utterance: the table of arXiv 2509.18010 for one.

    Rows: the mean over all heads and layers, that of each layer, the best single head by the encoder's output, and as
    a control the mean with its frames shuffled. `text` is what is said (None: what the model hears). InputError for a
    model without an attention decoder.
    """
    said = model.transcribe(samples).text if text is None else text
    reading = Reading.of(model, samples, said)
    weights = reading.cross_weights()[..., : reading.frames]
    by_input, by_frames = reading.by_input(attribution), reading.by_frames(attribution)
    width = min(weights.shape[-1], by_input.shape[1], by_frames.shape[1])
    weights, by_input, by_frames = (x[..., :width] for x in (weights, by_input, by_frames))
    order = torch.randperm(width, generator=torch.Generator().manual_seed(seed)).to(weights.device)
    layers, heads = weights.shape[:2]
    best = max(((i, j) for i in range(layers) for j in range(heads)), key=lambda at: pearson(weights[at], by_frames))
    maps: Sequence[tuple[str, Tensor]] = [
        ("mean of all", weights.mean((0, 1))),
        *((f"layer {i}", weights[i].mean(0)) for i in range(layers)),
        (f"layer {best[0]} head {best[1]}", weights[best]),
        ("shuffled", weights.mean((0, 1))[:, order]),
    ]
    return [Correlation(name, pearson(seen, by_input), pearson(seen, by_frames)) for name, seen in maps]
