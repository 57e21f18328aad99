"""Kokoro-82M: neural voices of many speakers (Apache-2.0), from a folder with the model and its voices.

The folder holds one `.onnx` file and `voices/NAME.bin` (float32 [510, 256]: a style for each length of the text).
Phonemes come from the espeak-ng data that Piper brings; the numbers of symbols are those of the model's configuration.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from speechattn.audio.resample import Resampler, Samples
from speechattn.data.prepare.debian import sha256
from speechattn.data.prepare.sound import RATE
from speechattn.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["SPEAKING", "Kokoro", "find_kokoro", "tokens"]

KOKORO_RATE = 24000
LONGEST = 510

# The first letter of a voice's name -> espeak's name of its language.
LANGUAGES = {"a": "en-us", "b": "en-gb-x-rp", "e": "es", "f": "fr", "h": "hi", "i": "it", "p": "pt-br"}

# ruff: noqa: RUF001 (letters of the phonetic alphabet)
# Runs of symbols with consecutive numbers, by the number of the first.
RUNS = {
    1: ";:,.!?", 9: "—…\"()“” ", 17: "\u0303ʣʥʦʨ", 24: "AI", 31: "O", 33: "Q", 35: "ST", 39: "W", 41: "Yᵊ",
    43: "abcdef", 50: "hijklmnopqrstuvwxyzɑɐɒæ", 75: "βɔɕç", 80: "ɖðʤə", 85: "ɚɛɜ", 90: "ɟ", 92: "ɡ", 99: "ɥ",
    101: "ɨɪʝ", 110: "ɯɰŋɳɲɴø", 118: "ɸθœ", 123: "ɹ", 125: "ɾɻ", 128: "ʁɽʂʃʈʧ", 135: "ʊʋ", 138: "ʌɣɤ", 142: "χʎ",
    147: "ʒʔ", 156: "ˈˌː", 162: "ʰ", 164: "ʲ", 177: "ᵻ",
}  # fmt: skip
SYMBOLS = {symbol: first + n for first, run in RUNS.items() for n, symbol in enumerate(run)}

# Where espeak writes two symbols, or others, for what Kokoro has learnt as one.
ENGLISH = [
    ("eɪ", "A"), ("aɪ", "I"), ("oʊ", "O"), ("əʊ", "Q"), ("aʊ", "W"), ("ɔɪ", "Y"), ("tʃ", "ʧ"), ("dʒ", "ʤ"), ("ɬ", "l"),
    ("r", "ɹ"), ("x", "k"), ("ɚɹ", "əɹ"), ("ɚ", "əɹ"),
]  # fmt: skip
AMERICAN = [("ɜːɹ", "ɜɹ"), ("ɜː", "ɜɹ"), ("ɾ", "T"), ("ː", "")]  # no long vowels


@dataclass(frozen=True)
class Kokoro:
    """A voice of the folder: `af_heart` speaks American English (a), and is female (f)."""

    folder: Path
    name: str
    engine: ClassVar[str] = "kokoro"

    @property
    def speaker(self) -> str:
        """kokoro-af_heart."""
        return f"kokoro-{self.name}"

    @property
    def identity(self) -> str:
        """Name and checksum of the model."""
        return f"{self.speaker} {checksum(find_model(self.folder))}"

    def check(self) -> None:
        """Voice, model and packages are there, and the language is one that espeak can write down."""
        if self.name[:1] not in LANGUAGES:
            raise InputError(f"voice {self.name}: voices here begin with one of {' '.join(LANGUAGES)} (their language)")
        style(self.folder, self.name)
        load(self.folder)
        phonemize("a", LANGUAGES[self.name[:1]])

    def say(self, text: str, speed: float) -> Samples:
        """Sentence after sentence."""
        session = load(self.folder)
        names = [one.name for one in session.get_inputs()]
        pieces = []
        for said in tokens(text, LANGUAGES[self.name[:1]]):
            padded = np.array([[0, *said, 0]], np.int64)
            look = style(self.folder, self.name)[len(said) - 1][None]
            feed = dict(zip(names, (padded, look, np.array([speed], np.float32)), strict=True))
            pieces.append(np.asarray(session.run(None, feed)[0], np.float32).reshape(-1))
        if not pieces:
            raise InputError("the voice has no sounds for it")
        return Resampler(KOKORO_RATE, RATE).feed(np.concatenate(pieces), last=True)


def tokens(text: str, language: str) -> Iterator[list[int]]:
    """Numbers of the symbols of each sentence, at most 510 (longer ones are cut at a space)."""
    for sentence in phonemize(text, language):
        symbols = [symbol for symbol in sentence if symbol in SYMBOLS]
        while symbols:
            end = len(symbols)
            if end > LONGEST:
                end = next((n for n in range(LONGEST, 0, -1) if symbols[n - 1] == " "), LONGEST)
            yield [SYMBOLS[symbol] for symbol in symbols[:end]]
            symbols = symbols[end:]


SPEAKING = Lock()  # espeak-ng is one per process, Piper's too, and speaks one language at a time


def phonemize(text: str, language: str) -> list[str]:
    """The phonemes of each sentence, with its punctuation, in Kokoro's symbols."""
    with SPEAKING:
        try:
            sentences = phonemizer().phonemize(language, text)
        except RuntimeError as error:
            raise InputError(f"espeak-ng cannot write {language} down: {error}") from error
    return [respell(unicodedata.normalize("NFC", "".join(one)), language) for one in sentences]


