"""Manifests to batches."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from lhotse import CutSet
from lightning.pytorch.loggers import CSVLogger
from toy_corpus import Recorder, rows, trainer, write_corpus

from speechattn.data.augment import Level, Speed
from speechattn.data.batch import Batch, collate
from speechattn.data.corpus import Corpus
from speechattn.data.cuts import Manifest
from speechattn.data.join import Join
from speechattn.data.loader import SILENCE, Loader
from speechattn.data.plan import Plan
from speechattn.data.texts import TextCorpus, cut
from speechattn.data.waiting import Waiting
from speechattn.errors import InputError

SECONDS = np.random.default_rng(1).uniform(0.2, 1.5, 24).round(3).tolist()
quiet = pytest.mark.filterwarnings("ignore:.*LeafSpec", "ignore:.*isinstance.treespec", "ignore:.*smaller than the log")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"), SECONDS, translation="Nummer!")


def corpus(manifest: Path, **changes: object) -> Corpus:
    options: dict[str, object] = {"max_seconds": 5, "longest_s": 2, "workers": 0}
    return Corpus([manifest], **{**options, **changes})  # type: ignore[arg-type]


def test_sound_and_text_are_those_of_the_manifest(manifest: Path) -> None:
    seen = set()
    for batch in corpus(manifest, normalise="lower").train_dataloader():
        assert batch.sound.values.shape[0] * batch.sound.values.shape[1] <= 5 * 16000
        for row, name in enumerate(batch.ids):
            number = int(name.partition("-")[2])
            expected = soundfile.read(manifest.parent / f"{name}.flac", dtype="float32")[0]
            n = len(expected)
            assert batch.durations_s[row] == pytest.approx(SECONDS[number])
            assert batch.sound.lengths[row] == n
            assert np.array_equal(batch.sound.values[row, :n].numpy(), expected)
            assert not batch.sound.values[row, n:].any()
            assert batch.texts[row] == f"number {number}!"
            assert batch.translations is not None
            assert batch.translations[row] == "nummer!"
            seen.add(name)
    assert len(seen) == len(SECONDS)
    assert corpus(manifest, normalise="letters").texts()[3] == "number"


def test_a_batch_moves_whole_and_is_not_looked_into() -> None:
    from lightning.fabric.utilities.apply_func import move_data_to_device
    from lightning.pytorch.plugins.precision import HalfPrecision

    batch = collate([np.ones(3, np.float32), np.ones(2, np.float32)], texts="ab", translations=[None, "c"], ids="xy")
    assert batch.translations is None  # not everyone has one
    assert batch.sound.lengths.tolist() == [3, 2]
    assert HalfPrecision("bf16-true").convert_input(batch).sound.values.dtype == torch.float32
    moved = move_data_to_device(batch, torch.device("meta"))
    assert isinstance(moved, Batch)
    assert {x.device.type for x in (moved.sound.values, moved.sound.mask, moved.durations_s)} == {"meta"}
    assert (moved.texts, moved.ids) == (("a", "b"), ("x", "y"))


def test_workers_and_devices_change_nothing(manifest: Path) -> None:
    def listed(loader: Loader[Batch]) -> list[tuple[tuple[str, ...], float]]:
        return [(batch.ids, float(batch.sound.values.double().sum())) for batch in loader]

    augment = [Speed(), Level()]
    alone, helped = (corpus(manifest, augment=augment, workers=workers).train_dataloader() for workers in (0, 2))
    first, second = listed(alone), listed(alone)
    assert first == listed(helped)
    assert second == listed(helped)
    assert first != second
    data = corpus(manifest, augment=augment, shares=2, max_seconds=3)
    whole = data.train_dataloader()
    ranks = [listed(Loader(whole.source, whole.plan, rank=rank, world=2)) for rank in range(2)]
    for both, *parts in zip(listed(whole), *ranks, strict=True):
        assert sorted(both[0]) == sorted(parts[0][0] + parts[1][0])
        assert both[1] == pytest.approx(parts[0][1] + parts[1][1])
    with pytest.raises(InputError, match="planned for 2 devices cannot be dealt to 3"):
        Loader(whole.source, whole.plan, world=3)


def test_the_limit_holds_when_speed_changes(manifest: Path) -> None:
    for batch in corpus(manifest, augment=[Speed(factors=(0.5, 2.0))], max_seconds=8).train_dataloader():
        assert batch.sound.values.numel() <= 8 * 16000
        scale = [s / SECONDS[int(i.partition("-")[2])] for s, i in zip(batch.durations_s, batch.ids, strict=True)]
        assert all(abs(x - 2) < 0.01 or abs(x - 0.5) < 0.01 for x in scale)


def test_a_joined_corpus_is_whole_and_within_the_limit(manifest: Path) -> None:
    batches = list(corpus(manifest, join=Join(most_s=4, p=1), max_seconds=8).train_dataloader())
    assert all(batch.sound.values.numel() <= 8 * 16000 for batch in batches)
    assert max(batch.durations_s.max() for batch in batches) > 2
    assert sorted("+".join(name for batch in batches for name in batch.ids).split("+")) == sorted(
        f"toy-{i}" for i in range(len(SECONDS))
    )


def test_other_rates_and_repeats(tmp_path: Path) -> None:
    manifest = write_corpus(tmp_path, [0.5] * 4, rate=8000)
    (path := tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(manifest.read_bytes()))
    batches = list(Corpus({str(path): 3}, workers=0).train_dataloader())
    assert sorted(name for batch in batches for name in batch.ids) == sorted(
        f"toy-{i}{copy}" for i in range(4) for copy in ("", "#2", "#3")
    )
    assert {batch.sound.values.shape[1] for batch in batches} == {8000}
    with pytest.raises(InputError, match="toy-0 is there twice"):
        Manifest.read([manifest, path])


@quiet
def test_broken_utterances_are_skipped_counted_and_listed(tmp_path: Path) -> None:
    manifest = write_corpus(tmp_path, [0.5] * 30)
    (tmp_path / "toy-7.flac").write_bytes(b"fLaC nonsense")
    log = tmp_path / "ids.jsonl"
    training = trainer(tmp_path, max_epochs=1, logger=CSVLogger(tmp_path), log_every_n_steps=1)
    with pytest.warns(UserWarning, match=r"1 utterances could not be loaded: toy-7 \(.*training went on"):
        training.fit(Recorder(log), datamodule=corpus(manifest, max_seconds=2))
    heard = [name for row in rows(log) for name in row[1]]
    assert sorted(heard) == sorted(f"toy-{i}" for i in range(30) if i != 7)
    listed = (Path(training.log_dir or "") / "skipped.tsv").read_text().splitlines()
    assert [line.split("\t")[0] for line in listed] == ["toy-7"]
    (tmp_path / "toy-8.flac").unlink()
    with pytest.raises(InputError, match=r"2 utterances.*of 30: more than 5 %"):
        list(corpus(manifest).train_dataloader())


def test_a_batch_of_which_nothing_can_be_loaded_is_silence(tmp_path: Path) -> None:
    manifest = write_corpus(tmp_path, [0.5] * 3)
    (tmp_path / "toy-1.flac").unlink()
    with pytest.warns(UserWarning, match="toy-1"):
        batches = list(corpus(manifest, max_utterances=1, most_broken=0.5).train_dataloader())
    assert sorted(batch.ids[0] for batch in batches) == [SILENCE, "toy-0", "toy-2"]
    (silent,) = [batch for batch in batches if batch.ids == (SILENCE,)]
    assert silent.texts == ("",)
    assert not silent.sound.values.any()


def test_what_cannot_be_used_is_said(tmp_path: Path) -> None:
    manifest = write_corpus(tmp_path, [0.05, 0.5, 0.6, 3.0])
    with pytest.warns(UserWarning, match=r"left out: 2 of 4 .* toy-0 \(0.05 s\), toy-3 \(3.00 s\)"):
        loader = corpus(manifest).train_dataloader()
    assert sorted(name for batch in loader for name in batch.ids) == ["toy-1", "toy-2"]
    with pytest.raises(InputError, match="nothing to train on: 4 of 4"):
        corpus(manifest, longest_s=0.01).train_dataloader()
    with pytest.raises(InputError, match="longest_s=20 does not fit into max_seconds=5"):
        corpus(manifest, longest_s=20).train_dataloader()
    with pytest.raises(InputError, match="no such manifest"):
        corpus(tmp_path / "none.jsonl").train_dataloader()
    with pytest.raises(InputError, match="no manifest to train on"):
        Corpus().train_dataloader()
    with pytest.raises(InputError, match="text normaliser loud: wanted one of"):
        corpus(manifest, normalise="loud")
    for content in ("nonsense", '{"id": "a"}', "[1]", '{"id": "a", "type": "MonoCut", "tracks": 3, "duration": []}'):
        (tmp_path / "bad.jsonl").write_text(content + "\n")
        with pytest.raises(InputError, match=r"bad\.jsonl"):
            corpus(tmp_path / "bad.jsonl").train_dataloader()
    mute = [json.loads(line) for line in manifest.read_text().splitlines()]
    mute[2]["recording"] = {"nonsense": 1}
    (tmp_path / "odd.jsonl").write_text("".join(json.dumps(row) + "\n" for row in mute[1:3]))
    with pytest.warns(UserWarning, match=r"toy-2 \(not a cut of lhotse"):
        assert len(list(corpus(tmp_path / "odd.jsonl", most_broken=0.5).train_dataloader())) == 1
    mute[1]["supervisions"] = []
    (tmp_path / "mute.jsonl").write_text("".join(json.dumps(row) + "\n" for row in mute))
    with pytest.warns(UserWarning, match="1 cuts have no supervision or several and are left out: toy-1"):
        assert len(Manifest.read([tmp_path / "mute.jsonl"])) == 3


def test_validation_is_whole_and_in_order(manifest: Path) -> None:
    data = Corpus([], {"all": manifest}, [manifest], max_seconds=1, augment=[Speed()], workers=0)
    assert (data.valid_names, data.test_names) == (("all",), ("toy_cuts_train",))
    for loader in [*data.val_dataloader(), *data.test_dataloader()]:
        for _ in range(2):
            heard = [float(s) for batch in loader for s in batch.durations_s]
            assert heard == pytest.approx(sorted(SECONDS, reverse=True))


@quiet
def test_waiting_is_measured(tmp_path: Path, manifest: Path) -> None:
    class Slow(Level):
        def __call__(self, *args: object) -> np.ndarray:
            time.sleep(0.01)
            return super().__call__(*args)  # type: ignore[arg-type]

    class Busy(Recorder):
        def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
            time.sleep(0.01 * len(batch))
            return super().training_step(batch, batch_idx)

    waiting = Waiting()
    training = trainer(tmp_path, max_epochs=2, callbacks=[waiting])
    training.fit(Busy(tmp_path / "log"), datamodule=corpus(manifest, augment=[Slow()]))
    assert 0.3 < waiting.share < 0.7
    assert float(training.callback_metrics["train/waiting"]) == pytest.approx(waiting.share)


def test_texts(tmp_path: Path) -> None:
    (path := tmp_path / "a.txt").write_text("One, two!\n\nthree\n" + "word " * 9 + "\n", encoding="utf-8")
    data = TextCorpus([path], {"v": path}, max_characters=30, longest=20, normalise="letters")
    epochs = [list(data.train_dataloader()) for _ in range(2)]
    for epoch in epochs:
        heard = sorted(text for batch in epoch for text in batch.texts)
        assert heard == ["one two", "three", "word", "word word word word", "word word word word"]
        assert all(len(batch) * max(map(len, batch.texts)) < 30 for batch in epoch)
    (valid,) = data.val_dataloader()
    assert [name for batch in valid for name in batch.ids][:2] == ["a.txt:4", "a.txt:4"]
    assert cut("abcdef gh", 4) == ["abcd", "ef", "gh"]
    (tmp_path / "empty").touch()
    (tmp_path / "latin").write_bytes(b"\xe9t\xe9")
    with pytest.raises(InputError, match=r"no text in .*empty"):
        TextCorpus([tmp_path / "empty"]).train_dataloader()
    with pytest.raises(InputError, match="not a UTF-8 text"):
        TextCorpus([tmp_path / "latin"]).train_dataloader()


def test_a_folder_of_shar_is_a_manifest(tmp_path: Path, manifest: Path) -> None:
    cuts = CutSet.from_file(manifest).with_recording_path_prefix(manifest.parent)
    cuts.to_shar(tmp_path, fields={"recording": "flac"}, shard_size=7)
    for plain, shar in zip(*(corpus(path).train_dataloader() for path in (manifest, tmp_path)), strict=True):
        assert plain.ids == shar.ids
        assert plain.texts == shar.texts
        torch.testing.assert_close(plain.sound.values, shar.sound.values, rtol=0, atol=1e-4)
    first = {batch.ids for batch in corpus(tmp_path, workers=2).train_dataloader()}
    assert first == {batch.ids for batch in corpus(tmp_path).train_dataloader()}
    second = tmp_path / "recording.000001.tar"
    whole = second.read_bytes()
    for content, said in (
        (whole[:1000], "not a tar file"),
        ((tmp_path / "recording.000000.tar").read_bytes(), "has no"),
    ):
        second.write_bytes(content)
        with pytest.raises(InputError, match=rf"recording\.000001\.tar: {said}"):
            corpus(tmp_path).train_dataloader()
    second.write_bytes(whole)
    loader = corpus(tmp_path, most_broken=0.5).train_dataloader()
    second.unlink()
    with pytest.warns(UserWarning, match=r"7 utterances could not be loaded: .*recording\.000001\.tar"):
        assert len([name for batch in loader for name in batch.ids if name != SILENCE]) == 17
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no shards of Lhotse Shar"):
        corpus(tmp_path / "empty").train_dataloader()


SCRIPT = """
import sys; sys.path.insert(0, {tests!r})
from pathlib import Path
from test_corpus import corpus
from toy_corpus import Recorder, trainer
folder, manifest = map(Path, sys.argv[1:])
training = trainer(folder, max_epochs=2, devices=2, strategy="ddp")
training.fit(Recorder(folder / "log"), datamodule=corpus(manifest, shares=2, max_seconds=3))
"""


@pytest.mark.slow
@quiet
def test_two_processes_hear_what_one_does(tmp_path: Path, manifest: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    command = [sys.executable, str(script), str(tmp_path), str(manifest)]
    subprocess.run(command, check=True, timeout=120, capture_output=True)
    alone = tmp_path / "alone"
    trainer(tmp_path, max_epochs=2).fit(Recorder(alone), datamodule=corpus(manifest, shares=2, max_seconds=3))
    parts = [rows(tmp_path / f"log.{rank}") for rank in range(2)]
    for both, a, b in zip(rows(alone), *parts, strict=True):
        assert both[1] == sorted(a[1] + b[1])
        assert both[2] == pytest.approx(a[2] + b[2])
    assert len(rows(alone)) == 2 * len(Plan(np.array(SECONDS), 3, shares=2))
