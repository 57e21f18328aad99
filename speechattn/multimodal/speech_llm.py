"""A language model that reads what was heard and seen, and goes on with the text (Llama-AVSR, arXiv 2409.12319)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from speechattn.encoder.layers import Stack
from speechattn.frames import Frames
from speechattn.multimodal.causal import CausalLM, Inspected
from speechattn.multimodal.layout import BOS, LIPS, MARK, PROMPT, SINK, SOUND, TEXT, Laid, laid
from speechattn.stream import Sliding, Stream

__all__ = ["Pool", "Pooled", "Side", "SpeechLLM", "Stacked", "senses"]

PLACES = {SOUND: (1, 2), LIPS: (3, 4)}  # of the marks before and behind; 0 is the beginning


class Pool(Sliding):
    """The mean of each `n` frames, of those that are there: [B, T, D] -> [B, T / n, D]."""

    def __init__(self, n: int) -> None:
        super().__init__(n, n, right=n - 1)

    def windows(self, x: Tensor) -> Tensor:
        pieces = x.unfold(1, self.kernel, self.kernel)
        there = (pieces != 0).any(2).sum(-1).clamp(min=1)
        return pieces.sum(-1) / there[..., None]


class Side(nn.Module):
    """Frames of one sense [B, T, width] -> embeddings of a language model [B, T / every, dim].

    `compress` makes fewer and perhaps wider frames (of `wide` features), an MLP projects them. What is made of several
    is there where the first of them is. With `norm` a LayerNorm comes last (as in the paper that studies sinks, arXiv
    2510.22603).
    """

    def __init__(self, compress: Stream, width: int, wide: int, dim: int, inner: int, *, norm: bool) -> None:
        super().__init__()
        self.compress, self.width = compress, width
        self.project = nn.Sequential(
            nn.Linear(wide, inner), nn.ReLU(), nn.Linear(inner, dim), nn.LayerNorm(dim) if norm else nn.Identity()
        )

    def forward(self, x: Frames) -> Frames:
        """`x` [B, T, width]."""
        y: Frames = self.compress(x)
        return Frames.of(self.project(y.values), y.mask)


class Stacked(Side):
    """Compression that puts `every` neighbours side by side."""

    def __init__(self, width: int, dim: int, *, every: int, inner: int = 2048, norm: bool = False) -> None:
        super().__init__(Stack(every, every), width, every * width, dim, inner, norm=norm)


class Pooled(Side):
    """Compression by the mean of `every` neighbours."""

    def __init__(self, width: int, dim: int, *, every: int, inner: int = 2048, norm: bool = False) -> None:
        super().__init__(Pool(every), width, width, dim, inner, norm=norm)


def senses(x: Frames, sides: Sequence[Side]) -> list[Frames]:
    """Encoder frames [B, T, D] -> those of each sense; of several, one is missing where its side is zero.

    ValueError for another number of features.
    """
    widths = [side.width for side in sides]
    if x.values.shape[2] != sum(widths):
        said = " + ".join(map(str, widths))
        raise ValueError(f"frames of {x.values.shape[2]} features: the language model reads {said}")
    parts = torch.split(x.values, widths, 2)
    return [Frames(part, x.mask if len(sides) == 1 else x.mask & (part != 0).any(-1)) for part in parts]


class SpeechLLM(nn.Module):
    """Encoder frames [B, T, D] of `sound` and `lips` side by side (`Senses`), or of one of them, before a text.

    The sequence is BOS, sinks, <audio> A </audio>, <video> V </video>, prompt, transcript, end. A sense that is missing
    in a row (its side is zero) takes no place there, nor do its marks. `prompt` are tokens of the language model `lm`,
    `bos` its own token for the beginning (None: a learned one). `sinks` learned places behind it, which stand for
    nothing, are for attention that has nowhere to go (arXiv 2309.17453, section 3.3).
    """

    def __init__(
        self, lm: nn.Module, *, sound: Side | None = None, lips: Side | None = None, prompt: Sequence[int] = (),
        bos: int | None = None, sinks: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        if sound is None and lips is None:
            raise ValueError("neither sound nor lips: wanted one of both")
        if sinks < 0:
            raise ValueError(f"{sinks} sinks: wanted 0 or more")
        self.lm: CausalLM = lm  # type: ignore[assignment]
        self.sound, self.lips = sound, lips
        self.prompt, self.bos = tuple(prompt), bos
        if wrong := [i for i in (*prompt, *([] if bos is None else [bos])) if not 0 <= i < self.lm.vocab]:
            raise ValueError(f"token {wrong[0]} of prompt or bos: the language model has 0 to {self.lm.vocab - 1}")
        self.marks = nn.Parameter(0.02 * torch.randn(5, self.lm.dim))
        self.sinks = nn.Parameter(0.02 * torch.randn(sinks, self.lm.dim))

    @property
    def vocab(self) -> int:
        """Tokens."""
        return self.lm.vocab

    @property
    def sides(self) -> list[tuple[int, Side]]:
        """The senses that it has, in the order of their features."""
        return [(kind, side) for kind, side in ((SOUND, self.sound), (LIPS, self.lips)) if side is not None]

    def before(self, x: Frames) -> list[tuple[Frames, int]]:
        """Encoder frames [B, T, D] -> what stands before the transcript, each part of a kind."""
        everybody = x.mask.new_ones(len(x.mask))
        parts = [(self.opened(everybody), BOS), (self.learned(self.sinks, everybody), SINK)]
        for (kind, side), frames in zip(self.sides, senses(x, [side for _, side in self.sides]), strict=True):
            tokens = side(frames)
            present = tokens.mask.any(1)
            first, last = (self.learned(self.marks[i : i + 1], present) for i in PLACES[kind])
            parts += [(first, MARK), (tokens, kind), (last, MARK)]
        prompt = torch.tensor([self.prompt], dtype=torch.long, device=x.mask.device).expand(len(x.mask), -1)
        return [*parts, (Frames(self.lm.embed(prompt), torch.ones_like(prompt, dtype=torch.bool)), PROMPT)]

    def opened(self, everybody: Tensor) -> Frames:
        """The beginning of each row [B, 1, D]."""
        if self.bos is None:
            return self.learned(self.marks[:1], everybody)
        tokens = torch.full((len(everybody), 1), self.bos, device=everybody.device)
        return Frames(self.lm.embed(tokens), everybody[:, None])

    @staticmethod
    def learned(values: Tensor, present: Tensor) -> Frames:
        """The same embeddings [n, D] in every row that is `present` [B]."""
        mask = present[:, None].expand(-1, len(values))
        return Frames.of(values.expand(len(present), -1, -1), mask)

    def whole(self, x: Frames, tokens: Tensor, lengths: Tensor) -> tuple[Laid, Tensor]:
        """The sequence with the first `lengths` [B] of `tokens` [B, U], and its length before them [B]."""
        before = self.before(x)
        said = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        text = Frames.of(self.lm.embed(tokens.where(said, 0)), said)
        return laid([*before, (text, TEXT)]), torch.stack([part.mask.sum(1) for part, _ in before]).sum(0)

    def losses(
        self, x: Frames, tokens: Tensor, lengths: Tensor, *, eos: int, smoothing: float = 0.0
    ) -> tuple[Tensor, Inspected, Tensor]:
        """Cross-entropy of each row's text and its end [B], summed over tokens; what is inside, and the kinds [B, S].

        Of `tokens` [B, U] the first `lengths` [B] count.
        """
        whole, first = self.whole(x, tokens, lengths)
        hidden, inside = self.lm.inspect(whole.x, weights=False)
        at = torch.arange(tokens.shape[1] + 1, device=tokens.device)
        place = (first[:, None] - 1 + at).clamp(max=hidden.shape[1] - 1)
        asked = hidden.gather(1, place[..., None].expand(-1, -1, hidden.shape[2]))
        targets = F.pad(tokens.where(at[:-1] < lengths[:, None], eos), [0, 1], value=eos)
        each = F.cross_entropy(self.lm.logits(asked).mT, targets, reduction="none", label_smoothing=smoothing)
        return each.masked_fill(at > lengths[:, None], 0.0).sum(1), inside, whole.kinds

    def inspect(self, x: Frames, tokens: Tensor, lengths: Tensor) -> tuple[Inspected, Tensor]:
        """States and attention weights of the whole sequence, text and all, and the kind of each place [B, S]."""
        whole, _ = self.whole(x, tokens, lengths)
        return self.lm.inspect(whole.x)[1], whole.kinds
