"""`speechattn evaluate`: real recordings of the small recogniser, offline and streamed."""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.metrics import BLEU as SacreBLEU
from test_live_terms import Scripted

from speechattn.attention import Span, set_span
from speechattn.cli import evaluate
from speechattn.cli.main import parser
from speechattn.cli.options import add_model_options
from speechattn.cli.policies import SETTINGS
from speechattn.errors import InputError
from speechattn.frames import Frames
from speechattn.model import Recognizer, load_model
from speechattn.policy.hold import Hold
from speechattn.pretrained.whisper import WhisperModel
from speechattn.score import listening, shards
from speechattn.score.evaluation import Evaluation, write_texts
from speechattn.score.journal import Journal, fingerprint
from speechattn.score.listening import Heard
from speechattn.score.shards import batches
from speechattn.score.utterances import FileSound, Utterance, read_utterances
from speechattn.score.wer import word_errors

FOLDER = Path(__file__).parent / "digits"
LINES: list[dict[str, Any]] = json.loads((FOLDER / "transcripts.json").read_text(encoding="utf-8"))
SOME = [LINES[i] for i in (4, 10, 12, 13)]
QUICK = ["--search", "ctc", "--beam-size", "1", "--normaliser", "none"]
PROGRAM = """
import sys
from speechattn.cli import evaluate
from speechattn.cli.main import parser
from tests.test_evaluate import options
if __name__ == "__main__":
    given = options(sys.argv[1:])
    sys.exit(given.run(given))
"""


def options(arguments: Sequence[str]) -> argparse.Namespace:
    """As the command line makes them."""
    top = argparse.ArgumentParser()
    evaluate.add_parser(top.add_subparsers(dest="command"))
    return top.parse_args(["evaluate", *arguments])


def run(*arguments: object) -> None:
    given = options([str(word) for word in arguments])
    assert given.run(given) == 0


def write_manifest(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rows(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"id": line["file"][:2], "audio": str(FOLDER / line["file"]), "text": line["text"], "speaker": line["voice"]}
        for line in lines
    ]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_manifest(tmp_path_factory.mktemp("data") / "digits.jsonl", rows(SOME))


@pytest.fixture(scope="module")
def finished(manifest: Path) -> Path:
    """A whole evaluation with its report."""
    place = manifest.parent / "finished"
    run(FOLDER, manifest, *QUICK, "--output-dir", place)
    return place


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def timeless(path: Path) -> list[dict[str, Any]]:
    """Results without what depends on the machine."""
    return [
        {k: v for k, v in line.items() if k not in ("offline_s", "streamed_s", "delay_s")} for line in lines_of(path)
    ]


def test_offline_is_the_search_over_the_whole_and_streamed_says_the_same(finished: Path) -> None:
    model = load_model(FOLDER)
    assert isinstance(model, Recognizer)
    search = model.search("ctc", beam_size=1)
    found = lines_of(finished / "utterances.jsonl")
    assert [line["id"] for line in found] == [line["file"][:2] for line in SOME]
    for line, said in zip(SOME, found, strict=True):
        samples = torch.from_numpy(soundfile.read(FOLDER / line["file"], dtype="float32")[0])[None]
        best = search.decode(model.listening(Frames(samples, torch.ones(samples.shape, dtype=torch.bool))))[0][0]
        assert said["offline"] == said["streamed"] == model.tokenizer.decode(best.tokens)
        assert said["duration_s"] == pytest.approx(samples.shape[1] / 16000)
        assert said["offline_s"] > 0
        assert said["streamed_s"] > 0
        assert said["words"] == len(said["streamed"].split())
        assert said["scores"]["offline"]["errors"] / len(line["text"].split()) == pytest.approx(
            jiwer.wer(line["text"], said["offline"])
        )


