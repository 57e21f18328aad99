"""A translator without cross attention: source and target in one Transformer, which are fed in turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from speechattn.attention.position import Rotary
from speechattn.attention.softmax import fused
from speechattn.decoder.groups import Grouped, Positions, Schedule, group_ids, group_mask, reads
from speechattn.decoder.in_turns import text_losses
from speechattn.encoder.layers import FeedForward
from speechattn.frames import Frames
from speechattn.linear import dropped, run
from speechattn.stream import Buffer
from speechattn.tree import node

__all__ = ["DecoderOnly", "GroupState"]


@node
class GroupState:
    """What each layer has made of the `source` and of the `target`: keys, turned, and values [B, N, 2, G, D / H]."""

    source: tuple[Buffer, ...]
    target: tuple[Buffer, ...]

    @property
    def read(self) -> Tensor:
        """Frames [B]."""
        return self.source[0].length

    @property
    def written(self) -> Tensor:
        """Tokens [B]."""
        return self.target[0].length

    def truncate(self, length: int) -> GroupState:
        """Take back the tokens behind the first `length` of each row; frames stay."""
        return replace(self, target=tuple(buffer.truncate(length) for buffer in self.target))


class Layer(nn.Module):
    """Self attention and feed-forward, each behind its norm and added to its input."""

    def __init__(self, dim: int, heads: int, inner: int, *, key_heads: int, base: float, dropout: float) -> None:
        super().__init__()
        self.heads, self.key_heads, self.width, self.dropout = heads, key_heads, dim // heads, dropout
        self.norm, self.position = nn.LayerNorm(dim), Rotary(dim, heads, base=base)
        self.qkv = nn.Linear(dim, (heads + 2 * key_heads) * self.width)  # queries, then keys, then values
        self.out = nn.Linear(dim, dim)
        self.ff = FeedForward(dim, inner, activation=nn.SiLU, dropout=dropout)

    def project(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, T, D] at places `ids` [B, T] -> queries [B, H, T, D / H]; keys and values [B, T, 2, G, D / H]."""
        sizes = [self.heads, self.key_heads, self.key_heads]
        y = run(self.qkv, self.norm(x)).view(*x.shape[:2], sum(sizes), self.width).transpose(1, 2)
        q, k, v = torch.split(y, sizes, 1)
        turned = torch.stack([self.position.placed(k, ids), v], 1)
        return self.position.placed(q, ids), turned.permute(0, 3, 1, 2, 4)

    def forward(self, x: Tensor, q: Tensor, keys: Tensor, seen: Tensor) -> Tensor:
        """x [B, T, D], whose queries see of `keys` [B, N, 2, G, D / H] those that are `seen` [B, T, N] -> as x."""
        k, v = keys.permute(2, 0, 3, 1, 4).unbind()
        said = fused(q, k, v, None, range(0), range(0), seen[:, None]).transpose(1, 2).flatten(2)
        x = x + self._dropped(run(self.out, said))
        return x + self._dropped(self.ff(x))

    def _dropped(self, x: Tensor) -> Tensor:
        return dropped(x, self.dropout) if self.training else x


