"""Lhotse Shar: sound in a few large tar files, for clusters whose file systems do not like many small ones.

Its tar files are not read from end to end but through an index of where each utterance begins, which is made by
skipping from one header to the next. So a folder of shards is a manifest like any other: batches, shuffling, resuming
and the dealing to devices and workers are the same, and so are their laws. It has to be a folder, not an address.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from speechattn.errors import InputError

__all__ = ["fill", "read_shar"]


def read_shar(folder: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The cuts of every shard, in order; the source of the recording says `TAR:OFFSET:SIZE`.

    A cut without sound has no supervision left. InputError for a folder without shards and for shards that lie.
    """
    from lhotse.serialization import open_best

    shards = sorted(folder.glob("cuts.*.jsonl*"))
    if not shards:
        raise InputError(f"{folder}: no shards of Lhotse Shar (cuts.000000.jsonl.gz, recording.000000.tar, ...) in it")
    for shard in shards:
        tar = folder / f"recording.{shard.name.split('.')[1]}.tar"
        places = index(tar)
        with open_best(shard, "rb") as file:
            for line in file:
                row = json.loads(line)
                if row["id"] not in places:
                    raise InputError(f"{tar}: has no {row['id']}, which {shard.name} lists")
                offset, size = places[row["id"]]
                if size:
                    row["recording"]["sources"][0]["source"] = f"{tar.resolve()}:{offset}:{size}"
                else:
                    row["supervisions"] = []
                yield json.dumps(row).encode(), row


def index(tar: Path) -> dict[str, tuple[int, int]]:
    """Where the sound of each cut begins in a tar file, and its bytes; no bytes where there is no sound."""
    try:
        with tarfile.open(tar, "r:") as archive:
            members = [(Path(member.name), member.offset_data, member.size) for member in archive]
    except (OSError, tarfile.TarError) as error:
        raise InputError(f"{tar}: not a tar file that can be read ({error})") from error
    # Behind each sound lies what is known of it (.json), or .nodata and .nometa where there is none.
    sounds = [member for member in members if member[0].suffix not in (".json", ".nometa")]
    return {str(name.with_suffix("")): (at, size) for name, at, size in sounds}


def fill(cut: Any) -> None:
    """Put the sound into a cut of `read_shar`; any other stays as it is. OSError when it is gone."""
    for source in cut.recording.sources if cut.has_recording else ():
        if source.type == "shar":
            tar, offset, size = source.source.rsplit(":", 2)
            with open(tar, "rb") as file:
                file.seek(int(offset))
                source.type, source.source = "memory", file.read(int(size))
