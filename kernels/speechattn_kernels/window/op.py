"""The op: checks, tiles, launches, gradients."""

from __future__ import annotations

from math import sqrt
from typing import Any

import torch
from torch import Tensor

from speechattn_kernels.common import Op, divided, generation, launch, power, precision, unable
from speechattn_kernels.window.backward import window_distance_kernel, window_keys_kernel, window_queries_kernel
from speechattn_kernels.window.forward import window_forward_kernel
from speechattn_kernels.window.naive import kept

__all__ = ["WIDEST", "window"]

WIDEST = 256  # features of a head
SHARES = 256  # programs that share the distances of a head are about as many as a GPU can run


def window(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor, *, left: int | None, chunk: int | None = 1, right: int = 0,
    dilation: int = 1, extra: Tensor | None = None, extra_values: Tensor | None = None, rows: Tensor | None = None,
    table: Tensor | None = None, turns: Tensor | None = None, origin: int = 0, dropout: float = 0.0, seed: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of q [B, H, T, D] to k, v [B, G, N, D] where `valid` [B, N] -> [B, H, T, D], and lse [B, H, T].

    The keys are [history | T | right], so query i stands at key F + i, with F = N - right - T, and sees key j if

        F + floor(i / chunk) chunk - left  <=  j  <  F + (floor(i / chunk) + 1) chunk + right

    and F + i - j is a multiple of `dilation`; `left = None` is all before, `chunk = None` everything. What is not
    valid may be anything. G divides H. A query that sees nothing gets zeros, and minus infinity.

    Positions by the distance F + i - j, which begin at `origin` in tables of R: q . `rows` [H, D, R] and `table`
    [H, R] are added to the scores, which are scaled by 1 / sqrt(D). `turns` [2, P, D / 2] (cosines, sines) turns
    queries and keys by their place among the keys, halves against each other; P is at least N.

    `extra` [B, H, T, S] are scores of more keys, whose values are `extra_values` [B, G, S, D]: attention sinks.
    `dropout` drops weights by a generator (Philox) that counts queries and keys; the same `seed` drops the same.

    ValueError for what does not fit together, or cannot run here.
    """
    check(q, k, v, valid, extra, extra_values, rows, table, turns)
    for name, value, least in (("chunk", chunk, 1), ("left", left, 0), ("right", right, 0), ("dilation", dilation, 1)):
        if value is not None and value < least:
            raise ValueError(f"window attention: {name} is {value}, at least {least} is needed")
    if k.shape[2] < q.shape[2] + right or (chunk is None and (left is not None or right)):
        raise ValueError(f"window attention: {k.shape[2]} keys for {q.shape[2]} queries, {right} ahead; a chunk that "
                         "is everything leaves nothing to its left or right")  # fmt: skip
    if not 0 <= dropout < 1:
        raise ValueError(f"window attention: a dropout of {dropout}, wanted one in [0, 1)")
    found: tuple[Tensor, Tensor] = forward(
        q, k, v, valid, extra, extra_values, rows, table, turns, left, chunk, right, dilation, origin, dropout, seed
    )
    return found


def check(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor, extra: Tensor | None, extra_values: Tensor | None,
    rows: Tensor | None, table: Tensor | None, turns: Tensor | None,
) -> None:  # fmt: skip
    """ValueError for tensors that do not fit together, or that no kernel can read."""
    (batch, heads, frames, dim), groups, keys = q.shape, k.shape[1], k.shape[2]
    if q.device.type != "meta" and not torch.compiler.is_compiling() and (reason := unable(q)):
        raise ValueError(f"window attention: {reason}")
    size = 0 if extra is None else extra.shape[-1]
    known = next((x.shape[-1] for x in (rows, table) if x is not None), 0)
    wanted: list[tuple[str, Tensor | None, list[int]]] = [
        ("keys", k, [batch, groups, keys, dim]), ("values", v, [batch, groups, keys, dim]),
        ("valid", valid, [batch, keys]), ("extra", extra, [batch, heads, frames, size]),
        ("extra_values", extra_values, [batch, groups, size, dim]), ("rows", rows, [heads, dim, known]),
        ("table", table, [heads, known]),
    ]  # fmt: skip
    for name, x, shape in wanted:
        if x is not None and list(x.shape) != shape:
            raise ValueError(f"window attention: {name} {list(x.shape)}, wanted {shape} for queries {list(q.shape)}")
    if groups == 0 or heads % groups or dim > WIDEST or max(batch, heads) > 65535:
        raise ValueError(f"window attention: {batch} rows, {heads} heads over {groups}, {dim} features: wanted heads "
                         f"that share evenly, at most 65535 of both, and up to {WIDEST} features")  # fmt: skip
    if any(x.dtype != q.dtype for x in (k, v, extra_values) if x is not None):
        raise ValueError(f"window attention: queries of {q.dtype}, keys of {k.dtype}, values of {v.dtype}")
    if (extra is None) != (extra_values is None) or (rows is not None and turns is not None):
        raise ValueError("window attention: extra scores come with extra_values, and rows without turns")
    if turns is not None and (dim % 2 or turns.shape[1] < keys or list(turns.shape[::2]) != [2, dim // 2]):
        raise ValueError(f"window attention: turns {list(turns.shape)}, wanted 2, {keys} or more places, {dim // 2}")
    if turns is not None and turns.requires_grad:
        raise ValueError("window attention: turns have no gradient")


# Queries and keys of a tile, warps and stages: the fastest on an H100 for heads of 64 features in bfloat16, of those
# that spill no registers.
HOPPER = {
    "forward": {None: (64, 32, 4, 2), "rows": (32, 32, 4, 2), "table": (64, 32, 4, 2), "turns": (64, 32, 4, 2)},
    "queries": {None: (64, 32, 4, 2), "rows": (32, 32, 4, 2), "table": (64, 32, 4, 2), "turns": (64, 32, 4, 2)},
    "keys": {None: (64, 64, 4, 1), "rows": (16, 64, 4, 2), "table": (32, 64, 4, 1), "turns": (16, 64, 4, 2)},
    "distance": {"rows": (32, 32, 4, 2), "table": (64, 64, 4, 2)},
}  # fmt: skip
# The same where a query sees everything, or everything before it: there are many keys, and no window to fit.
UNBOUNDED = {"forward": (64, 64, 4, 3), "queries": (64, 64, 4, 2), "keys": (64, 64, 4, 2)}
# For Ampere, whose products need more registers: what does not spill.
AMPERE = {
    "forward": {None: (64, 64, 4, 2), "rows": (32, 64, 4, 2), "table": (64, 32, 4, 2), "turns": (64, 32, 4, 2)},
    "queries": {None: (64, 64, 4, 2), "rows": (32, 32, 4, 2), "table": (64, 32, 4, 2), "turns": (32, 32, 4, 2)},
    "keys": {None: (64, 32, 4, 2), "rows": (16, 32, 4, 2), "table": (32, 32, 4, 2), "turns": (16, 32, 4, 2)},
    "distance": {"rows": (32, 32, 4, 2), "table": (64, 64, 4, 2)},
}  # fmt: skip


def tiles(kernel: str, args: dict[str, Any]) -> tuple[dict[str, int], dict[str, int]]:
    """Sizes of the tiles of a kernel with such arguments, then warps and stages."""
    position = next((name for name in ("rows", "table", "turns") if args[name] is not None), None)
    bytes_of_row = args["D"] * args["q"].element_size()
    hopper = generation(args["q"]) in (9, 10)
    queries, keys, warps, stages = (HOPPER if hopper else AMPERE)[kernel][position]
    if hopper and position is None and not args["BOUNDED"]:
        queries, keys, warps, stages = UNBOUNDED[kernel]
    if bytes_of_row > 512:
        queries, keys, stages = 16, 16, 1
    elif bytes_of_row > 128:
        queries, keys, stages = min(queries, 32), 32, 2 if bytes_of_row <= 256 and kernel != "keys" else 1
    return {"BLOCK_M": queries, "BLOCK_N": keys}, {"warps": warps, "stages": stages}


def strides(**tensors: Tensor) -> dict[str, int]:
    """Of batch, head and frame of each."""
    return {
        f"{name}_{part}": x.stride(n)
        for name, x in tensors.items()
        for n, part in enumerate(("batch", "head", "frame"))
    }


def rowwise(x: Tensor) -> Tensor:
    """With features side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def shared(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor, rows: Tensor | None, table: Tensor | None, turns: Tensor | None,
    left: int | None, chunk: int | None, right: int, dilation: int, origin: int, dropout: float, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """The arguments that all kernels have."""
    (_, heads, frames, dim), groups, keys = q.shape, k.shape[1], k.shape[2]
    rows = None if rows is None else rowwise(rows)
    known = rows if rows is not None else table
    return {
        "q": q, "k": k, "v": v, "valid": valid, "rows": rows,
        "table": None if table is None else table.float().contiguous(),
        "turns": None if turns is None else turns.contiguous(),
        **strides(q=q, k=k, v=v),
        "rows_head": 0 if rows is None else rows.stride(0), "rows_feature": 0 if rows is None else rows.stride(1),
        "H": heads, "G": groups, "T": frames, "N": keys, "R": 0 if known is None else known.shape[-1],
        "P": 0 if turns is None else turns.shape[1], "first": keys - right - frames, "origin": origin,
        "left": left or 0, "chunk": chunk or 1, "right": right, "dilation": dilation,
        "scale": 1 / sqrt(dim), "dropout": dropout, "seed": seed,
        "D": dim, "BLOCK_D": power(dim if turns is None else dim // 2), "BLOCK_V": power(dim),
        "BOUNDED": left is not None, "CHUNKED": chunk is not None, "DILATED": dilation > 1, "DROPPED": dropout > 0,
        "PRECISION": precision(q.dtype),
    }  # fmt: skip


def attended(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor, extra: Tensor | None, extra_values: Tensor | None,
    rows: Tensor | None, table: Tensor | None, turns: Tensor | None, left: int | None, chunk: int | None, right: int,
    dilation: int, origin: int, dropout: float, seed: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The kernel of `window`."""
    out, lse = empty(q, k, v, valid, extra, extra_values, rows, table, turns, left, chunk, right, dilation, origin,
                     dropout, seed)  # fmt: skip
    q, k, v = rowwise(q), rowwise(k), rowwise(v)
    args = {
        **shared(q, k, v, valid.contiguous(), rows, table, turns, left, chunk, right, dilation, origin, dropout, seed),
        "extra": None if extra is None else extra.contiguous(),
        "extra_values": None if extra_values is None else extra_values.contiguous(),
        "S": 0 if extra is None else extra.shape[3], "BLOCK_S": 16 if extra is None else power(extra.shape[3]),
        "out": out, "lse": lse,
    }  # fmt: skip
    sizes, how = tiles("forward", args)
    grid = divided(q.shape[2], sizes["BLOCK_M"]), q.shape[1], q.shape[0]
    launch(window_forward_kernel, grid, {**args, **sizes}, **how)
    return out, lse


def empty(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor, extra: Tensor | None, extra_values: Tensor | None,
    rows: Tensor | None, table: Tensor | None, turns: Tensor | None, left: int | None, chunk: int | None, right: int,
    dilation: int, origin: int, dropout: float, seed: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Room for the results; heads lie side by side, as the next layer wants them."""
    batch, heads, frames, dim = q.shape
    return q.new_empty(batch, frames, heads, dim).transpose(1, 2), q.new_empty(
        batch, heads, frames, dtype=torch.float32
    )


def differentiated(
    d_out: Tensor, d_lse: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, valid: Tensor,
    rows: Tensor | None, table: Tensor | None, turns: Tensor | None, left: int | None, chunk: int | None, right: int,
    dilation: int, origin: int, dropout: float, seed: int, learned: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, and of rows and table if they are `learned` (else, of nothing); and delta [B, H, T]."""
    d_q, d_k, d_v, d_rows, d_table, delta = room(
        d_out, d_lse, out, lse, q, k, v, valid, rows, table, turns, left, chunk, right, dilation, origin, dropout, seed,
        learned,
    )  # fmt: skip
    d_out, q, k, v = rowwise(d_out), rowwise(q), rowwise(k), rowwise(v)
    (batch, heads, frames, dim), (groups, keys) = q.shape, k.shape[1:3]
    args = {
        **shared(q, k, v, valid.contiguous(), rows, table, turns, left, chunk, right, dilation, origin, dropout, seed),
        **strides(o=d_out), "d_out": d_out, "delta": delta, "lse": lse,
    }  # fmt: skip
    sizes, how = tiles("queries", args)
    grid = divided(frames, sizes["BLOCK_M"]), heads, batch
    first = {"out": out, "d_lse": None if d_lse is None else d_lse.contiguous(), "d_q": d_q}
    launch(window_queries_kernel, grid, {**args, **sizes, **first}, **how)
    sizes, how = tiles("keys", args)
    grid = divided(keys, sizes["BLOCK_N"]), groups, batch
    launch(window_keys_kernel, grid, {**args, **sizes, "d_k": d_k, "d_v": d_v}, **how)
    if learned and args["R"]:
        sizes, how = tiles("distance", args)
        blocks = divided(args["R"], sizes["BLOCK_N"])
        shares = max(1, min(divided(SHARES, heads * blocks), batch * divided(frames, sizes["BLOCK_M"])))
        size, whole = (shares, heads, args["R"]), {"dtype": torch.float32}
        by_row = None if rows is None else q.new_empty(*size, dim, **whole)
        by_head = None if table is None else q.new_empty(*size, **whole)
        args = {**args, **sizes, "B": batch, "d_rows": by_row, "d_table": by_head}
        launch(window_distance_kernel, (blocks, heads, shares), args, **how)
        if by_row is not None:
            d_rows = by_row.sum(0).mT.to(d_rows.dtype).contiguous()
        if by_head is not None:
            d_table = by_head.sum(0).to(d_table.dtype)
    return d_q, d_k, d_v, d_rows, d_table, delta


def room(
    d_out: Tensor, d_lse: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, valid: Tensor,
    rows: Tensor | None, table: Tensor | None, turns: Tensor | None, left: int | None, chunk: int | None, right: int,
    dilation: int, origin: int, dropout: float, seed: int, learned: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Room for the gradients."""
    (batch, heads, frames, dim), (groups, keys) = q.shape, k.shape[1:3]
    d_k, d_v = (x.new_empty(batch, keys, groups, dim).transpose(1, 2) for x in (k, v))
    known = [x if learned else None for x in (rows, table)]
    d_rows, d_table = (q.new_empty(0) if x is None else x.new_empty(x.shape) for x in known)
    d_q = q.new_empty(batch, frames, heads, dim).transpose(1, 2)
    return d_q, d_k, d_v, d_rows, d_table, torch.empty_like(lse)


def saved(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """What the backward pass needs: no scores, and no weights."""
    ctx.save_for_backward(*inputs[:9], *output)
    ctx.options = inputs[9:]


def gradients(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
    """Of all inputs of the op."""
    q, k, v, valid, extra, extra_values, rows, table, turns, out, lse = ctx.saved_tensors
    dropout, seed = ctx.options[-2:]
    learned = ctx.needs_input_grad[6] or ctx.needs_input_grad[7]
    d_q, d_k, d_v, d_rows, d_table, delta = backward(
        d_out, d_lse, out, lse, q, k, v, valid, rows, table, turns, *ctx.options, learned
    )
    d_extra = d_values = None
    if extra is not None:
        d_extra, d_values = aside(d_out, delta, lse, extra, extra_values, k.shape[2], dropout, seed)
    d_rows, d_table = (d if x is not None and learned else None for x, d in ((rows, d_rows), (table, d_table)))
    return d_q, d_k, d_v, None, d_extra, d_values, d_rows, d_table, None, *[None] * 7


def aside(
    d_out: Tensor, delta: Tensor, lse: Tensor, extra: Tensor, values: Tensor, keys: int, dropout: float, seed: int
) -> tuple[Tensor, Tensor]:
    """Gradients of the extra scores [B, H, T, S] and values [B, G, S, D], which are few."""
    (batch, heads, frames, size), groups = extra.shape, values.shape[1]
    p = (extra.float() - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()
    split = d_out.float().reshape(batch, groups, heads // groups, frames, values.shape[3])
    grads = (split @ values.float().mT[:, :, None]).view(p.shape)
    used = p
    if dropout:
        number = keys + torch.arange(size, device=p.device)
        at, row = torch.arange(frames, device=p.device)[:, None], torch.arange(batch * heads, device=p.device)
        factor = kept(at, number, row.view(batch, heads, 1, 1), seed, dropout).to(p.dtype) / (1 - dropout)
        used, grads = p * factor, grads * factor
    d_values = (used.view(batch, groups, heads // groups, frames, size).mT @ split).sum(2)
    return (p * (grads - delta[..., None])).to(extra.dtype), d_values.to(values.dtype)


forward, backward = Op("window", attended, empty), Op("window_backward", differentiated, room)
forward.register_autograd(gradients, setup_context=saved)
