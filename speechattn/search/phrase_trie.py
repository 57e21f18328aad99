"""The automaton that finds phrases in a text as it grows."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence, Set
from dataclasses import dataclass

__all__ = ["Trie"]


@dataclass(frozen=True)
class Trie:
    """One set of phrases: node 0 is the root.

    A node stands for the last tokens of a text, the longest end of it that some phrase begins with (Aho-Corasick),
    and for which of them lie in a phrase already said. So a few strings have several nodes: where "b c" was begun in
    the middle of a phrase "a b" that was said, "b" is paid for.

    A phrase at the end of a text was said only when the next token begins a word, or when there is none. For this
    `ended[n]` is the node of the same string where it was said: a token that begins a word goes on from there, any
    other from n. Where a phrase needs no end of a word to be said, the two are one.
    """

    children: list[dict[int, int]]  # by token, in order
    failure: list[int]
    ended: list[int]
    depth: list[int]
    open: list[int]  # tokens that lie in no phrase said

    @classmethod
    def of(cls, phrases: Sequence[Sequence[int]], begins: Set[int] | None) -> Trie:
        """The automaton of some phrases; the tokens that begin a word, None where every token may end a phrase."""
        children, ends = plain(phrases)
        failure, order, depth = links(children)
        last = [0] * len(children)  # bit i: token i of the node's string lies in the longest phrase that it ends with
        for _, node in order:
            behind, less = failure[node], depth[node] - depth[failure[node]]
            last[node] = (1 << depth[node]) - 1 if node in ends else last[behind] << less
        nodes = Nodes()

        def reached(node: int, paid: int) -> int:
            """Where a text may be that ends with a node's string, of which these tokens are paid for."""
            if begins is None:
                return nodes.needed(node, paid | last[node], False)
            there = nodes.needed(node, paid, False)
            nodes.ended[there] = nodes.needed(node, paid | last[node], True)
            return there

        reached(0, 0)
        for at, word in nodes.todo:  # which grows
            node, paid = nodes.states[at]
            behind = failure[node]
            nodes.failure[at] = nodes.needed(behind, paid >> (depth[node] - depth[behind]), word)
            for token, to in children[node].items():
                if begins is None or (token in begins) == word:
                    nodes.children[at][token] = reached(to, paid)
        return cls(
            [dict(sorted(arcs.items())) for arcs in nodes.children], nodes.failure, nodes.ended,
            [depth[node] for node, _ in nodes.states], [depth[node] - paid.bit_count() for node, paid in nodes.states],
        )  # fmt: skip


class Nodes:
    """The nodes as they are found, and what is still to be looked at.

    A text that ends at a node may go on with tokens that begin a word, or with others; where only one of the two can
    be, the node has children of that kind alone.
    """

    def __init__(self) -> None:
        self.states: list[tuple[int, int]] = []  # a node of the plain trie, and the tokens of it that are paid for
        self.children: list[dict[int, int]] = []
        self.failure: list[int] = []
        self.ended: list[int] = []
        self.todo: list[tuple[int, bool]] = []
        self._ids: dict[tuple[int, int], int] = {}
        self._known: set[tuple[int, bool]] = set()

    def needed(self, node: int, paid: int, word: bool) -> int:
        """The id of a node where a token follows that begins a word, or (False) any other."""
        at = self._ids.setdefault((node, paid), len(self.states))
        if at == len(self.states):
            self.states.append((node, paid))
            self.children.append({})
            self.failure.append(0)
            self.ended.append(at)
        if (at, word) not in self._known:
            self._known.add((at, word))
            self.todo.append((at, word))
        return at


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
