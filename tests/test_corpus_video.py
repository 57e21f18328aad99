"""Pictures of lips in batches: those of the cut, picture by picture."""

from __future__ import annotations

import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from lipreader import lip_reader, pictures, voice
from torch import Tensor
from toy_corpus import Recorder, trainer, write_corpus

from speechattn.audio.clip import EVERY, AudioVisual, Clip
from speechattn.audio.lips import Grey
from speechattn.audio.vision import Image, Stretch, read_video, write_video
from speechattn.data.augment import Noise, Speed, lots, power
from speechattn.data.batch import Batch, collate
from speechattn.data.corpus import Corpus
from speechattn.data.cuts import Manifest, load_lips
from speechattn.data.join import Join
from speechattn.data.loader import Sounds
from speechattn.errors import InputError
from speechattn.frames import Frames
from speechattn.stream import Sliding
from speechattn.task.kept import Kept
from speechattn.task.tally import streamed

av = pytest.importorskip("av")

RATE, SIZE = 16000, 8
SECONDS = [1.0, 0.64, 1.3]  # 25, 16 and 33 pictures; of the last the sound ends within one


quiet = pytest.mark.filterwarnings("ignore:.*LeafSpec", "ignore:.*isinstance.treespec", "ignore:.*smaller than the log")


def shades(n: int, first: int = 0, size: int = SIZE) -> Image:
    """Pictures whose grey is 5 times their number, and a darker row."""
    images = np.empty((n, size, size), np.uint8)
    images[:] = (first + np.arange(n, dtype=np.uint8))[:, None, None] * 5 + 1
    images[:, 0] = 0
    return images


def numbers(images: Image) -> list[int]:
    assert (images[:, 0] == 0).all()
    assert (images[:, 1:] == images[:, 1:2, :1]).all()
    return ((images[:, 1, 0].astype(int) - 1) // 5).tolist()


def rewrite(manifest: Path, change: object) -> Path:
    """The same manifest, each row changed by a function of its number and itself."""
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    for i, row in enumerate(rows):
        change(i, row)  # type: ignore[operator]
    path = manifest.with_name(f"other_{len(list(manifest.parent.glob('other_*')))}_{manifest.name}")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def name_video(row: dict, name: str) -> None:  # type: ignore[type-arg]
    row["supervisions"][0]["custom"] = {**row["supervisions"][0].get("custom", {}), "video": name}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("video"), SECONDS)


