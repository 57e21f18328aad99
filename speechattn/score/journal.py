"""Results on disk while they come: what is finished is never done again, and runs with other options do not mix."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from speechattn.errors import InputError
from speechattn.score.listening import Heard

__all__ = ["Journal", "fingerprint"]

EDGE = 1 << 20  # bytes at either end of a file that stand for all of it
KNOWN = {field.name for field in fields(Heard)}


class Journal:
    """`utterances.jsonl` and `options.json` of a folder.

    Laws: a line is written in one piece when its utterance is finished, so that after any end of the process a last
    line that was cut off is dropped and everything before it counts; utterances that failed are tried again. As a
    context manager it locks the folder against a second run.
    """

    def __init__(self, folder: Path, options: Mapping[str, Any]) -> None:
        """InputError when the folder holds results of other options, naming the first that differs."""
        self.folder, self.path = folder, folder / "utterances.jsonl"
        self.options = json.loads(json.dumps(dict(options)))
        self.file: TextIO | None = None

    def __enter__(self) -> Journal:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = locked(self.folder)
        try:
            self.check()
            self.done = self.repaired()
            self.file = self.path.open("a", encoding="utf-8")
        except BaseException:
            os.close(self.lock)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.file is not None:
            self.file.close()
        os.close(self.lock)

    def check(self) -> None:
        """The options are those of before, or nothing was there before."""
        path = self.folder / "options.json"
        if not path.exists():
            if self.path.exists():
                raise InputError(f"{self.path} is there, but not {path}: whose results are these? Give another folder")
            replace_text(path, json.dumps(self.options, indent=2, ensure_ascii=False) + "\n")
            return
        try:
            before = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise InputError(f"{path}: not options of an evaluation ({error})") from error
        for name in [*self.options, *(before.keys() - self.options.keys())]:
            old, new = before.get(name), self.options.get(name)
            if old != new:
                raise InputError(
                    f"{self.folder} holds results with {name} {shown(old)}, now it is {shown(new)}: "
                    "give another --output-dir, or the same options"
                )

    def repaired(self) -> dict[str, Heard]:
        """What is finished, by id; a file with anything else in it is written anew without."""
        text = self.path.read_text(encoding="utf-8", errors="replace") if self.path.exists() else ""
        lines = text.split("\n")  # not those of splitlines: texts may hold other line ends
        cut_off = lines.pop()
        done: dict[str, Heard] = {}
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                heard = Heard(**{key: value for key, value in row.items() if key in KNOWN})
            except (ValueError, TypeError, AttributeError) as error:
                raise InputError(f"{self.path}, line {number}: not a result ({error})") from error
            if not heard.failed:
                done[heard.id] = heard
        if cut_off or len(done) != len(lines):
            replace_text(self.path, "".join(map(line_of, done.values())))
        return done

    def add(self, results: Sequence[Heard]) -> None:
        """Finished utterances, at once."""
        assert self.file is not None
        self.file.write("".join(map(line_of, results)))
        self.file.flush()

    def rewrite(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Put these lines in the place of all; none of the old is lost if the process ends meanwhile."""
        replace_text(self.path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def line_of(heard: Heard) -> str:
    """One line of JSON."""
    return json.dumps(asdict(heard), ensure_ascii=False) + "\n"


def shown(value: Any) -> str:
    """An option in a message."""
    return "not given" if value is None else str(value)


def replace_text(path: Path, text: str) -> None:
    """The file has either its old content or the new one, never a part."""
    beside = path.with_name(path.name + ".new")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def locked(folder: Path) -> int:
    """An open folder that no other process has locked, or InputError; systems without such locks go without."""
    handle = os.open(folder, os.O_RDONLY)
    with contextlib.suppress(ImportError):
        import fcntl

        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            raise InputError(f"{folder}: another evaluation is writing there") from error
    return handle


def fingerprint(name: str | Path, *, but: Path | None = None) -> str:
    """What changes when a file or folder does: from names, sizes and both ends of files; empty for what is neither.

    What lies in the folder `but` does not count.
    """
    path = Path(name).expanduser()
    if not path.exists():
        return ""
    digest = hashlib.sha256()
    for part in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if part.is_file() and not (but and part.resolve().is_relative_to(but.resolve())):
            size = part.stat().st_size
            digest.update(f"{part.relative_to(path)}\0{size}\0".encode())
            with part.open("rb") as file:
                digest.update(file.read(EDGE))
                file.seek(max(EDGE, size - EDGE))
                digest.update(file.read())
    return digest.hexdigest()[:16]