def test_files_are_those_that_score_takes(finished: Path) -> None:
    texts = {path.name: path.read_text().splitlines() for path in finished.glob("*.txt")}
    assert sorted(texts) == ["hypotheses.offline.txt", "hypotheses.streamed.txt", "references.txt"]
    assert texts["references.txt"] == [line["text"] for line in SOME]
    summary = json.loads((finished / "summary.json").read_text())
    for way in ("offline", "streamed"):
        errors = word_errors(texts["references.txt"], texts[f"hypotheses.{way}.txt"], normalise="none")
        found = summary["WER"][way]
        assert [found[key] / 100 for key in ("value", "low", "high")] == pytest.approx(
            [errors.rate, errors.low, errors.high]
        )
        assert found["n"] == len(SOME)
    assert summary["WER"]["difference"] == {"value": 0, "low": 0, "high": 0, "p": 1, "n": len(SOME)}
    took = sum(line["streamed_s"] for line in lines_of(finished / "utterances.jsonl"))
    assert summary["rtf"]["streamed"] == pytest.approx(took / summary["audio_s"])


class Page(HTMLParser):
    """Which tags are open, what is loaded, and the text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.sources += [str(value) for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_report_needs_no_other_file_and_says_how(finished: Path) -> None:
    page = Page()
    html = (finished / "report.html").read_text(encoding="utf-8")
    page.feed(html)
    assert page.open == []
    assert len(page.sources) == 4
    assert all(source.startswith("data:image/svg+xml;base64,") for source in page.sources)
    for words in ("--search ctc", "normaliser none", "commit", "Nowhere: every text is the same", "95 % intervals"):
        assert words in page.text
    assert "<del>jon</del> <ins>john</ins>" in html
    text = (finished / "report.md").read_text(encoding="utf-8")
    assert "~~jon~~ **john**" in text
    plots = sorted(path.stem for path in (finished / "plots").iterdir())
    assert plots == ["by-duration", "by-speaker", "computing", "offline-streamed"]
    assert all(f"(plots/{name}.svg)" in text for name in plots)


def test_the_summary_comes_last(manifest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(FOLDER, manifest, *QUICK, "--limit", 2)
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("2 utterances, ")
    assert said[-5].endswith("  streamed - offline")
    assert [line.split("  ")[0] for line in said[-4:]] == ["WER %", "CER %", "real-time factor", "mean delay of words"]
    assert "p = 1" in said[-4]


def lhotse_manifest(folder: Path, *, translations: Sequence[str] | None = None) -> Path:
    from lhotse import CutSet, Recording, SupervisionSegment

    shutil.copytree(FOLDER, folder / "audio", ignore=lambda _, names: [n for n in names if not n.endswith(".flac")])
    cuts = []
    for i, line in enumerate(SOME):
        recording = Recording.from_file(folder / "audio" / line["file"], recording_id=line["file"][:2])
        recording.sources[0].source = f"audio/{line['file']}"
        cut = recording.to_cut()
        cut.id = recording.id
        custom = {"translation": translations[i]} if translations else None
        said = SupervisionSegment(
            cut.id, cut.id, 0, cut.duration, text=line["text"], speaker=line["voice"], language="en", custom=custom
        )
        cuts.append(cut.__class__(**{**cut.__dict__, "supervisions": [said]}))
    CutSet.from_cuts(cuts).to_jsonl(folder / "digits_cuts_test.jsonl.gz")
    return folder / "digits_cuts_test.jsonl.gz"


def test_cuts_of_lhotse_are_read_from_their_folder(manifest: Path, finished: Path, tmp_path: Path) -> None:
    path = lhotse_manifest(tmp_path)
    plain, cuts = read_utterances(manifest), read_utterances(path)
    for one, other in zip(plain, cuts, strict=True):
        assert (one.id, one.text, one.speaker) == (other.id, other.text, other.speaker)
        assert one.duration_s == pytest.approx(other.duration_s)
        assert np.array_equal(one.sound.read()[0], other.sound.read()[0])
    run(FOLDER, path, *QUICK, "--output-dir", tmp_path / "out")
    assert timeless(tmp_path / "out" / "utterances.jsonl") == timeless(finished / "utterances.jsonl")


def test_translations_are_judged_by_bleu(tmp_path: Path, manifest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoken = [line["text"].replace("two", "zwei").replace("call", "rufe") for line in SOME]
    path = lhotse_manifest(tmp_path, translations=spoken)
    run(FOLDER, path, *QUICK, "--metric", "bleu", "--output-dir", tmp_path / "out", "--json")
    summary = json.loads(capsys.readouterr().out)
    said = (tmp_path / "out" / "hypotheses.streamed.txt").read_text().splitlines()
    assert summary["BLEU"]["streamed"]["value"] == pytest.approx(SacreBLEU().corpus_score(said, [spoken]).score)
    assert "chrF nrefs:1" in summary["label"]
    assert "by its chrF, offline" in (tmp_path / "out" / "report.md").read_text()
    with pytest.raises(InputError, match="no translation, which BLEU needs"):
        run(FOLDER, manifest, "--metric", "bleu")


def counting(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids that are heard from now on."""
    heard: list[str] = []
    real = listening.listen

    def listen(ears: Any, batch: Sequence[Utterance]) -> list[Heard]:
        heard.extend(one.id for one in batch)
        return real(ears, batch)

    monkeypatch.setattr(shards, "listen", listen)
    return heard


