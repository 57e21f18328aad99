"""Greedy search of an attention decoder over a memory that grows; its attention tells what is not heard out yet."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from speechattn import tree
from speechattn.cross.soft import Soft
from speechattn.decoder.attention import AttentionDecoder, DecoderState
from speechattn.frames import Frames, Memory
from speechattn.search.beam import Beam, Prefixes, Search
from speechattn.search.draft import Draft
from speechattn.search.leaning import Leaning
from speechattn.search.looks import Looked, apart, farthest, grown, narrowed
from speechattn.search.phrases import Phrases
from speechattn.search.room import kept, packed, tidied, without
from speechattn.search.speaker import RECENT, Speaker
from speechattn.tree import node

__all__ = ["AlignedGreedy", "AlignedState"]


@node
class AlignedState:
    """What the decoder has read: the frames, and the tokens of `decoder.cache`, of which the first `done` [B] stay.

    The token `last` [B] is read again when there are new frames; the draft stands behind it. `told` [B, RECENT] are
    the newest committed tokens, behind -1, and all of them stand at `node` [B] among the phrases. Of the stream's
    frames `origin` [B] came before the search began; since then `heard` [B] were read, and the committed text ends at
    frame `until` [B].
    """

    decoder: DecoderState
    looked: Looked
    told: Tensor
    node: Tensor
    last: Tensor
    done: Tensor
    heard: Tensor
    shown: Tensor
    origin: Tensor
    until: Tensor


class AlignedGreedy(Search):
    """The most probable token, again and again, behind what was committed; anew whenever frames were heard.

    The draft ends at the end of the text, at a token whose mean alignment peaks in the last `edge` frames that were
    heard (it is about a sound that still goes on; the condition of AlignAtt, arXiv 2305.11408), before a second round
    of a loop, and at `spare` tokens and `most` for each frame. No frames will follow `finish`: there is no edge.

    A token sees about `back` frames before and `reach` behind the last peak of those before it, and more where there is
    nothing to say of these (`Speaker`): with all in sight the text jumps over clauses where much of it waits.

    The tokens of the draft before are read in one pass, and kept as far as they would be said again. Law: such a guess
    changes the time that a search takes, never its result. Committed tokens keep what they made of the frames that
    were there; the last one is read again. Frames of which there is only a glimpse (`peek`) stay for one draft.

    Tokens in `never` are not said; those in `never_next` (they do not begin a word) not directly behind what was
    committed. When `memory` frames were read or the decoder's context is full, nothing more is heard or said: `room`
    tells before. The rows of at most `history` committed tokens are kept for those who compare tokens.

    With `phrases` a row leans towards them (`Leaning`): the draft is taken back where one that was begun is not said.

    A translation `reorders`: it sees all, and every token has the time where it looks.
    """

    def __init__(
        self, decoder: AttentionDecoder, *, sos: int, eos: int, never: Sequence[int] = (),
        never_next: Sequence[int] = (), edge: int = 4, back: int = 40, reach: int = 64, most: float = 0.16,
        spare: int = 10, memory: int = 1500, history: int = 24, phrases: Phrases | None = None,
    ) -> None:  # fmt: skip
        if wrong := [i for i, layer in enumerate(decoder.layers) if not isinstance(layer.cross, Soft)]:
            raise ValueError(f"cross attention in layers {wrong} is not soft: a token cannot be taken back there")
        if min(edge, back, reach - 1, memory - 1, history) < 0:
            raise ValueError(f"edge {edge}, back {back}, reach {reach}, memory {memory}, history {history}: too few")
        if phrases is not None and phrases.bonus < 0:
            raise ValueError(f"a bonus of {phrases.bonus:g}: it prefers phrases, and avoids none")
        self.decoder, self.sos, self.eos, self.phrases = decoder, sos, eos, phrases
        self.heads, self.peeks = decoder.alignment_heads, True
        self.edge, self.back, self.reach = edge, back, reach
        self.most, self.spare, self.history = most, spare, history
        table = decoder.memory_positions
        self.memory = memory if table is None else min(memory, len(table))
        self.context = decoder.context - decoder.opened
        self.longest = self.context - 1 - min(64, self.context // 8)  # committed tokens, and a draft
        self.never, self.never_next = (torch.tensor(sorted({*ids} - {eos}), dtype=torch.long)
                                       for ids in (never, never_next))  # fmt: skip

    def translating(self) -> AlignedGreedy:
        """The same for a translation: drafts go on to the end of the text, wherever they look."""
        made = copy(self)
        made.reorders, made.edge, made.most = True, 0, max(1.0, self.most)
        made.back = made.reach = self.memory
        return made

    def start(self, x: Frames) -> Beam:
        x = x[:0]
        none = torch.zeros(len(x.mask), dtype=torch.long, device=x.mask.device)
        looked = Looked(x.values.new_zeros(len(none), 0, len(self.heads), 0), none)
        told = none[:, None].expand(-1, RECENT) - 1
        root = 0 if self.phrases is None else self.phrases.root
        state = AlignedState(
            self.decoder.start(Memory.of(x)), looked, told.clone(), none + root, none + self.sos,
            *(none.clone() for _ in range(5)),
        )  # fmt: skip
        return Beam(Prefixes.empty(x.values, 1), x.values.new_zeros(len(none), 1), none.clone(), state)

    def start_at(self, x: Frames, heard: Tensor) -> Beam:
        beam = self.start(x)
        return replace(beam, frames=heard, state=replace(beam.state, origin=heard))

    def bias(self, beam: Beam, root: int | Tensor) -> Beam:
        if self.phrases is None:
            return super().bias(beam, root)
        state = beam.state
        nodes = self.phrases.start(len(beam.frames), 1, root=root)[:, 0].to(state.node.device)
        return replace(beam, state=replace(state, node=self._walked(nodes, state.told)))

    def step(self, x: Frames, beam: Beam) -> Beam:
        return self.peek(x, x[:0], beam)

    @torch.inference_mode()
    def peek(self, x: Frames, ahead: Frames, beam: Beam) -> Beam:
        x, ahead = x.front(), ahead.front()
        some = x.mask.any(1) | ahead.mask.any(1)
        if bool(some.all()):
            return self._heard(x, ahead, beam) if len(some) else beam
        if not bool(some.any()):
            return beam
        moves, rests = some.nonzero()[:, 0], (~some).nonzero()[:, 0]
        moved = self._heard(*(tree.select(part, moves) for part in (x, ahead, beam)))
        both: Beam = tree.select(tree.concat([moved, tree.select(beam, rests)]), torch.cat([moves, rests]).argsort())
        return both

    def _heard(self, x: Frames, ahead: Frames, beam: Beam) -> Beam:
        """Another draft behind frames [B, T, D], which are read, and those ahead of them, which are not."""
        beam = self._read(x, beam)
        glimpse = self._read(ahead, beam) if ahead.mask.shape[1] else beam
        said, before = self._spoken(glimpse, whole=False), beam.state
        decoder = replace(said.state.decoder, cross=before.decoder.cross)
        return replace(said, frames=beam.frames, state=replace(said.state, decoder=decoder, heard=before.heard))

    @torch.inference_mode()
    def finish(self, beam: Beam) -> Beam:
        if bool(beam.state.heard.any()):
            return self._spoken(beam, whole=True)
        said = beam.said.drop(beam.said.length[:, 0])  # it was about what nobody heard
        return replace(beam, said=said, score=said.log_probs.sum(2))

    def commit(self, beam: Beam, n: Tensor) -> Beam:
        after = super().commit(beam, n)
        if after is beam:
            return beam
        state, rows = beam.state, torch.arange(len(n), device=n.device)
        tokens = torch.cat([state.told, beam.said.tokens[:, 0]], 1)
        told = tokens.gather(1, torch.arange(RECENT, device=n.device) + n[:, None])
        place = self._walked(state.node, beam.said.tokens[:, 0], n)
        until = beam.said.ends[rows, 0, (n - 1).clamp(min=0)] - state.origin
        looked = replace(state.looked, first=state.looked.first + n)
        state = replace(
            state, looked=looked, told=told, node=place, last=told[:, -1].where(n > 0, state.last), done=state.done + n,
            until=until.where(n > 0, state.until),
        )  # fmt: skip
        return replace(after, score=after.said.log_probs.sum(2), state=state)

    def _walked(self, nodes: Tensor, tokens: Tensor, n: Tensor | None = None) -> Tensor:
        """Where texts that stood at `nodes` [B] among the phrases stand behind `tokens` [B, U], or `n` [B] of them."""
        if self.phrases is None:
            return nodes
        counts = [tokens.shape[1]] * len(tokens) if n is None else n.tolist()
        rows = zip(nodes.tolist(), tokens.tolist(), counts, strict=True)
        return nodes.new_tensor([Leaning(self.phrases, at).walked(row[:count]) for at, row, count in rows])

    def select(self, beam: Beam, parents: Tensor) -> Beam:
        return beam  # there is one

    def room(self, beam: Beam) -> Tensor:
        state = beam.state
        used = torch.maximum(state.done / self.longest, state.heard / self.memory)
        left: Tensor = (1 - used).clamp(min=0.0)
        return left

    def looks(self, beam: Beam) -> list[Draft]:
        looked, shown = beam.state.looked, beam.state.shown.tolist()
        drafts = []
        for b, draft in enumerate(super().looks(beam)):
            rows = int(looked.first[b]) + len(draft.tokens) + 1
            weights = looked.values[b, :rows, :, : shown[b]].transpose(0, 1)
            drafts.append(replace(draft, weights=weights.float().cpu(), heads=self.heads))
        return drafts

    def _read(self, x: Frames, beam: Beam) -> Beam:
        """The decoder reads frames [B, T, D], as far as there is room."""
        state = beam.state
        fits = x.mask & (x.mask.cumsum(1) <= (self.memory - state.heard)[:, None])
        new = Frames.of(x.values, fits).front()
        cross = self.decoder.read(Memory.of(new), packed(state.decoder.cross))
        state = replace(state, decoder=replace(state.decoder, cross=cross), heard=state.heard + new.lengths)
        return replace(beam, frames=beam.frames + x.lengths, state=state)

    def _spoken(self, beam: Beam, *, whole: bool) -> Beam:
        """Another draft; the `whole` rest of the text has no edge."""
        state = beam.state
        decoder = tidied(kept(state.decoder, state.done + self.decoder.opened))
        speakers = self._speakers(beam)
        rows, used = list[Tensor](), list[Tensor]()
        mask = state.decoder.cross[0].mask
        number = mask.cumsum(1) - 1  # of the frames that are there
        while any(row.speaks for row in speakers):
            block, sight = self._block(speakers, state), mask & in_view(speakers, number)
            cross = tuple(replace(c, mask=sight) for c in state.decoder.cross)
            hidden, seen, decoder = self.decoder.step(block, replace(decoder, cross=cross), heads=self.heads)
            count = self._follow(speakers, hidden, seen, number, sight, state.done, whole=whole)
            there = torch.arange(block.shape[1], device=block.device) < count[:, None]
            decoder = without(decoder, there)
            decoder = tidied(decoder) if block.shape[1] > 1 else decoder
            rows.append(seen.transpose(1, 2))
            used.append(there)
            if any(row.again for row in speakers):
                first = torch.tensor([len(row.tokens) if row.again else self.context for row in speakers])
                every = torch.cat(used, 1)
                used = [every & (every.cumsum(1) <= first.to(there.device)[:, None])]
                rows = [torch.cat(rows, 1)]
                decoder = tidied(kept(decoder, state.done + self.decoder.opened + used[0].sum(1)))
        n = torch.tensor([len(row.tokens) for row in speakers], device=state.done.device)
        decoder = kept(decoder, state.done + n + 1 + self.decoder.opened)
        looked = self._looked(state, torch.cat(rows, 1), torch.cat(used, 1), n)
        said = self._prefixes(speakers, replace(state, looked=looked), beam.said)
        decoder = replace(state.decoder, cache=decoder.cache)
        state = replace(state, decoder=decoder, looked=looked, shown=state.heard)
        return replace(beam, said=said, score=said.log_probs.sum(2), state=state)

    def _speakers(self, beam: Beam) -> list[Speaker]:
        """Who speaks, with the draft before as a guess."""
        state, n = beam.state, beam.said.length[:, 0].tolist()
        speakers = []
        for told, tokens, length, done, heard, far, at in zip(
            state.told.tolist(), beam.said.tokens[:, 0].tolist(), n, state.done.tolist(), state.heard.tolist(),
            farthest(state.looked).tolist(), state.node.tolist(), strict=True,
        ):  # fmt: skip
            most = min(int(self.most * heard) + self.spare, self.context - 2) - done  # its end is read beside others
            most = 0 if not heard or done >= self.longest else max(0, most)
            told, guess = [token for token in told if token >= 0], tokens[: min(length, most)]
            leaning = None if self.phrases is None else Leaning(self.phrases, at)
            speakers.append(Speaker(told, guess, most, far, heard, self.back, self.reach, self.edge, leaning))
        return speakers

    def _block(self, speakers: list[Speaker], state: AlignedState) -> Tensor:
        """The last token of each row, and the guess behind it [B, 1 + U]."""
        room = self.context - 1 - int(state.done.max())
        guesses = [row.guess[: max(0, room - len(row.tokens))] if row.speaks else [] for row in speakers]
        for row, guess in zip(speakers, guesses, strict=True):
            row.guess = guess
        most = max(map(len, guesses))
        last = [row.tokens[-1] if row.tokens else old for row, old in zip(speakers, state.last.tolist(), strict=True)]
        block = [[token, *guess, *[0] * (most - len(guess))] for token, guess in zip(last, guesses, strict=True)]
        return torch.tensor(block, device=state.last.device)

    def _follow(
        self, speakers: list[Speaker], hidden: Tensor, seen: Tensor, number: Tensor, sight: Tensor, done: Tensor, *,
        whole: bool,
    ) -> Tensor:  # fmt: skip
        """Let those who speak go on by what was found [B, U, D] -> how many of the U tokens were read rightly [B]."""
        begins = [not row.tokens and n > 0 for row, n in zip(speakers, done.tolist(), strict=True)]
        scores = self._scores(hidden, torch.tensor(begins, device=hidden.device))
        total, (best, tokens) = scores.logsumexp(-1), scores.max(-1)
        peaks = number.gather(1, seen.float().mean(1).masked_fill(~sight[:, None], -1.0).argmax(-1))
        found = zip(*(x.tolist() for x in (tokens, best - total, tokens == self.eos, peaks)), strict=True)
        counts = [
            row.follow(*each, whole=whole, others=partial(some, *of)) if row.speaks else 0
            for row, each, of in zip(speakers, found, zip(scores, total, strict=True), strict=True)
        ]
        return torch.tensor(counts, device=hidden.device)

    def _scores(self, hidden: Tensor, begins: Tensor) -> Tensor:
        """Logits [B, U, V] behind each [B, U, D]; the first token of rows that are `begins` [B] begins a word."""
        scores = self.decoder.logits(hidden)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        scores[:, :, self.never.to(scores.device)] = -torch.inf
        if len(self.never_next) and bool(begins.any()):
            rows = begins.nonzero()
            scores[rows, 0, self.never_next.to(scores.device)] = -torch.inf
        return scores

    def _looked(self, state: AlignedState, new: Tensor, used: Tensor, n: Tensor) -> Looked:
        """The rows of committed tokens, and behind them `n` [B] + 1 of the `new` ones [B, U, N, T] that were used."""
        mask, old = state.decoder.cross[0].mask, state.looked
        most = int(state.heard.max())
        if not bool(mask.all()):
            order = (~mask).byte().argsort(dim=1, stable=True)[:, :most]
            new = new.gather(3, order[:, None, None].expand(*new.shape[:3], -1)) * mask.gather(1, order)[:, None, None]
        at = torch.arange(old.values.shape[1], device=n.device)
        first = old.first[:, None]
        stays = (at < first) & (at >= first - self.history)
        valid = torch.cat([stays, used & (used.cumsum(1) <= n[:, None] + 1)], 1)
        values = torch.cat([grown(old.values, old.values.shape[1], most), new.to(old.values.dtype)], 1)
        order = (~valid).byte().argsort(dim=1, stable=True)[:, : int(valid.sum(1).max())]
        rows = torch.arange(len(n), device=n.device)[:, None]
        return Looked(values[rows, order], stays.sum(1))

    def _prefixes(self, speakers: list[Speaker], state: AlignedState, like: Prefixes) -> Prefixes:
        """What the speakers say, and when."""
        most = max(len(row.tokens) for row in speakers)
        values, first = state.looked.values.float().mean(2).cpu().numpy(), state.looked.first.tolist()
        until, heard, origin = state.until.tolist(), state.heard.tolist(), state.origin.tolist()
        tokens, log_probs, spans = [], [], []
        for b, row in enumerate(speakers):
            n = len(row.tokens)
            here = values[b, : first[b] + n + 1, : heard[b]]
            here = here - here.mean(0)  # frames that every token looks at drop out
            before = 0 if self.reorders else min(until[b], max(0, heard[b] - n - 1))
            place = apart if self.reorders else narrowed
            found = place(here[first[b] :, before:]) if n else []
            pad = most - n
            spans.append([(a + before + origin[b], z + before + origin[b]) for a, z in found] + [(0, 0)] * pad)
            tokens.append(row.tokens + [0] * pad)
            log_probs.append(row.log_probs + [0.0] * pad)
        whole = torch.tensor(spans, dtype=torch.long).view(len(speakers), 1, most, 2).to(like.tokens.device)
        length = torch.tensor([[len(row.tokens)] for row in speakers], device=like.tokens.device)
        return Prefixes(
            length.new_tensor(tokens).view(*length.shape, most), whole[..., 0].clone(), whole[..., 1].clone(),
            like.log_probs.new_tensor(log_probs).view(*length.shape, most), length,
        )  # fmt: skip


def in_view(speakers: Sequence[Speaker], number: Tensor) -> Tensor:
    """Which frames [B, T] of these numbers each row sees now."""
    first, end = torch.tensor([row.view for row in speakers], device=number.device).T[..., None]
    seen: Tensor = (number >= first) & (number < end)
    return seen


def some(scores: Tensor, total: Tensor, at: int, tokens: list[int]) -> list[float]:
    """The log-probabilities of some tokens at a place, of logits [U, V] and the logarithms of their sums [U]."""
    return (scores[at, tokens] - total[at]).tolist()