class DecoderOnly(nn.Module):
    """Source frames and target tokens through `depth` layers, in turns: `read` frames, `write` tokens.

    Frames see frames before them; tokens see tokens before them and the frames that have been read when they are
    written (arXiv 2505.16983). Caches of frames and tokens grow each for itself. With `positions` that are
    `Grouped` nothing that was made of a frame depends on when it was read. `source` makes [B, T, D] of the frames: an
    embedding where they are tokens, a linear layer where they come from an encoder; None: they are as they should be.
    `schedule` says when the next token is written, in training and by default in a search.

    Law: for any order of reads and writes, `read` and `write` give what `forward` gives in one masked pass.
    """

    forgets = False

    def __init__(
        self, vocab: int, dim: int, heads: int, depth: int, *, schedule: Schedule, source: nn.Module | None = None,
        inner: int | None = None, key_heads: int | None = None, positions: Positions | None = None,
        base: float = 10000.0, dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        key_heads = key_heads or heads
        if dim % heads or heads % key_heads:
            raise ValueError(f"{dim} features, {heads} heads, {key_heads} key heads: they do not divide")
        self.vocab, self.dim, self.schedule, self.dropout = vocab, dim, schedule, dropout
        self.positions: Positions = Grouped() if positions is None else positions
        self.source, self.embed = source, nn.Embedding(vocab, dim)
        self.layers: Sequence[Layer] = nn.ModuleList(  # type: ignore[assignment]
            Layer(dim, heads, inner or 4 * dim, key_heads=key_heads, base=base, dropout=dropout) for _ in range(depth)
        )
        self.norm, self.output = nn.LayerNorm(dim), nn.Linear(dim, vocab)

    def start(self, rows: int) -> GroupState:
        """Nothing read, nothing written."""
        like = self.embed.weight
        empty = [Buffer.empty(like.new_zeros(rows, 0, 2, x.key_heads, x.width)) for x in self.layers]
        return GroupState(tuple(empty), tuple(empty))

    def read(self, x: Frames, state: GroupState) -> tuple[Frames, GroupState]:
        """The next source frames [B, T, ...] -> what was made of them [B, T, D], the next state."""
        at = (state.read[:, None] + x.mask.cumsum(1) - 1).clamp(min=0)
        ids = self.positions.source(at, state.written[:, None])
        y, caches = self._heard(x.values), []
        for layer, cache in zip(self.layers, state.source, strict=True):
            q, new = layer.project(y, ids)
            cache = cache.append(new, x.mask)
            y = layer(y, q, cache.values, before(cache, x.mask.shape[1]))
            caches.append(cache)
        return Frames.finite(self.norm(y), x.mask), replace(state, source=tuple(caches))

    def write(self, tokens: Frames, state: GroupState, *, read: Tensor | None = None) -> tuple[Tensor, GroupState]:
        """The next target tokens [B, U] -> hidden [B, U, D], of which `logits` says what follows, and the next state.

        Each sees the frames that were read so far, or the first `read` [B, U] of them.
        """
        source, u = state.source[0], tokens.mask.shape[1]
        read = state.read[:, None].expand(-1, u) if read is None else read
        at = (state.written[:, None] + tokens.mask.cumsum(1) - 1).clamp(min=0)
        ids = self.positions.target(read, at)
        heard = source.mask[:, None] & (source.mask.cumsum(1)[:, None] <= read[..., None])
        y, caches = self._embedded(tokens.values), []
        for layer, there, cache in zip(self.layers, state.source, state.target, strict=True):
            q, new = layer.project(y, ids)
            cache = cache.append(new, tokens.mask)
            keys = torch.cat([there.values, cache.values], 1)
            y = layer(y, q, keys, torch.cat([heard, before(cache, u)], 2))
            caches.append(cache)
        return Frames.finite(self.norm(y), tokens.mask).values, replace(state, target=tuple(caches))

    def finish(self, state: GroupState) -> GroupState:
        """No frame will follow: none has waited for others."""
        return state

    def forward(self, source: Frames, tokens: Tensor, read: Tensor) -> tuple[Tensor, Tensor]:
        """The same in one pass: frames [B, T, ...], tokens [B, U], written behind `read` [B, U] of the frames.

        -> what was made of the valid frames, in front [B, T', D], and hidden [B, U, D].
        """
        source = source.front()
        frames = source.mask.shape[1]
        x = torch.cat([self._heard(source.values), self._embedded(tokens)], 1)
        ids, seen = group_ids(read, frames, self.positions), group_mask(read, frames)
        for layer in self.layers:
            q, keys = layer.project(x, ids)
            x = layer(x, q, keys, seen)
        x = self.norm(x)
        return Frames.finite(x[:, :frames], source.mask).values, x[:, frames:]

    def logits(self, hidden: Tensor) -> Tensor:
        """`hidden` [..., D] -> unnormalised scores of the next token [..., V]."""
        return run(self.output, hidden)

    def losses(
        self, source: Frames, targets: Tensor, lengths: Tensor, *, sos: int, eos: int, smoothing: float = 0.1
    ) -> Tensor:
        """Cross-entropy of each row's text and its end [B], summed over the tokens, each written when `schedule` says.

        Of `targets` [B, U] the first `lengths` [B] count. A share `smoothing` of the wanted distribution is uniform
        (arXiv 1512.00567, section 7).
        """
        read = reads(self.schedule, source.lengths, targets.shape[1] + 1)
        return text_losses(self, source, targets, lengths, read, sos=sos, eos=eos, smoothing=smoothing)

    def _heard(self, x: Tensor) -> Tensor:
        return self._dropped(x if self.source is None else self.source(x))

    def _embedded(self, tokens: Tensor) -> Tensor:
        return self._dropped(self.embed(tokens))

    def _dropped(self, x: Tensor) -> Tensor:
        return dropped(x, self.dropout) if self.training else x


def before(cache: Buffer, new: int) -> Tensor:
    """What each of the `new` last entries of a cache sees of it: those before it and itself [B, new, N]."""
    n = cache.mask.shape[1]
    causal = torch.ones(new, n, dtype=torch.bool, device=cache.mask.device).tril(n - new)
    return cache.mask[:, None] & causal
