"""Greedy attention that leans towards phrases: against loops that say everything anew; what must not change."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import soundfile
import torch
from test_aligned import BACK, EDGE, END, HEADS, INSIDE, NEVER, REACH, Loops, aligned, compare, decoder, utterances
from test_leaning import WORDS, Bar, Everywhere, book, some_phrases
from torch import Tensor

from speechattn import tree
from speechattn.frames import Frames
from speechattn.live import Session
from speechattn.model import Recognizer, load_model
from speechattn.search import Prefixes
from speechattn.search.aligned import AlignedGreedy
from speechattn.search.loops import loop_start

FOLDER = Path(__file__).parent / "digits"
SEEDS = (0, 1, 3, 4, 6, 10, 29, 46, 51)


@dataclass
class Leant(Loops):
    """Loops that lean by rules without memory; behind what is taken back they say everything anew."""

    rules: Everywhere = field(default_factory=lambda: Everywhere([], 0.0, None))
    taken: int = 0
    left_out: int = 0

    def speak(self, *, whole: bool = False) -> None:
        self.say([], [], whole)

    def say(self, kept: list[tuple[int, float, int]], bars: list[Bar], whole: bool) -> None:
        """`kept` are tokens, what each lost, and how much wider the view was."""
        n, shown, done = len(self.shown), self.shown, len(self.committed)
        state = self.seen(shown)
        for token, frames, first, end in self.read:
            state = replace(state, cross=self.seen(frames, first, end).cross)
            _, _, state = self.decoder.step(torch.tensor([[token]]), state)
        self.tokens, self.log_probs, self.looks, self.peaks, self.views = [], [], [], [], []
        token, far, most = self.last, self.far, int(self.most * n) + self.spare - done
        costs, wide = [0.0] * done, list[int]()
        while True:
            text, place = [*self.committed, *self.tokens], len(self.tokens)
            next_, cost, wider = kept[place] if (again := place < len(kept)) else (0, 0.0, 0)
            while True:
                half = REACH // 2
                first, end = max(0, far - BACK) // half * half, -((far + REACH) // -half) * half + wider
                state = replace(state, cross=self.seen(shown, first, end).cross)
                hidden, look, after = self.decoder.step(torch.tensor([[token]]), state, heads=HEADS)
                banned = [*NEVER, *(INSIDE if done and not self.tokens else ())]
                scores = self.decoder.logits(hidden[0, 0]).index_fill(0, torch.tensor(banned), -torch.inf)
                scores = scores.log_softmax(0)
                if not again:
                    ends = int(scores.argmax()) == END
                    next_ = END if ends else self.rules.choose(text, costs, bars, scores.tolist())
                peak = int(look[0, :, 0].mean(0).argmax())
                late, over = min(n, end) - 1 - peak < EDGE, next_ == END or peak < far - BACK
                if again or end >= n or not (late or over):
                    break
                wider += half
            waits, full = (late or over or place >= most) and not whole, whole and place >= most
            bar = None if again or waits else self.rules.fails(text, costs, bars, next_, over or full)
            if bar:
                self.taken += 1
                stays = zip(self.tokens[: bar.first - done], costs[done:], wide, strict=False)
                return self.say([*stays], [*bars, bar], whole)
            self.looks.append(look[0, :, 0])
            self.views.append((first, end))
            if waits and (half_said := self.rules.fails(text, costs, bars, next_, True)):
                cut = half_said.first - done
                self.left_out += 1
                del self.tokens[cut:], self.log_probs[cut:], self.peaks[cut:]
                del self.looks[cut + 1 :], self.views[cut + 1 :]
                return None
            if over or waits or place >= most:
                return None
            far, token, state = far if late else max(far, peak), next_, after
            self.peaks.append(peak)
            self.tokens.append(token)
            self.log_probs.append(float(scores[token]))
            costs.append(cost if again else float(scores.max() - scores[token]))
            wide.append(wider)
            loop = loop_start([*self.committed, *self.tokens])
            if loop is not None:
                sane = max(0, loop - done)
                del self.tokens[sane:], self.log_probs[sane:], self.looks[sane + 1 :]
                return None


def agreed(seed: int) -> tuple[int, int]:
    """Drafts are those of loops -> how often something was taken back in these, and left out at their end."""
    draw, made, begins = random.Random(seed), decoder(seed), (None, WORDS)[seed % 2]
    sets = [some_phrases(draw, begins, 5) for _ in range(4)]
    phrases, roots = book(*sets, bonus=(bonus := draw.choice([1.0, 3.0])), begins=begins)
    search, x = aligned(made, phrases=phrases), utterances(3, 24)
    rules = [Everywhere(one, bonus, begins) for one in sets]
    rows = [Leant(made, rules=rules[b]) for b in range(3)]
    beam, at = search.bias(search.start(x), torch.tensor(roots[:3])), 0
    while at < 24:
        size = draw.randint(1, 9)
        piece, seen = x[at : at + size], utterances(3, draw.choice([0, 3]))
        at += size
        beam = search.peek(piece, seen, beam)
        for b, row in enumerate(rows):
            row.frames += [*piece.values[b, piece.mask[b]]]
            if bool(piece.mask[b].any() or seen.mask[b].any()):
                row.ahead = [*seen.values[b, seen.mask[b]]]
                row.speak()
        compare(search, beam, [*rows])
        n = [draw.randint(0, min(3, len(row.tokens))) for row in rows]
        for row, count in zip(rows, n, strict=True):
            row.commit(count)
        beam = search.commit(beam, torch.tensor(n))
        compare(search, beam, [*rows])
        if draw.random() < 0.4:
            which = draw.choices(range(4), k=3)
            beam = search.bias(beam, torch.tensor([roots[i] for i in which]))
            for row, i in zip(rows, which, strict=True):
                row.rules = rules[i]
    beam = search.finish(beam)
    for row in rows:
        row.ahead = []
        if row.frames:
            row.speak(whole=True)
    compare(search, beam, [*rows])
    return sum(row.taken for row in rows), sum(row.left_out for row in rows)


@pytest.mark.usefixtures("precise")
def test_drafts_are_those_of_loops_that_look_everywhere() -> None:
    """Rows with sets of their own, other sets on the way, frames that are not there, glimpses, commits."""
    taken, left_out = (sum(counts) for counts in zip(*map(agreed, SEEDS), strict=True))
    assert taken > 20
    assert left_out > 5


def drafts(
    search: AlignedGreedy, x: Frames, roots: Sequence[int], *, guess: bool = True, again: bool = False
) -> list[tuple[Prefixes, list[Tensor]]]:  # fmt: skip
    """What is said after every seven frames, when half of it is committed; `again` goes over to the same sets."""
    beam, found = search.start(x), list[tuple[Prefixes, list[Tensor]]]()
    beam = search.bias(beam, torch.tensor(roots)) if roots else beam
    for at in range(0, x.mask.shape[1], 7):
        if not guess:
            beam = replace(beam, said=Prefixes.empty(x.values, 1))
        beam = search.step(x[at : at + 7], beam)
        found.append((beam.said, [draft.weights for draft in search.looks(beam)]))
        beam = search.commit(beam, beam.said.length[:, 0] // 2)
        beam = search.bias(beam, torch.tensor(roots)) if again else beam
    beam = search.finish(beam)
    return [*found, (beam.said, [draft.weights for draft in search.looks(beam)])]


def texts(found: list[tuple[Prefixes, list[Tensor]]]) -> list[list[list[int]]]:
    return [[row[:n] for row, n in zip(said.tokens[:, 0].tolist(), said.length[:, 0].tolist(), strict=True)]
            for said, _ in found]  # fmt: skip


@pytest.mark.usefixtures("precise")
def test_without_phrases_or_bonus_every_bit_stays() -> None:
    for seed in range(4):
        made, x = decoder(seed), utterances(3, 24, holes=False)
        some = some_phrases(random.Random(seed), WORDS, 6)
        free, [_, full] = book([], some, bonus=0.0, begins=WORDS)
        dear, [empty] = book([], bonus=9.0, begins=WORDS)
        plain = drafts(aligned(made), x, [])
        for other in (drafts(aligned(made, phrases=free), x, [full] * 3), drafts(aligned(made, phrases=dear), x, []),
                      drafts(aligned(made, phrases=dear), x, [empty] * 3)):  # fmt: skip
            for (said, looks), (mine, my_looks) in zip(plain, other, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(tree.leaves(said), tree.leaves(mine), strict=True))
                assert all(torch.equal(a, b) for a, b in zip(looks, my_looks, strict=True))


@pytest.mark.usefixtures("precise")
def test_neither_a_guess_nor_the_batch_nor_the_same_set_again_changes_a_text() -> None:
    changed = 0
    for seed in range(6):
        made, x, draw = decoder(seed), utterances(3, 28, holes=False), random.Random(seed)
        phrases, roots = book(*(some_phrases(draw, WORDS, 6) for _ in range(3)), bonus=2.0, begins=WORDS)
        search = aligned(made, phrases=phrases)
        found = drafts(search, x, roots)
        assert texts(drafts(search, x, roots, guess=False)) == texts(found)
        assert texts(drafts(search, x, roots, again=True)) == texts(found)
        for b in range(3):
            alone = drafts(search, tree.select(x, [b]), roots[b : b + 1])
            assert [one for [one] in texts(alone)] == [rows[b] for rows in texts(found)]
            for (mine, [weights]), (said, looks) in zip(alone, found, strict=True):
                torch.testing.assert_close(mine.log_probs[0, 0], said.log_probs[b, 0, : mine.log_probs.shape[2]])
                torch.testing.assert_close(weights, looks[b])
        changed += texts(found) != texts(drafts(aligned(made), x, []))
    assert changed > 3


def test_a_rare_name_is_heard_where_it_was_said() -> None:
    """By the model of the package, in a recording of a synthetic voice."""
    model = load_model()
    assert isinstance(model, Recognizer)

    def heard(name: str, phrases: list[str] | None) -> str:
        sound, rate = soundfile.read(FOLDER / name, dtype="float32")
        session = Session(model, search=model.search("aligned", phrases=phrases, bonus=6.0))
        return "".join(event.committed for event in session.feed(sound, rate) + session.finish()).strip()

    assert heard("13.flac", None) == "Please call mark."
    assert heard("13.flac", ["Marc"]) == "Please call Marc"
    for name in ("13.flac", "00.flac"):
        assert heard(name, ["Nebuchadnezzar", "Wolverhampton Wanderers"]) == heard(name, []) == heard(name, None)
