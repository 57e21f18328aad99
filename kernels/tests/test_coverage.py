"""Every line and branch of every kernel runs in the tests of its op: the interpreter is Python, so coverage sees it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import speechattn_kernels
from conftest import INTERPRETED

HERE = Path(__file__).parent
PACKAGE = Path(speechattn_kernels.__path__[0])
OPS = sorted(path.stem.removeprefix("test_") for path in HERE.glob("test_*.py") if path != Path(__file__))

PLANTED = """
import torch, triton
import triton.language as tl

@triton.jit
def helper(x, POSITIVE: tl.constexpr):
    if POSITIVE:
        x = x + 1
    else:
        x = x - 1
    return x

@triton.jit
def planted_kernel(out, n):
    i = tl.program_id(0)
    value = helper(i, POSITIVE=True) + helper(i, POSITIVE={other})
    for at in range(n):
        if at > {beyond}:
            value += 1
    tl.store(out + i, value)

@triton.jit
def last_kernel(out, WRITE: tl.constexpr):
    if WRITE:
        tl.store(out, 1)

out = torch.zeros(2, dtype=torch.int32)
planted_kernel[(2,)](out, 3)
last_kernel[(1,)](out, WRITE=True)
last_kernel[(1,)](out, WRITE={last})
"""


def lacking(folder: Path, command: list[str], source: Path) -> dict[str, list[str]]:
    """Lines and branches of the kernel files below `source` that the command does not run, by file.

    A kernel file is one with a jit function; the rest of it (launches, checks) counts as well. The interpreter compiles
    a function without its decorator, and coverage names the way out of one by the line where it begins: one line off.
    So a line from which any function was left is one whose way out was taken.
    """
    from coverage import CoverageData

    data, out = folder / "coverage", folder / "coverage.json"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "COVERAGE_FILE": str(data), "COVERAGE_CORE": "ctrace"}
    run = [sys.executable, "-m", "coverage", "run", "--rcfile=/dev/null", "--branch", f"--source={source}", *command]
    ran = subprocess.run(run, cwd=HERE.parents[1], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    show = [sys.executable, "-m", "coverage", "json", "--rcfile=/dev/null", "-q", "-o", str(out)]
    subprocess.run(show, cwd=HERE.parents[1], env=environment, check=True)
    seen, missing = CoverageData(str(data)), dict[str, list[str]]()
    seen.read()
    for name, found in json.loads(out.read_text())["files"].items():
        text = (HERE.parents[1] / name).read_text()
        if "@triton.jit" in text:
            lines = [f"line {n}: {text.splitlines()[n - 1].strip()}" for n in found["missing_lines"]]
            left = {a for a, b in seen.arcs(str(HERE.parents[1] / name)) or () if b < 0}
            branches = [f"branch {a} -> {b}" for a, b in found["missing_branches"] if b > 0 or a not in left]
            missing[Path(name).name] = lines + branches
    assert missing, "no kernel was found"
    return missing


@pytest.mark.slow
@pytest.mark.skipif(not INTERPRETED, reason="what runs on a GPU is not seen")
@pytest.mark.parametrize("op", OPS)
def test_no_branch_of_a_kernel_is_left_out(op: str, tmp_path: Path) -> None:
    """Alone: coverage run --branch --source=kernels/speechattn_kernels/OP -m pytest kernels/tests/test_OP.py"""
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / f"test_{op}.py")]
    missing = lacking(tmp_path, command, PACKAGE / op)
    assert not any(missing.values()), missing


@pytest.mark.skipif(not INTERPRETED, reason="what runs on a GPU is not seen")
def test_a_branch_that_is_left_out_is_seen(tmp_path: Path) -> None:
    planted = {
        "whole.py": ("False", "1", "False", []),
        "constant.py": (
            "True",
            "1",
            "False",
            ["line 10: x = x - 1", "branch 7 -> 10"],
        ),  # an else of a constant that never is
        "never.py": ("False", "9", "False", ["line 19: value += 1", "branch 18 -> 19"]),  # a condition on data
        "always.py": ("False", "-1", "False", ["branch 18 -> 17"]),
        "leaves.py": ("False", "1", "True", ["branch 24 -> -22"]),  # the way out of a kernel
    }
    folder, run = tmp_path / "planted", tmp_path / "run.py"
    folder.mkdir()
    for name, (other, beyond, last, _) in planted.items():
        (folder / name).write_text(PLANTED.format(other=other, beyond=beyond, last=last))
    imports = "\n".join(f"import {name.removesuffix('.py')}" for name in planted)
    run.write_text(f"import sys\nsys.path.insert(0, {str(folder)!r})\n{imports}\n")
    assert lacking(tmp_path, [str(run)], folder) == {name: found for name, (*_, found) in planted.items()}


def test_every_op_has_tests() -> None:
    ops = {path.parent.name for path in PACKAGE.glob("*/naive.py")}
    assert ops
    assert ops <= set(OPS), f"without tests: {ops - set(OPS)}"
