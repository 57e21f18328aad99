"""Phrase biasing: what a user expects to be said makes a hypothesis rank higher."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from speechattn.frames import Frames
from speechattn.text.pieces import Encodes, spelled

__all__ = ["Hits", "PhraseScorer", "PhraseTables", "Phrases", "hits"]


class Hits(NamedTuple):
    """Where a phrase was said: first and last-plus-one token, or start and end in the unit of the times given."""

    text: str
    spans: tuple[tuple[float, float], ...]


def hits(
    phrases: Sequence[tuple[str, Sequence[Sequence[Hashable]]]], said: Sequence[Hashable],
    times: Sequence[tuple[float, float]] | None = None,
) -> list[Hits]:  # fmt: skip
    """Where each phrase (text, spellings) was said in a final sequence of tokens, or of words; perhaps nowhere.

    `times` of each token or word. Of two spellings at one place the longer one counts.
    """
    spans = [(i, i + 1) for i in range(len(said))] if times is None else times
    begins: dict[Hashable, list[int]] = {}
    for i, token in enumerate(said):
        begins.setdefault(token, []).append(i)
    report = []
    for text, spellings in phrases:
        found = {(i, -i - len(s)) for s in spellings for i in begins.get(s[0], []) if [*said[i : i + len(s)]] == [*s]}
        kept: list[tuple[int, int]] = []
        for begin, end in sorted(found):
            if not kept or -end > kept[-1][1]:  # not inside another
                kept.append((begin, -end))
        report.append(Hits(text, tuple((spans[i][0], spans[j - 1][1]) for i, j in kept)))
    return report


class PhraseTables(NamedTuple):
    """The automaton as plain arrays, for a compiled loop; N nodes, A arcs.

    The children of node n are `child[first[n] : first[n + 1]]` by `token`, in order. A token that n has no child for
    is looked up in `failure[n]`, and so on until the root, whose failure is itself. `owed[n]` is what is to be given
    back of a phrase half said. From n, over the links to m, to a child of m: bonus + owed[m] - owed[n]; to the root
    because there is no child anywhere: -owed[n].
    """

    first: np.ndarray[Any, Any]  # [N + 1] int64
    token: np.ndarray[Any, Any]  # [A] int64
    child: np.ndarray[Any, Any]  # [A] int64
    failure: np.ndarray[Any, Any]  # [N] int64
    root: np.ndarray[Any, Any]  # [N] int64: that of the set that the node belongs to
    depth: np.ndarray[Any, Any]  # [N] int64: tokens that the node stands for
    owed: np.ndarray[Any, Any]  # [N] float64


@dataclass(frozen=True)
class Trie:
    """One set of phrases: node 0 is the root, parents come before children.

    A node stands for the last tokens of a text, the longest end of it that some phrase begins with (Aho-Corasick),
    and for which of them lie in a phrase already said. So a few strings have several nodes: where "b c" was begun in
    the middle of a phrase "a b" that was completed, "b" is paid for.
    """

    children: list[dict[int, int]]
    failure: list[int]
    depth: list[int]
    open: list[int]  # tokens that lie in no phrase said

    @classmethod
    def of(cls, phrases: Sequence[Sequence[int]]) -> Trie:
        """The automaton of some phrases."""
        children, ends = plain(phrases)
        failure, order, depth = links(children)
        inside = [0] * len(children)  # bit i: token i of the node's string lies in a phrase within the string
        longest = [0] * len(children)  # the longest phrase that the string ends with
        for parent, node in order:
            longest[node] = depth[node] if node in ends else longest[failure[node]]
            inside[node] = inside[parent] | (((1 << longest[node]) - 1) << (depth[node] - longest[node]))
        states = [(0, 0), *((node, inside[node]) for _, node in order)]
        ids = {state: i for i, state in enumerate(states)}
        arcs: list[dict[int, int]] = []
        links_: list[int] = []

        def known(state: tuple[int, int]) -> int:
            if state not in ids:
                ids[state] = len(states)
                states.append(state)
            return ids[state]

        for node, paid in states:  # which grows
            behind = failure[node]
            links_.append(known((behind, paid >> (depth[node] - depth[behind]))))
            arcs.append({token: known((to, paid | inside[to])) for token, to in sorted(children[node].items())})
        return cls(
            arcs, links_, [depth[node] for node, _ in states],
            [depth[node] - paid.bit_count() for node, paid in states],
        )  # fmt: skip


def plain(phrases: Sequence[Sequence[int]]) -> tuple[list[dict[int, int]], set[int]]:
    """The children of each node of a trie, and the nodes where a phrase ends."""
    children: list[dict[int, int]] = [{}]
    ends: set[int] = set()
    for phrase in phrases:
        node = 0
        for token in phrase:
            if token not in children[node]:
                children[node][token] = len(children)
                children.append({})
            node = children[node][token]
        ends.add(node)
    return children, ends


def links(children: list[dict[int, int]]) -> tuple[list[int], list[tuple[int, int]], list[int]]:
    """Each node's failure link, all (parent, node) by depth, and the depths."""
    failure, depth = [0] * len(children), [0] * len(children)
    order: list[tuple[int, int]] = []
    queue = deque([0])
    while queue:
        parent = queue.popleft()
        for token, node in children[parent].items():
            depth[node] = depth[parent] + 1
            order.append((parent, node))
            queue.append(node)
            behind = parent
            while behind:
                behind = failure[behind]
                if token in children[behind]:
                    failure[node] = children[behind][token]
                    break
    return failure, order, depth


