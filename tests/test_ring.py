"""Self-attention over rings: what the kernel of steps is given, with plain torch in its place, in float64."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from spelling import Speller
from torch import Tensor, nn

from speechattn import tree
from speechattn.analysis.weights import self_weights
from speechattn.attention import Alibi, Bucketed, Relative, Rotary, SelfAttention, Span
from speechattn.attention.attend import BACKENDS
from speechattn.attention.ring import Ring
from speechattn.attention.self_attention import AttentionState, set_backend, set_span, unable
from speechattn.attention.sparse import SparseSelfAttention
from speechattn.attention.triton import Triton
from speechattn.encoder import Conformer
from speechattn.errors import InputError
from speechattn.frames import Frames
from speechattn.live import Session
from speechattn.stream import Buffer, packed
from speechattn.testing import check_export, check_stream, random_frames, stepped

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("precise", "calls")

D = 8
LAYERS: dict[str, Callable[[], SelfAttention]] = {
    "sliding": lambda: SelfAttention(D, 2, Span.sliding(5), position=Relative(D, 2)),
    "chunked": lambda: SelfAttention(D, 4, Span.chunked(5, 2), position=Rotary(D, 4), key_heads=2),
    "ahead": lambda: SelfAttention(D, 2, Span.chunked(3, 2, right=3), position=Relative(D, 2)),
    "lookahead": lambda: SelfAttention(D, 2, Span.sliding(2, 2), position=Rotary(D, 2)),
    "dilated": lambda: SelfAttention(D, 2, Span(5, 2, 0, 3), position=Bucketed(D, 2), key_heads=1),
    "alibi": lambda: SelfAttention(D, 2, Span.chunked(0, 3, right=1), position=Alibi(D, 2)),
    "grouped": lambda: SelfAttention(D, 2, Span(2, 2), position=Relative(2 * D, 2), group=2, norm=nn.LayerNorm(D)),
    "narrow": lambda: SelfAttention(D, 3, Span.sliding(0), width=2),
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Frames of each step that the ring took: no GPU is needed, and no interpreter."""
    import speechattn_kernels.step
    from speechattn_kernels.step import check, naive

    seen = list[int]()

    def step(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, cache: Tensor, *rest: Tensor, **options: Any) -> Any:
        check(q, k, mask, cache, rest[0], **{n: options[n] for n in ("left", "chunk", "right", "late")})
        seen.append(q.shape[2])
        return naive.step(q, k, v, mask, cache, *rest, **options)

    def attended(self: Triton, *args: Any, **options: Any) -> Tensor:
        return BACKENDS["reference"](*args, **options)

    monkeypatch.setattr(speechattn_kernels.step, "step", step)
    monkeypatch.setattr(Triton, "supports", lambda *_: None)
    monkeypatch.setattr(Triton, "__call__", attended)
    return seen


def layer_of(name: str) -> SelfAttention:
    layer = LAYERS[name]()
    set_backend(layer, "triton")
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.4)
    return layer.eval()


@pytest.mark.parametrize("name", LAYERS)
def test_laws_of_streams(name: str, calls: list[int]) -> None:
    layer = layer_of(name)
    check_stream(layer, random_frames([17, 9, 12], D), tolerance=1e-5 if isinstance(layer.position, Rotary) else 1e-9)
    assert len(calls) > 10  # angles come in float32


def test_inside_a_whole_encoder(calls: list[int]) -> None:
    encoder = Conformer(8, 8, 2, 2, 12, span=Span(5, 2, 1), kernel=5, conv_right=1)
    set_backend(encoder, "triton")
    check_stream(encoder, random_frames([40, 33], 8))
    assert calls


@pytest.mark.parametrize("grad", [False, True])
def test_utterances_share_a_batch(grad: bool) -> None:
    layer, utterances = layer_of("ahead"), [random_frames([n], D, seed=n) for n in (5, 30, 12, 21)]
    with torch.set_grad_enabled(grad):
        for x, y in zip(utterances, packed(layer, utterances, rows=2, piece=4), strict=True):
            torch.testing.assert_close(y.values, layer(x).values)


def test_it_is_exported(calls: list[int]) -> None:
    check_export(layer_of("chunked"), random_frames([12, 9], D))
    assert calls


def test_nothing_grows(calls: list[int]) -> None:
    layer = layer_of("sliding")
    with torch.inference_mode():
        x = random_frames([1000, 1000], D)
        state = layer.init_state(x[:0])
        begin, outputs = state.past.values, []
        for i in range(1000):
            y, state = layer.step(x[i : i + 1], state)
            outputs.append(y)
        assert state.past.values.data_ptr() == begin.data_ptr()
        assert state.past.values.shape[1] == 6
        wanted = SelfAttention.forward(layer, x[900:])
        torch.testing.assert_close(Frames.cat(outputs)[910:].values, wanted[10:].values)
    assert len(calls) == 1000


