"""Drawn mouths that say what synthetic voices say."""

# ruff: noqa: RUF001

from __future__ import annotations

import hashlib
import shutil
import sys
from dataclasses import replace
from math import ceil, exp
from pathlib import Path

import numpy as np
import pytest

from speechattn.audio.resample import Samples
from speechattn.audio.vision import Image, read_video
from speechattn.cli.main import main
from speechattn.data.cuts import Manifest
from speechattn.data.prepare import avsynth, phones
from speechattn.data.prepare.avsynth import Babble, babble, film
from speechattn.data.prepare.face import Face, draw
from speechattn.data.prepare.mouth import OF, REST_S, SHAPES, movement
from speechattn.data.prepare.phones import Phone, Spoken, speak
from speechattn.data.prepare.synthetic import Cast, parse_cast
from speechattn.data.prepare.voices import Espeak, Flite, Voice
from speechattn.errors import InputError

voices = pytest.mark.skipif(
    shutil.which("flite") is None or shutil.which("espeak-ng") is None, reason="flite and espeak-ng are not installed"
)
VOICES = [Flite("slt"), Flite("rms"), Flite("awb"), Espeak("en-us"), Espeak("en-gb"), Espeak("en-us+m3")]
LINES = ["zero one two", "three four five six", "my big boat", "we saw five moons", "papa bought a map", "seven eight"]


def spoken(*names: str, each_s: float = 0.12) -> Spoken:
    said = tuple(Phone(name, i * each_s, (i + 1) * each_s) for i, name in enumerate(names))
    return Spoken(np.ones(round(16000 * each_s * len(names)), np.float32), said)


@voices
@pytest.mark.parametrize("voice", VOICES, ids=lambda voice: voice.speaker)
def test_times_are_those_of_the_sound(voice: Voice) -> None:
    text = "My baby. Please, team!"
    said = speak(voice, text, 1.0)
    again = speak(voice, text, 1.0)
    assert again.phones == said.phones
    assert np.array_equal(again.samples, said.samples)
    assert said.phones[0].start_s == 0
    assert all(a.end_s == b.start_s for a, b in zip(said.phones, said.phones[1:], strict=False))
    assert abs(said.phones[-1].end_s - len(said.samples) / 16000) < 0.03
    names = [phone.name for phone in said.phones if phone.name != "pau"]
    assert names == ["m", "aa", "ih", "b", "eh", "ih", "b", "iy", "p", "l", "iy", "z", "t", "iy", "m"]
    power = [(phone.name, loudness(said, phone)) for phone in said.phones if phone.end_s - phone.start_s > 0.05]
    quiet = [p for name, p in power if name == "pau"]
    assert min(p for name, p in power if name in ("aa", "eh", "iy")) > 10 * max(quiet)
    faster = speak(voice, text, 1.2)
    assert 1.05 < said.phones[-1].end_s / faster.phones[-1].end_s < 1.35


def loudness(said: Spoken, phone: Phone) -> float:
    """Mean square of the middle of a phone."""
    third = (phone.end_s - phone.start_s) / 3
    a, b = (round(16000 * time) for time in (phone.start_s + third, phone.end_s - third))
    return float(np.square(said.samples[a : max(b, a + 1)]).mean())


def test_phonemes_of_both_alphabets() -> None:
    assert phones.of_ipa("oʊ") == ("ao", "uh")
    assert phones.of_ipa("t͡ʃ") == ("t", "sh")
    assert phones.of_ipa("ˈɜːɹ") == ("er", "r")
    assert phones.of_ipa("") == phones.of_ipa("ˌ") == ("pau",)
    with pytest.raises(InputError, match="the phoneme y has no mouth here"):
        phones.of_ipa("y")
    assert phones.of_flite("pau:0.100 ay:0.300 m:0.350", 0.36) == (
        Phone("pau", 0.0, 0.1), Phone("aa", 0.1, 0.2), Phone("ih", 0.2, 0.3), Phone("m", 0.3, 0.35),
    )  # fmt: skip
    with pytest.raises(InputError, match=r"flite tells times up to 0\.30 s, but spoke for 0.36 s"):
        phones.of_flite("pau:0.100 aa:0.300", 0.36)
    with pytest.raises(InputError, match="flite's phone xx has no mouth"):
        phones.of_flite("xx:0.100", 0.1)
    assert phones.of_espeak([["h", 0.1], ["aɪ", 0.2], ["", 0.4]], 0.5) == (  # type: ignore[list-item]
        Phone("pau", 0.0, 0.1), Phone("hh", 0.1, 0.2), Phone("aa", 0.2, pytest.approx(0.3)),
        Phone("ih", pytest.approx(0.3), 0.4), Phone("pau", 0.4, 0.5),
    )  # fmt: skip


