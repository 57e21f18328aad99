"""Training what retrieves terms: the curriculum, the recipe, and the folder that comes out."""

from __future__ import annotations

import random
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from corpora import ENGLISH, murmur
from test_terms import made, sound

from speechattn.data.prepare.manifests import Utterance, write_manifests
from speechattn.errors import ModelError
from speechattn.frames import Frames
from speechattn.model.matcher import load_matcher, save_matcher
from speechattn.terms import Bank, RawRetriever, RestingRetriever, Retriever, Term, VectorIndex, contrastive

pytest.importorskip("lhotse")
pytest.importorskip("jsonargparse")

from speechattn.cli import main
from speechattn.task.kept import named
from speechattn.task.terms import Curriculum, TermRetrieval, said_in, worded

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes" / "terms"
TEXT = "the tactual luxury of stroking silky human hair on a very long winter evening"


def test_a_term_is_said_word_by_word() -> None:
    text = worded("Don't STROKE: the silky, human hair!")
    assert text == "don't stroke the silky human hair"
    assert said_in("silky human", text)
    assert not said_in("silk", text)
    assert not said_in("silky hair", text)


def test_the_curriculum_goes_from_words_to_phrases_to_terms() -> None:
    plan, rare = Curriculum(words=10, phrases=10, each=3), frozenset({"tactual", "silky", "unsaid"})
    seen: dict[int, set[int]] = {0: set(), 10: set(), 20: set()}
    for seed in range(40):
        for step in seen:
            terms = plan.terms(TEXT, step, rare, random.Random(seed))
            assert terms == plan.terms(TEXT, step, rare, random.Random(seed))
            assert len(terms) == len({*terms}) <= 3 + 2 * (step == 20)
            assert all(said_in(term, TEXT) for term in terms)
            assert step != 20 or {"tactual", "silky"} <= {*terms}
            seen[step] |= {len(term.split()) for term in terms}
            assert step == 10 or all(len(term) >= 4 for term in terms)
    assert seen == {0: {1}, 10: {1, 2, 3, 4}, 20: {1}} or seen == {0: {1}, 10: {2, 3, 4}, 20: {1}}
    assert plan.terms("a", 0, rare, random.Random(0)) == ["a"]


def line(name: str, seed: int) -> Utterance:
    """A short utterance."""
    said = " ".join(ENGLISH.split()[seed : seed + 5])
    noise = murmur(np.random.default_rng(seed), said)
    return Utterance(name, lambda: noise, said, "nobody", "en", None, None)