@pytest.fixture(scope="module")
def filmed(plain: Path) -> Path:
    """Utterances 0 and 2 have a video, of exactly their pictures; the paths are relative."""
    (plain.parent / "films").mkdir()

    def change(i: int, row: dict) -> None:  # type: ignore[type-arg]
        if i != 1:
            write_video(plain.parent / "films" / f"{i}.mkv", shades(-(-round(SECONDS[i] * RATE) // EVERY), 2 * i))
            name_video(row, f"films/{i}.mkv")

    return rewrite(plain, change)


def corpus(manifest: Path, **changes: object) -> Corpus:
    options: dict[str, object] = {"max_seconds": 10, "longest_s": 2, "workers": 0, "video_size": SIZE, "seed": 3}
    return Corpus([manifest], [manifest], **{**options, **changes})  # type: ignore[arg-type]


def only(found: list[Batch]) -> Batch:
    (batch,) = found
    return batch


def test_a_batch_is_a_clip_of_samples_and_their_pictures(filmed: Path, plain: Path) -> None:
    sound = only(list(corpus(plain).train_dataloader()))
    for data in (corpus(filmed).train_dataloader(), corpus(filmed).val_dataloader()[0]):
        batch = only(list(data))
        clip = batch.sound
        assert isinstance(clip, Clip)
        assert clip.lips.values.dtype == torch.uint8
        assert clip.lips.values.shape == (3, 33, SIZE, SIZE)
        assert clip.values.shape == (3, round(1.3 * RATE))  # not a sample more than the longest
        for row, name in enumerate(batch.ids):
            i = int(name.partition("-")[2])
            there = clip.lips.mask[row]
            assert there.tolist() == [i != 1 and k < [25, 0, 33][i] for k in range(33)]
            assert numbers(clip.lips.values[row][there].numpy()) == list(range(2 * i, 2 * i + int(there.sum())))
            assert not clip.lips.values[row][~there].any()
            other = sound.ids.index(name)
            assert torch.equal(clip.values[row], sound.sound.values[other])
            assert torch.equal(clip.mask[row], sound.sound.mask[other])


def test_without_pictures_everything_is_as_it_was(filmed: Path, plain: Path) -> None:
    for data in (corpus(filmed, video=False), corpus(plain)):
        batch = only(list(data.train_dataloader()))
        assert type(batch.sound) is Frames
    assert not Manifest.read([plain]).filmed
    code = (
        "import sys; from pathlib import Path; from speechattn.data.corpus import Corpus;"
        f"list(Corpus([Path({str(plain)!r})], longest_s=2, workers=0).train_dataloader());"
        "assert 'av' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_part_of_a_recording_has_the_pictures_of_its_time(plain: Path) -> None:
    write_video(plain.parent / "long.mkv", shades(33))

    def cut(start: float, duration: float, rate: int = 25) -> list[int]:
        def change(i: int, row: dict) -> None:  # type: ignore[type-arg]
            row["start"], row["duration"] = start, duration
            row["supervisions"][0]["duration"] = duration
            name_video(row, "long.mkv")

        utterance = Manifest.read([rewrite(plain, change)])[2]
        lips = load_lips(utterance, round(duration * RATE), size=SIZE)
        assert lips is not None
        return numbers(lips)

    assert cut(0.0, 0.4) == list(range(10))
    assert cut(0.2, 0.4) == list(range(5, 15))
    assert cut(0.21, 0.4) == list(range(5, 15))  # nearest in time
    assert cut(0.22, 0.4) == list(range(5, 15))  # the earlier of two
    assert cut(0.2200625, 0.4) == list(range(6, 16))  # one sample later
    assert cut(0.2, 0.401) == list(range(5, 16))
    assert cut(1.2, 0.1) == [30, 31, 32]


def test_parts_of_videos_of_any_rate_are_those_of_the_whole(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(1, 256, (330, 1, 1), np.uint8) * np.ones((1, SIZE, SIZE), np.uint8)
    images[:, 0] = 0
    for rate in (Fraction(25), Fraction(30000, 1001), Fraction(50), Fraction(60)):
        path = tmp_path / "x.mkv"
        write_video(path, images, rate=rate)
        with av.open(str(path)) as file:
            times = [frame.pts * frame.time_base for frame in file.decode(video=0)]
        for begin in (Fraction(1, 100), Fraction(1, 3), Fraction(39, 10), Fraction(51, 10)):
            found = read_video(path, size=SIZE, stretch=Stretch(begin, 12)).frames
            wanted = [begin + Fraction(k, 25) for k in range(12) if begin + Fraction(k, 25) < times[-1] + 1 / rate]
            nearest = [min(range(330), key=lambda i, t=t: (abs(times[i] - t), i)) for t in wanted]
            assert np.array_equal(found, images[nearest]), (rate, begin)
        with pytest.raises(InputError, match=r"it ends after .* before second 99\.00"):
            read_video(path, size=SIZE, stretch=Stretch(Fraction(99), 3))


def test_pictures_follow_a_change_of_speed(filmed: Path) -> None:
    for factor, expected in ((0.5, [k // 2 for k in range(50)]), (2.0, list(range(0, 25, 2)))):
        sounds = Sounds(Manifest.read([filmed]), RATE, str, (Speed(factors=[factor]),), video_size=SIZE)
        batch, broken = sounds.batch(np.array([0]), 0)
        assert not broken
        assert isinstance(batch.sound, Clip)
        assert batch.sound.lengths.tolist() == [RATE / factor]
        assert numbers(batch.sound.lips.values[0].numpy()) == pytest.approx(expected, abs=1)
        assert batch.sound.lips.mask.all()


def test_what_cannot_be_had_is_named(filmed: Path, plain: Path) -> None:
    with pytest.raises(InputError, match=r"rate 8000: pictures go with 16000 Hz; .video: false. leaves them"):
        corpus(filmed, rate=8000).train_dataloader()
    with pytest.raises(InputError, match="join: not with pictures"):
        corpus(filmed, join=Join()).train_dataloader()
    assert type(only(list(corpus(filmed, video=False, join=Join(p=1)).train_dataloader())).sound) is Frames
    with pytest.raises(ValueError, match="video_size 0"):
        corpus(filmed, video_size=0)
    (plain.parent / "bad.mkv").write_bytes(b"nothing")
    names = ["bad.mkv", "none.mkv", "films/2.mkv"]
    manifest = Manifest.read([rewrite(plain, lambda i, row: name_video(row, names[i]))])
    sounds = Sounds(manifest, RATE, str, video_size=SIZE)
    batch, broken = sounds.batch(np.arange(3), 0)
    assert [item.id for item in broken] == ["toy-0", "toy-1"]
    assert "not a video that can be read" in broken[0].reason
    assert "none.mkv: no such file" in broken[1].reason
    assert batch.ids == ("toy-2",)
    _, broken = Sounds(Manifest.read([filmed]), RATE, str, video_size=9).batch(np.arange(3), 0)
    assert ["8 x 8 pixels, not 9 x 9" in item.reason for item in broken] == [True, True]


def test_cuts_whose_time_is_not_that_of_the_video(filmed: Path) -> None:
    def speed(i: int, row: dict) -> None:  # type: ignore[type-arg]
        row["recording"]["transforms"] = [{"name": "Speed", "kwargs": {"factor": 1.1}}]

    with pytest.raises(InputError, match=r"changes the pace of the sound \(Speed\)"):
        load_lips(Manifest.read([rewrite(filmed, speed)])[0], RATE, size=SIZE)
    rows = [json.loads(line) for line in filmed.read_text().splitlines()]
    tracks = [{"type": "MonoCut", "cut": rows[i], "offset": 0} for i in (0, 1)]
    mixed = {"id": "m", "type": "MixedCut", "tracks": tracks}
    path = filmed.with_name("mixed.jsonl")
    path.write_text(json.dumps(mixed) + "\n")
    assert Manifest.read([path]).filmed
    with pytest.raises(InputError, match="mixed of several"):
        load_lips(Manifest.read([path])[0], RATE, size=SIZE)


def test_a_batch_moves_as_a_whole(filmed: Path) -> None:
    batch = only(list(corpus(filmed).train_dataloader()))
    there = batch.to("meta").sound
    assert isinstance(there, Clip)
    assert {leaf.device.type for leaf in (there.values, there.mask, there.lips.values, there.lips.mask)} == {"meta"}
    assert "lips [3, 33, 8, 8]" in repr(batch)
    assert "lips" not in repr(collate([np.ones(3, np.float32)], texts="a", translations=[None], ids="a"))


@quiet
def test_worker_processes_and_training(filmed: Path, tmp_path: Path) -> None:
    first, second = (only(list(corpus(filmed, workers=n).train_dataloader())).sound for n in (0, 1))
    assert isinstance(first, Clip)
    assert isinstance(second, Clip)
    assert torch.equal(first.lips.values, second.lips.values)
    trainer(tmp_path, max_epochs=1).fit(Recorder(tmp_path / "log"), corpus(filmed))


class Fold(Sliding):
    """Samples [B, N] -> [B, N / stride, 2 * stride]."""

    def __init__(self, stride: int) -> None:
        super().__init__(2 * stride, stride)

    def windows(self, x: Tensor) -> Tensor:
        return x.unfold(1, self.kernel, self.block or 1)


class Collected(torch.nn.Module):
    """A search that gives back the frames that it was given."""

    def start(self, x: Frames) -> Frames:
        return x[:0]

    def step(self, x: Frames, beam: Frames) -> Frames:
        return Frames.cat([beam, x])

    def finish(self, beam: Frames) -> Frames:
        return beam

    def hypotheses(self, beam: Frames) -> Frames:
        return beam


def test_streamed_validation_hears_and_sees_the_whole_clip(filmed: Path) -> None:
    clip = only(list(corpus(filmed).train_dataloader())).sound
    assert isinstance(clip, Clip)
    blind = Fold(160)  # one that hears sound alone takes clips as well, in steps of its own
    for stream, least in ((AudioVisual(Fold(EVERY), Grey(), size=SIZE), 1), (blind, 900)):
        found, whole = streamed(stream, Collected(), clip, least=least), stream(clip)  # type: ignore[arg-type]
        assert isinstance(found, Frames)
        assert torch.equal(found.values[:, : whole.mask.shape[1]], whole.values)
        assert torch.equal(found.mask[:, : whole.mask.shape[1]], whole.mask)
    assert torch.equal(blind(clip).values, blind(clip.sound).values)


def test_babble(tmp_path: Path) -> None:
    voices = []
    for i, (hertz, level) in enumerate([(300, 0.5), (700, 0.05), (1100, 0.01)]):
        voices.append(hertz)
        time = np.arange(RATE * (i + 1)) / RATE
        soundfile.write(tmp_path / f"{i}.wav", level * np.sin(2 * np.pi * hertz * time), RATE)
    x = 0.1 * np.random.default_rng(0).standard_normal(2 * RATE).astype(np.float32)
    six = Noise(tmp_path, lowest_db=-3, highest_db=-3, p=1, talkers=6)
    spectra = []
    for i in range(20):
        noise = six(x, RATE, lots(0, 0, str(i))) - x
        assert 10 * np.log10(power(x) / power(noise)) == pytest.approx(-3, abs=0.01)
        found = np.abs(np.fft.rfft(noise * np.hanning(len(noise))))
        spectra.append([found[2 * hertz] for hertz in voices])
    mean = np.mean(spectra, 0)
    assert mean.max() / mean.min() < 3  # alike loud, though the recordings differ by 34 dB
    assert np.mean([np.count_nonzero(np.array(row) > 0.1 * max(row)) for row in spectra]) > 2
    alone = Noise(tmp_path, p=1)(x, RATE, lots(0, 0, "a")) - x
    assert np.array_equal(alone, Noise(tmp_path, p=1, talkers=1)(x, RATE, lots(0, 0, "a")) - x)
    with pytest.raises(ValueError, match="talkers 0"):
        Noise(tmp_path, talkers=0)


def test_kept_frames_are_of_what_was_seen(tmp_path: Path) -> None:
    model, x = lip_reader(), voice(1.0)
    kept = Kept(tmp_path, model)
    texts: dict[str, object] = {"texts": "a", "translations": [None], "ids": ["u"]}
    for lips in (pictures(25), None):
        batch = collate([x], lips=[lips], **texts)  # type: ignore[arg-type]
        with torch.no_grad():
            right = model.listening(batch.sound)
        for _ in range(2):
            assert torch.allclose(kept(batch).frames.values, right.values[:, right.mask[0]], atol=1e-2)
    assert len(list(tmp_path.glob("*.npy"))) == 2