class Arrays(NamedTuple):
    """All sets of a book for lookups in batches."""

    chain: Tensor  # [N, C] the key of token 0 at the node, at its failure link, ..., and at the root to the end
    key: Tensor  # [A + 1] node * (V + 2) + token + 1, in order, and one that is larger than all
    child: Tensor  # [A + 1]
    gain: Tensor  # [A + 1] the bonus and what the node owed
    first: Tensor  # [N + 1]
    root: Tensor  # [N]
    owed: Tensor  # [N]


class Phrases:
    """Sets of phrases, as token sequences over a vocabulary of `vocab`; nodes of all sets are numbered through.

    A hypothesis' state is the id of a node. Law: over any text, what `step` gave and `finish` at its end give add up
    to `bonus` times the number of tokens that lie in at least one phrase said in full; a token that two phrases share
    counts once. Each token that goes on with a phrase gives `bonus` at once, and what turns out not to be a phrase is
    given back. After each token that lies in no beginning of a phrase, nothing is owed.

    Sets are added and removed while others are in use, and rows of one batch may use different ones: a node knows its
    set. Nodes of a set that was removed must not be used any more, unless by `moved`, before.
    """

    def __init__(self, phrases: Sequence[Sequence[int]] = (), *, bonus: float = 1.0, vocab: int) -> None:
        if vocab < 1:
            raise ValueError(f"a vocabulary of {vocab}")
        self.bonus, self.vocab, self.version = bonus, vocab, 0  # of the sets: it grows with every change
        self._sets: dict[int, Trie] = {}
        self._arrays: dict[tuple[torch.device, torch.dtype], Arrays] = {}
        self.root = self.add(phrases)

    @classmethod
    def from_text(cls, lines: Sequence[str], tokenizer: Encodes, *, bonus: float = 1.0, vocab: int) -> Phrases:
        """Phrases as a user writes them, one a line; see `spelled`."""
        return cls([s for phrase in spelled(lines, tokenizer) for s in phrase.spellings], bonus=bonus, vocab=vocab)

    def add(self, phrases: Sequence[Sequence[int]]) -> int:
        """Another set of phrases; its root. ValueError for a phrase without tokens or with unknown ones."""
        for phrase in phrases:
            if not len(phrase):
                raise ValueError("a phrase without tokens")
            if min(phrase) < 0 or max(phrase) >= self.vocab:
                raise ValueError(f"phrase {list(phrase)}: tokens are 0 to {self.vocab - 1}")
        trie = Trie.of(phrases)
        root = 0
        for at, other in sorted(self._sets.items()):  # the first gap that is large enough
            if at - root >= len(trie.depth):
                break
            root = at + len(other.depth)
        self._sets[root] = trie
        self._arrays.clear()
        self.version += 1
        return root

    def remove(self, root: int) -> None:
        """Forget a set; its ids will be given to another. KeyError when `root` is none."""
        del self._sets[root]
        self._arrays.clear()
        self.version += 1

    def start(self, rows: int, size: int, *, root: int | Tensor | None = None) -> Tensor:
        """Nodes [B, K] where nothing is said; `root`: of one set for all, or [B]; the first one.

        KeyError when there is no such set.
        """
        roots = torch.as_tensor(self.root if root is None else root).reshape(-1, 1)
        for one in {*roots[:, 0].tolist()}:
            self._sets[one]
        return roots.expand(rows, size).clone()

    def step(self, node: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        """Behind `node` [...] each says `token` [...] -> next nodes [...], bonus [...]; shapes are broadcast.

        Tokens -1 and V are in no phrase.
        """
        at = self._on(node.device)
        chain = F.embedding(node, at.chain)
        key = chain + token[..., None]
        arc = torch.searchsorted(at.key, key)
        hit = at.key.take(arc) == key
        which = hit.view(torch.uint8).argmax(-1, keepdim=True)  # the first
        there = hit.gather(-1, which)[..., 0]
        arc = arc.gather(-1, which)[..., 0]
        bonus = torch.where(there, at.gain.take(arc), 0) - at.owed.take(node)
        return torch.where(there, at.child.take(arc), at.root.take(node)), bonus

    def finish(self, node: Tensor) -> Tensor:
        """What the end of the text gives [...]: back what a phrase half said got."""
        return -self._on(node.device).owed[node]

    def scores(self, node: Tensor) -> Tensor:
        """The bonus of every token [..., V] behind `node` [...]."""
        at = self._on(node.device)
        flat = node.reshape(-1)
        chain = at.chain[flat] // (self.vocab + 2)
        new = chain != chain.roll(1, 1)  # not the root again
        new[:, 0] = True
        rows, column = new.nonzero(as_tuple=True)
        origin = chain[rows, column]
        count = at.first[origin + 1] - at.first[origin]
        arc = torch.arange(int(count.sum()), device=node.device)
        arc = arc - (count.cumsum(0) - count - at.first[origin]).repeat_interleave(count)
        token = at.key[arc] % (self.vocab + 2) - 1
        value = at.gain[arc] - at.owed[flat[rows]].repeat_interleave(count)
        out = (-at.owed[flat])[:, None].repeat(1, self.vocab)
        where = (rows * self.vocab).repeat_interleave(count) + token
        nearest = "amax" if self.bonus > 0 else "amin"  # the longest match gives most
        out.view(-1).scatter_reduce_(0, where, value, nearest)
        return out.view(*node.shape, self.vocab)

    def moved(self, node: Tensor, root: int | Tensor, recent: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """Hypotheses [B, K] go over to the set of `root` (or [B]) -> nodes, bonus [B, K].

        `recent` [B, K, U] is what they said last, as far as it is known, the first `length` [B, K] of it. What the
        old set kept for phrases half said is exchanged for what the new set would have given for them.
        """
        new = self.start(*node.shape, root=root).to(node.device)
        for u in range(recent.shape[2]):
            new = torch.where(u < length, self.step(new, recent[..., u])[0], new)
        return new, self.finish(node) - self.finish(new)

    def tables(self) -> PhraseTables:
        """All sets as plain arrays."""
        size = max((root + len(trie.depth) for root, trie in self._sets.items()), default=0)
        failure, home, depth = np.arange(size), np.arange(size), np.zeros(size, np.int64)
        degree, owed = np.zeros(size, np.int64), np.zeros(size)
        token: list[int] = []
        child: list[int] = []
        for root, trie in sorted(self._sets.items()):
            span = slice(root, root + len(trie.depth))
            failure[span] = np.array(trie.failure) + root
            home[span] = root
            depth[span] = trie.depth
            owed[span] = np.array(trie.open) * self.bonus
            degree[span] = [len(arcs) for arcs in trie.children]
            token += [t for arcs in trie.children for t in arcs]
            child += [to + root for arcs in trie.children for to in arcs.values()]
        first = np.concatenate([[0], degree.cumsum()]).astype(np.int64)
        return PhraseTables(first, np.array(token, np.int64), np.array(child, np.int64), failure, home, depth, owed)

    def _on(self, device: torch.device) -> Arrays:
        """The arrays on a device."""
        kind = device, torch.get_default_dtype()
        if kind not in self._arrays:
            self._arrays[kind] = self._made(*kind)
        return self._arrays[kind]

    def _made(self, device: torch.device, dtype: torch.dtype) -> Arrays:
        """From the tables."""
        tables = self.tables()
        chain = [np.arange(len(tables.root))]
        while (chain[-1] != tables.root).any():
            chain.append(tables.failure[chain[-1]])
        nodes = np.repeat(np.arange(len(tables.root)), np.diff(tables.first))
        key = np.append(nodes * (self.vocab + 2) + tables.token + 1, np.iinfo(np.int64).max)

        def put(x: np.ndarray[Any, Any]) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(x)).to(device)

        gain = np.append(tables.owed[nodes] + self.bonus, 0.0)
        chains = np.stack(chain, 1) * (self.vocab + 2) + 1
        return Arrays(
            put(chains), put(key), put(np.append(tables.child, 0)), put(gain).to(dtype), put(tables.first),
            put(tables.root), put(tables.owed).to(dtype),
        )  # fmt: skip


class PhraseScorer:
    """`Phrases` as a `Scorer`: the state is the node of each hypothesis [B, K].

    A token that no phrase has, as the end of the sentence, takes back what a half-said phrase was given.
    """

    partial = False

    def __init__(self, phrases: Phrases) -> None:
        self.phrases = phrases

    def start(self, x: Frames) -> Tensor:
        """Nothing said, for each row of `x` [B, T, D], with the first set of phrases."""
        return self.phrases.start(len(x.mask), 1).to(x.mask.device)

    def read(self, x: Frames, state: Tensor) -> Tensor:
        """Sound says nothing here."""
        return state

    def score(self, state: Tensor, candidates: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The bonus of every token [B, K, V], and the same nodes."""
        return self.phrases.scores(state), state

    def extend(self, state: Tensor, parents: Tensor, tokens: Tensor) -> Tensor:
        """Hypothesis j of a row was that of `parents` [B, K'] and says `tokens` [B, K']."""
        return self.phrases.step(state.gather(1, parents), tokens)[0]

    def select(self, state: Tensor, parents: Tensor) -> Tensor:
        """Hypotheses in another order [B, K']."""
        return state.gather(1, parents)
