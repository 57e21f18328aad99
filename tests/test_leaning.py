"""A choice that leans towards phrases: against one who looks for them everywhere and says all anew."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_aligned import END, VOCAB
from test_phrases import inside

from speechattn.search.leaning import Leaning
from speechattn.search.phrases import Phrases

WORDS = frozenset(range(4, VOCAB))  # tokens that begin a word, and the end


class Bar(NamedTuple):
    """From place `first` on there is no leaning towards phrases that began at `since`; places in the whole text."""

    since: int
    first: int


@dataclass
class Everywhere:
    """The rules of `Leaning` without any memory: from the text and what each of its tokens lost."""

    phrases: Sequence[Sequence[int]]
    bonus: float
    begins: Set[int] | None

    def word(self, token: int) -> bool:
        return self.begins is None or token in self.begins

    def goes_on(self, text: Sequence[int], since: int) -> set[int]:
        """Tokens with which a phrase goes on that began there."""
        n, so_far = len(text) - since, list(text[since:])
        return {p[n] for p in self.phrases if len(p) > n and list(p[:n]) == so_far and self.word(p[0])}

    def loser(self, text: Sequence[int], lost: Sequence[float], bars: Sequence[Bar], over: bool) -> tuple[Bar, float]:
        """Where the phrase began that lost something and was not said, where it lost that, and what; or nothing."""
        bar, sum_ = Bar(0, 0), 0.0
        for q in range(len(text) + 1):
            ends = over if q == len(text) else self.word(text[q])
            if all(inside(self.phrases, text[:q], self.begins, over=ends)[bar.since :]):
                sum_ = 0.0
            if q < len(text) and lost[q]:
                if not sum_:
                    there = (s for s in range(q + 1) if text[q] in self.goes_on(text[:q], s) and free(bars, s, q))
                    bar = Bar(next(there), q)
                sum_ += lost[q]
        return bar, sum_

    def choose(
        self, text: Sequence[int], lost: Sequence[float], bars: Sequence[Bar], log_probs: Sequence[float]
    ) -> int:  # fmt: skip
        """The token that is said behind the text."""
        best, q, left = max(range(len(log_probs)), key=log_probs.__getitem__), len(text), dict[int, float]()
        for word in (False, True):
            bar, so_far = self.loser(text, lost, bars, word)
            for s in [bar.since] if so_far else range(q + 1):
                for token in self.goes_on(text, s):
                    if free(bars, s, q) and self.word(token) == word:
                        left[token] = max(left.get(token, 0.0), self.bonus * (q + 1 - s) - so_far)
        if best in left:
            return best
        fits = [t for t, room in left.items() if log_probs[best] - log_probs[t] <= room]
        return max(fits or [best], key=log_probs.__getitem__)

    def fails(
        self, text: Sequence[int], lost: Sequence[float], bars: Sequence[Bar], token: int, end: bool
    ) -> Bar | None:  # fmt: skip
        bar, so_far = self.loser(text, lost, bars, end or self.word(token))
        return bar if so_far and (end or token not in self.goes_on(text, bar.since)) else None


def free(bars: Sequence[Bar], since: int, place: int) -> bool:
    return not any(bar.since == since and bar.first <= place for bar in bars)


Scores = Callable[[Sequence[int]], Sequence[float]]  # of the next token behind a text


def anew(
    rules: Everywhere, scores: Scores, most: int, told: list[int], kept: list[int], lost: list[float], bars: list[Bar]
) -> tuple[list[int], int]:  # fmt: skip
    """What is said behind what was `told` and `kept` -> all that is said, and how often something was taken back."""
    text, lost = [*told, *kept], [0.0] * len(told) + lost
    while True:
        probable = scores(text)
        token = rules.choose(text, lost, bars, probable)
        stop = token == END or len(text) - len(told) >= most
        if bar := rules.fails(text, lost, bars, token, stop):
            parts = text[len(told) : bar.first], lost[len(told) : bar.first]
            said, times = anew(rules, scores, most, told, *parts, [*bars, bar])
            return said, times + 1
        if stop:
            return text[len(told) :], 0
        text.append(token)
        lost.append(max(probable) - probable[token])


def spoken(leaning: Leaning, scores: Scores, most: int, told: list[int]) -> tuple[list[int], int]:
    """The same with what is tested."""
    text, times = list[int](), 0
    while True:
        probable = scores([*told, *text])
        best = max(range(len(probable)), key=probable.__getitem__)
        token, log_prob = leaning.choose(best, probable[best], lambda ids, p=probable: [p[i] for i in ids])  # type: ignore[misc]
        assert log_prob == probable[token]
        stop = token == END or len(text) >= most
        if leaning.fails(token, stop):
            del text[leaning.take_back() :]
            times += 1
            assert times < 500, "endless"
        elif stop:
            return text, times
        else:
            leaning.say(token, probable[best] - log_prob)
            text.append(token)


def chance(seed: int, spread: float = 2.0) -> Scores:
    """Log-probabilities that are drawn anew for every text."""

    def scores(text: Sequence[int]) -> list[float]:
        draw = random.Random(f"{seed} {text}")
        return torch.tensor([draw.gauss(0, spread) for _ in range(VOCAB)]).log_softmax(0).tolist()

    return scores


def some_phrases(draw: random.Random, begins: Set[int] | None, count: int, few: int = 3) -> list[list[int]]:
    """Of few tokens, so that they overlap."""
    inner = draw.sample(range(1, END), few)
    first = sorted({*inner} & WORDS) or [5] if begins else inner
    return [[draw.choice(first), *draw.choices(inner, k=draw.randrange(5))] for _ in range(count)]


def book(*sets: Sequence[Sequence[int]], bonus: float, begins: Set[int] | None) -> tuple[Phrases, list[int]]:
    made = Phrases(bonus=bonus, vocab=VOCAB, begins=None if begins is None else sorted(begins))
    return made, [made.add(one) for one in sets]


@pytest.mark.parametrize("begins", [None, WORDS])
def test_what_is_said_is_what_one_says_who_looks_everywhere(begins: Set[int] | None) -> None:
    """Random texts in which nothing depends on anything."""
    times = [0] * 9
    for seed in range(250):
        draw = random.Random(seed)
        phrases, bonus = some_phrases(draw, begins, draw.randrange(1, 7)), draw.choice([0.4, 1.0, 2.0, 4.0])
        made, [_, root] = book(some_phrases(draw, begins, 3), phrases, bonus=bonus, begins=begins)
        told = draw.choices(phrases[0] + phrases[-1], k=draw.randrange(5))
        leaning = Leaning(made, Leaning(made, root).walked(told))
        scores, most = chance(seed, draw.choice([0.7, 2.0])), draw.randrange(14)
        wanted, count = anew(Everywhere(phrases, bonus, begins), scores, most, told, [], [], [])
        assert spoken(leaning, scores, most, told) == (wanted, count), seed
        times[min(count, 8)] += 1
    assert min(times[:4]) > 4, times  # taken back not at all, once, twice, ...


@pytest.mark.usefixtures("precise")
@settings(deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(0, VOCAB - 1), max_size=12), st.booleans())
def test_a_text_that_loses_nothing_stands_where_phrases_say(seed: int, text: list[int], words: bool) -> None:
    draw, begins = random.Random(seed), WORDS if words else None
    phrases = some_phrases(draw, begins, 5)
    made, roots = book(phrases, phrases[:2], [], bonus=1.0, begins=begins)
    text = [phrases[0][t % len(phrases[0])] if t % 3 else t for t in text]
    for root in roots:
        node, leaning = made.start(1, 1, root=root), Leaning(made, root)
        for token in text:
            leaning.say(token)
            node, _ = made.step(node, torch.tensor([[token]]))
            assert leaning.root + leaning.node == int(node)
        assert Leaning(made, root).walked(text) == int(node)
        assert made.set_of(int(node)) == (root, leaning.trie)


A, B, C, D, X, IN = 4, 5, 6, 7, 8, 1  # words, and the inside of one


def by_hand(
    phrases: list[list[int]], table: dict[tuple[int, ...], dict[int, float]], bonus: float = 1.0, most: int = 20
) -> list[int]:  # fmt: skip
    """`table`: what tokens lose behind the longest end of a text that is known; the best lose 0, else the end does."""

    def scores(text: Sequence[int]) -> list[float]:
        ends = (tuple(text[i:]) for i in range(max(1, len(text))))
        lost = next((table[end] for end in ends if end in table), {END: 0.0})
        return [-lost.get(token, 99.0) for token in range(VOCAB)]

    made, [root] = book(phrases, bonus=bonus, begins=WORDS)
    return spoken(Leaning(made, root), scores, most, [])[0]


AB: dict[tuple[int, ...], dict[int, float]] = {(): {X: 0, A: 0.9}, (A,): {X: 0, B: 0.9}}
SCRIPTS: dict[str, tuple[list[list[int]], dict[tuple[int, ...], dict[int, float]], list[int]]] = {
    "what it can afford": ([[A, B]], AB, [A, B]),
    "not its first token": ([[A, B]], {**AB, (): {X: 0, A: 1.1}}, [X]),
    "not both": ([[A, B]], {**AB, (A,): {X: 0, B: 1.2}}, [X]),
    "the second pays with the first": ([[A, B]], {(): {A: 0}, (A,): {X: 0, B: 1.9}}, [A, B]),
    "only where a word begins": ([[IN, B]], {(): {X: 0, IN: 0.1}, (IN,): {END: 0, B: 0.1}}, [X]),
    "nor inside one that was": ([[IN, B]], {(): {IN: 0}, (IN,): {END: 0, B: 0.1}}, [IN]),
    "the end can wait": ([[A, B]], {(): {X: 0}, (X,): {END: 0, A: 0.9}, (A,): {B: 0}}, [X, A, B]),
    "not said at the end": ([[A, B]], {**AB, (A,): {END: 0}}, [X]),
    "the word goes on": ([[A]], {(): {X: 0, A: 0.9}, (A,): {IN: 0}}, [X]),
    "that goes on in another phrase": ([[A], [A, IN]], {(): {X: 0, A: 0.9}, (A,): {IN: 0}}, [A, IN]),
    "what lost nothing stays": ([[A, B]], {(): {A: 0, X: 0.1}, (A,): {C: 0}}, [A, C]),
    "none begins there again": ([[A, B], [B, A]], {(): {X: 0, A: 0.5, B: 0.6}}, [X]),
    "the next may begin": ([[A, B], [C]], {(): {X: 0, A: 0.5}, (X,): {END: 0, C: 0.9}}, [X, C]),
    "the shorter stays": (
        [[A, B], [A, B, C, D]], {**AB, (A, B): {X: 0, C: 0.9}}, [A, B, X]
    ),
    "unless its word goes on": (
        [[A, B], [A, B, C, D]], {**AB, (A, B): {IN: 0, C: 0.9}}, [X]
    ),
    "that overlaps stays": (
        [[A, B], [B, C, D]], {**AB, (A, B): {X: 0, C: 0.9}}, [A, B, X]
    ),
    "both that overlap": ([[A, B], [B, C, D]], {**AB, (A, B): {X: 0, C: 0.9}, (C,): {D: 0}}, [A, B, C, D]),
    "the longest pays": (
        [[A, B, A], [A]], {(): {A: 0}, (A,): {B: 0}, (A, B): {X: 0, A: 2.9}, (A, B, A): {END: 0}}, [A, B, A]
    ),
    "not the one that cannot": (
        [[A, B, C], [D, A]], {(): {A: 0}, (A,): {B: 0}, (A, B): {X: 0, D: 1.1, C: 1.2}}, [A, B, C]
    ),
    "an older one goes on": (
        [[A, B, C], [B, D, D]],
        {(): {A: 0}, (A,): {B: 0}, (A, B): {X: 0, D: 0.4, C: 0.5}, (B, D): {X: 0}}, [A, B, C],
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", SCRIPTS)
def test_by_hand(what: str) -> None:
    phrases, table, wanted = SCRIPTS[what]
    assert by_hand(phrases, table) == wanted
    dear = {end: {token: 50.0 if lost else 0.0 for token, lost in row.items()} for end, row in table.items()}
    assert by_hand(phrases, dear) == by_hand([], table)


def test_what_there_is_no_room_for_was_not_said() -> None:
    assert by_hand([[A, B]], AB, most=2) == [A, B]
    assert by_hand([[A, B]], AB, most=1) == [X]