def test_steps_of_any_length(calls: list[int]) -> None:
    """A longer step makes room; a very long one goes past the kernel; rings of two capacities share a batch."""
    layer, x = layer_of("chunked"), random_frames([300, 280], D)
    with torch.no_grad():
        wanted = layer(x)
        calls.clear()
        y = stepped(layer, x, [2, 10, 66, 2, 64, 130, 4, 22])
        assert calls == [2, 10, 2, 64, 4, 22]
        torch.testing.assert_close(y.values, wanted.values)
        (_, a), (_, b) = (layer.step(x[:n], layer.init_state(x[:0])) for n in (2, 10))
        assert a.past.room == 2
        assert b.past.room == 10
        (_, a), (_, b) = layer.step(x[2:4], a), layer.step(x[:0], b)
        assert tree.concat([a, b]).past.room == tree.concat([b, a]).past.room == 10
        _, a = layer.step(x[4:10], a)
        both, keep = tree.concat([a, b]), torch.tensor([True, False])
        apart = tree.split(both)
        for state in (tree.where(keep, a, b), tree.select(both, [0, 3]), tree.concat([apart[0], apart[3]])):
            torch.testing.assert_close(layer.step(x[10:12], state)[0].values, wanted.values[:, 10:12])


def test_a_state_that_was_stepped_from_is_whole_until_it_is_overwritten() -> None:
    layer, x = layer_of("sliding"), random_frames([40, 40], D)
    with torch.no_grad():
        _, state = layer.step(x[:12], layer.init_state(x[:0]))
        once, after = layer.step(x[12:13], state)
        other = Frames(x.values.flip(0), x.mask)
        elsewhere, beside = layer.step(other[12:13], state)  # a fork: it gets a copy
        assert not torch.allclose(once.values, elsewhere.values)
        views = tree.map(lambda leaf: leaf.view(leaf.shape), state)
        torch.testing.assert_close(layer.step(x[12:13], views)[0].values, once.values)
        for at in range(13, 30):
            y, after = layer.step(x[at : at + 1], after)
            z, beside = layer.step(other[at : at + 1], beside)
            wanted = layer(x[at - 8 : at + 1]).values[:, -1:]
            torch.testing.assert_close(y.values, wanted)
            assert not torch.allclose(z.values, wanted)
        with pytest.raises(RuntimeError, match="clone"):
            layer.step(x[12:13], state)
        with pytest.raises(RuntimeError, match="clone"):
            layer.step(x[12:32], state)