def test_movement_is_a_mean_by_dominance() -> None:
    """The definition, one number at a time."""
    said = spoken("pau", "m", "aa", "f", "uw", "s").phones
    times = np.arange(0, 0.72, 0.04)
    found = movement(said, times)
    marks = [Phone("pau", -REST_S, 0.0), *said, Phone("pau", 0.72, 0.72 + REST_S)]
    for t, row in zip(times, found, strict=True):
        weights = [OF[p.name].dominance * exp(-max(p.start_s - t, t - p.end_s, 0) / 0.035) for p in marks]
        for name, value in zip(SHAPES, row, strict=True):
            aim = sum(w * getattr(OF[p.name], name) for w, p in zip(weights, marks, strict=True)) / sum(weights)
            assert value == pytest.approx(aim, abs=1e-6)


def test_a_phone_is_shaped_by_its_neighbours() -> None:
    def at(*names: str) -> dict[str, float]:
        return dict(zip(SHAPES, movement(spoken(*names).phones, np.array([0.12 * 1.5]))[0], strict=True))

    assert at("iy", "s", "iy")["width"] > 0.2 + at("uw", "s", "uw")["width"]
    assert at("uw", "k", "uw")["rounding"] > 0.3 + at("aa", "k", "aa")["rounding"]
    assert at("aa", "m", "aa")["press"] > 0.8  # but lips that close do close
    assert at("aa", "f", "aa")["tuck"] > 0.8


PLAIN = replace(
    Face.drawn(np.random.default_rng(0)), skin=0.6, lips=0.4, wide=24, jaw=22, vigour=1, lean=0, centre=(44, 42),
    tilt=0, light=(0, 0), flicker=0, noise=0, wander=0, beard=0,
)  # fmt: skip


def still(phone: str, face: Face = PLAIN) -> Image:
    """The middle of a long phone."""
    times = np.array([0.5])
    return draw(movement([Phone(phone, 0, 1)], times), face, 25, np.random.default_rng(0))[0]


def dark(image: Image) -> int:
    """Pixels of the inside of the mouth."""
    return int((image[30:75, 15:73] < 0.2 * 255).sum())


def test_pictures_show_what_tells_phones_apart() -> None:
    areas = {name: dark(still(name)) for name in ("aa", "eh", "ih", "uw", "m")}
    assert areas["aa"] > 1.4 * areas["eh"]
    assert areas["eh"] > 1.4 * areas["ih"]
    assert areas["ih"] > 0
    assert areas["m"] == 0
    bright = {name: int((still(name)[30:75, 15:73] > 0.66 * 255).sum()) for name in ("s", "iy", "m", "aa", "f")}
    assert min(bright["s"], bright["iy"]) > 40
    assert bright["f"] > 10
    assert bright["m"] == bright["aa"] == 0
    lips = {name: np.ptp(np.nonzero((still(name) < 0.5 * 255)[36:48].any(0))[0]) for name in ("iy", "uw")}
    assert lips["iy"] > 8 + lips["uw"]
    shapes = np.array([[0.6, 0, 0, 0, 0, 0, 0], [0.6, 0, 0, 0, 0, 0, 1], [0.6, 0, 0, 0, 0, 1, 0]])
    nothing, tongue, teeth = draw(shapes, PLAIN, 25, np.random.default_rng(0)).astype(int)
    for part, below in ((tongue - nothing > 20, True), (teeth - nothing > 20, False)):
        assert part.sum() > 60
        assert (np.nonzero(part)[0].mean() > 44) == below