@pytest.mark.parametrize("name", ["terms", "released", "index"])
def test_the_recipe_trains_validates_and_writes_a_matcher(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data" / "terms"
    for corpus, split in (("kept_synthetic", "train"), ("kept_fotaq", "train"), ("held", "dev")):
        write_manifests(data, corpus, split, [line(f"{corpus}-{i}", i) for i in range(2)])
    words = sorted({word for word in worded(ENGLISH).split() if len(word) > 3})
    for file in ("train_terms.txt", "dev_bank.txt"):
        (data / file).write_text("".join(f"{word}\n" for word in words))
    monkeypatch.chdir(tmp_path)
    over = [] if name == "terms" else ["--config", str(RECIPES / f"{name}.yaml")]
    given = ["fit", "--config", str(RECIPES / "terms.yaml"), *over, "--trainer.default_root_dir", "run",
             "--trainer.max_steps", "2", "--trainer.val_check_interval", "1", "--trainer.logger", "false",
             "--trainer.enable_progress_bar", "false", "--model.init_args.scheduler.init_args.total", "2",
             "--model.init_args.scheduler.init_args.warmup", "1"]  # fmt: skip
    given += ["--model.init_args.align", "1"] if name == "released" else []
    assert main(given) == 0
    matcher, encoder = load_matcher(tmp_path / "run" / "model")
    assert encoder == "speechattn/en-tiny-stream"
    assert type(matcher) is {"terms": RawRetriever, "released": RestingRetriever, "index": VectorIndex}[name]
    assert len([*(tmp_path / "runs" / "terms" / "frames").glob("*.npy")]) == 6
    if name != "index":
        check_calibrated(matcher, words, tmp_path / "runs" / "terms" / "frames")
    untrained = yaml.safe_load((tmp_path / "run" / "model" / "config.yaml").read_text())
    assert untrained["matcher"]["init_args"]["dim"] == 128
    assert main([*given, "--resume"]) == 0


def test_what_is_learnt_in_which_step(tmp_path: Path) -> None:
    (tmp_path / "terms.txt").write_text("silky\n")
    file, x, texts = str(tmp_path / "terms.txt"), sound(9, 4), ("silky human hair", "a winter evening")
    model = made(RestingRetriever).float()
    x = Frames(x.values.float(), x.mask)
    before = model.odds(x, model.embed(["ox"]))
    task = TermRetrieval(model, "speechattn/en-tiny-stream", file, file, str(tmp_path), Curriculum(9, 0),
                         align=1, contrast=0.5, smoothing=0.0, prior=-2.0)  # fmt: skip
    torch.testing.assert_close(model.odds(x, model.embed(["ox"])), before - 2)
    task.kept = (lambda batch: SimpleNamespace(frames=x),)
    label = torch.tensor([[True, True, True, False, False], [False, False, False, True, True]])
    bank = model.embed(["silky", "human", "hair", "winter", "evening"])
    for step, say in enumerate((model.alike, model.present)):
        odds = say(model.frames(x), bank)
        fit = torch.nn.functional.binary_cross_entropy_with_logits(odds, label.float())
        wanted = fit + 0.5 * contrastive(odds, label)
        torch.testing.assert_close(task.loss(SimpleNamespace(texts=texts), step), wanted)


@pytest.mark.parametrize("wrong", [{"contrast": 1.0}, {"align": 3}, {"prior": -4.0}])
def test_an_index_learns_by_contrast_alone(wrong: dict[str, float]) -> None:
    model = made()
    index = VectorIndex(model.frames, model.spelling, 8, window=2)
    with pytest.raises(ValueError, match="not with an index"):
        TermRetrieval(index, "encoder", "terms", "bank", "keep", Curriculum(1, 1), **wrong)


def check_calibrated(matcher: Retriever, words: list[str], frames: Path) -> None:
    """The mean probability of the validation set is the mean of Platt's targets."""
    bank, held = Bank(matcher, [Term(word) for word in words]), [line(f"held-{i}", i) for i in range(2)]
    rows = [torch.from_numpy(np.load(frames / named(utterance.id, False))).float()[None] for utterance in held]
    odds = torch.cat([bank.odds(Frames(x, torch.ones(x.shape[:2], dtype=torch.bool))) for x in rows])
    label = torch.tensor([[said_in(word, worded(utterance.text)) for word in words] for utterance in held])
    said, silent = int(label.sum()), int((~label).sum())
    wanted = (said * (said + 1) / (said + 2) + silent / (silent + 2)) / label.numel()
    assert float(odds.sigmoid().mean()) == pytest.approx(wanted, abs=2e-3)


def test_recipes_name_what_their_page_makes() -> None:
    page = (RECIPES / "README.md").read_text(encoding="utf-8")
    config = yaml.safe_load((RECIPES / "terms.yaml").read_text(encoding="utf-8"))
    assert config["model"]["init_args"]["scheduler"]["init_args"]["total"] == config["trainer"]["max_steps"]
    assert {path.name for path in RECIPES.glob("*.yaml")} == {*re.findall(r"--config recipes/terms/(\w+\.yaml)", page)}


CONFIG = {
    "class_path": "speechattn.terms.RawRetriever",
    "init_args": {
        "dim": 8, "heads": 2,
        "frames": {"class_path": "speechattn.terms.Hearing",
                   "init_args": {"features": 6, "dim": 8, "stack": 2, "kernel": 3, "layers": 1}},
        "spelling": {"class_path": "speechattn.terms.Spelling", "init_args": {"dim": 8, "layers": 2, "stride": 2}},
    },
}  # fmt: skip


def test_a_folder_is_read_as_it_was_written(tmp_path: Path) -> None:
    model = made(RawRetriever).float()
    save_matcher(model, CONFIG, "some/encoder", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "model.safetensors"}
    again, encoder = load_matcher(tmp_path)
    assert encoder == "some/encoder"
    assert not again.training
    x, terms = sound(9), [Term("zeppelin"), Term("ox")]
    x = type(x)(x.values.float(), x.mask)
    assert torch.equal(Bank(again, terms).odds(x), Bank(model, terms).odds(x))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 2}, "wanted format 1"), ({"more": 1}, "wanted format 1"),
        ({"matcher": {"class_path": "torch.nn.Identity"}}, "no matcher"),
        ({"matcher": {"class_path": "os.system"}}, "no module"),
        ({"matcher": CONFIG | {"class_path": "speechattn.terms.Retriever"}}, "not the weights"),
    ],
)  # fmt: skip
def test_what_is_no_matcher_is_refused(change: dict[str, object], said: str, tmp_path: Path) -> None:
    save_matcher(made(RawRetriever).float(), CONFIG, "some/encoder", tmp_path)
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config | change))
    with pytest.raises(ModelError, match=said):
        load_matcher(tmp_path)
