"""wait-k by what CTC hears, and heads that stop: alone, and in sessions of either kind; the table of policies."""

from __future__ import annotations

import itertools
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from fake import RATE, FakeModel, draft, said
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from speechattn import load_model
from speechattn.audio.vad import AlwaysSpeech
from speechattn.cli.policies import POLICIES, SETTINGS, build_policy, build_streaming_policy
from speechattn.cross.monotonic import MoChA
from speechattn.decoder.attention import AttentionDecoder
from speechattn.decoder.ctc import CTC
from speechattn.errors import InputError
from speechattn.frames import Frames, Memory
from speechattn.live import Session, Settings, StreamSettings
from speechattn.live.heard import SourceWords
from speechattn.model import Recognizer
from speechattn.policy import Source
from speechattn.policy.adaptive import Counts, CTCWaitK, WordCounter, WordsHeard
from speechattn.policy.align_att import AlignAtt
from speechattn.policy.local_agreement import LocalAgreement
from speechattn.policy.monotonic import Stopped
from speechattn.policy.retranslation import Retranslation
from speechattn.search import Draft
from speechattn.search.greedy import Greedy
from speechattn.text.pieces import Pieces

FOLDER = Path(__file__).parent / "digits"
ENDS = [0.6 + 0.45 * i for i in range(12)]
GO, END = Source(50, 0.02, finished=False), Source(50, 0.02, finished=True)


LETTERS = Pieces(["<blank>", *" abc"])
MARKED = Pieces(["<blank>", "▁", "▁a", "b", "▁c"])


def collapsed(path: Sequence[int]) -> list[int]:
    return [a for a, before in zip(path, [-1, *path], strict=False) if a != before and a != 0]


@given(st.lists(st.integers(0, 4), max_size=30), st.lists(st.integers(0, 30), max_size=4), st.booleans())
@settings(deadline=None)
def test_words_are_counted_as_they_are_spelled(path: list[int], cuts: list[int], marked: bool) -> None:
    """For any split; frames that are not valid are not there."""
    pieces = MARKED if marked else LETTERS
    counter = WordCounter(CTC(3, 5), pieces)
    heard, places = WordsHeard(), [0, *sorted(min(cut, len(path)) for cut in cuts), len(path)]
    for a, b in itertools.pairwise(places):
        heard = counter.hear([-1, *path[a:b], -1], heard)
    assert counter.count(heard) == len(pieces.decode(collapsed(path)).split())
    assert len(heard.open) <= max(1, len(collapsed(path)))


def test_pieces_of_a_text_without_spaces_are_words() -> None:
    counter = WordCounter(CTC(3, 5), MARKED, spaceless=True)
    assert counter.count(counter.hear([3, 3, 0, 3, 4, 4, 1])) == 3


def test_labels_are_those_of_the_head() -> None:
    head = CTC(4, 4)
    with torch.no_grad():
        head.head.weight.copy_(torch.eye(4))
        head.head.bias.zero_()
    x = Frames.from_lengths(torch.eye(4)[torch.tensor([[1, 0, 3], [2, 2, 2]])], torch.tensor([3, 1]))
    assert WordCounter(head, LETTERS).labels(x) == [[1, 0, 3], [2, -1, -1]]


def test_labels_ahead_count_for_now_alone() -> None:
    words = SourceWords(CTCWaitK(1, by_pairs, counter=WordCounter(CTC(3, 5), LETTERS)))
    words.hear([2, 3, 0, 1])
    assert [words.count(ahead) for ahead in ([], [1, 1], [2], [2, 1, 3], [])] == [1, 1, 2, 3, 1]
    words.anew()
    assert words.count([2]) == 1
    nobody = SourceWords(LocalAgreement())
    assert nobody.labels(Frames.from_lengths(torch.zeros(2, 3, 3), torch.tensor([3, 1]))) == [[], []]
    assert nobody.count([1]) is None