def test_lips_close_between_open_vowels() -> None:
    said = spoken("aa", "m", "aa", "k", "aa", each_s=0.07).phones
    shapes = movement(said, 0.07 * np.array([0.5, 1.5, 3.5]))
    vowel, closed, behind = (dark(image) for image in draw(shapes, PLAIN, 25, np.random.default_rng(0)))
    assert closed == 0
    assert behind > vowel > 50


def test_people_and_films_differ_and_come_again() -> None:
    said = spoken("pau", "m", "aa", "f", "uw")
    one, same, other, seed = (film(said, *key) for key in ((0, "a"), (0, "a"), (0, "b"), (1, "a")))
    assert one.shape == (ceil(0.6 * 25), 88, 88)
    assert np.array_equal(one, same)
    for another in (other, seed):
        assert np.abs(one.astype(int) - another).mean() > 5
    assert np.std([film(said, 0, str(n)).mean() for n in range(12)]) > 10  # another person in each clip
    faces = [Face.drawn(np.random.default_rng(n)) for n in range(200)]
    for name in ("skin", "wide", "upper", "lower", "jaw", "vigour", "noise", "wander", "tilt"):
        assert np.std([getattr(face, name) for face in faces]) > 0.02 * abs(getattr(PLAIN, name) or 0.1), name


def test_the_head_moves_slowly_and_noise_is_of_each_frame() -> None:
    shapes = movement([Phone("pau", 0, 4)], np.arange(100) / 25)
    rng = np.random.default_rng
    assert not np.ptp(draw(shapes, PLAIN, 25, rng(0)).astype(int), axis=0).any()
    moving = draw(shapes, replace(PLAIN, wander=1.5), 25, rng(0)).astype(int)
    assert 0.05 < np.abs(np.diff(moving, axis=0)).mean() < 0.3 * np.abs(moving[:50] - moving[50:]).mean()
    noisy = draw(shapes, replace(PLAIN, noise=0.02), 25, rng(0)).astype(float)
    assert np.diff(noisy, axis=0).std() / 2**0.5 == pytest.approx(0.02 * 255, rel=0.03)


@pytest.mark.parametrize("ratio", [-10, 0, 5])
def test_babble_has_the_ratio_that_was_asked_for(ratio: float) -> None:
    rng = np.random.default_rng(0)
    x, loud, soft = (
        (a * rng.standard_normal(n)).astype(np.float32) for a, n in ((0.1, 9000), (0.3, 20000), (0.01, 500))
    )
    y = babble(x, [loud, soft], ratio, np.random.default_rng(1))
    fit = np.dot(x, y) / np.dot(x, x)
    noise = y / fit - x
    assert 10 * np.log10(np.square(x).sum() / np.square(noise).sum()) == pytest.approx(ratio, abs=0.3)
    assert np.abs(y).max() <= 1.0
    period: Samples = noise[500:] - noise[:-500]
    assert np.square(period).mean() < 1.3 * np.square(noise).mean()  # half of the power is the short one, repeated


