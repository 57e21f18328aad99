"""A speech language model that reads while sound is still coming in, and writes in turns (arXiv 2505.16983)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from speechattn.decoder.decoder_only import before
from speechattn.decoder.groups import Grouped, Schedule
from speechattn.decoder.in_turns import text_losses
from speechattn.frames import Frames
from speechattn.multimodal.interleaved import all_tokens, apart, every, next_tokens
from speechattn.multimodal.llama import Llama, LlamaState, View, bounds, kept
from speechattn.multimodal.speech_llm import Side, senses
from speechattn.stream import Buffer
from speechattn.tree import node

__all__ = ["TurnsLLM", "TurnsLLMState"]


@node
class TurnsLLMState:
    """What the layers made of the `source` and of the `target`; frames that wait for others of their token.

    The places of `source` are frames that had been read when each token was complete, those of `target` places.
    `heard` [B] frames were read, `tokens` [B] source tokens made, more than the source has where it is bounded.
    `waiting` has for each sense fewer frames than a token is made of [B, N, width].
    """

    source: LlamaState
    target: LlamaState
    waiting: tuple[Buffer, ...]
    heard: Tensor
    tokens: Tensor


class TurnsLLM(nn.Module):
    """Encoder frames [B, T, D] of `sound` and `lips` side by side (`Senses`), or of one of them, and a text, in turns.

    The source group is BOS and then a token whenever one is complete: sound makes one of each so many frames, lips
    likewise; of two that are complete with the same frame sound comes first. A sense that is missing in a row (its side
    is zero) has none. Fewer frames than a token is made of wait for more; when no more come they make a last one of
    each sense, sound first, which is read by who comes after the end. The target group is the `prompt`, tokens of the
    language model `lm`, and what is written: a start token and the text. It sees of the source what was read when it
    was written (the prompt: BOS), and stands at places of its own (`positions`). `bos` is the language model's token
    for the beginning (None: learned).

        sound of 2 frames, lips of 3:   BOS  s1  l1  s2  s3  l2       frames    0 2 3 4 6 6

    `window` = (sinks, recent) bounds the source: a source token sees the first `sinks` of its group, BOS among them,
    and the last `recent`, itself among them; a target token sees the first and the last of those that it may see, and
    its whole group. Places of the source are those inside this cache, 0 to sinks + recent - 1 (StreamingLLM, arXiv
    2309.17453, section 3.2). Others are forgotten.

    Laws: for any order and pieces of reads and writes, they give what `forward` gives in one masked pass. While a
    source has no more tokens than sinks + recent, a window changes nothing.
    """

    def __init__(
        self, lm: Llama, *, schedule: Schedule, sound: Side | None = None, lips: Side | None = None,
        prompt: Sequence[int] = (), bos: int | None = None, positions: Grouped | None = None,
        window: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if sound is None and lips is None:
            raise ValueError("neither sound nor lips: wanted one of both")
        if lm.window is not None:
            raise ValueError("the language model has a window for all it reads: wanted one of the source, here")
        for side in (sound, lips):
            if side is not None and not apart(side.compress.plan()):
                raise ValueError("a token of sound or lips is made of frames that belong to no other")
        self.lm, self.sound, self.lips, self.schedule = lm, sound, lips, schedule
        self.prompt, self.bos, self.window = tuple(prompt), bos, bounds(window)
        self.positions = Grouped() if positions is None else positions
        self.opening = nn.Parameter(0.02 * torch.randn(lm.dim)) if bos is None else None

    @property
    def vocab(self) -> int:
        """Tokens."""
        return self.lm.vocab

    @property
    def forgets(self) -> bool:
        """With a window."""
        return self.window is not None

    @property
    def sides(self) -> list[Side]:
        """The senses that it has, in the order of their features."""
        return [side for side in (self.sound, self.lips) if side is not None]

    @property
    def width(self) -> int:
        """Features of a frame."""
        return sum(side.width for side in self.sides)

    def embed(self, tokens: Tensor) -> Tensor:
        """[B, U] -> [B, U, D]."""
        return self.lm.embed(tokens)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden [..., D] -> unnormalised scores of the next token [..., V]."""
        return self.lm.logits(hidden)

    def start(self, rows: int) -> TurnsLLMState:
        """BOS read, the prompt written."""
        bos, prompt = self._opened(rows)
        none = torch.zeros(rows, dtype=torch.long, device=bos.values.device)
        frames, empty = bos.values.new_zeros(rows, 0, self.width), self.lm.start(rows)
        waiting = tuple(Buffer.empty(frames, every(side) - 1) for side in self.sides)
        state = TurnsLLMState(empty, empty, waiting, none, none)
        _, state = self._taken(bos, none[:, None], state)
        _, state = self._said(prompt, state.tokens[:, None].expand_as(prompt.mask), state)
        return state

    def read(self, x: Frames, state: TurnsLLMState) -> tuple[Frames, TurnsLLMState]:
        """The next frames [B, T, ...] -> what was made of tokens that are complete now [B, N, D], the next state."""
        senses(x[:0], self.sides)  # whose features are others is told so
        tokens, at, waiting = next_tokens(self.sides, x, state.waiting, state.heard, whole=True)
        return self._taken(tokens, at, replace(state, waiting=waiting, heard=state.heard + x.lengths))

    def finish(self, state: TurnsLLMState) -> TurnsLLMState:
        """No frame will follow: those that have waited make the last tokens."""
        nothing = self.lm.embed_tokens.weight.new_zeros(len(state.heard), 0, self.width)
        x = Frames(nothing, torch.zeros_like(nothing[..., 0], dtype=torch.bool))
        tokens, at, waiting = next_tokens(self.sides, x, state.waiting, state.heard, whole=False)
        return self._taken(tokens, at, replace(state, waiting=waiting))[1]

    def write(
        self, tokens: Frames, state: TurnsLLMState, *, read: Tensor | None = None
    ) -> tuple[Tensor, TurnsLLMState]:
        """The next tokens [B, U] -> hidden [B, U, D], of which `logits` says what follows, and the next state.

        Each sees what the frames gave that were read so far, or the first `read` [B, U] of them. ValueError where a
        window has forgotten a part of that.
        """
        read = state.heard[:, None].expand_as(tokens.mask) if read is None else read
        at = state.source.places
        later = (at.mask[:, None] & (at.values[:, None] > read[..., None])).sum(2)
        if self.window is not None:
            gone = (later > 0) & (state.tokens > sum(self.window))[:, None] & tokens.mask
            if bool(gone.any()):
                raise ValueError("a token that sees less than was read: the window has forgotten what it would see")
        x = Frames.of(self.lm.embed(tokens.values.where(tokens.mask, 0)), tokens.mask)
        return self._said(x, state.tokens[:, None] - later, state)

    def forward(self, source: Frames, tokens: Tensor, read: Tensor) -> tuple[Frames, Tensor]:
        """The same in one pass: frames [B, T, ...], tokens [B, U], written behind `read` [B, U] of the frames.

        Who has `read` more frames than there are comes after the end. -> what was made of the source tokens behind BOS
        [B, N, D], in front, and hidden [B, U, D].
        """
        rows = len(tokens)
        bos, prompt = self._opened(rows)
        heard, at = all_tokens(self.sides, source.front())
        n, first = 1 + heard.mask.shape[1], 1 + heard.mask.shape[1] + len(self.prompt)
        text = Frames(self.lm.embed(tokens), torch.ones_like(tokens, dtype=torch.bool))
        x = Frames.cat([bos, heard, prompt, text])
        own = torch.arange(1, n + 1, device=tokens.device).expand(rows, -1)
        opened = own.new_ones(rows, len(self.prompt))
        seen = torch.cat([own, opened, 1 + (heard.mask[:, None] & (at[:, None] <= read[..., None])).sum(2)], 1)
        group = torch.ones(x.mask.shape[1] - n, x.mask.shape[1] - n, dtype=torch.bool, device=x.mask.device).tril()
        others = torch.cat([group.new_zeros(n, len(group)), group]).expand(rows, -1, -1)
        places = self.positions.target(own, torch.arange(len(group), device=own.device).expand(rows, -1))
        near = torch.cat([self._inside(own), places], 1)
        view = self._view(seen, near, own - 1, x.mask[:, :n], places, others)
        y = x.values
        for layer, nothing in zip(self.lm.layers, self.lm.start(rows).layers, strict=True):
            y, _, _ = layer(y, x.mask, nothing, view, False)
        y = self.lm.norm(y)
        return Frames.finite(y[:, 1:n], heard.mask), y[:, first:]

    def losses(
        self, source: Frames, targets: Tensor, lengths: Tensor, *, sos: int, eos: int, smoothing: float = 0.1
    ) -> Tensor:
        """Cross-entropy of each row's text and its end [B], summed over the tokens, each written when `schedule` says.

        Of `targets` [B, U] the first `lengths` [B] count. A share `smoothing` of the wanted distribution is uniform.
        """
        turns = torch.arange(targets.shape[1] + 1, device=targets.device)
        read = self.schedule.needed(turns).expand(len(targets), -1)
        return text_losses(self, source, targets, lengths, read, sos=sos, eos=eos, smoothing=smoothing)

    def _opened(self, rows: int) -> tuple[Frames, Frames]:
        """BOS [B, 1, D] and the prompt [B, P, D]."""
        where = self.lm.embed_tokens.weight.device
        first = self.lm.embed(torch.tensor(self.bos, device=where)) if self.opening is None else self.opening
        prompt = self.lm.embed(torch.tensor(self.prompt, dtype=torch.long, device=where))
        everybody = torch.ones(rows, 1 + len(self.prompt), dtype=torch.bool, device=where)
        return (
            Frames(first.expand(rows, 1, -1), everybody[:, :1]),
            Frames(prompt.expand(rows, -1, -1), everybody[:, 1:]),
        )

    def _taken(self, tokens: Frames, at: Tensor, state: TurnsLLMState) -> tuple[Frames, TurnsLLMState]:
        """Source tokens [B, N, D], complete with frames `at` [B, N] -> what was made of them, the next state."""
        source, new = state.source, tokens.mask.shape[1]
        if not new:
            return tokens, state
        places = source.places.append(at, tokens.mask)
        total = state.tokens + tokens.lengths
        seen = (state.tokens[:, None] + tokens.mask.cumsum(1)).clamp(min=1)
        old = self._ranks(source.places.mask, state.tokens)
        ranks = torch.cat([old, seen - 1], 1)
        view = self._view(
            seen, self._inside(seen), ranks, places.mask, ranks[:, :0], places.mask.new_zeros(len(seen), new, 0)
        )
        y, layers = tokens.values, list[Buffer]()
        for layer, cache in zip(self.lm.layers, source.layers, strict=True):
            y, cache, _ = layer(y, tokens.mask, cache, view, False)
            layers.append(cache)
        source = LlamaState(tuple(layers), places)
        source = source if self.window is None else kept(source, self.window)
        return Frames.finite(self.lm.norm(y), tokens.mask), replace(state, source=source, tokens=total)

    def _said(self, x: Frames, seen: Tensor, state: TurnsLLMState) -> tuple[Tensor, TurnsLLMState]:
        """Target embeddings [B, U, D], which see so many source tokens `seen` [B, U] -> hidden, the next state."""
        source, target, new = state.source, state.target, x.mask.shape[1]
        if not new:
            return x.values, state
        at = (target.places.length[:, None] + x.mask.cumsum(1) - 1).clamp(min=0)
        near = self.positions.target(seen, at)
        places = target.places.append(near, x.mask)
        there = source.places.mask
        ranks = self._ranks(there, state.tokens)
        view = self._view(seen, near, ranks, there, places.values, before(places, new))
        y, layers = x.values, list[Buffer]()
        for layer, heard, cache in zip(self.lm.layers, source.layers, target.layers, strict=True):
            y, both, _ = layer(y, x.mask, heard.append(cache.values, cache.mask), view, False)
            layers.append(cache.append(both.values[:, both.values.shape[1] - new :], x.mask))
        hidden = Frames.finite(self.lm.norm(y), x.mask).values
        return hidden, replace(state, target=LlamaState(tuple(layers), places))

    def _ranks(self, there: Tensor, tokens: Tensor) -> Tensor:
        """Which of the `tokens` [B] of each row the cache has [B, N]: the first and the last."""
        at = there.cumsum(1) - 1
        sinks = there.shape[1] if self.window is None else self.window[0]
        return (at + (tokens - there.sum(1))[:, None].where(at >= sinks, 0)).clamp(min=0)

    def _inside(self, seen: Tensor) -> Tensor:
        """The place inside the cache of the last of so many source tokens."""
        return seen - 1 if self.window is None else seen.clamp(max=sum(self.window)) - 1

    def _view(
        self, seen: Tensor, near: Tensor, ranks: Tensor, there: Tensor, places: Tensor, others: Tensor
    ) -> View:  # fmt: skip
        """Of queries at places `near` [B, T] that see the first `seen` [B, T] source tokens, or of these what is kept.

        Keys are the source tokens of `ranks` [B, N] that are `there`, and behind them targets at `places` [B, M], of
        which they see `others` [B, T, M].
        """
        like = self.lm.embed_tokens.weight[..., : self.lm.width]
        heard = there[:, None] & (ranks[:, None] < seen[..., None])
        keys = self.lm.position.angles(torch.cat([ranks, places], 1), like)
        if self.window is None:
            return View(torch.cat([heard, others], 2), self.lm.position.angles(near, like), keys)
        sinks, recent = self.window
        heard = heard & ((ranks < sinks)[:, None] | (ranks[:, None] >= seen[..., None] - recent))
        far = near + (seen - sinks - recent).clamp(min=0)
        still = torch.cat([ranks < sinks, torch.ones_like(places, dtype=torch.bool)], 1)
        turns = self.lm.position.angles(far, like), self.lm.position.angles(near, like)
        return View(torch.cat([heard, others], 2), turns[0], keys, still, turns[1])
