"""Terms in sessions: what is retrieved is preferred, from then on and for that utterance alone; reports; options."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from speechattn import tree
from speechattn.cli.main import main
from speechattn.errors import InputError
from speechattn.frames import Frames
from speechattn.live import Event, Pool, Session, Terms, TermUse
from speechattn.live.events import Word
from speechattn.live.rows import joined
from speechattn.live.streaming import Streaming, listen, retrieved, roots, valid
from speechattn.live.terms import Watch
from speechattn.model import Recognizer, load_model
from speechattn.model.matcher import save_matcher
from speechattn.terms import Bank, Hearing, Queries, Retriever, Running, Spelling, Term

DIGITS = Path(__file__).parent / "digits"
JON, MARC = DIGITS / "12.flac", DIGITS / "13.flac"  # "call jon please", "please call marc"
RATE = 16000
HEARD = {"jon": 8, "marc": 8, "erin": 8, "late": 10**6}  # frames behind which the scripted retriever finds a term
SEARCHES = ("ctc", "transducer", "joint", "aligned")


class Scripted(Retriever):
    """Finds each term behind so many frames of the utterance, whatever they say."""

    def __init__(self, heard: dict[str, int], features: int) -> None:
        super().__init__(Hearing(features, 4, stack=1), Spelling(4), 4, 1)
        self.when = heard

    def embed(self, texts: Sequence[str]) -> Queries:
        n = len(texts)
        when = torch.tensor([float(self.when[text]) for text in texts])
        return Queries(torch.zeros(n, 4), torch.arange(n), torch.ones(n), when)

    def further(self, heard: tuple[Tensor, Tensor, Tensor], state: Running, bank: Queries) -> Running:
        return Running(state.most, state.total + heard[2].shape[1], state.value)

    def judged(self, state: Running, bank: Queries) -> Tensor:
        return torch.where(state.total[:, 0] >= bank.prior, 4.0, -4.0)


@pytest.fixture(scope="module")
def model() -> Recognizer:
    found = load_model(DIGITS)
    assert isinstance(found, Recognizer)
    return found


@pytest.fixture(scope="module")
def matcher(model: Recognizer) -> Scripted:
    x = torch.zeros(1, RATE)
    features = model.listening(Frames(x, torch.ones_like(x, dtype=torch.bool))).values.shape[2]
    return Scripted(HEARD, features).eval()


def bank(matcher: Scripted, *names: str) -> Bank:
    return Bank(matcher, [Term(*name.split("=")) for name in names])


def sound(*paths: Path, apart_s: float = 0.0) -> np.ndarray:
    pieces = [np.pad(soundfile.read(path, dtype="float32")[0], [0, round(apart_s * RATE)]) for path in paths]
    return np.concatenate(pieces)


def session(model: Recognizer, terms: Terms | None, kind: str = "ctc") -> Session:
    search = model.search(kind, beam_size=8, phrases=[])
    return Session(model, search=search, terms=terms)


def heard(one: Session, samples: np.ndarray, piece: int = 1600) -> list[Event]:
    events = [event for at in range(0, len(samples), piece) for event in one.feed(samples[at : at + piece], RATE)]
    return events + one.finish()


def text(events: Sequence[Event]) -> str:
    return " ".join("".join(event.committed for event in events).split())


@pytest.mark.parametrize("kind", ["ctc", "transducer", "joint"])
def test_what_is_retrieved_is_preferred_and_what_is_not_is_not(model: Recognizer, matcher: Scripted, kind: str) -> None:
    assert text(heard(session(model, None, kind), sound(JON))) == "call john please"
    one = session(model, Terms(bank(matcher, "jon", "late")), kind)
    events = heard(one, sound(JON))
    assert text(events) == "call jon please"
    assert [event.terms for event in events if event.terms] == [("jon",)]
    (said,) = [event for event in events if event.terms]
    assert "jon" in said.committed
    assert Event.from_json(said.to_json()).terms == ("jon",)
    (use,) = one.terms() or []
    ((start, end),) = use.said
    assert (use.term, use.retrieved, use.missed) == ("jon", 1, 0)
    assert start < 0.92  # the name is said from 0.52 to 0.92 s
    assert end > 0.52
    never = session(model, Terms(bank(matcher, "late")), kind)
    assert text(heard(never, sound(JON))) == "call john please"
    assert never.terms() == []


def test_the_shipped_model_prefers_what_is_retrieved() -> None:
    model = load_model()
    assert isinstance(model, Recognizer)
    for heard_at, name in ((8, "Marc"), (10**6, "mark.")):
        terms = Terms(Bank(Scripted({"Marc": heard_at}, 384).eval(), [Term("Marc")]))
        one = Session(model, search=model.search("aligned", phrases=[], bonus=6.0), terms=terms)
        assert text(heard(one, sound(MARC))) == f"Please call {name}"


@pytest.mark.parametrize("kind", SEARCHES)
def test_an_empty_bank_has_no_effect(model: Recognizer, matcher: Scripted, kind: str) -> None:
    samples = sound(JON, MARC, apart_s=1.0)
    plain, empty = session(model, None, kind), session(model, Terms(bank(matcher)), kind)
    assert heard(empty, samples) == heard(plain, samples)
    assert empty.terms() == []
    assert plain.terms() is None


def test_what_an_utterance_says_is_forgotten_with_it(model: Recognizer, matcher: Scripted) -> None:
    one = session(model, Terms(bank(matcher, "jon")))
    events = heard(one, sound(JON, MARC, JON, apart_s=1.2))
    assert text(events) == "call jon please please call mark call jon please"
    assert [event.terms for event in events if event.terms] == [("jon",), ("jon",)]
    (use,) = one.terms() or []
    assert (use.retrieved, len(use.said), use.missed) == (3, 2, 1)
    assert use.said[0][1] < 2 < 4 < use.said[1][0]


class Once(Scripted):
    """Finds terms in the first utterance alone."""

    began = 0

    def start(self, rows: int, bank: Queries) -> Running:
        self.began += 1
        return super().start(rows, bank)

    def judged(self, state: Running, bank: Queries) -> Tensor:
        return super().judged(state, bank) - (8.0 if self.began > 1 else 0.0)


def test_what_was_retrieved_is_preferred_in_its_utterance_alone(model: Recognizer, matcher: Scripted) -> None:
    once = Once(HEARD, matcher_features(matcher)).eval()
    one = session(model, Terms(bank(once, "jon")))
    assert text(heard(one, sound(JON, JON, apart_s=1.2))) == "call jon please call john please"
    watch, x = Watch(Terms(bank(matcher, "jon"))), torch.zeros(1, 6, matcher_features(matcher))
    frames = Frames(x, torch.ones(1, 6, dtype=torch.bool))
    assert not watch.hear(frames)
    watch.forget()
    assert not watch.hear(frames)  # those of the utterance before do not count
    assert watch.hear(frames)


def test_a_model_in_half_precision_has_terms_too(matcher: Scripted) -> None:
    half = load_model(DIGITS, dtype="bfloat16")
    assert isinstance(half, Recognizer)
    assert text(heard(session(half, Terms(bank(matcher, "jon"))), sound(JON))) == "call jon please"


def test_a_report_that_cannot_be_written_stops_no_other_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    terms = tmp_path / "terms.txt"
    terms.write_text("seven\n", encoding="utf-8")
    (tmp_path / "12.terms.tsv").mkdir()
    names = [str(JON), str(DIGITS / "01.flac")]
    assert main(["transcribe", *names, "--terms", str(terms), "-o", str(tmp_path)]) == 2
    assert "12.terms.tsv: Is a directory" in capsys.readouterr().err
    assert (tmp_path / "01.terms.tsv").is_file()
    assert (tmp_path / "12.txt").is_file()


def test_events_do_not_depend_on_how_the_sound_was_cut(model: Recognizer, matcher: Scripted) -> None:
    samples, terms = sound(JON, MARC, apart_s=1.0), Terms(bank(matcher, "jon", "marc"))
    whole = heard(session(model, terms), samples, len(samples))
    assert text(whole) == "call jon please please call marc"
    for piece in (160, 5000, 20000):
        assert heard(session(model, terms), samples, piece) == whole


@pytest.mark.parametrize("kind", ["ctc", "aligned"])
def test_a_row_does_not_know_the_terms_of_others(model: Recognizer, matcher: Scripted, kind: str) -> None:
    samples = sound(JON, MARC, apart_s=1.0)
    banks = [bank(matcher, "jon"), bank(matcher, "marc", "late"), bank(matcher), None]
    pool = Pool(model, slots=4, search=model.search(kind, beam_size=8, phrases=[]))
    terms = [None if one is None else Terms(one) for one in banks]
    slots = [pool.open(terms=one) for one in terms]
    found: dict[int, list[Event]] = {slot: [] for slot in slots}
    for at in range(0, len(samples), 8000):
        for i, slot in enumerate(slots):
            if i != 2 or at:  # one of them is behind
                pool.feed(slot, samples[at - 8000 * (i == 2) :][:8000], RATE)
        for slot, events in pool.step().items():
            found[slot] += events
    pool.feed(slots[2], samples[len(samples) // 8000 * 8000 :], RATE)
    for slot in slots:
        pool.close(slot)
    while pool.busy:
        for slot, events in pool.step().items():
            found[slot] += events
    for slot, one in zip(slots, terms, strict=True):
        assert text(found[slot]) == text(heard(session(model, one, kind), samples))
    names = [[name for name in ("jon", "marc") if name in text(found[slot]).split()] for slot in slots]
    assert names == [["jon"], ["marc"], [], []]


def test_what_one_row_retrieves_leaves_the_others_where_they_are(model: Recognizer, matcher: Scripted) -> None:
    """Also inside a phrase of which some words are committed."""
    search = model.search("ctc", beam_size=8, phrases=[])
    finds, waits = (Streaming(model, search=search, terms=one) for one in (Terms(bank(matcher, "jon")), None))
    waits.prefer(["one two three four five six"])
    samples = sound(DIGITS / "00.flac")
    for at in range(0, len(samples), 1600):
        for one in (finds, waits):
            one.add(samples[at : at + 1600])
        ready = [one for one in (finds, waits) if one.ready]
        if ready:
            listen(ready)
        if waits.first:
            break
    assert waits.first  # tokens of the phrase are committed
    assert finds.preferred.watch is not None
    finds.preferred.watch.forget()
    beam = joined([one.place for one in (finds, waits) if one.place is not None]).beam
    x = torch.zeros(2, 12, matcher_features(matcher))
    frames, before = Frames(x, torch.ones(2, 12, dtype=torch.bool)), tree.leaves(tree.select(beam, [1]))
    beam = retrieved([finds, waits], frames, [0, 0], [12, 12], beam)
    assert finds.preferred.watch.phrases == ("jon",)
    assert all(torch.equal(a, b) for a, b in zip(before, tree.leaves(tree.select(beam, [1])), strict=True))
    moved = tree.leaves(tree.select(search.bias(beam, roots([finds, waits], x.device)), [1]))
    assert not all(torch.equal(a, b) for a, b in zip(before, moved, strict=True))  # which a search would have done


def test_a_bank_is_a_sessions_own_and_changes_while_it_is_live(model: Recognizer, matcher: Scripted) -> None:
    shared = bank(matcher, "marc")
    one = session(model, Terms(shared))
    first = one.feed(sound(MARC, apart_s=1.2), RATE)
    one.add_terms([Term("jon")])
    one.remove_terms(["marc"])
    rest = one.feed(sound(JON, MARC, apart_s=1.2), RATE) + one.finish()
    assert text(first) == "please call marc"
    assert text(rest) == "call jon please please call mark"
    assert [term.source for term in shared.terms] == ["marc"]
    with pytest.raises(InputError, match="in the bank already"):
        one.add_terms([Term("jon")])
    with pytest.raises(InputError, match="not in the bank"):
        one.remove_terms(["marc"])
    with pytest.raises(InputError, match="cannot spell: '東京'"):
        one.add_terms([Term("東京")])
    with pytest.raises(InputError, match="cannot spell: '東京'"):
        session(model, Terms(Bank(Scripted({"東京": 1}, 64).eval(), [Term("東京")])))


def test_phrases_of_the_user_stay(model: Recognizer, matcher: Scripted) -> None:
    one = session(model, Terms(bank(matcher, "marc")))
    one.prefer(["jon"])
    assert text(heard(one, sound(JON, MARC, JON, apart_s=1.2))) == "call jon please please call marc call jon please"
    assert [(hit.text, len(hit.spans)) for hit in one.hits()] == [("jon", 2)]


def test_frames_of_the_utterance_before_are_not_heard_again() -> None:
    mask = torch.tensor([[True] * 6, [True, True, False, True, True, False]])
    frames = Frames.of(torch.arange(12.0).view(2, 6, 1) + 1, mask)
    assert valid(frames, 0, 2, 4).values.flatten().tolist() == [3, 4]
    assert valid(frames, 1, 1, 6).values.flatten().tolist() == [8, 10, 11]
    assert valid(frames, 1, 5, 6).mask.shape == (1, 0)


def test_every_frame_is_heard_once(model: Recognizer, matcher: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, hear = list[float](), Watch.hear
    monkeypatch.setattr(Watch, "hear", lambda watch, x: (seen.extend(x.values[0, :, 0].tolist()), hear(watch, x))[1])
    samples = sound(JON, MARC, apart_s=1.2)
    one = session(model, Terms(bank(matcher, "jon")))
    ends = sum(event.final for event in heard(one, samples))
    x = torch.from_numpy(np.pad(samples, [0, RATE]))[None]
    whole = model.listening(Frames(x, torch.arange(x.shape[1])[None] < len(samples)))
    assert ends > 1
    assert seen == pytest.approx(whole.values[0, whole.mask[0], 0].tolist(), abs=1e-4)


def test_a_translation_says_targets(matcher: Scripted) -> None:
    terms = Terms(bank(matcher, "jon=joão", "marc"))
    x = Frames(torch.zeros(1, 20, matcher_features(matcher)), torch.ones(1, 20, dtype=torch.bool))
    for translates, names in ((True, {"joão", "marc"}), (False, {"jon", "marc"})):
        watch = Watch(terms, translates=translates)
        assert not watch.hear(x[:0])
        assert watch.hear(x)
        assert {*watch.phrases} == names
        assert not watch.hear(x)  # the same again


def matcher_features(matcher: Scripted) -> int:
    return next(p for name, p in matcher.frames.named_parameters() if p.ndim == 1).shape[0]


def test_a_term_is_named_once_where_its_last_word_is_committed(matcher: Scripted) -> None:
    watch = Watch(Terms(Bank(Scripted({"new york": 0, "york": 0}, 4).eval(), [Term("new york"), Term("york")])))
    x = Frames(torch.zeros(1, 1, 4), torch.ones(1, 1, dtype=torch.bool))
    watch.hear(x)
    said = [watch.add([Word(f" {word}", i, i + 1, 1.0)]) for i, word in enumerate(["New", "York,", "york", "is"])]
    assert [{*names} for names in said] == [set(), {"new york", "york"}, {"york"}, set()]
    watch.forget()
    assert watch.uses == {
        "new york": TermUse("new york", 1, ((0, 2),), 0), "york": TermUse("york", 1, ((1, 2), (2, 3)), 0)
    }  # fmt: skip
    for words in ([], [Word(" so", 4, 5, 1.0)]):  # where no word was said there was no utterance
        watch.hear(x)
        watch.add(words)
        watch.forget()
    assert watch.uses["york"] == TermUse("york", 2, ((1, 2), (2, 3)), 1)


def test_top_k_and_threshold(model: Recognizer, matcher: Scripted) -> None:
    sure = 1 / (1 + math.exp(-4.0))
    for terms, phrase in (
        (Terms(bank(matcher, "jon"), threshold=sure - 1e-4), "jon"),
        (Terms(bank(matcher, "jon"), threshold=sure + 1e-4), "john"),
        (Terms(bank(matcher, "erin", "jon"), top_k=1), "john"),  # of equals the first
        (Terms(bank(matcher, "erin", "jon"), top_k=2), "jon"),
    ):
        assert text(heard(session(model, terms), sound(JON))) == f"call {phrase} please"
    for wrong in ({"top_k": 0}, {"threshold": 1.5}, {"threshold": -0.1}):
        with pytest.raises(InputError, match="wanted 1 or more, and 0 to 1"):
            Terms(bank(matcher, "jon"), **wrong)  # type: ignore[arg-type]


def test_who_cannot_says_so(model: Recognizer, matcher: Scripted) -> None:
    with pytest.raises(InputError, match="takes no phrases"):
        Session(model, search=model.search("ctc"), terms=Terms(bank(matcher, "jon")))
    with pytest.raises(InputError, match="without terms"):
        Session(model).add_terms([Term("jon")])
    assert Session(model).terms() is None
    assert text(heard(Session(model, terms=Terms(bank(matcher, "jon"))), sound(JON))).startswith(
        "call"
    )  # its own search


@pytest.mark.parametrize("name", ["speechattn/en-tiny-stream", "tiny.en"])
def test_the_shipped_retriever_finds_what_is_said(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of forty words those of the digits that are said, in a recording of a synthetic voice."""
    digits = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    others = [a + b for a in ("mar", "ker", "lom", "pun", "dis") for b in ("ble", "tal", "zik", "vane", "orf", "ix")]
    terms = tmp_path / "terms.txt"
    terms.write_text("\n".join([*others, *digits]), encoding="utf-8")
    given = ["--model", name, "--terms", str(terms), "-o", str(tmp_path)]
    assert main(["transcribe", str(DIGITS / "01.flac"), *given]) == 0
    assert (tmp_path / "01.txt").read_text(encoding="utf-8").strip(".\n").lower() == "seven eight nine zero"
    rows = [line.split("\t") for line in (tmp_path / "01.terms.tsv").read_text(encoding="utf-8").splitlines()[1:]]
    found = {row[0] for row in rows}
    assert len(found & {"seven", "eight", "nine", "zero"}) >= 2
    assert len(found) <= 15
    capsys.readouterr()


