"""A corpus from the speech of Beneath a Steel Sky: 1.8 hours of voice-acted English, its texts by Whisper.

    python recipes/embedded/steel_sky.py data/steelsky

The game may be redistributed free of charge with its notice; the package's notice is written beside the manifests
(`LICENCE`). Part `all` is every clip of at least half a second, with "?" for a text. Whisper hears each twice, as it is
and 1.1 times as fast. Where both texts are nearly the same and are such as a voice could say in that time, the first is
the clip's text in part `train`; all others are in part `unlabelled`, with "?". These labels are no reference: measure
nothing against them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from math import log
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor
from tqdm import tqdm

from speechattn.audio.resample import Resampler, Samples, to_mono
from speechattn.cross.soft import SoftState
from speechattn.data.prepare.debian import download, sha256, unpack
from speechattn.data.prepare.manifests import Skipped, Utterance, prepared, write_manifests
from speechattn.data.prepare.sound import RATE
from speechattn.decoder.attention import DecoderState
from speechattn.errors import InputError
from speechattn.frames import Frames, Memory
from speechattn.pretrained.whisper import WhisperModel, load
from speechattn.score.wer import error_counts

NAME, TEXT = "steelsky", "?"
PACKAGE = "beneath-a-steel-sky"
INSIDE = "usr/share/scummvm/beneath-a-steel-sky"
SHA256 = {
    "sky.dnr": "1aa426bc9b04d962c98f2c6108f770b23a45a32cb85bd4e053a6eb1779173164",
    "sky.dsk": "9ef6ca3dcb6f9ceb31e950bc3a05d5105bbbb38a5e9fc9a9f6508363c87849e2",
}
SPEECH = range(50000, 59000)  # numbers of the files that are speech; behind them are rooms and pictures
SPEECH_RATE = 11025
HEADER = 22  # bytes before what is packed
SHORTEST_S = 0.5
FASTER = 1.1
MOST_ERRORS = 0.1
PACE = 0.5, 5.5  # words per second
LONGEST_LABEL = 60  # tokens; the longest clips have about 40
THIN = 5  # so many frames of silence are read as one


class Packed:
    """Bytes packed by Rob Northen's ProPack, method 1: a string of bits in words of 16 (the lowest bit first, little
    endian) and between these words, where the bits ask for them, the literals."""

    def __init__(self, data: bytes) -> None:
        if data[:4] != b"RNC\1":
            raise InputError("not packed with RNC, method 1")
        self.size, length = struct.unpack_from(">II", data, 4)
        self.blocks = data[17]
        self.data = data[18 : 18 + length] + bytes(4)  # codes are looked up in 16 bits, beyond the end too
        self.at = self.word = self.have = 0

    def ahead(self) -> int:
        """The next 16 bits or more, not yet taken."""
        if self.have >= 16:
            return self.word
        return self.word | (self.data[self.at] | self.data[self.at + 1] << 8) << self.have

    def bits(self, n: int) -> int:
        """Take a number of n bits."""
        if n > self.have:
            self.word = self.ahead()
            self.at += 2
            self.have += 16
        value = self.word & ((1 << n) - 1)
        self.word >>= n
        self.have -= n
        return value

    def codes(self) -> tuple[int, list[tuple[int, int]]]:
        """A table of canonical Huffman codes: mask of the longest, and (length, symbol) for what the bits may be."""
        lengths = [self.bits(4) for _ in range(self.bits(5))]
        longest, code = max(lengths, default=0), 0
        table = [(0, 0)] * (1 << longest)
        for length in range(1, longest + 1):
            for symbol, wanted in enumerate(lengths):
                if wanted == length:
                    first = int(f"{code:0{length}b}"[::-1], 2)
                    table[first :: 1 << length] = [(length, symbol)] * (1 << longest - length)
                    code += 1
            code <<= 1
        return (1 << longest) - 1, table

    def value(self, codes: tuple[int, list[tuple[int, int]]]) -> int:
        """Take a number: its code says how many bits it has, those behind the leading one follow."""
        length, symbol = codes[1][self.ahead() & codes[0]]
        self.bits(length)
        return symbol if symbol < 2 else self.bits(symbol - 1) | 1 << symbol - 1

    def unpack(self) -> bytes:
        """What was packed: literals and copies of what was said before, in turn."""
        out = bytearray()
        self.bits(2)  # whether it is locked, whether it has a key
        for _ in range(self.blocks):
            literals, distances, lengths = self.codes(), self.codes(), self.codes()
            for left in range(self.bits(16), 0, -1):
                if count := self.value(literals):
                    out += self.data[self.at : self.at + count]
                    self.at += count
                if left > 1:
                    back, count = self.value(distances) + 1, self.value(lengths) + 2
                    piece = out[max(len(out) - back, 0) : len(out) - back + count]
                    out += (piece * -(-count // back))[:count]  # a copy may run into itself
        if len(out) != self.size:
            raise InputError(f"{len(out)} bytes unpacked, {self.size} expected")
        return bytes(out)


class Game:
    """`sky.dnr`, a table of files, and `sky.dsk`, where they are."""

    def __init__(self, folder: Path) -> None:
        table = (folder / "sky.dnr").read_bytes()
        self.data = (folder / "sky.dsk").read_bytes()
        (count,) = struct.unpack_from("<I", table)
        if len(table) != 4 + 8 * count:
            raise InputError(f"{folder / 'sky.dnr'}: not the table of Beneath a Steel Sky")
        self.files: dict[int, tuple[int, int]] = {}
        for at in range(4, len(table), 8):
            (number,) = struct.unpack_from("<H", table, at)
            place = int.from_bytes(table[at + 2 : at + 5], "little")
            size = int.from_bytes(table[at + 5 : at + 8], "little") & 0x3FFFFF
            start = (place & 0x7FFFFF) * (16 if place >> 23 else 1)  # the highest bit: in units of 16 bytes
            self.files[number] = start, size

    def clips(self) -> list[int]:
        """Numbers of the speech files."""
        return sorted(number for number in self.files if number in SPEECH)

    def audio(self, number: int) -> Samples:
        """Samples [N] at 16 kHz; 8 bits without a sign in the file."""
        start, size = self.files[number]
        sound = np.frombuffer(Packed(self.data[start + HEADER : start + size]).unpack(), np.uint8)
        return Resampler(SPEECH_RATE, RATE).feed(to_mono(sound), last=True)

    def utterances(self) -> Iterator[Utterance | Skipped]:
        """Every clip for the manifests."""
        for number in self.clips():
            try:
                samples = self.audio(number)
            except InputError as error:
                yield Skipped(str(number), str(error))
                continue
            if len(samples) < SHORTEST_S * RATE:
                yield Skipped(str(number), f"{len(samples) / RATE:.2f} s: shorter than {SHORTEST_S} s")
                continue
            yield Utterance(str(number), lambda x=samples: x, TEXT, "unknown", "en")  # type: ignore[misc]


def fetch(folder: Path) -> Game:
    """The game in the folder, from the Debian package, which is fetched when it is not there."""
    if not all((folder / name).is_file() for name in SHA256):
        work = folder / "package"
        shutil.rmtree(work, ignore_errors=True)  # of a run that was killed
        work.mkdir(parents=True)
        unpack(download(PACKAGE, work), work / "files")
        shutil.copy(work / "files/usr/share/doc" / PACKAGE / "copyright", folder / "LICENCE")
        for name in SHA256:
            (work / "files" / INSIDE / name).rename(folder / name)
        shutil.rmtree(work)
    for name, wanted in SHA256.items():
        found = sha256(folder / name)
        if found != wanted:
            raise InputError(f"{folder / name}: its SHA-256 is {found}, expected {wanted}; remove it to fetch it again")
    return Game(folder)


class Teacher:
    """Greedy Whisper over many clips at once, in bfloat16.

    Behind a clip it reads silence up to 30 s, as it was trained; without it loops. What it reads of silence is nearly
    the same from frame to frame, so `THIN` frames are one here, with the weight of so many (log of it on its score).
    """

    def __init__(self, model: WhisperModel, *, pad_s: float = 0.5) -> None:
        self.model, self.network, self.pad = model, model.network.to(torch.bfloat16), round(pad_s * RATE)
        self.network._silence = None  # was made in another precision
        config, self.end = self.network.config, model.tokenizer.end_of_text
        self.never = torch.zeros(config.vocab, dtype=torch.bfloat16)
        self.never[[*config.suppress, *range(self.end + 1, config.vocab)]] = -torch.inf
        self.never_first = self.never.clone()
        self.never_first[[*config.suppress_first]] = -torch.inf
        self.silence = [self.thinned(state) for state in self.network.silence().cross]

    @staticmethod
    def thinned(state: SoftState) -> SoftState:
        """Means of `THIN` frames; the mask is what is added to their scores."""
        key, value = (x.reshape(*x.shape[:2], -1, THIN, x.shape[3]).mean(3) for x in (state.key, state.value))
        return SoftState(key, value, key.new_full((1, key.shape[2]), log(THIN)))

    def start(self, memory: Memory) -> DecoderState:
        """Clips, and silence behind them."""
        state, frames = self.network.decoder.start(memory), memory.frames.mask.shape[1]
        cross = (
            SoftState(own.key, own.value, own.key.new_zeros(own.mask.shape)).then(silence, frames // THIN)
            for own, silence in zip(state.cross, self.silence, strict=True)
        )
        return replace(state, cross=tuple(cross))

    @torch.inference_mode()
    def texts(self, clips: Sequence[Samples]) -> list[str]:
        """What is said in clips of about one length."""
        longest = max(map(len, clips))
        x = torch.from_numpy(np.stack([np.pad(clip, [0, longest - len(clip)]) for clip in clips]))
        features = self.model.front_end(Frames(x, torch.ones_like(x, dtype=torch.bool))).values
        memory = Memory.of(self.network.encode(features, samples=longest, pad=self.pad), finished=True)
        state, decoder = self.start(memory), self.network.decoder
        read = torch.tensor([self.model.prompt(memory, [])] * len(clips))
        said: list[Tensor] = []
        done = torch.zeros(len(clips), dtype=torch.bool)
        while not done.all() and len(said) < LONGEST_LABEL:
            hidden, _, state = decoder.step(read, state)
            scores = decoder.logits(hidden[:, -1]) + (self.never if said else self.never_first)
            said.append(scores.argmax(-1).where(~done, self.end))
            done = said[-1] == self.end
            read = said[-1][:, None]
        return [
            self.model.tokenizer.decode([token for token in row if token != self.end]).strip()
            for row in torch.stack(said, 1).tolist()
        ]


@dataclass(frozen=True)
class Label:
    """What was heard in a clip, and in the same clip spoken faster."""

    id: str
    first: str
    second: str

    def fault(self, seconds: float) -> str | None:
        """Why it is no label; None where it is one."""
        ((substituted, inserted, deleted, words),) = error_counts([self.first], [self.second])
        if not words:
            return "empty"
        spoken = self.first.lower().split()
        if any(spoken[i : i + n] * 3 == spoken[i : i + 3 * n] for n in range(1, 9) for i in range(len(spoken))):
            return "a loop"
        if not PACE[0] <= words / seconds <= PACE[1]:
            return "no pace of speech"
        return "two texts" if substituted + inserted + deleted > MOST_ERRORS * words else None


def read_labels(path: Path) -> list[Label]:
    """Labels so far; a line that was cut off is none."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
    return [Label(**json.loads(line)) for line in lines]


