"""Every recipe parses, builds, makes a step and validates on stand-ins; every command of their pages exists."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
import warnings
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from corpora import ENGLISH, FOREIGN, make_librispeech, make_must_c, murmur

pytest.importorskip("lhotse")
pytest.importorskip("jsonargparse")

from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, LightningModule

from speechattn.attention import Span
from speechattn.data.prepare import librispeech, must_c
from speechattn.data.prepare.manifests import Utterance, write_manifests
from speechattn.data.prepare.sound import RATE
from speechattn.frames import Frames
from speechattn.model import Recognizer, load_model
from speechattn.task.base import seeded
from speechattn.task.command import Fit, spelled, whole
from speechattn.task.objectives import CTCObjective, Heard, Said
from speechattn.task.recognizer import Recognizer as Task
from speechattn.text.pieces import Pieces

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"
PAGES = [*sorted(RECIPES.glob("*/README.md")), RECIPES / "README.md", ROOT / "docs" / "training.md", ROOT / "README.md"]
OWN = {"av", "digits", "terms"}  # recipes with tests of their own
PAGES = [page for page in PAGES if page.parent.name not in OWN]
FILES = sorted(str(path.relative_to(RECIPES)) for path in RECIPES.glob("*/*.yaml") if path.parent.name not in OWN)
PARTS = {"librispeech/960h.yaml"}  # named by recipes, and no configuration by themselves
TINY = {
    "dim": 16, "dims": [12, 12, 16], "depth": 2, "depths": [1, 1, 1], "heads": 2, "inner": 24, "gate": 24,
    "channels": 4, "frames": 16, "labels": 16, "kernel": 5, "merge_kernel": 3, "alignment_heads": [[0, 1]],
}  # fmt: skip
QUICK = {
    "max_steps": 1, "accelerator": "cpu", "devices": 1, "precision": "32-true", "accumulate_grad_batches": 1,
    "val_check_interval": 1, "limit_val_batches": 1, "num_sanity_val_steps": 0, "logger": False,
    "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
}  # fmt: skip


class Parsed(Fit):
    """Parses; makes its objects only when told to."""

    told = False

    def instantiate_classes(self) -> None:
        if self.told:
            super().instantiate_classes()


@cache
def parsed() -> Parsed:
    """The one parser of these tests: to make it takes as long as to use it."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(sys, "argv", ["speechattn"])
        patch.chdir(RECIPES)
        return Parsed(
            LightningModule, LightningDataModule, subclass_mode_model=True, subclass_mode_data=True,
            args=["--config", "librispeech/mini.yaml"], run=False, save_config_kwargs={"overwrite": True},
            auto_configure_optimizers=False, load_from_checkpoint_support=False, parser_kwargs={"exit_on_error": False},
        )  # fmt: skip


@cache
def once(recipe: str) -> Namespace:
    """A recipe, `+` between a base and what lies over it; not to be changed."""
    files = chain.from_iterable(("--config", str(RECIPES / name)) for name in recipe.split("+"))
    return parsed().parser.parse_args([*files])


def read(recipe: str) -> Namespace:
    """The same, for changes."""
    return once(recipe).clone()


def shell(page: Path) -> list[str]:
    """The commands in the shell blocks of a page, each on a line."""
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    return [line.strip() for line in "".join(blocks).replace("\\\n", " ").splitlines() if line.strip()]


def speechattn_of(line: str) -> list[str] | None:
    """The arguments of `speechattn` in a command, if it is one."""
    words = shlex.split(line, comments=True)
    return words[words.index("speechattn") + 1 :] if "speechattn" in words else None


COMMANDS = sorted({(page, line) for page in PAGES for line in shell(page) if speechattn_of(line)})


def configs(arguments: list[str]) -> str:
    """The recipe that a `fit` command names."""
    pairs = pairwise(arguments)
    return "+".join(value.removeprefix("recipes/") for name, value in pairs if name == "--config")


NAMED = {configs(speechattn_of(line) or []) for _, line in COMMANDS} - {""}
BASES = {name for name in FILES if "\nmodel:\n  class_path:" in (RECIPES / name).read_text(encoding="utf-8")}
COMBINED = sorted(BASES | NAMED)
QUICKEST = {
    "librispeech/conformer_ctc_attention.yaml", "librispeech/conformer_ctc_attention.yaml+librispeech/stream.yaml",
    "librispeech/efficient_conformer.yaml+librispeech/stream_80ms.yaml", "must_c/en_de.yaml",
    "fotaq/transformer_transducer.yaml",
}  # fmt: skip


def marked(recipe: str) -> Any:
    """What is like another one is not looked at every time."""
    twin = re.search(r"must_c/en_(fr|it|nl|pt|ro|ru)|(fr|ru)_en|mini.yaml\+|ducer.yaml\+librispeech/stream", recipe)
    return pytest.param(recipe, marks=pytest.mark.slow if twin else ())


