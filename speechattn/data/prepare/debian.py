"""Packages of Debian and Ubuntu: fetched and unpacked without root."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

from speechattn.errors import InputError

__all__ = ["download", "sha256", "unpack"]


def download(package: str, folder: Path) -> Path:
    """The package's file, freshly fetched into the folder; its own apt state, so neither root nor an update is needed.

    InputError where there is no package system, no network or no such package.
    """
    folder = folder.resolve()  # apt takes its paths from the root
    for part in ("state/lists/partial", "cache/archives/partial"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    options = [
        f"Dir::State={folder / 'state'}",
        f"Dir::Cache={folder / 'cache'}",
        "APT::Sandbox::User=",
        "Debug::NoLocking=1",
    ]
    apt = ["apt-get", "-qq", *(word for option in options for word in ("-o", option))]
    run([*apt, "update"], folder, package)
    run([*apt, "download", package], folder, package)
    (found,) = folder.glob(f"{package}_*.deb")
    return found


def unpack(package: Path, folder: Path) -> None:
    """The files of a package into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    run(["dpkg-deb", "-x", str(package.resolve()), "."], folder, package.name)


def run(command: list[str], folder: Path, package: str) -> None:
    """Run a program of the package system; InputError with its own words when it fails."""
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=600)
    except FileNotFoundError as error:
        raise InputError(
            f"{command[0]} is not installed: the recordings come as a package of Debian or Ubuntu"
        ) from error
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        said = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
        raise InputError(f"the package {package} cannot be fetched: {said[-1] if said else error}") from error


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
