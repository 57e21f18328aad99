"""Optimizers and schedules: who is moved by what, by how much, and that a resumed run goes on exactly."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from math import cos, pi
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from speechattn.attention import Span
from speechattn.attention.position import Bucketed
from speechattn.decoder.attention import AttentionDecoder
from speechattn.decoder.ctc import CTC
from speechattn.decoder.predictor import StatelessPredictor
from speechattn.decoder.transducer import Joint, Transducer
from speechattn.encoder import Conformer
from speechattn.search.language_model import LanguageModel
from speechattn.task.optimizer import MuonAdamW
from speechattn.task.schedule import InverseRoot, WarmupCosine


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 6)
        self.layers = nn.ModuleList([nn.Linear(6, 12), nn.Linear(12, 6)])
        self.out = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.layers[1](self.layers[0](self.embed(x)).relu()))
        return y


def named(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters()]


def steps(model: nn.Module, optimizer: Optimizer, n: int, schedule: LRScheduler | None = None, first: int = 0) -> None:
    for i in range(first, first + n):
        x = torch.randint(0, 5, (7,), generator=torch.Generator().manual_seed(i))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), (x + 1) % 5).backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()


def twins() -> tuple[Net, Net]:
    one, other = Net(), Net()
    other.load_state_dict(one.state_dict())
    return one, other


def test_matrices_of_layers_are_muons_and_all_else_is_adamws() -> None:
    mine, theirs = twins()
    optimizer = MuonAdamW(named(mine), 3e-3, weight_decay=0.1, momentum=0.9, betas=(0.8, 0.9), eps=1e-7)
    matrices = [layer.weight for layer in theirs.layers]  # type: ignore[union-attr]
    wide = [theirs.embed.weight, theirs.out.weight]
    vectors = [p for p in theirs.parameters() if p.ndim == 1]
    apart: list[Optimizer] = [
        Muon(matrices, 3e-3, 0.1, 0.9, adjust_lr_fn="match_rms_adamw"),  # type: ignore[arg-type]
        AdamW(wide, 3e-3, (0.8, 0.9), 1e-7, 0.1), AdamW(vectors, 3e-3, (0.8, 0.9), 1e-7, 0.0),
    ]  # fmt: skip
    for i in range(4):
        steps(mine, optimizer, 1, first=i)
        x = torch.randint(0, 5, (7,), generator=torch.Generator().manual_seed(i))
        theirs.zero_grad()
        nn.functional.cross_entropy(theirs(x), (x + 1) % 5).backward()
        for one in apart:
            one.step()
    for (name, p), q in zip(named(mine), theirs.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_the_parts_of_real_models_are_told_apart() -> None:
    vocab, dim = 11, 16
    model = nn.ModuleDict(
        {
            "encoder": Conformer(8, dim, 2, 2, 24, span=Span(16, 4), kernel=5),
            "biased": Conformer(8, dim, 1, 2, 24, span=Span(16, 4), kernel=5, position=Bucketed),
            "ctc": CTC(dim, vocab),
            "attention": AttentionDecoder.soft(vocab, 20, dim, 2, 1),
            "transducer": Transducer(StatelessPredictor(vocab, dim), Joint(dim, dim, dim, vocab)),
            "language": LanguageModel(vocab, dim, 1, 2, 24, end=10),
        }
    )
    optimizer = MuonAdamW(named(model))
    muon = set(optimizer.param_groups[0]["param_names"])
    of = dict(model.named_parameters())
    assert all(of[name].ndim == 2 and of[name].shape[0] != vocab for name in muon)
    kinds = {name.rsplit(".", 2)[-2] for name in muon}
    assert kinds == {"widen", "narrow", "linear", "qkv", "out", "1", "2", "0", "query", "key", "value"}
    linear = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layers" in n.split(".")}
    assert muon == linear
    everything = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert sorted(everything) == sorted(of)
    assert {name for name, p in of.items() if p.ndim < 2} == set(optimizer.param_groups[2]["param_names"])
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.01, 0.0]


def test_an_update_of_muon_is_as_large_as_one_of_adamw() -> None:
    net = Net()
    net.layers = nn.ModuleList([nn.Linear(6, 300), nn.Linear(300, 6)])
    before = {name: p.detach().clone() for name, p in named(net)}
    steps(net, MuonAdamW(named(net), 1e-2, weight_decay=0.0), 1)
    moved = (net.layers[0].weight - before["layers.0.weight"]).square().mean().sqrt()  # type: ignore[union-attr, operator]
    assert 0.1e-2 < float(moved.detach()) < 0.4e-2  # 0.2 is what AdamW's updates usually have


def test_the_state_comes_back_exactly() -> None:
    whole, parts = twins()
    optimizer = MuonAdamW(named(whole), 1e-2)
    schedule = InverseRoot(optimizer, 3)
    steps(whole, optimizer, 8, schedule)
    first = MuonAdamW(named(parts), 1e-2)
    before = InverseRoot(first, 3)
    steps(parts, first, 4, before)
    file = io.BytesIO()
    torch.save([parts.state_dict(), first.state_dict(), before.state_dict()], file)
    file.seek(0)
    weights, state, rate = torch.load(file, weights_only=True)
    resumed = Net()
    resumed.load_state_dict(weights)
    second = MuonAdamW(named(resumed), 5e-2)  # the checkpoint knows better
    after = InverseRoot(second, 3)
    second.load_state_dict(state)
    after.load_state_dict(rate)
    steps(resumed, second, 4, after, first=4)
    for (name, p), q in zip(named(whole), resumed.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert second.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] == schedule.get_last_lr()[0]


def test_a_closure_is_called_once_with_gradients() -> None:
    net, calls = Net(), []
    optimizer = MuonAdamW(named(net), 1e-2)
    before = [p.detach().clone() for p in net.parameters()]

    def closure() -> float:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = net(torch.arange(5)).square().sum()
        loss.backward()
        return float(loss.detach())

    assert optimizer.step(closure) > 0
    assert calls == [True]
    assert all(not torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


def test_parameters_without_names_are_refused() -> None:
    with pytest.raises(ValueError, match="by their names"):
        MuonAdamW(Net().parameters())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="0 matrices inside blocks, 7 others"):
        MuonAdamW(named(Net()), inside=["blocks"])


@pytest.mark.parametrize("kind", [AdamW, SGD, MuonAdamW])
def test_every_optimizer_takes_names(kind: Any) -> None:
    net = Net()
    optimizer = kind(named(net), lr=1e-2)
    steps(net, optimizer, 2)
    assert optimizer.param_groups[0]["param_names"]


def rates(schedule: LRScheduler, optimizer: Optimizer, n: int) -> list[float]:
    found = []
    for _ in range(n):
        found.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        schedule.step()
    return found


def one(lr: float = 1.0) -> SGD:
    return SGD([nn.Parameter(torch.zeros(()))], lr)


def test_inverse_root_is_that_of_the_transformer() -> None:
    dim, warmup = 512, 40
    optimizer = one((dim * warmup) ** -0.5)
    found = rates(InverseRoot(optimizer, warmup), optimizer, 200)
    assert found == pytest.approx([dim**-0.5 * min(n**-0.5, n * warmup**-1.5) for n in range(1, 201)])


def test_warmup_and_cosine() -> None:
    optimizer = one(2.0)
    found = rates(WarmupCosine(optimizer, 4, 12, floor=0.1), optimizer, 14)
    assert found[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert found[4:12] == pytest.approx([2 * (0.1 + 0.9 * (1 + cos(pi * n / 8)) / 2) for n in range(1, 9)])
    assert found[11:] == pytest.approx([0.2, 0.2, 0.2])
    optimizer = one()
    assert rates(WarmupCosine(optimizer, 0, 4), optimizer, 2) == pytest.approx([(1 + cos(pi / 4)) / 2, 0.5])
    with pytest.raises(ValueError, match="warmup 5, total 5"):
        WarmupCosine(one(), 5, 5)
    with pytest.raises(ValueError, match="warmup 0"):
        InverseRoot(one(), 0)


MAKERS: dict[str, Callable[[Optimizer], LRScheduler]] = {
    "root": lambda o: InverseRoot(o, 7), "cosine": lambda o: WarmupCosine(o, 5, 30, 0.05),
    "one cycle": lambda o: OneCycleLR(o, max_lr=0.7, total_steps=41),
}  # fmt: skip


@given(kind=st.sampled_from(sorted(MAKERS)), done=st.integers(0, 20), more=st.integers(1, 20))
@settings(deadline=None, max_examples=40)
def test_a_schedule_goes_on_where_it_was(kind: str, done: int, more: int) -> None:
    optimizer = one()
    schedule = MAKERS[kind](optimizer)
    expected = rates(schedule, optimizer, done + more)
    first = one()
    before = MAKERS[kind](first)
    found = rates(before, first, done)
    second = one()
    after = MAKERS[kind](second)
    second.load_state_dict(first.state_dict())
    after.load_state_dict(before.state_dict())
    assert [*found, *rates(after, second, more)] == expected


def test_a_recipe_names_them() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--optimizer", type=Callable[[Iterable], Optimizer])  # type: ignore[arg-type]
    parser.add_argument("--scheduler", type=Callable[[Optimizer], LRScheduler])
    muon = {"class_path": "speechattn.task.optimizer.MuonAdamW", "init_args": {"lr": 0.02, "betas": [0.9, 0.95]}}
    cosine = {"class_path": "speechattn.task.schedule.WarmupCosine", "init_args": {"warmup": 2, "total": 9}}
    config = parser.parse_object({"optimizer": muon, "scheduler": cosine})
    made = parser.instantiate(config)
    optimizer = made.optimizer(named(Net()))
    assert isinstance(optimizer, MuonAdamW)
    assert optimizer.param_groups[1]["betas"] == (0.9, 0.95)
    schedule = made.scheduler(optimizer)
    assert isinstance(schedule, WarmupCosine)
    assert [group["lr"] for group in optimizer.param_groups] == [0.01] * 3
