"""What the package promises about itself."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import speechattn

ROOT = Path(__file__).parents[1]
ORDER = [
    {"errors", "version", "frames", "linear", "tree"}, {"stream"}, {"audio", "attention", "text"}, {"encoder", "cross"},
    {"decoder"}, {"search"}, {"policy", "terms"}, {"live"}, {"model", "pretrained", "multimodal", "analysis"},
    {"task", "score", "data", "testing"}, {"cli", "evaluators"},
]  # fmt: skip
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
MODULES = sorted((ROOT / "speechattn").rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way_and_exports_are_sorted(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    parts = path.relative_to(ROOT / "speechattn").parts
    mine = RANK[parts[0].removesuffix(".py")] if parts[0] not in ("__init__.py", "__main__.py") else len(ORDER)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("speechattn."):
            assert RANK[(node.module or "").split(".")[1]] <= mine, node.module
    exported = [
        ast.literal_eval(node.value)  # type: ignore[arg-type]
        for node in tree.body
        if (isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__")
        or (isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == "__all__")
    ]
    if path.name not in ("version.py",):
        assert exported
        defined = {n for node in ast.walk(tree) for n in names(node)}
        assert set(exported[0]) <= defined
        assert exported[0] == sorted(exported[0], key=lambda name: (not name.isupper(), not name[0].isupper(), name))


def names(node: ast.AST) -> set[str]:
    """What a statement defines."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return {node.name}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {alias.asname or alias.name for alias in node.names}
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return {node.target.id}
    if isinstance(node, ast.Assign):
        return {target.id for target in node.targets if isinstance(target, ast.Name)}
    return set()


def test_import_is_light() -> None:
    code = (
        "import sys, time, torch; began = time.perf_counter(); import speechattn; took = time.perf_counter() - began;"
        "heavy = {'triton', 'lightning', 'librosa', 'espnet', 'transformers', 'torchaudio', 'tokenizers', 'rich'};"
        "new = {name for name in heavy if name in sys.modules}; import torch;"
        "print(took, sorted(new))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    took, heavy = done.stdout.split(" ", 1)
    assert float(took) < 0.5
    assert heavy.strip() == "[]"


def test_everything_exported_is_there() -> None:
    assert all(hasattr(speechattn, name) for name in speechattn.__all__)
