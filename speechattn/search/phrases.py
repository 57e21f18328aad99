"""Phrase biasing: what a user expects to be said makes a hypothesis rank higher."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from speechattn.errors import InputError
from speechattn.frames import Frames
from speechattn.search.phrase_trie import Trie
from speechattn.text.pieces import Encodes, Pieces, spelled

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
    """The automaton as plain arrays, for a compiled loop; N nodes, A arcs, vocabulary V.

    A text at node n goes on with a token t from s = `ended[n]` where `begins[t]`, else from s = n. The children of
    node s are `child[first[s] : first[s + 1]]` by `token`, in order. A token that s has no child for is looked up in
    `failure[s]`, and so on until the root, whose failure is itself. `owed[s]` is what is to be given back of phrases
    not said. From s, over the links to m, to a child of m: bonus + owed[m] - owed[s]; to the root because there is no
    child anywhere: -owed[s]. The end of the text: -owed[ended[n]].
    """

    first: np.ndarray[Any, Any]  # [N + 1] int64
    token: np.ndarray[Any, Any]  # [A] int64
    child: np.ndarray[Any, Any]  # [A] int64
    failure: np.ndarray[Any, Any]  # [N] int64
    root: np.ndarray[Any, Any]  # [N] int64: that of the set that the node belongs to
    depth: np.ndarray[Any, Any]  # [N] int64: tokens that the node stands for
    owed: np.ndarray[Any, Any]  # [N] float64
    ended: np.ndarray[Any, Any]  # [N] int64: n itself where no phrase waits for the end of its word
    begins: np.ndarray[Any, Any]  # [V] bool


class Arrays(NamedTuple):
    """All sets of a book for lookups in batches."""

    chain: Tensor  # [N, C] the key of token 0 at the node, at its failure link, ..., and at the root to the end
    key: Tensor  # [A + 1] node * (V + 2) + token + 1, in order, and one that is larger than all
    child: Tensor  # [A + 1]
    gain: Tensor  # [A + 1] the bonus and what the node owed
    first: Tensor  # [N + 1]
    root: Tensor  # [N]
    owed: Tensor  # [N]
    ended: Tensor  # [N]
    begins: Tensor  # [V + 2] of tokens -1 to V; the first and the last end a text


class Phrases:
    """Sets of phrases, as token sequences over a vocabulary of `vocab`; nodes of all sets are numbered through.

    A phrase was said where its tokens follow each other and the word of the last one ends: the next token is one of
    `begins`, those that begin a word or end the text, or there is none. Without `begins` it was said with its last
    token, as in text without spaces.

    A hypothesis' state is the id of a node. Law: over any text, what `step` gave and `finish` at its end give add up
    to `bonus` times the number of tokens that lie in at least one phrase said. Each phrase counts wherever it was
    said, also inside or at the beginning of another ("go" in "go on" and in "go off", not in "gold"); a token that
    several share counts once. Each token that goes on with a phrase gives `bonus` at once, and what turns out not to
    be said is given back: what was given so far is for the tokens in phrases said, and for those of the longest end
    of the text that some phrase begins with, or is.

    Sets are added and removed while others are in use, and rows of one batch may use different ones: a node knows its
    set. Nodes of a set that was removed must not be used any more, unless by `moved`, before.
    """

    def __init__(
        self, phrases: Sequence[Sequence[int]] = (), *, bonus: float = 1.0, vocab: int,
        begins: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        if vocab < 1:
            raise ValueError(f"a vocabulary of {vocab}")
        self.begins = None if begins is None else frozenset(begins)
        if wrong := sorted(token for token in self.begins or () if not 0 <= token < vocab):
            raise ValueError(f"tokens {wrong} begin a word: tokens are 0 to {vocab - 1}")
        self.bonus, self.vocab, self.version = bonus, vocab, 0  # of the sets: it grows with every change
        self.lines: tuple[str, ...] = ()  # the first set as it was written, if it was
        self._sets: dict[int, Trie] = {}
        self._arrays: dict[tuple[torch.device, torch.dtype], Arrays] = {}
        self.root = self.add(phrases)

    @classmethod
    def from_text(cls, lines: Sequence[str], tokenizer: Encodes, *, bonus: float = 1.0, vocab: int) -> Phrases:
        """Phrases as a user writes them, one a line (see `spelled`), that end with a word if the tokenizer knows words.

        InputError for what cannot be spelled, and for pieces that end with a space.
        """
        tokens = [s for phrase in spelled(lines, tokenizer) for s in phrase.spellings]
        made = cls(tokens, bonus=bonus, vocab=vocab, begins=beginnings(tokenizer))
        made.lines = tuple(lines)
        return made

    def add(self, phrases: Sequence[Sequence[int]]) -> int:
        """Another set of phrases; its root. ValueError for a phrase without tokens or with unknown ones."""
        for phrase in phrases:
            if not len(phrase):
                raise ValueError("a phrase without tokens")
            if min(phrase) < 0 or max(phrase) >= self.vocab:
                raise ValueError(f"phrase {list(phrase)}: tokens are 0 to {self.vocab - 1}")
        trie = Trie.of(phrases, self.begins)
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

    def set_of(self, node: int) -> tuple[int, Trie]:
        """The root of the set that a node belongs to, and its automaton."""
        root = max(at for at in self._sets if at <= node)
        return root, self._sets[root]

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

        Tokens -1 and V are in no phrase, and end the text.
        """
        at = self._on(node.device)
        if self.begins is not None:
            node = torch.where(at.begins.take(token + 1), at.ended.take(node), node)
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
        at = self._on(node.device)
        return -at.owed[at.ended[node]]

    def scores(self, node: Tensor) -> Tensor:
        """The bonus of every token [..., V] behind `node` [...]."""
        at, flat = self._on(node.device), node.reshape(-1)
        if self.begins is None:
            return self._dense(flat, at).view(*node.shape, self.vocab)
        over = at.ended[flat]
        rows = (over != flat).nonzero()[:, 0]
        every = self._dense(torch.cat([flat, over[rows]]), at)
        out = every[: len(flat)]
        out[rows] = torch.where(at.begins[1:-1], every[len(flat) :], out[rows])
        return out.view(*node.shape, self.vocab)

    def _dense(self, flat: Tensor, at: Arrays) -> Tensor:
        """What every token gives [N, V] that goes on from nodes [N] themselves, whether it begins a word or not."""
        chain = at.chain[flat] // (self.vocab + 2)
        new = chain != chain.roll(1, 1)  # not the root again
        new[:, 0] = True
        rows, column = new.nonzero(as_tuple=True)
        origin = chain[rows, column]
        count = at.first[origin + 1] - at.first[origin]
        arc = torch.arange(int(count.sum()), device=flat.device)
        arc = arc - (count.cumsum(0) - count - at.first[origin]).repeat_interleave(count)
        token = at.key[arc] % (self.vocab + 2) - 1
        value = at.gain[arc] - at.owed[flat[rows]].repeat_interleave(count)
        out = (-at.owed[flat])[:, None].repeat(1, self.vocab)
        where = (rows * self.vocab).repeat_interleave(count) + token
        nearest = "amax" if self.bonus > 0 else "amin"  # the longest match gives most
        out.view(-1).scatter_reduce_(0, where, value, nearest)
        return out

    def moved(self, node: Tensor, root: int | Tensor, recent: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """Hypotheses [B, K] go over to the set of `root` (or [B]) -> nodes, bonus [B, K].

        `recent` [B, K, U] is what they said last, as far as it is known, the first `length` [B, K] of it. What the
        old set gave for phrases not said (or whose last word may still go on) is exchanged for what the new set would
        have given for its own.
        """
        new = self.start(*node.shape, root=root).to(node.device)
        for u in range(recent.shape[2]):
            new = torch.where(u < length, self.step(new, recent[..., u])[0], new)
        owed = self._on(node.device).owed
        return new, owed[new] - owed[node]

    def tables(self) -> PhraseTables:
        """All sets as plain arrays."""
        size = max((root + len(trie.depth) for root, trie in self._sets.items()), default=0)
        failure, home, depth, ended = np.arange(size), np.arange(size), np.zeros(size, np.int64), np.arange(size)
        degree, owed = np.zeros(size, np.int64), np.zeros(size)
        token: list[int] = []
        child: list[int] = []
        for root, trie in sorted(self._sets.items()):
            span = slice(root, root + len(trie.depth))
            failure[span] = np.array(trie.failure) + root
            ended[span] = np.array(trie.ended) + root
            home[span] = root
            depth[span] = trie.depth
            owed[span] = np.array(trie.open) * self.bonus
            degree[span] = [len(arcs) for arcs in trie.children]
            token += [t for arcs in trie.children for t in arcs]
            child += [to + root for arcs in trie.children for to in arcs.values()]
        first = np.concatenate([[0], degree.cumsum()]).astype(np.int64)
        words = np.zeros(self.vocab, np.bool_)
        words[sorted(self.begins or ())] = True
        return PhraseTables(
            first, np.array(token, np.int64), np.array(child, np.int64), failure, home, depth, owed, ended, words
        )

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
            put(tables.root), put(tables.owed).to(dtype), put(tables.ended),
            put(np.concatenate([[True], tables.begins, [True]])),
        )  # fmt: skip


def beginnings(tokenizer: Encodes) -> list[int] | None:
    """The tokens that a word ends before; None where text has no spaces, or where the tokenizer knows no words.

    InputError for pieces that end with a space: the end of a word cannot be seen in what follows it.
    """
    begins: Sequence[bool] | None = getattr(tokenizer, "begins", None)
    if isinstance(tokenizer, Pieces):
        space = tokenizer.space
        if not space:
            return None
        if late := next((p for p in tokenizer.pieces if p.endswith(space) and p.strip(space)), None):
            raise InputError(f"phrases need pieces that begin with the space, not end with it as {late!r}")
    if begins is None or not any(begins):
        return None
    end = getattr(tokenizer, "end", None)
    return [i for i, word in enumerate(begins) if word or i == end]


class PhraseScorer:
    """`Phrases` as a `Scorer`: the state is the node of each hypothesis [B, K].

    The end of the sentence is a token as any other, in no phrase: with `Phrases.begins` it must be one of these.
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