def numbers(part: Any, name: str) -> Iterator[Any]:
    """The values of every key of that name, all the way down."""
    if isinstance(part, Namespace | dict):
        for key, value in (vars(part) if isinstance(part, Namespace) else part).items():
            if key == name:
                yield value
            yield from numbers(value, name)
    elif isinstance(part, list):
        for value in part:
            yield from numbers(value, name)


def shrink(part: Any, sizes: dict[str, Any]) -> None:
    """Put small numbers in place of those of the recipe."""
    if isinstance(part, Namespace | dict):
        inside = vars(part) if isinstance(part, Namespace) else part
        for key, value in inside.items():
            if key in sizes and isinstance(value, int | list):
                inside[key] = sizes[key]
            else:
                shrink(value, sizes)
    elif isinstance(part, list):
        for value in part:
            shrink(value, sizes)


def test_every_file_is_a_recipe_or_lies_over_one_that_a_page_names() -> None:
    used = set(chain.from_iterable(name.split("+") for name in COMBINED))
    assert used | PARTS == {*FILES}
    assert all(name in NAMED or any(name in one.split("+") for one in NAMED) for name in FILES if name not in PARTS)


@pytest.mark.parametrize("recipe", [*map(marked, COMBINED)])
def test_a_recipe_says_everything_consistently(recipe: str) -> None:
    config = read(recipe)
    model, data = config.model.init_args, config.data.init_args
    (vocab,) = {*numbers(model.heads, "vocab")}
    own = not model.tokenizer.startswith("speechattn/")
    assert model.scheduler.init_args.total == config.trainer.max_steps
    page = [shlex.join(shlex.split(line)) for line in shell(RECIPES / recipe.split("/")[0] / "README.md")]
    folder = re.sub(r"-[a-z]+$", "", model.tokenizer)  # one line of the page stands for all languages
    normal = "" if data.normalise == "none" else f"--normalise {data.normalise}"
    if own:
        assert re.search(rf"[a-z]{vocab}(-[a-z]+)?$", model.tokenizer), "the tokenizer is called after its size"
        assert any(re.search(rf"speechattn tokenizer .*--vocab-size {vocab} .*{folder}", line) for line in page)
        assert any(re.search(rf"speechattn tokenizer .*{normal} .*{folder}", line) for line in page)
    else:
        assert load_model(model.tokenizer).tokenizer.size == vocab
    for place in {Path(path).parent for path in [*data.train, *data.valid.values()]}:
        assert any(re.search(rf"speechattn prepare .*{place}$", line) for line in page)
    frame = model.encoder.init_args.span
    alike = frame.class_path.endswith("full") or model.keep is not None
    assert (model.spans is None) == alike, "trained as it will be heard"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data` as the commands of the pages make it, of stand-ins, and a tokenizer of their letters."""
    root = tmp_path_factory.mktemp("place")
    original, data = root / "original", root / "data"
    parts = [*librispeech.PARTS, *librispeech.MINI]
    make_librispeech(original, parts, readers=1, chapters=1, lines=2)
    librispeech.prepare(original, data / "librispeech", parts)
    for language in ("de", "es"):
        make_must_c(original, language, ("train", "dev"), talks=1, segments=2)
        must_c.prepare(original, data / "must_c", language, ("train", "dev"))
    languages = ("be", "bg", "ca", "da", "el", "es", "fr", "ro", "ru")
    for folder, name in [
        ("fotaq", "fotaq"),
        ("synthetic", "synthetic"),
        ("en_pt", "fotaq"),
        ("en_pt", "dialogue"),
        ("en_pt", "steelsky"),
        ("en_pt", "synthetic"),
        *(("tuxpaint", f"tuxpaint-{c}") for c in languages),
    ]:
        for split in ("train", "dev"):
            write_manifests(data / folder, name, split, [line(f"{name}-{split}-{i}", i) for i in range(2)])
    words = " ".join([ENGLISH, *FOREIGN.values()])
    pieces = [
        "<blank>",
        "<unk>",
        "▁",
        *sorted({f"▁{word}" for word in words.split()}),
        *sorted({*words, *words.upper(), "."} - {" "}),
    ]
    (root / "tokens").mkdir()
    Pieces([*pieces, "<sos/eos>"]).save(root / "tokens")
    return root


def line(name: str, seed: int) -> Utterance:
    """A short utterance with its translation."""
    said = " ".join(ENGLISH.split()[seed : seed + 3])
    sound = murmur(np.random.default_rng(seed), said)
    assert RATE == 16000
    return Utterance(name, lambda: sound, said, "nobody", "en", said.upper(), "en")


def run(recipe: str, place: Path, **options: Any) -> Parsed:
    """One step and one validation at tiny width."""
    cli = parsed()
    tokens = (place / "tokens" / "tokens.txt").read_text(encoding="utf-8").splitlines()
    cli.config = read(recipe)
    vars(cli.config.trainer).update(QUICK | options)
    model = cli.config.model.init_args
    shrink(model.encoder, TINY)
    shrink(model.heads, TINY | {"vocab": len(tokens)})
    shrink(cli.config.data, {"workers": 0})
    model.tokenizer = str(place / "tokens")
    cli.told = True
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")  # of Lightning: about loggers and workers that are not there
        patch.chdir(place)
        cli.instantiate_classes()
        cli.fit()
    return cli


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(name, marks=() if name in QUICKEST else pytest.mark.slow)
        for name in COMBINED
        if not re.search(r"must_c/en_(?!de|es)", name)
    ],
)
def test_a_recipe_trains_a_step_and_validates_at_tiny_width(recipe: str, place: Path) -> None:
    cli = run(recipe, place)
    found = {name: float(value) for name, value in cli.trainer.callback_metrics.items()}
    assert cli.trainer.global_step == 1
    assert 0 < found["train/loss"] < 100
    shown = cli.model.monitor[0]
    assert np.isfinite(found[shown])
    chunked = "speechattn.attention.Span.full" not in str(cli.config.model)
    assert (f"{shown}_streamed" in found) == chunked
    if chunked:
        assert found[f"{shown}_streamed"] == found[shown]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", sorted(BASES))
def test_the_pages_say_how_large_a_model_is(recipe: str, tmp_path: Path) -> None:
    config = read(recipe)
    (vocab,) = {*numbers(config.model.init_args.heads, "vocab")}
    tokens = ["<blank>", "<unk>", "▁", *(f"x{i}" for i in range(vocab - 4)), "<sos/eos>"]
    (tmp_path / "tokens.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    config.model.init_args.tokenizer = str(tmp_path)
    config.pop("data")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of jsonargparse, to its users
        model = parsed().parser.instantiate_classes(config).model.model
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    folder, name = recipe.split("/")
    page = (RECIPES / folder / "README.md").read_text(encoding="utf-8")
    row = next(row for row in page.splitlines() if row.startswith(f"| `{name}` |"))
    assert f"| {millions:.1f} M |" in row
    assert f"| {millions:.1f} M |" in next(
        row for row in (RECIPES / "README.md").read_text(encoding="utf-8").splitlines() if f"]({recipe})" in row
    )


@cache
def parser(name: str) -> argparse.ArgumentParser:
    """That of one command."""
    top = argparse.ArgumentParser(exit_on_error=False)
    import_module(f"speechattn.cli.{name}").add_parser(top.add_subparsers(dest="command"))
    return top


@pytest.mark.parametrize("command", [marked(line) for line in sorted({line for _, line in COMMANDS})])
def test_a_command_of_the_pages_parses(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = speechattn_of(command)
    assert arguments is not None
    arguments = ["tests/digits" if word == "MODEL" else word for word in arguments]
    monkeypatch.chdir(ROOT)
    if arguments[0] == "fit" and len(arguments) == 1 + 2 * arguments.count("--config"):
        assert once(configs(arguments)).model
    elif arguments[0] == "fit":
        assert parsed().parser.parse_args(whole(spelled(arguments[1:]))).model
    else:
        assert parser(arguments[0]).parse_args(arguments).command == arguments[0]


def test_a_typo_in_a_recipe_is_found(tmp_path: Path) -> None:
    text = (RECIPES / "librispeech" / "mini.yaml").read_text(encoding="utf-8")
    for right, wrong in (("inner: 576", "iner: 576"), ("weight: 0.3", "wieght: 0.3"), ("max_seconds", "max_second")):
        (tmp_path / "mini.yaml").write_text(text.replace(right, wrong), encoding="utf-8")
        with pytest.raises(Exception, match=wrong.split(":")[0]):
            parsed().parser.parse_args(["--config", str(tmp_path / "mini.yaml")])


def test_dynamic_chunks_reach_the_encoder(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[set[Any]] = []
    hear = Task.hear

    def listening(task: Task, sound: Frames) -> Heard:
        heard.append({module.span for module, _ in task.own_spans})
        return hear(task, sound)

    monkeypatch.setattr(Task, "hear", listening)
    cli = run("librispeech/mini.yaml+librispeech/stream.yaml", place, limit_val_batches=0)
    drawn = cli.model.spans.draw(torch.Generator().manual_seed(seeded(0, 0, 0)))
    assert heard == [{drawn}]
    assert {module.span for module, _ in cli.model.own_spans} == {Span(64, 16)} != {drawn}


def test_an_objective_of_ones_own_works_as_the_page_shows() -> None:
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    for example in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(example, "docs/training.md", "exec"), names)
    model = load_model(ROOT / "tests" / "digits")
    assert isinstance(model, Recognizer)
    sound = torch.from_numpy(murmur(np.random.default_rng(0), "one two"))[None]
    x = Frames(sound, torch.ones_like(sound, dtype=torch.bool))
    heard = Heard(x, model.front_end(x), model.listening(x))
    said = Said(
        torch.tensor([model.tokenizer.encode("one two")]), torch.tensor([len(model.tokenizer.encode("one two"))])
    )
    plain = CTCObjective().losses(model, heard, said)
    assert (names["ConfidentCTC"](price=0.0).losses(model, heard, said) == plain).all()
    assert (names["ConfidentCTC"](price=1.0).losses(model, heard, said) > plain).all()