def by_pairs(tokens: Sequence[int]) -> list[int]:
    return [2] * (len(tokens) // 2) + [1] * (len(tokens) % 2)


def test_wait_k_of_heard_words() -> None:
    policy = CTCWaitK(2, by_pairs, counter=WordCounter(CTC(3, 5), LETTERS))
    assert isinstance(policy, Counts)
    assert not isinstance(LocalAgreement(), Counts)
    counts = [policy.accept(draft(7), Source(10**6, 0.02, False, words=n), policy.initial())[0] for n in range(7)]
    assert counts == [0, 0, 0, 2, 4, 6, 7]
    assert policy.accept(draft(7), END, policy.initial())[0] == 7
    now = Source(1, 0.02, False, words=3)
    assert policy.why(draft(7), now, policy.initial(), 2) == "3 words were heard: 1 may be said (wait-2)"
    assert policy.why(draft(7), now, policy.initial(), 1) == ""
    with pytest.raises(InputError, match="nobody counted"):
        policy.accept(draft(7), GO, policy.initial())


@pytest.fixture(scope="module")
def digits() -> Recognizer:
    made = load_model(FOLDER)
    assert isinstance(made, Recognizer)
    return made


@dataclass(frozen=True)
class Noting(CTCWaitK):
    """Writes down what it is told."""

    told: list[Source] = field(default_factory=list)

    def accept(self, draft: Draft, source: Source, state: Any) -> tuple[int, Any]:
        self.told.append(source)
        return super().accept(draft, source, state)


def test_a_stream_counts_the_words_of_each_utterance(digits: Recognizer) -> None:
    """Two recordings and a pause: what was counted before the end of each are the words of its CTC path."""
    counter = digits.counter
    assert counter is not None
    sounds = [soundfile.read(FOLDER / f"0{i}.flac", dtype="float32")[0] for i in (0, 1)]
    gap = np.zeros(RATE, np.float32)
    policy = Noting(1, digits.tokenizer.words, counter=counter)
    session = Session(digits, policy=policy, search=digits.search("ctc", beam_size=1))
    for one in sounds:
        assert session.feed(np.concatenate([one, gap]), RATE)[-1].final
    whole = digits.sound(np.concatenate([sounds[0], gap, sounds[1], gap]))
    with torch.no_grad():
        frames = digits.listening(Frames(whole, torch.ones_like(whole, dtype=torch.bool)))
    total = counter.count(counter.hear(counter.labels(frames)[0]))
    words = [source.words for source in policy.told]
    assert None not in words
    begins = [i for i in range(1, len(words)) if policy.told[i].frames < policy.told[i - 1].frames]
    assert begins  # behind the first recording
    parts = [words[a:b] for a, b in itertools.pairwise([0, *begins, len(words)])]
    assert all(part == sorted(part) for part in parts)  # type: ignore[type-var]
    assert sum(max(part) for part in parts) == total > 4  # type: ignore[type-var]
    assert len({source.frames for source in policy.told[: begins[0]]}) > 3


def test_wait_k_waits_for_words_and_then_says_all(digits: Recognizer) -> None:
    both = np.concatenate([soundfile.read(FOLDER / f"0{i}.flac", dtype="float32")[0] for i in (2, 5)])
    how = StreamSettings(patience_s=60, pause_s=60, silence_s=60)
    lags, texts = [], []
    for k in (0, 2, 50):
        policy = CTCWaitK(k, digits.tokenizer.words, counter=digits.counter)  # type: ignore[arg-type]
        session = Session(digits, policy=policy, search=digits.search("ctc", beam_size=1), settings=how)
        events = session.feed(both, RATE) + session.finish()
        texts.append(said(events))
        lags.append(sum(event.audio_s * len(event.words) for event in events) / len(said(events).split()))
    assert len({*texts}) == 1
    assert lags[0] < lags[1] < lags[2]


class Clock:
    """A counter for `FakeModel`: label 2 (a word) at the frame where each word begins, by the time of the window."""

    def __init__(self, model: FakeModel) -> None:
        self.model = model

    def labels(self, frames: Frames) -> list[list[int]]:
        n = frames.mask.shape[1]
        first = round((self.model.end_s - n * 0.02) / 0.02)
        begins = {round((end - 0.3) / 0.02) for end in ENDS}
        return [[2 if first + i in begins else 0 for i in range(n)]]

    hear = WordCounter(CTC(3, 5), Pieces(["<blank>", "▁a", "▁b"])).hear
    count = WordCounter(CTC(3, 5), Pieces(["<blank>", "▁a", "▁b"])).count


@pytest.mark.parametrize("max_window_s", [2.0, 20.0])
def test_a_window_counts_words_that_left_it(max_window_s: float) -> None:
    model = FakeModel(ENDS)
    policy = Noting(1, model.tokenizer.words, counter=Clock(model))  # type: ignore[arg-type]
    made = Session(
        model, policy=policy, vad=AlwaysSpeech(),
        settings=Settings(min_chunk_s=0.5, max_window_s=max_window_s, history_words=2),
    )  # fmt: skip
    events = made.feed(np.full(6 * RATE, 0.1, np.float32), RATE) + made.finish()
    assert said(events).split() == [f"w{i}" for i in range(12)]
    heard = [(source.frames * 0.02, source.words) for source in policy.told]
    assert all(words == sum(end - 0.3 < s - 0.01 for end in ENDS) for s, words in heard), heard
    assert max(model.encoded) < (5 if max_window_s < 5 else 7) * RATE
    assert heard[-1][0] == pytest.approx(6.0, abs=0.04)


def walker(seed: int) -> AttentionDecoder:
    torch.manual_seed(seed)
    cross = partial(MoChA, window=3, offset=-1.0)
    made = AttentionDecoder.usual(9, 8, 2, 2, 12, context=60, cross=cross, dropout=0.0).eval()
    for name, parameter in made.named_parameters():
        if "offset" not in name:
            nn.init.normal_(parameter, std=0.7)
    return made.requires_grad_(False)


def test_stopped_says_what_will_stay() -> None:
    """Whatever comes: a greedy draft of more frames begins with what was accepted of fewer."""
    policy, waited, early = Stopped(), 0, 0
    for seed in range(5):
        search = Greedy(walker(seed), 8)
        x = torch.randn(1, 14, 8)

        def over(n: int, *, finished: bool = False, search: Greedy = search, x: Tensor = x) -> Draft:
            frames = Frames(x[:, :n], torch.ones(1, n, dtype=torch.bool))
            return search.draft(Memory.of(frames, finished=finished), [8], [], max_tokens=12, guess=[1, 2])

        whole = over(14, finished=True)
        for n in range(1, 15, 2):
            part = over(n)
            assert part.waiting is not None
            assert len(part.waiting) == len(part.tokens)
            safe, _ = policy.accept(part, GO, None)
            assert part.tokens[:safe].tolist() == whole.tokens[:safe].tolist()
            assert not part.waiting[:-1].any()  # it goes no further than the first that waits
            waited += bool(part.waiting.any())
            early += safe > 0
            assert part.ended <= (not part.waiting.any())
            for i in range(len(part.tokens)):
                assert (policy.why(part, GO, None, i) != "") == (i >= safe)
    assert waited > 9
    assert early > 9
    assert policy.accept(draft(4), END, None) == (4, None)
    with pytest.raises(InputError, match="never wait"):
        policy.accept(draft(4), GO, None)


def options(**given: Any) -> Namespace:
    return Namespace(**{**dict.fromkeys(("policy", *SETTINGS)), "model": "it", **given})


def test_the_table_makes_them_or_says_why_not(digits: Recognizer) -> None:
    search = digits.search("ctc")
    made = build_streaming_policy(options(policy="wait-k-ctc", wait_k=5), digits, search)
    assert isinstance(made, CTCWaitK)
    assert (made.k, made.counter) == (5, digits.counter)
    assert build_streaming_policy(options(policy="retranslation", mask_k=4), digits, search) == Retranslation(4)
    assert build_streaming_policy(options(policy="local-agreement"), digits, search) == LocalAgreement()
    assert build_streaming_policy(options(), digits, search) is None
    for wrong, words in (
        ({"policy": "monotonic"}, "no monotonic heads"), ({"policy": "alignatt"}, "no attention"),
        ({"frame_threshold": 3}, "--frame-threshold does nothing"), ({"mask_k": 2}, "--mask-k belongs to retrans"),
        ({"policy": "retranslation", "mask_k": -1}, "-1"), ({"policy": "wait-k", "mask_k": 1}, "--mask-k belongs"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            build_streaming_policy(options(**wrong), digits, search)
    window = FakeModel(ENDS)
    with pytest.raises(InputError, match="no CTC head of it"):
        build_policy(options(policy="wait-k-ctc"), window)
    with pytest.raises(InputError, match="no monotonic heads"):
        build_policy(options(policy="monotonic"), window)
    assert build_policy(options(policy="retranslation"), window) == Retranslation()
    window.policy = Stopped  # type: ignore[method-assign]
    assert build_policy(options(), window) == Stopped()
    own = build_policy(options(policy="alignatt", frame_threshold=7), window)
    assert isinstance(own, AlignAtt)
    assert (own.heads, own.frame_threshold) == (window.alignment_heads, 7)
    assert {"monotonic", "retranslation", "wait-k-ctc"} <= {*POLICIES}
    with pytest.raises(InputError, match="no monotonic heads"):
        Session(digits, policy=Stopped(), search=search)
