"""Window attention: kernels against `naive`, the output and every gradient, in shapes that reach every branch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from speechattn_kernels.window import naive, window
from speechattn_kernels.window.op import backward
from torch import Tensor

from speechattn.attention import Alibi, Bucketed, Relative, Rotary, Span, attend

KINDS = (None, "rows", "table", "both", "turns")


@dataclass(frozen=True)
class Case:
    """One call: sizes, span, and what comes on top."""

    left: int | None = 7
    chunk: int | None = 4
    right: int = 0
    dilation: int = 1
    frames: int = 37
    dim: int = 32
    heads: int = 2
    groups: int = 2
    batch: int = 1
    position: str | None = None
    extra: int = 0
    dropout: float = 0.0
    history: int | None = None
    there: str = "most"
    dtype: torch.dtype = torch.float32

    def tensors(self, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What has a gradient, and what has none; NaN in what is not valid."""
        before = (self.left or 0) if self.history is None else self.history
        keys = before + self.frames + self.right
        options: dict[str, Any] = {
            "left": self.left, "chunk": self.chunk, "right": self.right, "dilation": self.dilation,
            "dropout": self.dropout, "seed": 12345678901,
        }  # fmt: skip

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, device=device).to(self.dtype)

        valid = torch.rand(self.batch, keys, device=device) > 0.2
        if self.there != "most":
            valid[0] = False
        if self.there == "one":
            valid[0, keys // 2] = True
        hidden = ~valid[:, None, :, None]
        found = {
            "q": normal(self.batch, self.heads, self.frames, self.dim),
            "k": normal(self.batch, self.groups, keys, self.dim).masked_fill(hidden, torch.nan),
            "v": normal(self.batch, self.groups, keys, self.dim).masked_fill(hidden, torch.nan),
        }
        distances = keys + self.frames
        if self.position in ("rows", "both"):
            found["rows"] = normal(self.heads, self.dim, distances) * self.dim**-0.5
        if self.position in ("table", "both"):
            found["table"] = normal(self.heads, distances).float()
        if self.position in ("rows", "table", "both"):
            options["origin"] = -self.frames - self.right
        if self.position == "turns":
            angle = torch.rand(keys + 3, self.dim // 2, device=device) * 6
            options["turns"] = torch.stack([angle.cos(), angle.sin()])
        if self.extra:
            scores = normal(self.batch, self.heads, self.frames, self.extra).float()
            found["extra"] = scores.masked_fill(torch.rand_like(scores) < 0.3, -torch.inf)
            found["extra_values"] = normal(self.batch, self.groups, self.extra, self.dim)
        return found, {"valid": valid, **options}

    def compare(self, device: torch.device, tolerance: float) -> None:
        """Both, and every gradient of both, from one random direction; relative to the size of each."""
        tensors, options = self.tensors(device)
        towards, level = None, None
        results = []
        for attention in (window, naive.window):
            wide = torch.float64 if attention is naive.window else None
            inputs = {name: (x.to(wide) if wide else x.clone()).requires_grad_() for name, x in tensors.items()}
            out, lse = attention(**inputs, **options)
            seen = lse > -torch.inf
            if towards is None:
                towards, level = torch.randn_like(out), torch.randn_like(lse)
            ((out * towards.to(out.dtype)).sum() + (lse.where(seen, 0.0) * level.to(lse.dtype)).sum()).backward()
            assert out[~seen].eq(0).all()
            results.append({
                "out": out, "lse": lse.where(seen, 0.0), "seen": seen.float(),
                **{f"d {name}": x.grad for name, x in inputs.items() if x.grad is not None},
            })  # fmt: skip
        mine, wanted = results
        assert mine.keys() == wanted.keys()
        hidden = ~options["valid"][:, None, :, None]
        for name, want in wanted.items():
            got = mine[name]
            assert not got.isnan().any(), name
            if name in ("d k", "d v"):
                assert got.masked_select(hidden).eq(0).all(), name
            error = (got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-6)
            assert error < tolerance, f"{name}: {float(error):.2g}"


CASES = {
    "chunks": Case(),
    "frames alone": Case(left=0, chunk=1),
    "left beyond": Case(left=50, batch=2),
    "ahead": Case(right=5),
    "dilated": Case(chunk=1, dilation=2),
    "causal": Case(left=None, chunk=1, history=5),
    "chunks, all before": Case(left=None, chunk=8, history=3),
    "full": Case(left=None, chunk=None, frames=70, groups=1),
    "one frame": Case(frames=1, chunk=1, left=9),
    "nobody": Case(there="none"),
    "one key": Case(there="one"),
    "sinks": Case(extra=3, batch=2),
    "sinks alone": Case(extra=2, there="none"),
    "dropout": Case(dropout=0.3, batch=2),
    "dropout of sinks": Case(dropout=0.3, extra=2),
    "four share": Case(heads=4, groups=1),
    "two share": Case(heads=4, groups=2),
    "rows": Case(position="rows", dropout=0.2),
    "rows and table": Case(position="both", frames=70, left=70, chunk=16, right=3),
    "rows, full": Case(position="both", left=None, chunk=None, frames=80),
    "table": Case(position="table", heads=4),
    "turns": Case(position="turns"),
    "turns, 40": Case(position="turns", dim=40),
    "one place": Case(position="turns", frames=1, left=0, chunk=1),
    "48 features": Case(dim=48, position="both"),
    "64 features": Case(dim=64, left=64, chunk=16, frames=70),
    "128 features": Case(dim=128),
    "256 features": Case(dim=256, frames=20),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_kernels_are_the_definition(case: Case, device: torch.device) -> None:
    case.compare(device, 3e-6)


@pytest.mark.parametrize("position", KINDS)
@pytest.mark.parametrize("dtype", [pytest.param(torch.bfloat16, marks=pytest.mark.gpu), torch.float16])
def test_short_numbers(dtype: torch.dtype, position: str | None, device: torch.device) -> None:
    Case(dtype=dtype, position=position, extra=2).compare(device, 0.02 if dtype == torch.bfloat16 else 3e-3)


@settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape(data: st.DataObject, device: torch.device) -> None:
    chunk = data.draw(st.sampled_from([None, 1, 3, 8]))
    left = data.draw(st.sampled_from([0, 1, 5, 90])) if chunk and data.draw(st.booleans()) else None
    groups = data.draw(st.sampled_from([1, 2]))
    case = Case(
        left, chunk, data.draw(st.integers(0, 9)) if chunk else 0, data.draw(st.integers(1, 3)),
        frames=data.draw(st.integers(1, 70)), dim=data.draw(st.sampled_from([32, 36])), groups=groups, heads=2,
        position=data.draw(st.sampled_from(KINDS)), extra=data.draw(st.integers(0, 2)),
        history=None if left is not None else data.draw(st.integers(0, 9)),
        there=data.draw(st.sampled_from(["most", "one"])),
    )  # fmt: skip
    case.compare(device, 5e-6)


@pytest.mark.parametrize("case", [Case(frames=5, dim=4, position="both", extra=1), Case(frames=4, dim=4, dropout=0.4)])
def test_the_definition_has_these_gradients(case: Case) -> None:
    tensors, options = case.tensors(torch.device("cpu"))
    hidden = ~options["valid"][:, None, :, None]
    tensors |= {name: tensors[name].masked_fill(hidden, 1.0) for name in ("k", "v")}
    names, seen = list(tensors), options["valid"].any()
    assert seen

    def attended(*values: Tensor) -> Tensor:
        return naive.window(**dict(zip(names, values, strict=True)), **options)[0]

    torch.autograd.gradcheck(
        attended, tuple(x.double().nan_to_num(neginf=-9.0).requires_grad_() for x in tensors.values())
    )


SPANS = (
    Span.sliding(5, 2), Span.chunked(8, 4, right=3), Span.dilated(6, 2), Span.sliding(4, sinks=2),
    Span(6, 4, 2, 1, 3), Span.full(), Span.causal(),
)  # fmt: skip


@pytest.mark.parametrize("kind", [None, Relative, Rotary, Alibi, Bucketed])
@pytest.mark.parametrize("span", SPANS, ids=str)
def test_the_backend_is_the_reference(span: Span, kind: Any, device: torch.device) -> None:
    heads, dim, frames = 2, 16, 27
    position = kind(heads * dim, heads).to(device) if kind else None
    if kind is Relative:
        torch.nn.init.normal_(position.u)
        torch.nn.init.normal_(position.v)
    keys = span.sinks + (span.left or 0) + frames + span.right
    valid = torch.rand(1, keys, device=device) > 0.2
    inputs = [torch.randn(1, h, n, dim, device=device) for h, n in ((heads, frames), (1, keys), (1, keys))]
    towards = torch.randn(1, heads, frames, dim, device=device)
    results = []
    for backend in ("triton", "reference"):
        given = [x.clone().requires_grad_() for x in inputs]
        out = attend(*given, pattern=span, valid=valid, position=position, backend=backend)
        wanted = given + (list(position.parameters()) if position else [])
        results.append([out, *torch.autograd.grad((out * towards).sum(), wanted)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


def test_neighbours_in_memory_do_not_matter(device: torch.device) -> None:
    """Every input as a part of something larger, its features far from each other."""
    for position in ("both", "turns"):
        tensors, options = Case(position=position, extra=2, batch=2).tensors(device)

        def apart(x: Tensor) -> Tensor:
            wide = x.new_ones([2 * n for n in x.shape])
            part = wide[tuple(slice(None, None, 2) for _ in x.shape)]
            return part.copy_(x)

        spread = {name: apart(x) for name, x in tensors.items()}
        loose = {name: apart(x) if isinstance(x, Tensor) else x for name, x in options.items()}
        assert not any(x.is_contiguous() for x in spread.values())
        torch.testing.assert_close(window(**spread, **loose), window(**tensors, **options), equal_nan=True)


def test_a_second_derivative_is_refused(device: torch.device) -> None:
    q, k = (torch.randn(1, 1, 5, 32, device=device, requires_grad=True) for _ in range(2))
    out, _ = window(q, k, k, torch.ones(1, 5, dtype=torch.bool, device=device), left=2)
    (first,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be once more"):
        torch.autograd.grad(first.square().sum() + q.sum(), q)


def test_a_level_that_nobody_uses_has_no_gradient(device: torch.device) -> None:
    """Compilers may give none where eager torch gives zeros."""
    q, k, v = torch.randn(3, 1, 2, 20, 32, device=device)
    valid, towards = torch.ones(1, 20, dtype=torch.bool, device=device), torch.randn(1, 2, 20, 32, device=device)
    out, lse = window(q, k, v, valid, left=4)
    rest = (out, lse, q, k, v, valid, None, None, None, 4, 1, 0, 1, 0, 0.0, 0, False)
    for got, want in zip(backward(towards, None, *rest), backward(towards, torch.zeros_like(lse), *rest), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_autocast_and_a_state_of_other_numbers(device: torch.device) -> None:
    kind = torch.float16
    q, k = torch.randn(1, 2, 8, 16, device=device, dtype=kind), torch.randn(1, 2, 14, 16, device=device)
    valid, span = torch.ones(1, 14, dtype=torch.bool, device=device), Span.sliding(4, sinks=2)
    out = attend(q, k, k, pattern=span, valid=valid, backend="triton")
    wanted = attend(q.float(), k, k, pattern=span, valid=valid, backend="reference")
    assert out.dtype == kind
    torch.testing.assert_close(out.float(), wanted, rtol=5e-3, atol=5e-3)


def test_dropout_drops_its_share_and_the_same_again(device: torch.device) -> None:
    i, j = torch.arange(400, device=device)[:, None], torch.arange(500, device=device)
    kept = naive.kept(i, j, torch.tensor(3, device=device), 7, 0.25)
    assert abs(float(kept.float().mean()) - 0.75) < 0.005
    assert not torch.equal(kept, naive.kept(i, j, torch.tensor(3, device=device), 8, 0.25))
    assert not torch.equal(kept, naive.kept(i, j, torch.tensor(4, device=device), 7, 0.25))


def test_torch_sees_through(device: torch.device) -> None:
    tensors, options = Case(position="both", extra=1).tensors(device)
    tensors = {name: x.nan_to_num(neginf=-5.0).requires_grad_() for name, x in tensors.items()}
    valid = options.pop("valid")

    def whole(inputs: dict[str, Tensor]) -> Tensor:
        out, lse = window(valid=valid, **inputs, **options)
        return (out.square().sum(-1) + lse).sum()

    plain = torch.autograd.grad(whole(tensors), list(tensors.values()))
    compiled = torch.compile(whole, fullgraph=True, backend="aot_eager")
    for got, want in zip(torch.autograd.grad(compiled(tensors), list(tensors.values())), plain, strict=True):
        torch.testing.assert_close(got, want)
    order = ("q", "k", "v", "valid", "extra", "extra_values", "rows", "table", "turns")
    given = {**tensors, "valid": valid}
    torch.library.opcheck(
        torch.ops.speechattn.window.default,
        (*[given.get(name) for name in order], 7, 4, 0, 1, options["origin"], 0.0, 0),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


class Layer(torch.nn.Module):
    """What is exported."""

    def forward(self, q: Tensor, k: Tensor, valid: Tensor) -> Tensor:
        return window(q, k, k, valid, left=7, chunk=4)[0]


def test_it_can_be_exported(device: torch.device) -> None:
    tensors, options = Case().tensors(device)
    given = tensors["q"], tensors["k"], options["valid"]
    program = torch.export.export(Layer(), given)
    assert "speechattn.window" in program.graph_module.code
    torch.testing.assert_close(program.module()(*given), Layer()(*given))


REFUSED = [
    ({"right": 9}, "44 keys for 37 queries, 9 ahead"), ({"dropout": 1.0}, "dropout of 1.0"),
    ({"chunk": None}, "leaves nothing to its left"), ({"chunk": 0}, "chunk is 0"), ({"dilation": 0}, "dilation is 0"),
    ({"left": -1}, "left is -1"), ({"turns": torch.ones(2, 8, 16)}, "44 or more places"),
    ({"turns": torch.ones(2, 44, 16, requires_grad=True)}, "no gradient"), ({"rows": torch.ones(1, 32, 80)}, "rows"),
    ({"table": torch.ones(3, 80)}, "table"), ({"extra": torch.ones(1, 2, 37, 2)}, "come with"),
    ({"extra": torch.ones(1, 2, 34, 2), "extra_values": torch.ones(1, 2, 2, 32)}, "extra"),
    ({"extra": torch.ones(1, 2, 37, 4), "extra_values": torch.ones(1, 2, 1, 32)}, "extra_values"),
    ({"v": torch.ones(1, 1, 44, 32)}, "values"), ({"k": torch.ones(1, 2, 44, 32).half()}, "float16"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=str)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str, device: torch.device) -> None:
    tensors, options = Case().tensors(device)
    change = {name: x.to(device).detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x
              for name, x in change.items()}  # fmt: skip
    with pytest.raises(ValueError, match=message):
        window(**{**tensors, **options, **change})


def test_what_no_kernel_can_read_is_refused(device: torch.device) -> None:
    tensors, options = Case().tensors(device)
    with pytest.raises(ValueError, match="float64"):
        window(**{name: x.double() for name, x in tensors.items()}, **options)
    with pytest.raises(ValueError, match="up to 256 features"):
        window(*(torch.ones(1, 1, 3, 257, device=device) for _ in range(3)), options["valid"][:, :3], left=None)
    with pytest.raises(ValueError, match="share evenly"):
        window(torch.ones(1, 3, 3, 8, device=device), *2 * [torch.ones(1, 2, 3, 8, device=device)],
               options["valid"][:, :3], left=None)  # fmt: skip