def respell(phonemes: str, language: str) -> str:
    """Symbols as Kokoro has learnt them."""
    rules = [("g", "ɡ"), ("\u0329", "")]
    rules += ENGLISH if language.startswith("en") else []
    rules += AMERICAN if language == "en-us" else []
    for theirs, ours in rules:
        phonemes = phonemes.replace(theirs, ours)
    return phonemes


@lru_cache
def phonemizer() -> Any:
    """espeak-ng's, as Piper brings it."""
    try:
        from piper.phonemize_espeak import EspeakPhonemizer
    except ImportError as error:
        raise InputError("Kokoro's phonemes come with Piper: pip install piper-tts") from error
    return EspeakPhonemizer()


@lru_cache
def load(folder: Path) -> Any:
    """The model on one thread: lines are read side by side instead."""
    try:
        from onnxruntime import InferenceSession, SessionOptions  # type: ignore[import-untyped, unused-ignore]
    except ImportError as error:
        raise InputError("onnxruntime is not installed: pip install onnxruntime") from error
    options = SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    path = find_model(folder)
    try:
        session = InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # whatever a file that is no model makes onnxruntime raise
        raise InputError(f"{path}: not a model ({error})") from error
    if len(session.get_inputs()) != 3:
        raise InputError(f"{path}: not Kokoro's model: it takes {len(session.get_inputs())} inputs, not 3")
    return session


def find_model(folder: Path) -> Path:
    """The folder's only .onnx file."""
    found = sorted(folder.glob("*.onnx"))
    if len(found) != 1:
        raise InputError(f"{folder}: {len(found)} files end in .onnx; wanted Kokoro's model, and voices/NAME.bin")
    return found[0]


@lru_cache
def checksum(path: Path) -> str:
    """A file's SHA-256, computed once."""
    return sha256(path)


@lru_cache(maxsize=64)
def style(folder: Path, name: str) -> NDArray[np.float32]:
    """A voice: [510, 256]."""
    path = folder / "voices" / f"{name}.bin"
    try:
        values = np.fromfile(path, np.float32)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    if len(values) != LONGEST * 256:
        raise InputError(f"{path}: not a voice of Kokoro: {len(values)} numbers, not {LONGEST} x 256")
    return values.reshape(LONGEST, 256)


def find_kokoro(rest: str) -> list[Kokoro]:
    """FOLDER#NAME, or FOLDER for all its English voices."""
    folder, _, name = rest.partition("#")
    if not folder:
        raise InputError("voice kokoro: name the folder with its model, as kokoro:FOLDER or kokoro:FOLDER#af_heart")
    if name:
        return [Kokoro(Path(folder), name)]
    found = sorted(path.stem for path in Path(folder).glob("voices/[ab]?_*.bin"))
    if not found:
        raise InputError(f"{folder}: no English voices (voices/af_*.bin and so on) in it")
    return [Kokoro(Path(folder), one) for one in found]