@voices
def test_a_corpus_is_read_by_our_loader(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text("\n".join([*LINES, ""]))
    common = ["--voices", "flite:slt,espeak:en-us+f3", "--takes", "2", str(tmp_path / "text")]
    for number, folder in enumerate("ab"):
        where = str(tmp_path / folder)
        assert main(["prepare", "avsynth", *common, where, "--jobs", str(1 + number)]) == 0
        noisy = ["--split", "test", "--babble", "-5", "--talkers", "3"]
        assert main(["prepare", "avsynth", *common, where, *noisy]) == 0
    assert "avsynth test: 12 utterances" in capsys.readouterr().out
    train, test = (Manifest.read([tmp_path / "a" / f"avsynth_cuts_{split}.jsonl.gz"]) for split in ("train", "test"))
    assert len(train) == len(test) == 12
    for i in range(12):
        clean, heard = (part[i].cut.supervisions[0].custom for part in (train, test))
        assert clean["video"] == heard["video"]
        assert heard["snr_db"] == -5
        assert clean["synthetic"] in ("flite", "espeak")
        x, y = (part[i].cut.load_audio()[0] for part in (train, test))
        fit = np.dot(x, y) / np.dot(x, x)
        assert 10 * np.log10(np.square(x).sum() / np.square(y / fit - x).sum()) == pytest.approx(-5, abs=1.5)
        assert len(read_video(Path(clean["video"])).frames) == ceil(len(x) / 640)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert len(digests(tmp_path / "a")) == 36


def digests(folder: Path) -> dict[str, str]:
    """Every sound and video, by its name and bytes."""
    files = [path for path in folder.rglob("*") if path.suffix in (".flac", ".mkv")]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@voices
def test_lips_move_with_the_sound(tmp_path: Path) -> None:
    """The mouth is open when there is sound, and not 0.4 s before or after."""
    cast = parse_cast(["flite:slt", "flite:rms", "espeak:en-us"])
    avsynth.prepare(tmp_path, ["papa, papa, papa", "a map, a cop, a bob", "bomb, bomb, bomb"], cast, takes=2)
    together: dict[int, list[float]] = {-10: [], 0: [], 10: []}
    clips = Manifest.read([tmp_path / "avsynth_cuts_train.jsonl.gz"])
    for cut in (clips[i] for i in range(len(clips))):
        open_ = np.array([dark(image) for image in read_video(Path(cut.cut.supervisions[0].custom["video"])).frames])
        samples = np.pad(cut.cut.load_audio()[0], [0, 640])[: 640 * len(open_)]
        sound = np.sqrt(np.square(samples.reshape(-1, 640)).mean(1))
        for shift, found in together.items():
            found.append(np.corrcoef(np.roll(open_, shift), sound)[0, 1])
    assert np.mean(together[0]) > 0.4
    assert np.mean(together[0]) > 0.3 + max(np.mean(together[-10]), np.mean(together[10]))


@voices
def test_what_is_there_is_not_made_again_and_what_fails_is_listed(tmp_path: Path) -> None:
    cast = parse_cast(["espeak:en-us"])
    avsynth.prepare(tmp_path, LINES[:2], cast)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.mkv")}
    next(iter(times)).unlink()
    written = avsynth.prepare(tmp_path, [*LINES[:3], "...", ""], cast)
    assert (written.utterances, written.skipped) == (3, 2)
    reasons = (tmp_path / "avsynth_skipped_train.tsv").read_text()
    assert "the voice has no sounds for it" in reasons
    assert "no text" in reasons
    now = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.mkv")}
    assert len(now) == 3
    assert [now[path] == time for path, time in times.items()] == [False, True]
    assert not list(tmp_path.rglob("*.part"))


def test_what_cannot_be_made_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="voices that do not tell when they say what: flite-kal16"):
        avsynth.prepare(tmp_path, LINES, Cast((Flite("kal16"),), (1,)))
    with pytest.raises(InputError, match="the voice flite-kal16 does not tell when it says what"):
        speak(Flite("kal16"), "one", 1.0)
    for noise in ((0, 0), (float("nan"), 3), (200, 3)):
        with pytest.raises(InputError, match="wanted at least one, and -100"):
            Babble(*noise)
    (tmp_path / "text").write_text("one\n")
    command = ["prepare", "avsynth", str(tmp_path / "text"), str(tmp_path)]
    assert main([*command, "--talkers", "3"]) == 2
    assert main([*command, "--jobs", "0"]) == 2
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(InputError, match=r"pip install speechattn\[video\]"):
        avsynth.prepare(tmp_path, LINES, Cast((Flite("slt"),), (1,)))


@voices
def test_babble_needs_others(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="babble of 2 talkers needs as many utterances of other lines; there are 1"):
        avsynth.prepare(tmp_path, LINES[:2], parse_cast(["espeak:en-us"]), noise=Babble(0, 2))
    with pytest.raises(InputError, match="espeak-ng has no voice xx-none"):
        speak(Espeak("xx-none"), "one", 1.0)
