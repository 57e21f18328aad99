"""Training of a language model: what it costs, what is logged, and what a search makes of the folder."""

from __future__ import annotations

import warnings
from math import exp
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import AdamW
from torch.utils.data import DataLoader

from speechattn.errors import InputError, ModelError
from speechattn.frames import Frames
from speechattn.model import load_model
from speechattn.model.folder import load_language_model, save_language_model
from speechattn.search.language_model import LanguageModel as Network
from speechattn.search.language_model import LanguageModelScorer
from speechattn.task.language_model import LanguageModel, export_language_model
from speechattn.task.optimizer import MuonAdamW
from speechattn.text.pieces import Pieces

PIECES = Pieces(["<blank>", "▁", *"abcdefgh", "<sos/eos>"])
VOCAB, END = PIECES.size, PIECES.size - 1
TEXTS = ("bad cab", "a bed", "", "fed a gag he had")
CONFIG: dict[str, Any] = {
    "format": 1,
    "network": {
        "class_path": "speechattn.search.language_model.LanguageModel",
        "init_args": {"vocab": VOCAB, "dim": 16, "depth": 1, "heads": 2, "inner": 24, "end": END, "dropout": 0.1},
    },
}


class Lines(LightningDataModule):
    """The same texts in every step."""

    valid_names = ("first", "second")

    def __init__(self, repeat: int = 1, valid: tuple[tuple[str, ...], ...] = (TEXTS, TEXTS[:1])) -> None:
        super().__init__()
        self.repeat, self.valid = repeat, valid

    def train_dataloader(self) -> Any:
        return DataLoader([SimpleNamespace(texts=TEXTS)] * self.repeat, batch_size=None)  # type: ignore[arg-type]

    def val_dataloader(self) -> Any:
        return [DataLoader([SimpleNamespace(texts=(text,)) for text in texts], batch_size=None)  # type: ignore[arg-type]
                for texts in self.valid]  # fmt: skip


@pytest.fixture
def tokens(tmp_path: Path) -> str:
    PIECES.save(tmp_path / "tokens")
    return str(tmp_path / "tokens")


def network(**changes: Any) -> Network:
    return Network(**{**CONFIG["network"]["init_args"], **changes})


def trained(task: LanguageModel, data: Lines, *callbacks: Any, **options: Any) -> Trainer:
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=bool(callbacks), callbacks=[*callbacks],
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Lightning: about workers, and loggers that are not there
        trainer.fit(task, data, **options)
    return trainer


def test_a_step_costs_what_the_network_says_and_reaches_all_of_it(tokens: str) -> None:
    task = LanguageModel(network(dropout=0.0), tokens)
    cost, count = task.surprise(TEXTS)
    for text, one, n in zip(TEXTS, cost.tolist(), count.tolist(), strict=True):
        ids = PIECES.encode(text)
        log_probs = task.model.log_probs(torch.tensor([ids], dtype=torch.long))[0]
        said = -sum(float(row[i]) for row, i in zip(log_probs.detach(), [*ids, END], strict=True))
        assert one == pytest.approx(said, abs=1e-4)
        assert n == len(ids) + 1
    cost.sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for n, p in task.named_parameters())
    assert [tuple(x.shape) for x in task.surprise(())] == [(0,), (0,)]


def test_perplexities_are_those_of_the_whole_set(tokens: str) -> None:
    task = LanguageModel(network(), tokens, optimizer=lambda p: AdamW(p, lr=1e-9))
    found = trained(task, Lines()).callback_metrics
    task.eval()
    for place, texts in (("valid/", TEXTS), ("valid/second/", TEXTS[:1])):
        cost = sum(float(task.surprise([text])[0].detach()) for text in texts)
        count = sum(len(PIECES.encode(text)) + 1 for text in texts)
        words = sum(len(text.split()) + 1 for text in texts)
        assert float(found[f"{place}perplexity"]) == pytest.approx(exp(cost / count), rel=1e-4)
        assert float(found[f"{place}perplexity_word"]) == pytest.approx(exp(cost / words), rel=1e-4)


