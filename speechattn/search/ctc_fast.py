"""The recursion of `CTCPrefixBeam` over frames, compiled by numba for the CPU.

The arithmetic and the order of equals are those of the readable one. What cannot enter the beam is not looked at:
a token more is worth no more than the best prefix, the token's log-probability and the most that biasing gives.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit  # type: ignore[import-not-found,import-untyped,unused-ignore]
from torch import Tensor

from speechattn.search.ctc import PrefixState
from speechattn.search.ctc_paths import MIX, Spoken
from speechattn.search.phrases import Phrases

__all__ = ["Arcs", "read"]

Array = np.ndarray[Any, Any]
NEVER = -np.inf
MIX_A, MIX_B = np.int64(MIX[0]), np.int64(MIX[1])
LOW = np.int64(0xFFFFFFFF)


class Arcs(NamedTuple):
    """What the loop needs of `PhraseTables`; the most that a token can be given is `most`."""

    first: Array
    token: Array
    child: Array
    failure: Array
    owed: Array
    ended: Array
    begins: Array
    bonus: float
    most: float

    @classmethod
    def of(cls, phrases: Phrases | None) -> Arcs:
        """Of no phrases: one node, whose arcs lead nowhere."""
        if phrases is None:
            first, nothing, node = np.zeros(2, np.int64), np.zeros(0, np.int64), np.zeros(1, np.int64)
            return cls(first, nothing, nothing, node, np.zeros(1), node, np.zeros(1, np.bool_), 0.0, 0.0)
        t = phrases.tables()
        most = max(phrases.bonus, 0.0) + max(-float(t.owed.min(initial=0.0)), 0.0)
        return cls(t.first, t.token, t.child, t.failure, t.owed, t.ended, t.begins, float(phrases.bonus), most)


def read(
    x: Tensor, live: Tensor, state: PrefixState, arcs: Arcs, *, blank: int, candidates: int | None, reward: float
) -> tuple[PrefixState, Tensor, Spoken]:
    """As the readable loop: log-probabilities [B, T, V], where they count [B, T]."""
    rows, frames, vocab = x.shape
    size = state.last.shape[1]
    width = vocab if candidates is None else min(candidates, vocab)
    if arcs.most == 0 and not len(arcs.token):
        width = min(width, 2 * size)  # of the others none can enter
    worth = torch.stack([state.label, state.blank, state.best_label, state.best_blank, state.bonus], 1).numpy()
    ids = torch.stack([state.key, state.parent, state.last, state.node], 1).numpy()
    root = np.zeros((rows, 2 * size), np.int64)
    flags = np.zeros((2, rows, 2 * size, frames), np.bool_)
    token = np.zeros((rows, 2 * size, frames), np.int64)
    values = x.detach() if x.dtype in (torch.float32, torch.float64) else x.detach().float()
    log_prob = np.zeros(token.shape, np.float32 if values.dtype == torch.float32 else np.float64)
    _rows(values.contiguous().numpy(), live.numpy(), blank, width, reward, worth, ids, arcs,
          root, flags[0], flags[1], token, log_prob)  # fmt: skip
    parts = (
        [torch.from_numpy(worth[:, i].copy()) for i in range(5)],
        [torch.from_numpy(ids[:, i].copy()) for i in range(4)],
    )
    label, free, best_label, best_blank, bonus = parts[0]
    key, parent, last, node = parts[1]
    new = replace(state, label=label, blank=free, best_label=best_label, best_blank=best_blank, bonus=bonus, key=key,
                  parent=parent, last=last, node=node)  # fmt: skip
    spoken = Spoken(*(torch.from_numpy(part) for part in (flags[0], flags[1], token, log_prob)))
    return new, torch.from_numpy(root), spoken


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator,unused-ignore]
def _add(a: float, b: float) -> float:
    """log(exp a + exp b)."""
    if a < b:
        a, b = b, a
    if b - a < -40.0 or b == NEVER:  # nothing beside it, in float64
        return a
    more: float = np.log1p(np.exp(b - a))
    return a + more


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator,unused-ignore]
def _follow(node: int, token: int, arcs: Arcs) -> tuple[int, float]:
    """`Phrases.step` of one node and token."""
    first, tokens, owed, failure = arcs.first, arcs.token, arcs.owed, arcs.failure
    if token < len(arcs.begins) and arcs.begins[token]:
        node = arcs.ended[node]
    at = node
    while True:
        low, high = first[at], first[at + 1]
        while low < high:
            middle = (low + high) // 2
            if tokens[middle] < token:
                low = middle + 1
            else:
                high = middle
        if low < first[at + 1] and tokens[low] == token:
            return arcs.child[low], owed[at] + arcs.bonus - owed[node]
        if failure[at] == at:
            return at, -owed[node]
        at = failure[at]


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator,unused-ignore]
def _likely(x: Array, blank: int, width: int, above: float, tokens: Array, ranked: Array) -> int:
    """The at most `width` best tokens of a frame that are better than `above`, best first; how many."""
    n = 0
    for token in range(len(x)):
        value = x[token]
        if value > above and token != blank:
            if n < width:
                n += 1
            at = n - 1
            while at > 0 and ranked[at - 1] < value:
                ranked[at] = ranked[at - 1]
                tokens[at] = tokens[at - 1]
                at -= 1
            ranked[at] = value
            tokens[at] = token
            if n == width:
                above = max(above, ranked[n - 1])
    return n


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator,unused-ignore]
def _put(score: float, what: int, scores: Array, chosen: Array, n: int) -> int:
    """Into the best of the list, of which `n` are there, behind its equals; how many there are then."""
    if n < len(scores):
        n += 1
    elif not score > scores[n - 1]:
        return n
    at = n - 1
    while at > 0 and scores[at - 1] < score:
        scores[at] = scores[at - 1]
        chosen[at] = chosen[at - 1]
        at -= 1
    scores[at] = score
    chosen[at] = what
    return n


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator,unused-ignore]
def _stay(
    x: Array, blank: int, worth: Array, ids: Array, source: Array, began: Array, room: Array, scores: Array,
    chosen: Array, parents: Array,
) -> tuple[int, float]:  # fmt: skip
    """What becomes of the prefixes that are there: into `room` [6, K], and onto the list of the best.

    -> how many are listed, and the best score before this frame.
    """
    size = worth.shape[1]
    label, free, best_label, best_free, extra = worth
    key, parent, last = ids[0], ids[1], ids[2]
    total, best, new_label, new_free, new_best, new_best_free = room
    for k in range(size):
        total[k] = _add(label[k], free[k])
        best[k] = max(best_label[k], best_free[k])
        parents[k] = -1
        source[2 * k] = 2 * k
        began[k] = False
    n, top = 0, NEVER
    for j in range(size):
        if total[j] == NEVER:
            continue
        top = max(top, total[j] + extra[j])
        entry, best_entry, again = NEVER, NEVER, NEVER
        if last[j] >= 0:
            again = x[last[j]]
            for i in range(size):
                if key[i] == parent[j] and total[i] > NEVER:
                    parents[j] = i
                    same = last[i] == last[j]
                    entry = free[i] if same else total[i]
                    best_entry = best_free[i] if same else best[i]
                    if best_entry > best_label[j]:
                        source[2 * j] = 2 * i + (1 if same or best_free[i] > best_label[i] else 0)
                        began[j] = True
                    break
        new_label[j] = _add(label[j], entry) + again
        new_free[j] = total[j] + x[blank]
        new_best[j] = max(best_label[j], best_entry) + again
        new_best_free[j] = best[j] + x[blank]
        score = _add(new_label[j], new_free[j]) + extra[j]
        if score > NEVER:
            n = _put(score, j, scores, chosen, n)
    return n, top


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator,unused-ignore]
def _grow(
    width: int, likely: int, reward: float, worth: Array, ids: Array, arcs: Arcs, room: Array, tokens: Array,
    ranked: Array, scores: Array, chosen: Array, parents: Array, n: int,
) -> int:  # fmt: skip
    """Prefixes with one of the `likely` best tokens more come onto the list; how many are on it then."""
    size = worth.shape[1]
    free, extra, last, node, total = worth[1], worth[4], ids[2], ids[3], room[0]
    for k in range(size):
        if total[k] == NEVER:
            continue
        for c in range(likely):
            if n == size and total[k] + ranked[c] + (extra[k] + (reward + arcs.most)) <= scores[n - 1]:
                break  # the others are worse still
            token = tokens[c]
            known = False
            for j in range(size):
                known |= parents[j] == k and last[j] == token
            if known:
                continue
            score = (free[k] if token == last[k] else total[k]) + ranked[c]
            gain = reward
            if len(arcs.token):
                gain += _follow(node[k], token, arcs)[1]
            score += extra[k] + gain
            if score > NEVER:
                n = _put(score, size + k * width + c, scores, chosen, n)
    return n


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator,unused-ignore]
def _keep(
    width: int, reward: float, worth: Array, ids: Array, after: Array, ids_after: Array, arcs: Arcs, source: Array,
    began: Array, room: Array, tokens: Array, ranked: Array, chosen: Array, n: int,
) -> None:  # fmt: skip
    """The `n` that are `chosen` are the next state.

    Where their paths come from is written behind the first 2 K of `source`, which are those of the old prefixes.
    """
    size = worth.shape[1]
    free, best_label, best_free, extra, last = worth[1], worth[2], worth[3], worth[4], ids[2]
    total, best = room[0], room[1]
    after[:4] = NEVER
    for s in range(size):
        at = 2 * size + 2 * s
        if s >= n:
            after[4, s] = 0.0
            ids_after[:, s] = ids[:, 0]
            ids_after[2, s] = -1
            source[at], source[at + 1], began[size + s] = 0, 1, False
            continue
        what = chosen[s]
        k = what if what < size else (what - size) // width
        side = 1 if best_free[k] > best_label[k] else 0
        source[at + 1] = 2 * k + side
        ids_after[:, s] = ids[:, k]
        after[4, s] = extra[k]
        if what < size:
            after[:4, s] = room[2:, k]
            source[at], began[size + s] = source[2 * k], began[k]
            continue
        c = (what - size) % width
        token = tokens[c]
        same = token == last[k]
        after[0, s] = (free[k] if same else total[k]) + ranked[c]
        after[2, s] = (best_free[k] if same else best[k]) + ranked[c]
        gain = reward
        if len(arcs.token):
            ids_after[3, s], given = _follow(ids[3, k], token, arcs)
            gain += given
        after[4, s] += gain
        mixed = (ids[0, k] ^ ((token + 1) * MIX_A)) * MIX_B
        ids_after[0, s] = mixed ^ ((mixed >> 32) & LOW)
        ids_after[1, s] = ids[0, k]
        ids_after[2, s] = token
        source[at], began[size + s] = 2 * k + (1 if same else side), True


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator,unused-ignore]
def _rows(
    x: Array, live: Array, blank: int, width: int, reward: float, worth: Array, ids: Array, arcs: Arcs, root: Array,
    label: Array, begins: Array, token: Array, log_prob: Array,
) -> None:  # fmt: skip
    """All frames of all rows: the state in place, and the paths followed back."""
    rows, frames, _ = x.shape
    size = worth.shape[2]
    after, ids_after = np.empty((5, size)), np.empty((4, size), np.int64)
    room, ranked, tokens = np.empty((6, size)), np.empty(width + 1), np.empty(width + 1, np.int64)
    scores, chosen, parents = np.empty(size), np.empty(size, np.int64), np.empty(size, np.int64)
    source, began = np.empty((frames, 4 * size), np.int64), np.empty((frames, 2 * size), np.bool_)
    lasts = np.empty((frames, size), np.int64)
    for b in range(rows):
        for t in range(frames):
            if live[b, t]:
                n, top = _stay(x[b, t], blank, worth[b], ids[b], source[t], began[t], room, scores, chosen, parents)
                above = NEVER
                if n == size:  # less than this cannot enter; with a margin for rounding
                    above = scores[n - 1] - top - (reward + arcs.most)
                    above -= 1e-9 * (1 + abs(above) + abs(top))
                likely = _likely(x[b, t], blank, width, above, tokens, ranked)
                n = _grow(width, likely, reward, worth[b], ids[b], arcs, room, tokens, ranked, scores, chosen, parents,
                          n)  # fmt: skip
                _keep(width, reward, worth[b], ids[b], after, ids_after, arcs, source[t], began[t], room, tokens,
                      ranked, chosen, n)  # fmt: skip
                worth[b] = after
                ids[b] = ids_after
                lasts[t] = ids_after[2]
        for path in range(2 * size):
            at = path
            for t in range(frames - 1, -1, -1):
                if live[b, t]:
                    which = at // 2
                    if at % 2 == 0 and lasts[t, which] >= 0:
                        label[b, path, t] = True
                        begins[b, path, t] = began[t, size + which]
                        token[b, path, t] = lasts[t, which]
                        log_prob[b, path, t] = x[b, t, lasts[t, which]]
                    at = source[t, 2 * size + at]
            root[b, path] = at