def test_the_command_reports_terms(
    matcher: Scripted, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    terms = tmp_path / "terms.txt"
    terms.write_text("# names\njon\nerin\nlate\n", encoding="utf-8")
    plain = Retriever(Hearing(matcher_features(matcher), 4, stack=1), Spelling(4), 4, 1)
    config = {
        "class_path": "speechattn.terms.Retriever",
        "init_args": {
            "dim": 4, "heads": 1, "spelling": {"class_path": "speechattn.terms.Spelling", "init_args": {"dim": 4}},
            "frames": {
                "class_path": "speechattn.terms.Hearing",
                "init_args": {"features": matcher_features(matcher), "dim": 4, "stack": 1},
            },
        },
    }  # fmt: skip
    folder = tmp_path / "retriever"
    save_matcher(plain, config, str(DIGITS), folder)
    monkeypatch.setattr("speechattn.cli.terms.load_matcher", lambda _: (matcher, str(DIGITS)))
    there = ["--model", str(DIGITS), "--search", "ctc", "--terms", str(terms), "--terms-model", str(folder)]
    assert main(["transcribe", str(JON), *there]) == 0
    said = capsys.readouterr()
    assert said.out == "call jon please\n"
    assert "terms: 2 retrieved, 1 of them said\n  jon: 0." in said.err
    assert "  not said: erin\n" in said.err
    assert main(["stream", str(JON), "--fast", "--format", "jsonl", *there]) == 0
    assert '"terms": ["jon"]' in capsys.readouterr().out
    assert main(["transcribe", str(JON), "-o", str(tmp_path), *there]) == 0
    table = [line.split("\t") for line in (tmp_path / "12.terms.tsv").read_text(encoding="utf-8").splitlines()]
    assert table[0] == ["term", "retrieved", "said", "missed", "times"]
    assert {line[0]: line[1:4] for line in table[1:]} == {"jon": ["1", "1", "0"], "erin": ["1", "0", "1"]}
    assert main(["transcribe", str(JON), *there, "--terms-threshold", "0.99"]) == 0
    assert capsys.readouterr().out == "call john please\n"


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        (["--terms-top-k", "3"], "--terms-top-k needs --terms"),
        (["--terms", "TERMS"], "has no retriever of terms"),
        (["--terms", "TERMS", "--terms-model", "FOLDER"], "config.yaml"),
        (["--terms", "NONE"], "has no retriever of terms"),
        (["--terms", "NONE", "--model", "tiny.en"], "No such file"),
    ],
)
def test_options_that_cannot_be_honoured(
    options: list[str], wrong: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    terms = tmp_path / "terms.txt"
    terms.write_text("jon\n", encoding="utf-8")
    named = {"TERMS": str(terms), "FOLDER": str(tmp_path / "none")}
    given = [named.get(option, option) for option in options]
    model = [] if "--model" in given else ["--model", str(DIGITS)]
    assert main(["transcribe", str(JON), *model, *given]) == 2
    assert wrong in capsys.readouterr().err
