"""Manifests: what is written, what is left out, what is done again; and the corpora that are read in place."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
from corpora import damaged, make_librispeech, make_must_c, murmur
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from speechattn.data.prepare import librispeech, must_c
from speechattn.data.prepare.manifests import Skipped, Utterance, manifest_path, prepared, write_manifests
from speechattn.data.prepare.sound import AUDIO_FORMATS, RATE, AudioFormat, read_sound, write_sound
from speechattn.errors import InputError

lhotse = pytest.importorskip("lhotse")


def tone(seconds: float) -> Callable[[], np.ndarray]:
    """A function that gives a second or so of 440 Hz."""
    return lambda: (0.3 * np.sin(np.arange(round(seconds * RATE)) * 2 * np.pi * 440 / RATE)).astype(np.float32)


def rows(folder: Path, name: str, kind: str, split: str) -> list[dict]:  # type: ignore[type-arg]
    with gzip.open(manifest_path(folder, name, kind, split), "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def skipped(folder: Path, name: str, split: str) -> dict[str, str]:
    lines = manifest_path(folder, name, "skipped", split).read_text(encoding="utf-8").splitlines()
    assert lines[0] == "id\treason"
    return dict(line.split("\t") for line in lines[1:])


def check_with_lhotse(folder: Path, name: str, split: str) -> lhotse.CutSet:
    """lhotse reads the three manifests, finds them valid and agrees with them about every sound."""
    cuts = lhotse.CutSet.from_file(manifest_path(folder, name, "cuts", split))
    recordings = lhotse.RecordingSet.from_file(manifest_path(folder, name, "recordings", split))
    supervisions = lhotse.SupervisionSet.from_file(manifest_path(folder, name, "supervisions", split))
    lhotse.validate_recordings_and_supervisions(recordings, supervisions)
    lhotse.validate(cuts, read_data=True)
    assert [cut.supervisions[0].id for cut in cuts] == [supervision.id for supervision in supervisions]
    assert {cut.recording.id for cut in cuts} == {recording.id for recording in recordings}
    for cut, supervision in zip(cuts, supervisions, strict=True):
        (said,) = cut.supervisions
        assert (said.text, said.start, said.duration, said.id) == (supervision.text, 0, cut.duration, cut.id)
        assert supervision.start == cut.start
        assert cut.load_audio().shape == (1, round(cut.duration * RATE))
    return cuts


@pytest.mark.parametrize("audio_format", AUDIO_FORMATS)
def test_a_sound_comes_back_from_every_format_also_through_lhotse(tmp_path: Path, audio_format: AudioFormat) -> None:
    x = murmur(np.random.default_rng(0), "nobody saw the boy")[:20001]
    utterance = Utterance("a/b c", lambda: x, " Nobody saw the boy ", "me", "en", "Niemand", "de", custom={"take": 2})
    written = write_manifests(tmp_path, "toy", "dev", [utterance], audio_format=audio_format)
    assert (written.utterances, written.skipped) == (1, 0)
    assert written.hours == pytest.approx(20001 / RATE / 3600, abs=1e-4)
    (cut,) = check_with_lhotse(tmp_path, "toy", "dev")
    (said,) = cut.supervisions
    assert (said.text, said.speaker, said.language) == ("Nobody saw the boy", "me", "en")
    assert said.custom == {"take": 2, "translation": "Niemand", "translation_language": "de"}
    y = cut.load_audio()[0]
    assert len(y) == len(x)
    assert np.corrcoef(x, y)[0, 1] > (0.98 if audio_format == "ogg" else 0.999999)
    info = soundfile.info(cut.recording.sources[0].source)
    assert (info.samplerate, info.channels, info.format) == (RATE, 1, AUDIO_FORMATS[audio_format][0])


def test_opus_is_small(tmp_path: Path) -> None:
    x = murmur(np.random.default_rng(0), " ".join(["nobody saw the boy"] * 10))
    write_sound(tmp_path / "x.ogg", x, "ogg")
    assert (tmp_path / "x.ogg").stat().st_size * 8 / (len(x) / RATE) < 50_000


def broken(folder: Path) -> Iterator[tuple[Utterance | Skipped, str]]:
    """Utterances that cannot be used, and a word of the reason."""
    good = folder / "good.flac"
    soundfile.write(good, np.random.default_rng(0).standard_normal(RATE) * 0.1, RATE)
    (folder / "cut.flac").write_bytes(good.read_bytes()[:12000])
    soundfile.write(folder / "good.wav", np.random.default_rng(0).standard_normal(8000) * 0.1, 8000)
    (folder / "cut.wav").write_bytes((folder / "good.wav").read_bytes()[:12000])
    (folder / "head.wav").write_bytes((folder / "good.wav").read_bytes()[:20])
    (folder / "empty.flac").touch()
    (folder / "text.wav").write_text("not a sound\n" * 99)

    def fail() -> np.ndarray:
        raise InputError("no voice\ntoday")

    yield Utterance("1", folder / "none.flac", "one", "me", "en"), "No such file"
    yield Utterance("2", folder / "cut.flac", "two", "me", "en"), "cut.flac: damaged or cut off"
    yield Utterance("3", folder / "empty.flac", "three", "me", "en"), "the file is empty"
    yield Utterance("4", folder / "text.wav", "four", "me", "en"), "not audio"
    yield Utterance("5", folder / "cut.wav", "five", "me", "en"), "announces 16044 bytes, and 12000 are there"
    yield Utterance("5b", folder / "head.wav", "five", "me", "en"), "head.wav: not audio"
    yield Utterance("6", good, " \t", "me", "en"), "no text"
    yield Utterance("7", good, "seven", "me", "en", " "), "no translation"
    yield Utterance("8", good, "x" * 42, "me", "en"), "nobody speaks so fast"
    yield Utterance("9", good, "a", "me", "en", start_s=0.5, duration_s=0.05), "too short"
    yield Utterance("10", good, "ten", "me", "en", start_s=1.0), "the recording has 1.00 s"
    yield Utterance("10b", good, "ten", "me", "en", start_s=float("nan")), "from nan s"
    yield Utterance("11", lambda: np.zeros(RATE, np.float32), "silence", "me", "en"), "every sample is zero"
    yield Utterance("12", fail, "no", "me", "en"), "no voice today"
    yield Utterance("13", lambda: np.full(RATE, np.nan, np.float32), "nan", "me", "en"), "not a finite number"
    yield Utterance("good", good, "again", "me", "en"), "same id"
    yield Skipped("15", "the corpus says so"), "the corpus says so"


def test_what_cannot_be_used_is_left_out_counted_and_listed_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    bad = list(broken(tmp_path / "in"))
    good = Utterance("good", tmp_path / "in/good.flac", "x" * 41, "me", "en")
    written = write_manifests(tmp_path, "toy", "train", [good, *(one for one, _ in bad)])
    assert (written.utterances, written.skipped) == (1, len(bad))
    reasons = skipped(tmp_path, "toy", "train")
    assert list(reasons) == [one.id for one, _ in bad]
    for one, reason in bad:
        assert reason in reasons[one.id], one.id
    assert not list(tmp_path.glob("toy_train/*"))
    assert [cut.id for cut in check_with_lhotse(tmp_path, "toy", "train")] == ["good"]


def test_where_nobody_speaks_there_is_no_text_and_it_says_what_is_heard(tmp_path: Path) -> None:
    rain = Utterance("rain", tone(1), "", "nobody", "en", custom={"sound": "rain"})
    assert write_manifests(tmp_path, "toy", "train", [rain]).utterances == 1
    (cut,) = check_with_lhotse(tmp_path, "toy", "train")
    assert cut.supervisions[0].text == ""
    assert cut.supervisions[0].custom["sound"] == "rain"


def test_a_full_disk_is_no_fault_of_the_utterance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("speechattn.data.prepare.manifests.write_sound", full)
    with pytest.raises(OSError, match="No space left"):
        write_manifests(tmp_path, "toy", "dev", [Utterance("a", tone(1), "a", "me", "en")])
    assert prepared(tmp_path, "toy", "dev") is None


def test_where_nothing_is_left_it_says_why(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"toy dev: no utterance can be used \(1 left out; the first: no text\)"):
        write_manifests(tmp_path, "toy", "dev", [Utterance("a", tone(1), "", "me", "en")])
    assert prepared(tmp_path, "toy", "dev") is None
    with pytest.raises(InputError, match="names none"):
        write_manifests(tmp_path, "toy", "dev", [])


def test_prepared_means_same_options_and_sounds_still_there(tmp_path: Path) -> None:
    one = [Utterance("a", tone(1), "a", "me", "en")]
    options = {"audio_format": "flac", "speeds": (0.9, 1.1)}
    assert prepared(tmp_path, "toy", "dev", options) is None
    written = write_manifests(tmp_path, "toy", "dev", one, options=options)
    assert prepared(tmp_path, "toy", "dev", options) == written == prepared(tmp_path, "toy", "dev")
    assert prepared(tmp_path, "toy", "dev", {**options, "speeds": (1, 1)}) is None
    first = manifest_path(tmp_path, "toy", "cuts", "dev").read_bytes()
    write_manifests(tmp_path, "toy", "dev", one, options=options)
    assert manifest_path(tmp_path, "toy", "cuts", "dev").read_bytes() == first
    (tmp_path / "toy_dev" / "a.flac").unlink()
    assert prepared(tmp_path, "toy", "dev", options) is None


def test_a_run_that_dies_counts_as_nothing_and_leaves_no_half_file(tmp_path: Path) -> None:
    def utterances() -> Iterator[Utterance]:
        yield Utterance("a", tone(1), "a", "me", "en")
        raise KeyboardInterrupt

    write_manifests(tmp_path, "toy", "dev", [Utterance("old", tone(1), "old", "me", "en")])
    with pytest.raises(KeyboardInterrupt):
        write_manifests(tmp_path, "toy", "dev", utterances())
    assert prepared(tmp_path, "toy", "dev") is None
    assert [row["id"] for row in rows(tmp_path, "toy", "cuts", "dev")] == ["old"]
    assert not list(tmp_path.rglob("*.part"))


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rate=st.sampled_from([8000, 11025, 16000, 44100]), channels=st.integers(1, 2),
    ending=st.sampled_from(["wav", "flac", "ogg"]), start=st.integers(0, 90), length=st.integers(20, 60),
)  # fmt: skip
def test_a_part_of_any_file_is_the_part_of_the_whole(
    tmp_path: Path, rate: int, channels: int, ending: str, start: int, length: int
) -> None:
    x = np.random.default_rng(rate).standard_normal((2 * rate, channels)) * 0.1
    path = tmp_path / f"{rate}-{channels}.{ending}"
    if not path.exists():
        soundfile.write(path, x, rate)
    start_s, duration_s = start / 100, length / 100
    one = Utterance("x", path, "a b", "me", "en", start_s=start_s, duration_s=duration_s)
    write_manifests(tmp_path / "out", "toy", "dev", [one])
    (row,) = rows(tmp_path / "out", "toy", "cuts", "dev")
    lies = Path(row["recording"]["sources"][0]["source"])
    assert (lies == path) == (rate == RATE and channels == 1)
    found = soundfile.read(lies, dtype="float32")[0][round(row["start"] * RATE) :][: round(row["duration"] * RATE)]
    expected = read_sound(path)[round(start_s * RATE) : round((start_s + duration_s) * RATE)]
    assert abs(len(found) - len(expected)) <= 1
    n = min(len(found), len(expected))
    assert np.abs(found[:n] - expected[:n]).max() < 1e-4


def test_recordings_of_the_same_name_stay_apart_and_shared_ones_together(tmp_path: Path) -> None:
    for name in ("a/x.wav", "b/x.wav"):
        (tmp_path / name).parent.mkdir()
        soundfile.write(tmp_path / name, tone(2)(), RATE)
    said = [
        Utterance(f"{name}-{start}", tmp_path / name / "x.wav", name, "me", "en", start_s=start, duration_s=1.0)
        for name in "ab"
        for start in (0, 1)
    ]
    write_manifests(tmp_path, "toy", "dev", said)
    cuts = check_with_lhotse(tmp_path, "toy", "dev")
    assert [cut.recording.id for cut in cuts] == ["x", "x", "x-2", "x-2"]
    assert [Path(cut.recording.sources[0].source).parent.name for cut in cuts] == ["a", "a", "b", "b"]


def test_librispeech_is_what_lhotse_reads(tmp_path: Path) -> None:
    from lhotse.recipes import prepare_librispeech

    corpus = make_librispeech(tmp_path)
    parts = librispeech.prepare(tmp_path, tmp_path / "out")
    assert parts == ["dev-clean-2", "train-clean-5"]
    theirs = prepare_librispeech(corpus)
    for part in parts:
        ours = {cut.id: cut for cut in check_with_lhotse(tmp_path / "out", "librispeech", part)}
        assert len(ours) == 12
        assert set(ours) == {one.id for one in theirs[part]["supervisions"]}
        for one in theirs[part]["supervisions"]:
            said = ours[one.id].supervisions[0]
            assert (said.text, said.speaker, said.duration) == (one.text, one.speaker, one.duration)
            assert said.language == "en"
        sources = {one.id: one.sources for one in theirs[part]["recordings"]}
        assert {cut.recording.id: cut.recording.sources for cut in ours.values()} == sources


def test_librispeech_lists_what_is_broken(tmp_path: Path) -> None:
    corpus = make_librispeech(tmp_path, ["dev-clean-2"])
    (corpus / "dev-clean-2/100/1000/100-1000-0001.flac").unlink()
    (corpus / "dev-clean-2/100/1000/100-1000-0002.flac").write_bytes(b"fLaC")
    words = corpus / "dev-clean-2/101/1010/101-1010.trans.txt"
    first, *others = words.read_text().splitlines()
    words.write_text("\n".join([first.split()[0], *others[1:]]))
    librispeech.prepare(tmp_path, tmp_path / "out")
    reasons = skipped(tmp_path / "out", "librispeech", "dev-clean-2")
    assert set(reasons) == {"100-1000-0001", "100-1000-0002", "101-1010-0000", "101-1010-0001"}
    assert "No such file" in reasons["100-1000-0001"]
    assert "no text" in reasons["101-1010-0000"]
    assert "no line for it" in reasons["101-1010-0001"]
    assert len(rows(tmp_path / "out", "librispeech", "cuts", "dev-clean-2")) == 8
    with pytest.raises(InputError, match="test-clean missing; fetch with --download"):
        librispeech.prepare(tmp_path, tmp_path / "out", ["test-clean"])
    with pytest.raises(InputError, match="no part dev-clear; it has dev-clean"):
        librispeech.prepare(tmp_path, tmp_path / "out", ["dev-clear"])
    with pytest.raises(InputError, match="--download"):
        librispeech.prepare(tmp_path / "out", tmp_path)


def test_librispeech_archives_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(folder: Path, dataset_parts: list[str]) -> Path:
        (part,) = dataset_parts
        make_librispeech(folder, [part])
        (folder / "LibriSpeech" / part / ".completed").touch()
        (folder / f"{part}.tar.gz").write_bytes(b"no archive")
        return folder / "LibriSpeech"

    monkeypatch.setattr("lhotse.recipes.librispeech.download_librispeech", fetch)
    assert librispeech.download(tmp_path, ["dev-clean-2"]) == tmp_path / "LibriSpeech"
    with pytest.raises(InputError, match="expected 39fde525"):
        librispeech.download(tmp_path, ["test-clean"])
    assert not (tmp_path / "LibriSpeech/test-clean/.completed").exists()
    with pytest.raises(InputError, match="no part test-clear"):
        librispeech.download(tmp_path, ["test-clear"])


def test_must_c_is_what_lhotse_reads_and_the_transcript(tmp_path: Path) -> None:
    from lhotse.recipes.must_c import prepare_must_c

    make_must_c(tmp_path)
    name = must_c.prepare(tmp_path, tmp_path / "out", "de")
    prepare_must_c(tmp_path, tmp_path / "theirs", "de")
    for split in must_c.SPLITS:
        cuts = check_with_lhotse(tmp_path / "out", name, split)
        theirs = lhotse.SupervisionSet.from_file(tmp_path / f"theirs/must_c_supervisions_en-de_{split}.jsonl.gz")
        english = (tmp_path / f"en-de/data/{split}/txt/{split}.en").read_text().splitlines()
        assert len(cuts) == 8
        for cut, one, text in zip(cuts, theirs, english, strict=True):
            said = cut.supervisions[0]
            assert (cut.id, said.custom["translation"], said.speaker) == (one.id, one.text, one.speaker)
            assert (said.text, said.language, said.custom["translation_language"]) == (text, "en", "de")
            assert cut.recording.id == one.recording_id
            assert (cut.start, cut.duration) == pytest.approx((one.start, one.duration), abs=1 / RATE)


def test_must_c_names_what_is_missing_before_it_writes(tmp_path: Path) -> None:
    make_must_c(tmp_path)
    text = tmp_path / "en-de/data/tst-HE/txt"
    (text / "tst-HE.en").unlink()
    (text / "tst-HE.yaml").unlink()
    with pytest.raises(InputError, match=r"tst-HE lacks tst-HE/txt/tst-HE\.yaml, tst-HE/txt/tst-HE\.en in "):
        must_c.prepare(tmp_path, tmp_path / "out", "de")
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="no folder en-es/data"):
        must_c.prepare(tmp_path, tmp_path / "out", "es")
    for place in (tmp_path / "en-de", tmp_path / "en-de/data"):
        assert must_c.prepare(place, tmp_path / "out", "de", ["dev"]) == "must_c_en-de"


def test_must_c_with_broken_lines(tmp_path: Path) -> None:
    make_must_c(tmp_path, splits=["dev"])
    text, wav = (tmp_path / "en-de/data/dev" / kind for kind in ("txt", "wav"))
    (wav / "ted_101.wav").unlink()
    segments = (text / "dev.yaml").read_text().splitlines(keepends=True)
    (text / "dev.yaml").write_text("".join(segments).replace("offset: 0.500000", "offset: early", 1))
    must_c.prepare(tmp_path, tmp_path / "out", "de", ["dev"])
    reasons = skipped(tmp_path / "out", "must_c_en-de", "dev")
    assert list(reasons) == ["ted_100-seg-0", *(f"ted_101-seg-{n}" for n in range(4))]
    assert "not numbers" in reasons["ted_100-seg-0"]
    assert "ted_101.wav: No such file" in reasons["ted_101-seg-3"]
    (text / "dev.yaml").write_text("".join(segments[1:]))
    with pytest.raises(InputError, match="7 segments, 8 lines in en, 8 lines in de"):
        must_c.prepare(tmp_path, tmp_path / "other", "de", ["dev"])
    (text / "dev.yaml").write_text("- {wav: [}")
    with pytest.raises(InputError, match="not YAML"):
        must_c.prepare(tmp_path, tmp_path / "other", "de", ["dev"])


def test_a_damaged_manifest_counts_as_nothing(tmp_path: Path) -> None:
    write_manifests(tmp_path, "toy", "dev", [Utterance("a", tone(1), "one", "me", "en")])
    assert prepared(tmp_path, "toy", "dev") is not None
    path = manifest_path(tmp_path, "toy", "cuts", "dev")
    for content in (damaged(gzip.decompress(path.read_bytes())), gzip.compress(b"[]\n")):
        path.write_bytes(content)
        assert prepared(tmp_path, "toy", "dev") is None


def test_a_long_id_gives_a_file_that_can_be_written(tmp_path: Path) -> None:
    names = [
        "запись " * 12 + end for end in ("один", "два")
    ]  # more than 255 bytes, once they are spelled for any system
    written = write_manifests(tmp_path, "toy", "dev", [Utterance(name, tone(1), "one", "me", "ru") for name in names])
    assert written.utterances == 2
    found = rows(tmp_path, "toy", "cuts", "dev")
    assert [row["id"] for row in found] == names
    assert len({row["recording"]["sources"][0]["source"] for row in found}) == 2


def test_times_that_are_not_in_the_recording_are_no_part_of_it(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "x.wav", tone(2)(), RATE)
    soundfile.write(tmp_path / "y.wav", tone(2)(), 8000)
    for name in ("x", "y"):
        seconds = soundfile.info(tmp_path / f"{name}.wav").duration
        some = [
            Utterance(
                f"{late}", tmp_path / f"{name}.wav", "one", "me", "en", start_s=1.0, duration_s=seconds - 1 + late
            )
            for late in (0.0, 0.9, 1.1, 60.0)
        ]
        write_manifests(tmp_path, name, "dev", some)
        found = {row["id"]: row["duration"] for row in rows(tmp_path, name, "cuts", "dev")}
        assert found == {"0.0": seconds - 1, "0.9": seconds - 1}
        assert f"{seconds + 59:.2f} s long, but the recording has" in skipped(tmp_path, name, "dev")["60.0"]


@pytest.mark.parametrize("bad", ["LibriSpeech/dev-clean-2/200/2000/200-2000.trans.txt", "en-es/data/dev/txt/dev.es"])
def test_transcripts_that_are_no_text_are_named(bad: str, tmp_path: Path) -> None:
    make_librispeech(tmp_path)
    make_must_c(tmp_path, "es")
    (tmp_path / bad).write_bytes(b"\xff")
    prepare = {
        "L": lambda: librispeech.prepare(tmp_path, tmp_path / "out", ["dev-clean-2"]),
        "e": lambda: must_c.prepare(tmp_path, tmp_path / "out", "es", ["dev"]),
    }[bad[0]]
    with pytest.raises(InputError, match="not UTF-8 text"):
        prepare()
