"""Clips joined into streams: what is said, when, and the same again."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from speechattn.data.prepare.joined import Joining, write_streams
from speechattn.data.prepare.manifests import write_rows
from speechattn.errors import InputError
from speechattn.score.utterances import read_utterances

RATE = 16000


def cut_row(name: str, parts: int, seconds: float, speaker: str) -> dict[str, Any]:
    """A cut of lhotse whose supervisions are as long as it is."""
    rows = [
        {"id": f"{name}-{k}", "recording_id": name, "start": 0.0, "duration": seconds, "channel": 0,
         "text": f"{name} said", "language": "en", "speaker": speaker, "custom": {"translation": f"{name} SAID"}}
        for k in range(parts)
    ]  # fmt: skip
    recording = {
        "id": name, "sources": [{"type": "file", "channels": [0], "source": f"{name}.flac"}], "sampling_rate": RATE,
        "num_samples": round(seconds * RATE), "duration": seconds, "channel_ids": [0],
    }  # fmt: skip
    return {"id": name, "start": 0.0, "duration": seconds, "channel": 0, "supervisions": rows, "recording": recording,
            "type": "MonoCut"}  # fmt: skip


def clips(folder: Path, sizes: Mapping[str, int]) -> Path:
    """So many clips of each speaker."""
    rows, random = [], np.random.default_rng(1)
    for speaker, count in sizes.items():
        for k in range(count):
            name, seconds = f"{speaker}{k}", 0.2 + 0.01 * k
            soundfile.write(folder / f"{name}.flac", 0.1 * random.standard_normal(round(seconds * RATE)), RATE)
            rows.append(cut_row(name, 1, seconds, speaker))
    write_rows(folder / "clips.jsonl.gz", rows)
    return folder / "clips.jsonl.gz"


def test_joined_clips_keep_texts_times_and_word_ends(tmp_path: Path) -> None:
    source = clips(tmp_path, {"y": 12, "x": 31, "z": 3})
    out = tmp_path / "made" / "streams.jsonl.gz"
    write_streams(source, out, word_ends={"x1": [0.1, 0.15]})
    streams = read_utterances(out)
    assert [one.id for one in streams] == ["x-00", "y-00", "z-00", "x-01"]
    assert [len(one.text.split()) // 2 for one in streams] == [16, 12, 3, 15]
    assert " ".join(one.text for one in (streams[0], streams[3])) == " ".join(f"x{k} said" for k in range(31))
    assert streams[2].translation == "z0 SAID z1 SAID z2 SAID"
    sound, rate = streams[0].sound.read()
    rows = sorted(streams[0].sound.said.cut.supervisions, key=lambda row: row.start)  # type: ignore[attr-defined]
    for k, row in enumerate(rows):
        part = sound[round(row.start * rate) : round((row.start + row.duration) * rate)]
        assert np.array_equal(part, soundfile.read(tmp_path / f"x{k}.flac", dtype="float32")[0])
    pauses = [after.start - before.start - before.duration for before, after in pairwise(rows)]
    assert all(0.3 <= pause <= 0.8 for pause in pauses)
    assert len({round(pause, 3) for pause in pauses}) > 10
    assert rows[1].custom["word_ends"] == pytest.approx([rows[1].start + 0.1, rows[1].start + 0.15], abs=1e-3)
    assert "word_ends" not in rows[0].custom


def test_the_same_seed_joins_the_same(tmp_path: Path) -> None:
    source = clips(tmp_path, {"x": 5})

    def made(name: str, seed: int) -> list[float]:
        rows: Any = write_streams(source, tmp_path / f"{name}.jsonl.gz", Joining(2, 3, seed=seed))
        assert [len(row["supervisions"]) for row in rows] == [3, 2]
        return [float(part["start"]) for row in rows for part in row["supervisions"]]

    assert made("first", 0) == made("second", 0) != made("third", 1)
    for how in ((3, 2), (0, 2)):
        with pytest.raises(InputError, match="clips: wanted"):
            Joining(*how)
    with pytest.raises(InputError, match="pauses"):
        Joining(shortest_s=0.8, longest_s=0.3)
    with pytest.raises(InputError, match=r"ends in \.jsonl\.gz"):
        write_streams(source, tmp_path / "streams.jsonl")
    write_rows(tmp_path / "mixed.jsonl.gz", [cut_row("x0", 2, 0.2, "x")])
    with pytest.warns(UserWarning, match="several"), pytest.raises(InputError, match="no clips to join"):
        write_streams(tmp_path / "mixed.jsonl.gz", tmp_path / "streams.jsonl.gz")