def test_it_learns_and_a_search_reads_what_is_exported(tokens: str, tmp_path: Path) -> None:
    made = LanguageModel(network(dropout=0.0), tokens, optimizer=lambda p: MuonAdamW(p, lr=2e-2))
    made.config = CONFIG
    keep = ModelCheckpoint(tmp_path / "kept", filename="one")
    found = trained(made, Lines(100), keep).callback_metrics
    assert float(found["valid/perplexity"]) < 1.6
    network_there = export_language_model([tmp_path / "kept" / "one.ckpt"], tmp_path / "lm")
    loaded, pieces = load_language_model(tmp_path / "lm")
    assert pieces.pieces == PIECES.pieces
    assert not loaded.training
    assert loaded.output.weight is loaded.encoder.subsample.f.weight  # type: ignore[union-attr]
    sizes = (tmp_path / "lm" / "model.safetensors").stat().st_size / 4
    assert sizes < sum(p.numel() for p in loaded.parameters()) + 1000  # tied weights are there once
    scorer = LanguageModelScorer(loaded)
    state, total = scorer.start(Frames(torch.zeros(1, 1, 1), torch.ones(1, 1, dtype=torch.bool))), 0.0
    ids = [*PIECES.encode(TEXTS[0]), END]
    for token in ids:
        scores, state = scorer.score(state)
        total += float(scores[0, 0, token])
        state = scorer.extend(state, torch.zeros(1, 1, dtype=torch.long), torch.tensor([[token]]))
    made.eval()
    assert -total == pytest.approx(float(made.surprise(TEXTS[:1])[0].detach()), abs=1e-4)
    assert -total / len(ids) < 0.7
    torch.testing.assert_close(network_there.state_dict(), made.model.state_dict())
    again = LanguageModel(network(), tokens)
    for place in (tmp_path / "lm", tmp_path / "kept" / "one.ckpt"):
        again.model.load_state_dict(network().state_dict())
        again.init_from(place)
        torch.testing.assert_close(again.model.state_dict(), made.model.state_dict())


def test_a_run_that_was_stopped_goes_on_as_if_not(tokens: str, tmp_path: Path) -> None:
    def made() -> LanguageModel:
        torch.manual_seed(2)
        return LanguageModel(network(), tokens, optimizer=lambda p: AdamW(p, lr=1e-2), seed=4)

    def fit(task: LanguageModel, epochs: int, **options: Any) -> None:
        keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        trainer = Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, callbacks=[keep], enable_progress_bar=False,
            enable_model_summary=False, num_sanity_val_steps=0,
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(task, Lines(3), **options)

    whole, resumed = made(), made()
    fit(whole, 2)
    torch.manual_seed(99)
    fit(resumed, 2, ckpt_path=tmp_path / "epoch=0.ckpt", weights_only=True)
    torch.testing.assert_close(resumed.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)


def test_what_does_not_fit_is_refused(tokens: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="11 tokens, of which 10 is the end; the language model has 12, of which 10"):
        LanguageModel(network(vocab=12), tokens)
    folder = tmp_path / "lm"
    save_language_model(network(), CONFIG, PIECES, folder)
    with pytest.raises(InputError, match="another language model"):
        LanguageModel(network(dim=8), tokens).init_from(folder)
    with pytest.raises(ModelError, match="unknown: network"):
        load_model(folder)
    (folder / "config.yaml").write_text("format: 1\nnetwork: {class_path: torch.nn.Identity}\n", encoding="utf-8")
    with pytest.raises(ModelError, match="network: Identity is not a language model"):
        load_language_model(folder)
    (folder / "config.yaml").write_text("format: 1\nencoder: {}\n", encoding="utf-8")
    with pytest.raises(ModelError, match="not a language model: wanted format 1 and a network"):
        load_language_model(folder)
    save_language_model(network(), CONFIG, PIECES, folder)
    other = {**CONFIG, "network": {**CONFIG["network"], "init_args": {**CONFIG["network"]["init_args"], "dim": 8}}}
    (folder / "config.yaml").write_text(yaml.safe_dump(other), encoding="utf-8")
    with pytest.raises(ModelError, match=r"not the weights of this config\.yaml"):
        load_language_model(folder)
    with pytest.raises(InputError, match="no checkpoint was given"):
        export_language_model([], folder)