COPIES: dict[str, Callable[[Any], Any]] = {
    "select": lambda s: tree.select(s, [0, 1]),
    "clone": tree.clone,
    "where": lambda s: tree.where(torch.tensor([True, True]), s, tree.clone(s)),
    "where not": lambda s: tree.where(torch.tensor([False, False]), tree.clone(s), s),
    "concat": lambda s: tree.concat([s]),
    "split": lambda s: tree.concat(tree.split(s)),
    "deepcopy": copy.deepcopy,
    "pickle": lambda s: pickle.loads(pickle.dumps(s)),
    "with a buffer": lambda s: tree.where(torch.tensor([True, True]), s, AttentionState(
        s.waiting, Buffer(torch.zeros(2, 4, 2, 2, D // 2), torch.zeros(2, 4, dtype=torch.bool)), s.sinks
    )),
}  # fmt: skip


@pytest.mark.parametrize("name", COPIES)
def test_no_copy_of_a_state_that_was_overwritten(name: str) -> None:
    """Copies have counters of their own, so who makes one asks first."""
    layer, x = SelfAttention(D, 2, Span.sliding(4), backend="triton").eval(), random_frames([40, 40], D)
    with torch.no_grad():
        wanted = layer(x).values
        _, state = layer.step(x[:12], layer.init_state(x[:0]))
        room, after = state.past.room, state
        for at in range(12, 12 + room):
            _, after = layer.step(x[at : at + 1], after)
        y, _ = layer.step(x[12:13], COPIES[name](state))
        torch.testing.assert_close(y.values, wanted[:, 12:13])
        layer.step(x[24:25], after)
        for use in (COPIES[name], lambda s: s.past.buffer(), lambda s: s.past.truncate(2)):
            with pytest.raises(RuntimeError, match="took its place"):
                use(state)


@pytest.mark.parametrize("room", [3, 4])
def test_each_frame_of_the_room_counts(room: int) -> None:
    """Steps of two frames: they end where the room ends, or one frame behind it."""
    layer, x = layer_of("sliding"), random_frames([40, 40], D)
    with torch.no_grad():
        wanted = layer(x).values
        _, state = layer.step(x[:8], layer.init_state(x[:0]))
        _, state = layer.step(x[8 : 8 + room], roomy(state, room))
        after, at = state, 8 + room
        for n in (0, 2):
            assert state.past.stale() == n
            torch.testing.assert_close(layer.step(x[at : at + 2], tree.clone(state))[0].values, wanted[:, at : at + 2])
            y, after = layer.step(x[at + n : at + n + 2], after)
            torch.testing.assert_close(y.values, wanted[:, at + n : at + n + 2])
        if room == 4:
            z, _ = layer.step(x[at : at + 2], state)
            torch.testing.assert_close(z.values, wanted[:, at : at + 2])
        else:
            with pytest.raises(RuntimeError, match="took its place"):
                layer.step(x[at : at + 2], state)


def roomy(state: Any, room: int) -> AttentionState:
    """The same with so much room."""
    return AttentionState(state.waiting, Ring.of(state.past.buffer(), room), state.sinks)


def test_what_is_opened_is_fresh() -> None:
    layer, x = layer_of("sliding"), random_frames([20, 15], D)
    with torch.no_grad():
        _, state = layer.step(x[:9], layer.init_state(x[:0]))
        _, after = layer.step(x[9:10], state)
        assert state.past.stale() == 1
        assert after.past.open(1, torch.float64) is after.past
        for opened in (
            state.past.open(1, torch.float64),
            state.past.open(1, torch.float32),
            state.past.open(99, torch.float64),
        ):
            assert opened.stale() == 0
            assert opened.values.data_ptr() != state.past.values.data_ptr()


def test_compiled_steps_leave_their_state_alone(calls: list[int]) -> None:
    layer, x = layer_of("sliding"), random_frames([40, 40], D)
    other = Frames(x.values.flip(0), x.mask)
    step = torch.compile(layer.step, backend="eager")
    with torch.no_grad():
        wanted = layer(x).values
        _, state = layer.step(x[:12], layer.init_state(x[:0]))
        _, state = layer.step(x[12:13], state)
        calls.clear()
        y, after = step(x[13:14], state)
        _, beside = step(other[13:14], state)
        assert calls == [1, 1]
        torch.testing.assert_close(y.values, wanted[:, 13:14])
        assert state.past.stale() == after.past.stale() == beside.past.stale() == 0
        for at in range(14, 24):
            y, after = (step if at % 2 else layer.step)(x[at : at + 1], after)
            torch.testing.assert_close(y.values, wanted[:, at : at + 1])
        torch.testing.assert_close(layer.step(x[13:14], state)[0].values, wanted[:, 13:14])


@pytest.mark.parametrize("span", [Span.sliding(5, sinks=2), Span(None, 1)])
def test_a_ring_does_not_outlive_its_span(span: Span, calls: list[int]) -> None:
    """What a ring has not (sinks, all of the past) is asked of a buffer, as if there had never been a ring."""
    layer, x = layer_of("sliding"), random_frames([20, 15], D)
    with torch.no_grad():
        _, ring = layer.step(x[:4], layer.init_state(x[:0]))
        buffer = AttentionState(ring.waiting, ring.past.buffer(), ring.sinks)
        set_span(layer, span)
        calls.clear()
        for at in range(4, 15):
            (y, ring), (wanted, buffer) = layer.step(x[at : at + 1], ring), layer.step(x[at : at + 1], buffer)
            torch.testing.assert_close(y.values, wanted.values)
            assert isinstance(ring.past, Buffer)
            torch.testing.assert_close(ring.past.values, buffer.past.values)
    assert not calls


def test_gradients_and_other_backends_take_buffers(calls: list[int]) -> None:
    layer, x = layer_of("ahead"), random_frames([20, 15], D)
    wanted = layer(x).values.detach()
    with torch.no_grad():
        ring = layer.step(x[:6], layer.init_state(x[:0]))[1]
        assert isinstance(ring.past, Ring)
        buffer = layer.step(x[:6], layer.init_state(x[:0]))[1]
    y, state = layer.step(x[6:10], ring)
    assert isinstance(state.past, Buffer)
    assert y.values.requires_grad
    torch.testing.assert_close(y.values.detach(), wanted[:, 2:6])
    with torch.no_grad():
        mixed = tree.concat([layer.step(x[6:10], buffer)[1], state])
        assert isinstance(mixed.past, Buffer)
        z = layer.step(Frames(*(torch.cat([x, x]) for x in (x.values[:, 10:12], x.mask[:, 10:12]))), mixed)[0]
        torch.testing.assert_close(z.values, torch.cat([wanted, wanted])[:, 6:8])
        state = layer.step(x[:6], layer.init_state(x[:0]))[1]
        set_backend(layer, "window")
        calls.clear()
        y, state = layer.step(x[6:10], state)
        torch.testing.assert_close(y.values, wanted[:, 2:6])
        assert isinstance(layer.init_state(x).past, Buffer)
        assert not calls


@pytest.mark.parametrize("layer", [
    lambda: SelfAttention(D, 2, Span.causal(), backend="triton"),
    lambda: SelfAttention(D, 2, Span.sliding(4, sinks=1), backend="triton"),
    lambda: SelfAttention(D, 2, Span.sliding(4), backend="auto"),
    lambda: SparseSelfAttention(D, 2, Span.sliding(4)),
])  # fmt: skip
def test_others_keep_buffers(layer: Callable[[], SelfAttention], calls: list[int]) -> None:
    with torch.no_grad():
        x = random_frames([9, 5], D)
        made = layer()
        made.step(x, made.init_state(x))
        assert isinstance(made.init_state(x), AttentionState)
        assert isinstance(made.init_state(x).past, Buffer)
    assert not calls


def test_types_and_modes_may_change() -> None:
    """A state from inference mode goes on outside it; autocast gives keys of another type than the state has."""
    layer, x = layer_of("sliding"), random_frames([20, 15], D)
    wanted = layer(x).values.detach()
    with torch.inference_mode():
        _, state = layer.step(x[:9], layer.init_state(x[:0]))
    with torch.no_grad():
        y, state = layer.step(x[9:12], state)
        torch.testing.assert_close(y.values, wanted[:, 9:12])
        low = layer.init_state(Frames(x.values[:, :0].float(), x.mask[:, :0]))
        y, state = layer.step(x[:7], low)
        torch.testing.assert_close(y.values, wanted[:, :7])
        assert state.past.values.dtype == torch.float64
        low = layer.init_state(Frames(x.values[:, :0].float(), x.mask[:, :0]))
        assert low.past.room == 1
        for at in range(8):  # as many as there is room for
            y, low = layer.step(x[at : at + 1], low)
            torch.testing.assert_close(y.values, wanted[:, at : at + 1])
            assert low.past.values.dtype == torch.float64


def test_weights_are_seen_through_it() -> None:
    layer, x = layer_of("ahead"), random_frames([9, 5], D)
    with torch.no_grad():
        assert isinstance(layer.init_state(x).past, Ring)
        found = self_weights(layer, x)
    torch.testing.assert_close(found, self_weights(layer, x).detach())


def test_lengths_count_what_is_there() -> None:
    layer, x = layer_of("sliding"), random_frames([20, 3], D)
    with torch.no_grad():
        _, state = layer.step(x[:4], layer.init_state(x[:0]))
    assert state.past.length.tolist() == [4, 3]


def test_a_backend_is_set_for_all_layers() -> None:
    encoder = Conformer(8, 8, 2, 2, 12, span=Span(5, 2), kernel=3)
    set_backend(encoder, "reference")
    assert {m.backend for m in encoder.modules() if isinstance(m, SelfAttention)} == {"reference"}
    with pytest.raises(ValueError, match="wanted auto or one of"):
        set_backend(encoder, "unknown")
    with pytest.raises(ValueError, match="nothing that attends"):
        set_backend(nn.Linear(2, 2), "window")
    assert unable(encoder, "auto") is None
    assert "not bounded" in str(unable(SelfAttention(D, 2, Span.causal()), "window"))


class Packed(nn.Module):
    """Weights that are no floating-point tensor: a method, as of torch's quantised layers, or integers."""

    def __init__(self, weight: Any) -> None:
        super().__init__()
        self.weight = weight


@pytest.mark.parametrize("weight", [lambda: torch.zeros(1), torch.zeros(4, dtype=torch.int8), None])
def test_quantised_layers_are_asked_too(weight: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[torch.dtype]()
    monkeypatch.setattr(Triton, "supports", lambda _, q, *rest: seen.append(q.dtype))
    layer = SelfAttention(D, 2, Span.sliding(4)).bfloat16()
    assert unable(layer, "triton") is None
    layer.qkv = Packed(weight)  # type: ignore[assignment]
    assert unable(layer, "triton") is None
    assert seen == [torch.bfloat16] * 2
    layer.out = Packed(weight)  # type: ignore[assignment]
    assert unable(layer, "triton") is None
    assert seen[2] == torch.get_default_dtype()


def test_a_session_asks_for_a_backend() -> None:
    model, layer = Speller(), SelfAttention(D, 2, Span.causal())
    model.encoder = layer  # type: ignore[attr-defined]
    Session(model, backend="reference")
    assert layer.backend == "reference"
    for name, words in (("window", "run with the backend window: .* bounded"), ("other", "wanted auto or one of")):
        with pytest.raises(InputError, match=words):
            Session(model, backend=name)
        assert layer.backend == "reference"
    with pytest.raises(InputError, match="this model has nothing that attends"):
        Session(Speller(), backend="window")