def test_what_is_finished_is_not_done_again(
    manifest: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "out"
    shutil.copytree(finished, place)
    whole = (place / "utterances.jsonl").read_text()
    for kept, piece in ((2, 40), (4, 0)):
        parts = whole.splitlines(keepends=True)
        (place / "utterances.jsonl").write_text("".join(parts[:kept]) + "".join(parts[kept:])[:piece])
        heard = counting(monkeypatch)
        run(FOLDER, manifest, *QUICK, "--output-dir", place)
        assert sorted(heard) == [line["file"][:2] for line in SOME[kept:]]
        assert timeless(place / "utterances.jsonl") == timeless(finished / "utterances.jsonl")
    assert (
        json.loads((place / "summary.json").read_text())["WER"]
        == json.loads((finished / "summary.json").read_text())["WER"]
    )


def test_more_utterances_and_another_normaliser_go_on(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "out"
    run(FOLDER, manifest, *QUICK, "--output-dir", place, "--limit", 2)
    assert len((place / "references.txt").read_text().splitlines()) == 2
    heard = counting(monkeypatch)
    run(FOLDER, manifest, *QUICK[:-1], "whisper-basic", "--output-dir", place, "--limit", 3)
    assert heard == [SOME[2]["file"][:2]]
    heard = counting(monkeypatch)
    run(FOLDER, manifest, *QUICK, "--output-dir", place, "--limit", 1)
    assert heard == []
    assert len((place / "references.txt").read_text().splitlines()) == 1
    assert len(lines_of(place / "utterances.jsonl")) == 3  # nothing is thrown away


def test_other_options_are_refused(manifest: Path, finished: Path, tmp_path: Path) -> None:
    before = (finished / "utterances.jsonl").read_bytes()
    for change, words in (
        (["--search", "transducer"], "with search ctc, now it is transducer"),
        (["--chunk", "0.5"], "with chunk 0.1, now it is 0.5"),
        (["--silence", "1"], "with silence not given, now it is 1.0"),
    ):
        with pytest.raises(InputError, match=words):
            run(FOLDER, manifest, *QUICK, *change, "--output-dir", finished)
    other = write_manifest(tmp_path / "digits.jsonl", rows(SOME[:2]))
    with pytest.raises(InputError, match="with manifest "):
        run(FOLDER, other, *QUICK, "--output-dir", finished)
    assert (finished / "utterances.jsonl").read_bytes() == before
    shutil.copytree(finished, tmp_path / "copy")
    (tmp_path / "copy" / "options.json").unlink()
    with pytest.raises(InputError, match="whose results are these"):
        run(FOLDER, manifest, *QUICK, "--output-dir", tmp_path / "copy")


def test_a_model_that_has_changed_is_another(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"x" * (5 << 20))
    before = fingerprint(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report").write_text("of ours")
    assert fingerprint(tmp_path, but=tmp_path / "out") == before
    (tmp_path / "weights").write_bytes(b"x" * ((5 << 20) - 1) + b"y")
    assert fingerprint(tmp_path, but=tmp_path / "out") != before
    assert fingerprint("tiny.en") == ""


def test_a_line_that_is_no_result_is_an_error_but_for_the_last(tmp_path: Path) -> None:
    good = '{"id": "a", "offline": "x", "streamed": null, "speaker": "s"}\n'
    with Journal(tmp_path, {}) as journal:
        journal.add([Heard("é\u2028"), Heard("b", failed="broken"), Heard("c")])
        with pytest.raises(InputError, match="another evaluation is writing there"), Journal(tmp_path, {}):
            pass
    path = tmp_path / "utterances.jsonl"
    path.write_text(path.read_text() + good + good[:-5])
    with Journal(tmp_path, {}) as journal:
        assert sorted(journal.done) == ["a", "c", "é\u2028"]  # what failed is tried again
        assert len(path.read_text().split("\n")) == 4
    path.write_text(good + good[:-5])
    with Journal(tmp_path, {}) as journal:
        journal.add([Heard("d")])
    with Journal(tmp_path, {}) as journal:
        assert sorted(journal.done) == ["a", "d"]  # what was cut off is not in front of a new line
    path.write_text(good + "{}\n" + good)
    with pytest.raises(InputError, match="line 2: not a result"), Journal(tmp_path, {}):
        pass


def test_what_cannot_be_heard_is_skipped_counted_and_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut = tmp_path / "cut.flac"
    cut.write_bytes((FOLDER / "00.flac").read_bytes()[:9000])
    soundfile.write(tmp_path / "short.wav", np.zeros(3), 16000)
    bad = [
        {"id": "<b>cut", "audio": "cut.flac", "text": "one"}, {"id": "gone", "audio": "gone.wav", "text": "two"},
        {"id": "short", "audio": "short.wav", "text": "three"},
    ]  # fmt: skip
    path = write_manifest(tmp_path / "m.jsonl", [*rows(SOME[:2]), *bad])
    run(FOLDER, path, *QUICK, "--output-dir", tmp_path / "out")
    said = capsys.readouterr()
    assert said.err.count("speechattn: skipped") == 2
    assert "2 utterances could not be heard" in said.out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["failed"] == ["<b>cut", "gone"]
    assert summary["WER"]["offline"]["n"] == 3  # too short to say anything, but heard
    html = (tmp_path / "out" / "report.html").read_text()
    assert "Not heard" in html
    assert "&lt;b&gt;cut" in html
    assert "<b>cut" not in html
    with pytest.raises(InputError, match="none of 2 utterances could be heard"):
        run(FOLDER, write_manifest(tmp_path / "bad.jsonl", bad[:2]), *QUICK)


def test_one_that_fails_does_not_take_its_batch_along() -> None:
    def fussy(sounds: Sequence[np.ndarray]) -> list[str]:
        if any(len(sound) == 2 for sound in sounds):
            raise RuntimeError("two samples")
        return [f"{len(sound)}" for sound in sounds]

    ears = listening.Ears(fussy, None, 16000)
    sounds = {name: np.zeros(n, np.float32) for name, n in (("a", 1), ("b", 2), ("c", 3))}
    found = listening.hear_offline(ears, {name: listening.Sensed(x, 16000, x, None) for name, x in sounds.items()})
    assert [str(text) for text, _ in found.values()] == ["1", "two samples", "3"]


def test_matplotlib_is_missed_before_the_work(manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    heard = counting(monkeypatch)
    with pytest.raises(InputError, match=r"pip install 'speechattn\[train\]'"):
        run(FOLDER, manifest, *QUICK, "--output-dir", tmp_path / "out")
    assert heard == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"audio": "a.wav", "text": "a"}\n{"audio": "b.wav"}', "line 2: wanted audio"),
        ('{"audio": "a.wav", "text": "a"}\n{"audio": "a.wav", "text": "b"}', "the id a.wav is there twice"),
        ("[1]", "line 1: not an object"),
        ("{", "not JSONL"),
        ('{"supervisions": []}', "line 1: not a cut"),
        ("", "no utterances"),
        ('{"audio": "a.wav", "text": "a", "offset": -1}', "line 1: offset -1.0 and duration None are no place"),
        ('{"audio": "a.wav", "text": "a", "offset": 0, "duration": NaN}', "duration nan are no place"),
    ],
)
def test_what_is_no_manifest(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=words):
        read_utterances(path)
    with pytest.raises(InputError, match="No such file"):
        read_utterances(tmp_path / "none.jsonl.gz")
    packed = gzip.compress(b'{"audio": "a.wav", "text": "a"}\n' * 99)
    (tmp_path / "bad.jsonl.gz").write_bytes(packed[:10] + b"\xff" * 8 + packed[18:])
    with pytest.raises(InputError, match="not JSONL"):
        read_utterances(tmp_path / "bad.jsonl.gz")


def test_a_piece_of_a_file(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.arange(16000) / 32768, 16000, subtype="PCM_16")
    line = {"audio_filepath": "a.wav", "text": "x", "offset": 0.25, "duration": 0.5}
    (one,) = read_utterances(write_manifest(tmp_path / "m.jsonl", [line]))
    samples, rate = one.sound.read()
    assert (one.id, one.duration_s, rate) == ("a.wav", 0.5, 16000)
    assert (samples * 32768).round().tolist() == list(range(4000, 12000))
    with pytest.raises(InputError, match="not inside the file"):
        FileSound(tmp_path / "a.wav", 0.9, 0.5).read()


def test_parts_of_a_long_recording_and_the_text_of_a_mixed_cut(tmp_path: Path) -> None:
    from lhotse import CutSet, MonoCut, Recording, SupervisionSegment

    soundfile.write(tmp_path / "a.wav", np.arange(16000) / 32768, 16000, subtype="PCM_16")
    recording = Recording.from_file(tmp_path / "a.wav", recording_id="r")
    recording.sources[0].source = "a.wav"
    pieces = [
        MonoCut(f"c{n}", n / 4, 0.25, 0, [SupervisionSegment(f"s{n}", "r", 0, 0.25, text=f"word{n}", speaker=f"p{n}")],
                recording=recording)
        for n in range(3)
    ]  # fmt: skip
    CutSet.from_cuts([*pieces, pieces[2].append(pieces[0])]).to_file(tmp_path / "x_cuts_test.jsonl.gz")
    found = read_utterances(tmp_path / "x_cuts_test.jsonl.gz")
    for n, one in enumerate(found[:3]):
        assert (one.id, one.text, one.speaker, one.duration_s) == (f"c{n}", f"word{n}", f"p{n}", 0.25)
        assert (one.sound.read()[0] * 32768).round().tolist() == list(range(4000 * n, 4000 * n + 4000))
    assert (found[3].text, found[3].speaker) == ("word2 word0", "p0+p2")
    (tmp_path / "a.wav").unlink()
    with pytest.raises(InputError, match=r"^c0: "):
        found[0].sound.read()


@settings(deadline=None, max_examples=60)
@given(durations=st.lists(st.floats(0, 40), max_size=30), seconds=st.floats(1, 60))
def test_batches_hold_every_utterance_once_and_no_more_than_fits(durations: list[float], seconds: float) -> None:
    sound = FileSound(Path("x"))
    all_of = [Utterance(str(i), "", duration, sound) for i, duration in enumerate(durations)]
    found = batches(all_of, seconds=seconds)
    assert sorted(one.id for batch in found for one in batch) == sorted(one.id for one in all_of)
    for batch in found:
        assert len(batch) == 1 or len(batch) * max(one.duration_s for one in batch) <= seconds + 1e-9
    for batch, _ in pairwise(found):
        assert batch[0].duration_s * (len(batch) + 1) > seconds  # none could have taken one more


def test_a_model_of_whole_utterances(manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load_model(FOLDER)
    assert isinstance(whole, Recognizer)
    set_span(whole.encoder, Span.full())
    monkeypatch.setattr(evaluate, "build_model", lambda options: whole)
    both = evaluate.ears(options([str(FOLDER), str(manifest), *QUICK, "--no-vad"]))
    assert both.session is not None
    found = listening.listen(both, read_utterances(manifest)[:2])
    assert [said.offline for said in found] == [line["text"] for line in SOME[:2]]
    assert str(found[0].streamed).startswith("turn right go on stop")
    del whole.heads["attention"]
    run(FOLDER, manifest, *QUICK, "--output-dir", tmp_path)
    assert "it was not streamed" in (tmp_path / "report.md").read_text()
    assert not (tmp_path / "hypotheses.streamed.txt").exists()
    assert json.loads((tmp_path / "summary.json").read_text())["WER"]["streamed"] is None


@pytest.mark.slow
def test_whisper_hears_both_ways(
    tiny: WhisperModel, manifest: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evaluate, "build_model", lambda options: tiny)
    run("tiny.en", manifest, "--limit", 1, "--policy", "local-agreement", "--json")
    summary = json.loads(capsys.readouterr().out)
    assert summary["WER"]["offline"]["value"] == summary["WER"]["streamed"]["value"] == 0
    assert summary["delay_s"] > 0
    with pytest.raises(InputError, match="--search does nothing with tiny"):
        run("tiny.en", manifest, "--search", "ctc")


def test_texts_with_line_ends_stay_aligned(tmp_path: Path) -> None:
    sound = FileSound(Path("x"))
    utterances = [Utterance("a", "one\ntwo", 1, sound), Utterance("b", "", 1, sound)]
    heard = {"a": Heard("a", 1, "one\r\ntwo", "one two"), "b": Heard("b", 1, "", "x")}
    found = Evaluation.of(utterances, heard, metric="wer", normalise="none")
    write_texts(found, tmp_path)
    assert (tmp_path / "references.txt").read_text() == "one two\n\n"
    assert (tmp_path / "hypotheses.offline.txt").read_text() == "one two\n\n"
    assert found.figures["WER"].offline.value == 0
    assert found.figures["WER"].offline.n == 1  # without a reference nothing counts


def test_a_stream_is_heard_by_the_policy_that_was_asked_for(manifest: Path) -> None:
    asked = options([str(FOLDER), str(manifest), "--search", "ctc", "--policy", "hold-n", "--hold-n", "3"])
    session = evaluate.ears(asked).session
    assert session is not None
    assert session().listener.policy == Hold(3)


def test_whole_windows_keep_no_setting_of_a_policy(manifest: Path) -> None:
    """A setting without its policy would be refused."""
    asked = options(["tiny.en", str(manifest), "--policy", "edatt", "--attn-threshold", "0.2", "--min-chunk-size", "1"])
    whole = evaluate.changed(asked, evaluate.POLICY)
    assert asked.attn_threshold == 0.2
    assert {getattr(whole, name) for name in ("policy", "min_chunk_size", *SETTINGS)} == {None}


def test_phrases_are_preferred_both_ways(manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    phrases = tmp_path / "phrases.txt"
    phrases.write_text("call jon please\nplease call marc\nplease call anna\n")
    how = ["--normaliser", "none", "--hotwords-file", phrases, "--hotwords-score", 1.0, "--json"]
    run(FOLDER, manifest, *how, "--search", "transducer")
    summary = json.loads(capsys.readouterr().out)
    assert summary["WER"]["offline"]["value"] == summary["WER"]["streamed"]["value"] == 0
    given = options([str(word) for word in (FOLDER, manifest, *how)])
    before = evaluate.settings(given, tmp_path / "out")
    phrases.write_text("call john please\n")
    assert {key for key, value in evaluate.settings(given, tmp_path / "out").items() if before[key] != value} == {
        "contents of the hotwords"
    }


def test_terms_are_preferred_live(
    manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted = Scripted({"jon": 8, "marc": 8}, 64).eval()
    monkeypatch.setattr("speechattn.cli.terms.load_matcher", lambda _: (scripted, str(FOLDER)))
    terms = tmp_path / "terms.txt"
    terms.write_text("jon\nmarc\n")
    how = ["--normaliser", "none", "--search", "transducer", "--json", "--terms", terms, "--terms-model", tmp_path]
    run(FOLDER, manifest, *how)
    summary = json.loads(capsys.readouterr().out)
    assert summary["WER"]["streamed"]["value"] < summary["WER"]["offline"]["value"]  # which hears no terms


def test_every_option_that_a_model_needs_is_there(tmp_path: Path) -> None:
    ours = {name for name in vars(options(["m", "x"])) if name not in ("run", "command")}
    for command in ("stream", "transcribe"):
        theirs = parser().parse_args([command, "x.wav"])
        needed = argparse.ArgumentParser()
        add_model_options(needed)
        assert {*vars(needed.parse_args([]))} <= {*vars(theirs)}
        assert {*vars(needed.parse_args([]))} <= ours
    assert options(["m", "x", "--plugin", "mine"]).plugin == ["mine"]


def test_the_commands_of_the_page_parse() -> None:
    page = (FOLDER.parents[1] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    commands = [line.split() for block in page.split("```sh\n")[1:] for line in block.split("```")[0].splitlines()]
    assert len(commands) == 14
    for _, name, *arguments in commands:
        assert (options(arguments) if name == "evaluate" else parser().parse_args([name, *arguments])).run


def program(tmp_path: Path, *arguments: object) -> subprocess.Popen[bytes]:
    """The command in a process of its own."""
    (tmp_path / "program.py").write_text(PROGRAM)
    words = [sys.executable, str(tmp_path / "program.py"), *map(str, arguments)]
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    return subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL)


@pytest.mark.slow
def test_two_processes_hear_what_one_hears(manifest: Path, finished: Path, tmp_path: Path) -> None:
    arguments = [FOLDER, manifest, *QUICK, "--batch-seconds", 4, "--processes", 2, "--output-dir", tmp_path / "out"]
    assert program(tmp_path, *arguments).wait(timeout=300) == 0
    assert timeless(tmp_path / "out" / "utterances.jsonl") == timeless(finished / "utterances.jsonl")


@pytest.mark.slow
def test_killed_and_started_again(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many = [{**row, "id": f"{row['id']}-{i}"} for i in range(12) for row in rows(SOME)]
    path = write_manifest(tmp_path / "many.jsonl", many)
    place = tmp_path / "out"
    arguments = [FOLDER, path, *QUICK, "--batch-seconds", 6, "--output-dir", place]
    running, journal = program(tmp_path, *arguments), place / "utterances.jsonl"
    until = time.monotonic() + 240
    while time.monotonic() < until and not (journal.exists() and journal.stat().st_size > 1500):
        time.sleep(0.05)
    running.send_signal(signal.SIGKILL)
    running.wait(timeout=60)
    before = journal.read_bytes()
    with journal.open("ab") as file:
        file.write(before[: len(before.splitlines()[0]) // 2])  # as if it had died in the middle of a line
    done = before.count(b"\n")
    assert 0 < done < len(many)
    heard = counting(monkeypatch)
    run(*arguments)
    assert len(heard) == len(many) - done
    found = {line["id"].split("-")[0]: line["offline"] for line in lines_of(journal)}
    assert [line["id"] for line in lines_of(journal)] == [row["id"] for row in many]
    assert found == {line["id"]: line["offline"] for line in lines_of(finished / "utterances.jsonl")}