def batches(clips: Sequence[Path], size: int) -> list[list[Path]]:
    """Clips of about one length together, in random order, so that what is done at any time is like the whole."""
    ordered = sorted(clips, key=lambda path: (soundfile.info(path).frames, path.name))
    groups = [ordered[at : at + size] for at in range(0, len(ordered), size)]
    return [groups[i] for i in np.random.default_rng(0).permutation(len(groups))]


def listen(
    hear: Callable[[Sequence[Samples]], list[str]], clips: Sequence[Path], labels: Path, *, size: int = 25
) -> None:
    """Label the clips that have no label yet; each batch is kept as soon as it is heard."""
    known = {label.id for label in read_labels(labels)}
    for batch in tqdm(batches([clip for clip in clips if clip.stem not in known], size), unit=" batches", disable=None):
        sounds = [soundfile.read(clip, dtype="float32")[0] for clip in batch]
        faster = [Resampler(round(FASTER * RATE), RATE).feed(sound, last=True) for sound in sounds]
        rows = zip(batch, hear(sounds), hear(faster), strict=True)
        with labels.open("a", encoding="utf-8") as file:
            file.writelines(
                json.dumps(asdict(Label(clip.stem, *said)), ensure_ascii=False) + "\n" for clip, *said in rows
            )


def write_parts(folder: Path, clips: Sequence[Path], labels: Iterable[Label]) -> dict[str, int]:
    """Parts `train` and `unlabelled`; returns how many clips were kept (`kept`), or why not."""
    by_id = {label.id: label for label in labels}
    parts: dict[str, list[Utterance]] = {"train": [], "unlabelled": []}
    faults: dict[str, int] = {}
    for clip in clips:
        label = by_id.get(clip.stem)
        fault = label.fault(soundfile.info(clip).duration) if label else "not heard"
        faults[fault or "kept"] = faults.get(fault or "kept", 0) + 1
        text = TEXT if fault or not label else label.first
        part = "unlabelled" if fault else "train"
        parts[part].append(Utterance(clip.stem, clip, text, "unknown", "en", custom={"label": fault or "tiny.en"}))
    for part, utterances in parts.items():
        if utterances:
            print(part, write_manifests(folder, NAME, part, utterances, options={"source": SHA256}))
    return faults


def main() -> None:
    """Fetch, extract, listen, write; what was done before is not done again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the corpus is to be")
    parser.add_argument("--model", default="tiny.en", help="the Whisper that listens")
    parser.add_argument("--no-listening", action="store_true", help="write the parts from the labels there are")
    given = parser.parse_args()
    torch.set_num_threads(1)
    folder = given.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if prepared(folder, NAME, "all", {"source": SHA256}) is None:
        game = fetch(folder)
        write_manifests(
            folder, NAME, "all", game.utterances(), options={"source": SHA256}, total=len(game.clips())
        )  # fmt: skip
    clips, labels = sorted((folder / f"{NAME}_all").glob("*.flac")), folder / "labels.jsonl"
    if not given.no_listening:
        listen(Teacher(load(given.model)).texts, clips, labels)
    print(write_parts(folder, clips, read_labels(labels)))


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"steel_sky.py: {error}")
