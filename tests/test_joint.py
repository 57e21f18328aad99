"""The joint beam: against loops in plain Python, enumeration, ESPnet; blocks, rows and restarts."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from speechattn import tree
from speechattn.decoder.attention import AttentionDecoder
from speechattn.frames import Frames, Memory
from speechattn.search import Beam, Hypothesis
from speechattn.search.attention import AttentionScorer
from speechattn.search.ctc_prefix import CTCPrefixScorer
from speechattn.search.joint import Endings, JointBeam
from speechattn.search.length import LengthBonus
from speechattn.search.phrases import Phrases, PhraseScorer

pytestmark = pytest.mark.usefixtures("precise")
DIM, VOCAB, END = 8, 12, 11
Text = tuple[int, ...]


class Head(nn.Module):
    """Log-probabilities of CTC."""

    def __init__(self, vocab: int = VOCAB) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, vocab)

    def forward(self, x: Frames) -> Frames:
        return Frames.of((4 * self.linear(x.values)).log_softmax(-1), x.mask)


def parts(vocab: int = VOCAB) -> tuple[AttentionDecoder, Head]:
    decoder = AttentionDecoder.usual(vocab, DIM, 2, 2, 12, context=50).eval()
    head = Head(vocab)
    for parameter in [*decoder.parameters(), *head.parameters()]:
        nn.init.normal_(parameter, std=0.6)
    return decoder.requires_grad_(False), head.requires_grad_(False)


def utterances(lengths: list[int], *, holes: bool = False) -> Frames:
    x = Frames.from_lengths(torch.randn(len(lengths), max(lengths, default=0), DIM), torch.tensor(lengths))
    return Frames.of(x.values, x.mask & (torch.rand(x.mask.shape) < 0.7)) if holes else x


def joint(decoder: AttentionDecoder, head: Head, size: int, **options: Any) -> JointBeam:
    scorers = [
        (0.7, AttentionScorer(decoder, END, END)), (0.3, CTCPrefixScorer(head, END)), (0.2, LengthBonus(VOCAB))
    ]  # fmt: skip
    return JointBeam(scorers, size, eos=END, **options)


def attention(decoder: AttentionDecoder, x: Frames, text: Text) -> float:
    """log p(text, end) by teacher forcing."""
    tokens = torch.tensor([text], dtype=torch.long).view(1, -1)
    state = decoder.start(Memory.of(x))
    scores, wanted, _, _ = decoder.forced(state, tokens, torch.tensor([len(text)]), sos=END, eos=END)
    return float(scores.log_softmax(-1).gather(2, wanted[..., None]).sum())


def forward(log_probs: Tensor, text: Text) -> tuple[float, float]:
    """(log psi, log p) of a text: the recursion in Python, over [label, blank] of each prefix."""
    begins = 0.0 if text else 1.0
    tracks = [[0.0, 1.0]] + [[0.0, 0.0] for _ in text]
    for row in log_probs.exp().tolist():
        new = [[0.0, tracks[0][1] * row[0]]]
        for i, token in enumerate(text):
            enter = tracks[i][1] if i and text[i - 1] == token else sum(tracks[i])
            begins += enter * row[token] if i + 1 == len(text) else 0.0
            new.append([(tracks[i + 1][0] + enter) * row[token], sum(tracks[i + 1]) * row[0]])
        tracks = new
    log = [torch.tensor(p).log().item() for p in (begins, sum(tracks[-1]))]
    return log[0], log[1]


def total(decoder: AttentionDecoder, head: Head, x: Frames, text: Text) -> float:
    """What the beam of `joint` must give to a text that has ended."""
    return (
        0.7 * attention(decoder, x, text) + 0.3 * forward(head(x).values[0], text)[1] + 0.2 * (len(text) + 1)
    )  # fmt: skip


def texts(found: list[Hypothesis]) -> list[Text]:
    return [hypothesis.tokens for hypothesis in found]


def same(a: list[list[Hypothesis]], b: list[list[Hypothesis]]) -> None:
    for row, other in zip(a, b, strict=True):
        assert texts(row) == texts(other)
        for x, y in zip(row, other, strict=True):
            assert x.score == pytest.approx(y.score, abs=1e-9)
            assert x.log_probs == pytest.approx(y.log_probs, abs=1e-9)
            assert x.spans == y.spans


def fed(search: JointBeam, x: Frames, cuts: list[int]) -> list[list[Hypothesis]]:
    beam = search.start(x)
    for a, b in itertools.pairwise([0, *sorted(cuts), x.mask.shape[1]]):
        beam = search.step(x[a:b], beam)
    return search.hypotheses(search.finish(beam))


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.integers(1, 5))
def test_scores_are_those_of_the_whole_texts(seed: int, size: int) -> None:
    torch.manual_seed(seed)
    decoder, head = parts()
    x = utterances([9])
    found = joint(decoder, head, size).decode(x)[0]
    assert found
    assert len({h.tokens for h in found}) == len(found)
    assert [h.score for h in found] == sorted((h.score for h in found), reverse=True)
    for hypothesis in found:
        assert hypothesis.score == pytest.approx(total(decoder, head, x, hypothesis.tokens), abs=1e-8)
        each = [attention(decoder, x, hypothesis.tokens[:n]) for n in range(len(hypothesis.tokens) + 1)]
        assert len(hypothesis.log_probs) == len(hypothesis.tokens) == len(hypothesis.spans)
        end = each[-1] - sum(hypothesis.log_probs)  # the rest is the end's
        assert end < 0


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_one_hypothesis_is_the_best_token_again_and_again(seed: int) -> None:
    torch.manual_seed(seed)
    decoder, head = parts()
    x = utterances([8])
    log_probs, said = head(x).values[0], ()
    while True:
        scores = decoder.forced(decoder.start(Memory.of(x)), torch.tensor([said]).long().view(1, -1),
                                torch.tensor([len(said)]), sos=END, eos=END)[0][0, -1].log_softmax(-1)  # fmt: skip
        before = forward(log_probs, said)[0]
        ctc = [forward(log_probs, said)[1] if c == END else forward(log_probs, (*said, c))[0] for c in range(VOCAB)]
        ctc[0] = -torch.inf
        weighted = 0.7 * scores + 0.3 * (torch.tensor(ctc) - before)
        asked = {*scores.topk(8).indices.tolist(), END} if len(said) < 8 else {END}
        best = max(asked, key=lambda c: float(weighted[c]))
        if best == END:
            break
        said = (*said, best)
    assert texts(joint(decoder, head, 1).decode(x)[0]) == [said]


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10**6), length=st.integers(0, 4))
def test_ctc_alone_finds_the_most_probable_texts(seed: int, length: int) -> None:
    torch.manual_seed(seed)
    head, x = Head(3), utterances([length])
    log_probs = head(x).values[0]
    every = [text for n in range(length + 1) for text in itertools.product((1, 2), repeat=n)]
    chances = {text: forward(log_probs, text)[1] for text in every}
    found = JointBeam([(1.0, CTCPrefixScorer(head, END))], 40, eos=END).decode(x)[0]
    for hypothesis in found:
        assert hypothesis.score == pytest.approx(chances[hypothesis.tokens], abs=1e-9)
    assert found[0].score == pytest.approx(max(chances.values()), abs=1e-9)


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_attention_alone_finds_the_most_probable_texts(seed: int) -> None:
    torch.manual_seed(seed)
    decoder, head = parts(4)
    x = utterances([6])
    chances = {}
    for n in range(4):
        for text in itertools.product(range(3), repeat=n):
            tokens = torch.tensor([text], dtype=torch.long).view(1, -1)
            scores, wanted, _, _ = decoder.forced(
                decoder.start(Memory.of(x)), tokens, torch.tensor([n]), sos=3, eos=3
            )  # fmt: skip
            chances[text] = float(scores.log_softmax(-1).gather(2, wanted[..., None]).sum())
    search = partial(JointBeam, size=64, eos=3, most=0.5)
    scorer = AttentionScorer(decoder, 3, 3)
    found = search([(1.0, scorer)]).decode(x)[0]
    best = sorted(chances, key=lambda text: -chances[text])
    settled = {h.tokens: h.score for h in found}
    assert texts(found)[0] == best[0]
    assert settled == pytest.approx({text: chances[text] for text in settled}, abs=1e-9)
    same([found], search([(1.0, scorer), (0.0, CTCPrefixScorer(head, 3))]).decode(x))


@settings(max_examples=8, deadline=None)
@example(seed=0, block=5, cuts=[5, 5], size=2)
@given(
    seed=st.integers(0, 10**6), block=st.integers(1, 30), cuts=st.lists(st.integers(0, 23), max_size=5),
    size=st.integers(1, 4),
)  # fmt: skip
def test_any_split_of_the_input_gives_the_same_beam(seed: int, block: int, cuts: list[int], size: int) -> None:
    torch.manual_seed(seed)
    decoder, head = parts()
    x = utterances([23, 11], holes=True)
    search = joint(decoder, head, size, block=block, repeat=2)
    whole = fed(search, x, [])
    same(fed(search, x, cuts), whole)
    if block >= 23:
        same(whole, joint(decoder, head, size).decode(x))


@pytest.mark.parametrize("block", [None, 4])
def test_a_row_does_not_know_its_batch(block: int | None) -> None:
    decoder, head = parts()
    search = joint(decoder, head, 3, block=block, repeat=2)
    x = utterances([23, 0, 11, 5], holes=True)
    dirty = Frames(x.values.masked_fill(~x.mask[..., None], float("nan")), x.mask)
    together = fed(search, Frames.of(dirty.values, dirty.mask), [3, 9, 17])
    for row, found in enumerate(together):
        alone = Frames(x.values[row : row + 1, x.mask[row]], x.mask[row : row + 1, x.mask[row]])
        same([found], fed(search, alone, []))


def test_a_block_that_holds_everything_is_the_search_without_blocks() -> None:
    for seed in range(4):
        torch.manual_seed(seed)
        decoder, head = parts()
        x = utterances([17])
        for repeat in (1, None):
            same(joint(decoder, head, 4, block=17, repeat=repeat).decode(x), joint(decoder, head, 4).decode(x))


def test_rows_of_different_age_are_put_together_and_taken_apart() -> None:
    decoder, head = parts()
    search = joint(decoder, head, 3, block=4, repeat=2)
    old, young = utterances([22]), utterances([9])
    late = search.step(old[:14], search.start(old))
    both = tree.concat([late, search.start(young)])
    pad = young.pad(1)
    both = search.step(Frames(torch.cat([old.values[:, 14:], pad.values[:, :8]]), torch.ones(2, 8).bool()), both)
    both = tree.select(both, [1, 0])
    both = search.step(Frames(torch.cat([young.values[:, 8:], young.values[:, :1]]), torch.tensor([[True], [False]])),
                       both)  # fmt: skip
    rows = tree.split(both)
    found = [search.hypotheses(search.finish(row))[0] for row in rows]
    same(found, [fed(search, young, [])[0], fed(search, old, [])[0]])
    same(search.hypotheses(search.finish(both)), found)


class Told:
    """A scorer that says what it was told to, as far as it has heard it: token i is known behind frame `at[i]`.

    Where it knows nothing it says what `else_` does.
    """

    partial = False

    def __init__(self, text: Text, at: list[int], otherwise: int, vocab: int = 10) -> None:
        self.text, self.at, self.otherwise, self.vocab = text, at, otherwise, vocab

    def start(self, x: Frames) -> tuple[Tensor, Tensor]:
        return torch.zeros(len(x.mask), dtype=torch.long), torch.zeros(len(x.mask), 1, dtype=torch.long)

    def read(self, x: Frames, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return state[0] + x.lengths, state[1]

    def score(self, state: tuple[Tensor, Tensor], candidates: Tensor | None) -> tuple[Tensor, Any]:
        scores = torch.full((*state[1].shape, self.vocab), -20.0)
        for b, row in enumerate(state[1].tolist()):
            for k, n in enumerate(row):
                known = n < len(self.text) and state[0][b] > self.at[n]
                scores[b, k, self.text[n] if known else self.otherwise] = -0.5
        return scores, state

    def extend(self, state: tuple[Tensor, Tensor], parents: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return state[0], state[1].gather(1, parents) + 1

    def select(self, state: tuple[Tensor, Tensor], parents: Tensor) -> tuple[Tensor, Tensor]:
        return state[0], state[1].gather(1, parents)


def progress(search: JointBeam, x: Frames) -> list[Text]:
    """What is said after each frame."""
    beam, found = search.start(x), []
    for t in range(x.mask.shape[1]):
        beam = search.step(x[t : t + 1], beam)
        found.append(search.hypotheses(beam)[0][0].tokens)
    return [*found, search.hypotheses(search.finish(beam))[0][0].tokens]


def test_a_step_that_ran_past_the_input_is_discarded_with_the_one_before() -> None:
    x = utterances([8])
    told = Told((1, 2, 3, 4, 5), [0, 1, 2, 5, 6], 9)
    ended = progress(JointBeam([(1.0, told)], 1, eos=9, block=4), x)
    assert ended == [(), (), (), (1, 2), (1, 2), (1, 2), (1, 2), (1, 2, 3, 4), (1, 2, 3, 4, 5)]
    # where it does not know, it says again what it has said: the same, but for finish, which has no reason to stop
    for again in (1, 3):
        told = Told((1, 2, 3, 4, 5, 9), [0, 1, 2, 5, 6, 0], again)
        repeated = progress(JointBeam([(1.0, told)], 1, eos=9, block=4, repeat=1), x)
        assert repeated[:-1] == ended[:-1]
        assert repeated[-1] == (1, 2, 3, 4, 5)
    # twice in a row is needed: one more label is said before it is noticed, and is discarded
    twice = progress(JointBeam([(1.0, Told((1, 2, 3, 1, 4), [0, 1, 2, 3, 6], 9))], 1, eos=9, block=4, repeat=2), x)
    assert twice[3] == (1, 2, 3)
    assert twice[-1] == (1, 2, 3, 1, 4)


def test_there_are_not_more_tokens_than_frames_allow() -> None:
    x = utterances([8])
    endless = Told((), [], 1)
    assert [len(h.tokens) for h in JointBeam([(1.0, endless)], 1, eos=9, most=0.5).decode(x)[0]] == [4]
    assert progress(JointBeam([(1.0, endless)], 1, eos=9, block=4, repeat=None, most=0.5), x)[3] == (1,)
    several = JointBeam([(1.0, endless)], 1, eos=9, most=0.5).decode(utterances([8, 3, 0, 5]))
    assert [len(row[0].tokens) for row in several] == [4, 1, 0, 2]


def test_a_decoder_that_is_full_ends_the_text() -> None:
    decoder, head = parts()
    with torch.no_grad():
        decoder.output.bias[END] = -1e6  # type: ignore[union-attr, operator]
    short = AttentionDecoder.usual(VOCAB, DIM, 2, 2, 12, context=5).eval()
    short.load_state_dict(decoder.state_dict())
    for block in (None, 4):
        scorers = [(1.0, AttentionScorer(short, END, END)), (0.1, CTCPrefixScorer(head, END))]
        found = fed(JointBeam(scorers, 3, eos=END, block=block), utterances([20]), [7])[0]
        assert {len(h.tokens) for h in found} == {4}


def test_a_length_is_worth_the_same_for_every_token() -> None:
    bonus = LengthBonus(5)
    state = bonus.select(bonus.start(utterances([3, 2])), torch.zeros(2, 4, dtype=torch.long))
    scores, state = bonus.score(bonus.read(utterances([3, 2]), state), None)
    assert torch.equal(scores, torch.ones(2, 4, 5))
    assert bonus.extend(state, torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3)).shape == (2, 3)


def test_ends_that_become_less_probable_settle_the_search() -> None:
    none = torch.full((1, 1), -torch.inf)
    beam = JointBeam([(1.0, Told((), [], 1))], 1, eos=9).start(utterances([0]))
    endings = Endings.none(beam)
    seen = []
    for score in (-3.0, -12.0, -13.1, -14.0, -20.0):
        endings = endings.joined_by(beam.said, torch.tensor([[score]]))
        seen.append(bool(endings.settled))
    assert seen == [False, False, False, False, True]
    assert endings.score.item() == -3.0
    assert not endings.joined_by(beam.said, none).settled
    said = JointBeam([(1.0, Told((1, 2), [0, 0], 9))], 2, eos=9)
    labels = []
    label = said._label
    said._label = lambda *args: (labels.append(1), label(*args))[1]  # type: ignore[method-assign]
    assert said.decode(utterances([300]))[0][0].tokens == (1, 2)
    assert len(labels) < 20


def test_committed_tokens_are_forgotten_and_the_search_goes_on() -> None:
    decoder, head = parts()
    search = joint(decoder, head, 4, block=4, repeat=3)
    for seed in range(20):
        torch.manual_seed(seed)
        x = utterances([24])
        beam = search.step(x[:12], search.start(x))
        best = search.hypotheses(beam)[0][0].tokens
        if len(best) > 2:
            break
    assert len(best) > 2
    kept = search.commit(beam, torch.tensor([2]))
    for hypothesis in search.hypotheses(kept)[0]:
        assert (*best[:2], *hypothesis.tokens) in texts(search.hypotheses(beam)[0])
    assert search.hypotheses(kept)[0][0].tokens == best[2:]
    ended = search.finish(search.step(x[12:], kept))
    assert search.hypotheses(ended)[0]
    with pytest.raises(ValueError, match=r"commit \[99\]"):
        search.commit(ended, torch.tensor([99]))


def test_a_search_that_begins_later_counts_on() -> None:
    decoder, head = parts()
    x = utterances([12, 9])
    for search in (joint(decoder, head, 3, block=4, repeat=2), joint(decoder, head, 3)):
        beam = search.step(x, search.start_at(x, torch.tensor([100, 7])))
        assert beam.frames.tolist() == [112, 16]
        found, fresh = search.hypotheses(search.finish(beam)), search.decode(x)
        for row, later in enumerate((100, 7)):
            moved = [
                Hypothesis(h.tokens, h.score, h.log_probs, tuple((a + later, b + later) for a, b in h.spans))
                for h in fresh[row]
            ]
            same([found[row]], [moved])


def test_memory_of_a_stream_that_begins_anew_now_and_then_is_bounded() -> None:
    decoder, head = parts()
    search = joint(decoder, head, 2, block=4, repeat=2)
    x = utterances([8, 8])
    beam, sizes = search.start(x), []
    for i in range(24):
        beam = search.step(x, beam)
        anew = torch.tensor([i % 3 == 2, i % 2 == 1])
        beam = tree.where(anew, search.start_at(x, beam.frames), beam)
        sizes.append(sum(leaf.numel() for leaf in tree.leaves(beam)))
    assert max(sizes[12:]) <= max(sizes[:12])


def test_phrases_are_preferred_and_taken_back() -> None:
    decoder, head = parts()
    x = utterances([14])
    phrases = Phrases(vocab=VOCAB, bonus=30.0)
    root = phrases.add([[4, 2, 4]])
    scorers = [(0.7, AttentionScorer(decoder, END, END)), (0.3, CTCPrefixScorer(head, END))]
    plain = JointBeam(scorers, 4, eos=END)
    search = JointBeam([*scorers, (1.0, PhraseScorer(phrases))], 4, eos=END)
    assert search.phrases is phrases
    same(search.decode(x), plain.decode(x))  # no phrase is in the first set
    beam = search.bias(search.start(x), root)
    preferred = search.hypotheses(search.finish(search.step(x, beam)))[0][0].tokens
    assert (4, 2, 4) in [preferred[i : i + 3] for i in range(len(preferred))]
    with pytest.raises(ValueError, match="takes no phrases"):
        plain.bias(plain.start(x), root)
    blocks = JointBeam([*scorers, (1.0, PhraseScorer(phrases))], 4, eos=END, block=4, repeat=3)
    halfway = blocks.step(x[:8], blocks.bias(blocks.start(x), root))
    back = blocks.bias(halfway, phrases.root)
    never = blocks.step(x[:8], blocks.start(x))
    known = {h.tokens: h.score for h in blocks.hypotheses(never)[0]}
    common = [h for h in blocks.hypotheses(back)[0] if h.tokens in known and h.tokens[-3:] != (4, 2, 4)]
    assert sorted(back.score[0].tolist(), reverse=True) == back.score[0].tolist()
    assert all(h.score == pytest.approx(known[h.tokens]) for h in common)


def test_nothing_to_hear_and_nobody_to_hear_it() -> None:
    decoder, head = parts()
    for block in (None, 4):
        search = joint(decoder, head, 3, block=block)
        assert texts(search.decode(utterances([0]))[0]) == [()]
        assert search.decode(utterances([])) == []
    one = Head(1)
    assert texts(JointBeam([(1.0, CTCPrefixScorer(one, END))], 2, eos=END).decode(utterances([5]))[0]) == [()]
    with pytest.raises(ValueError, match="without a scorer"):
        JointBeam([(0.0, LengthBonus(3))], 2, eos=END)
    with pytest.raises(ValueError, match="blocks of 0 frames"):
        joint(decoder, head, 3, block=0)


def test_what_is_never_said_is_not() -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        decoder, head = parts()
        x = utterances([9])
        free = joint(decoder, head, 3).decode(x)[0][0].tokens
        if not free:
            continue
        held = joint(decoder, head, 3, never=[free[0]]).decode(x)[0]
        assert all(free[0] not in h.tokens for h in held)
        alone = JointBeam([(1.0, CTCPrefixScorer(head, END))], 3, eos=END, never=[free[0]]).decode(x)[0]
        assert all(free[0] not in h.tokens for h in alone)


def test_spans_without_a_scorer_that_knows_are_blocks() -> None:
    x = utterances([8])
    search = JointBeam([(1.0, Told((1, 2, 3, 4, 5), [0, 1, 2, 5, 6], 9))], 1, eos=9, block=4)
    assert search.decode(x)[0][0].spans == ((0, 4), (0, 4), (4, 8), (4, 8), (4, 8))


def test_frames_in_front_keep_their_order() -> None:
    x = Frames.of(torch.arange(10).double().view(2, 5, 1), torch.tensor([[1, 0, 1, 0, 1], [0, 0, 0, 1, 0]]).bool())
    y = x.front()
    assert y.values[..., 0].tolist() == [[0, 2, 4], [8, 0, 0]]
    assert y.mask.tolist() == [[True] * 3, [True, False, False]]


def test_parity_with_espnet() -> None:
    pytest.importorskip("espnet.nets.batch_beam_search")
    from espnet.nets.batch_beam_search import BatchBeamSearch
    from espnet.nets.scorers.ctc import CTCPrefixScorer as Theirs
    from espnet.nets.scorers.length_bonus import LengthBonus as TheirBonus
    from test_decoder import espnet_decoder

    torch.manual_seed(4)
    vocab, eos, weights = 30, 29, {"decoder": 0.7, "ctc": 0.3, "bonus": 0.4}
    theirs, mine = espnet_decoder(vocab, DIM)
    head = Head(vocab)

    class CTC(nn.Module):
        def log_softmax(self, x: Tensor) -> Tensor:
            return head(Frames(x, torch.ones(x.shape[:2], dtype=torch.bool))).values

    scorers = {"decoder": theirs, "ctc": Theirs(CTC(), eos), "bonus": TheirBonus(vocab)}
    x = utterances([14])
    their_search = BatchBeamSearch(
        scorers=scorers, weights=weights, beam_size=6, vocab_size=vocab, sos=eos, eos=eos, pre_beam_score_key="full"
    )  # fmt: skip
    with torch.inference_mode():
        expected = their_search(x.values[0])
    found = JointBeam(
        [(0.7, AttentionScorer(mine, eos, eos)), (0.3, CTCPrefixScorer(head, eos)), (0.4, LengthBonus(vocab))],
        6, eos=eos,
    ).decode(x)[0]  # fmt: skip
    for ours, other in zip(found[:2], expected, strict=False):
        assert list(ours.tokens) == other.yseq.tolist()[1:-1]
        assert ours.score == pytest.approx(float(other.score), abs=1e-6)


def test_a_beam_is_a_tree() -> None:
    decoder, head = parts()
    search = joint(decoder, head, 2, block=4)
    beam = search.step(utterances([9, 9]), search.start(utterances([9, 9])))
    assert isinstance(beam, Beam)
    assert all(len(leaf) == 2 for leaf in tree.leaves(beam))
