"""Kernels run on a GPU, or in Triton's interpreter: then in a process of their own, TRITON_INTERPRET=1 before all."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from typing import Any

import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (INTERPRETED or torch.cuda.is_available()):
    raise pytest.UsageError("no GPU here: set TRITON_INTERPRET=1 to run these tests in Triton's interpreter")

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run."""
    return torch.device("cpu" if INTERPRETED else "cuda")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if INTERPRETED and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def spoilt(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`make`, with NaN or a large number wherever nothing is promised."""

    @wraps(make)
    def made(*args: Any, **options: Any) -> Tensor:
        found = make(*args, **options)
        if found.device.type == "meta" or found.dtype == torch.bool:
            return found
        return found.fill_(torch.nan if found.is_floating_point() else torch.iinfo(found.dtype).max // 2)

    return made


@pytest.fixture(autouse=True)
def _seeded_and_spoilt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a kernel should have written and has not is NaN."""
    torch.manual_seed(0)
    monkeypatch.setattr(torch, "empty", spoilt(torch.empty))
    monkeypatch.setattr(torch, "empty_like", spoilt(torch.empty_like))
    monkeypatch.setattr(Tensor, "new_empty", spoilt(Tensor.new_empty))
