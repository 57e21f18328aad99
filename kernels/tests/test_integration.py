"""Where the library takes kernels by itself, it says the same as without them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import speechattn_kernels.entmax
import torch
from speechattn_kernels.entmax import entmax_attention
from speechattn_kernels.policy import naive, policy
from torch import Tensor, nn

from speechattn import tree
from speechattn.attention import Span
from speechattn.attention.entmax import Entmax, Softmax
from speechattn.audio.spectrum import LogMel
from speechattn.cross import soft
from speechattn.cross.soft import Soft
from speechattn.decoder.attention import AttentionDecoder
from speechattn.decoder.predictor import StatelessPredictor
from speechattn.decoder.transducer import Joint, Transducer
from speechattn.decoder.transducer_loss import transducer_loss
from speechattn.encoder import Conformer
from speechattn.frames import Frames, Memory
from speechattn.model import Recognizer
from speechattn.model.config import build
from speechattn.policy import Policy, Source
from speechattn.policy.align_att import AlignAtt
from speechattn.policy.ed_att import EDAtt
from speechattn.search import Draft
from speechattn.search.greedy import Greedy
from speechattn.task.objectives import FusedTransducerObjective, Heard, Objective, Said, TransducerObjective
from speechattn.testing import random_frames
from speechattn.text.pieces import Pieces


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of queries that went to the kernel `entmax`, which is taken in the interpreter too."""
    shapes: list[tuple[int, ...]] = []

    def counted(*given: Tensor) -> tuple[Tensor, Tensor]:
        shapes.append(tuple(given[0].shape))
        found: tuple[Tensor, Tensor] = entmax_attention(*given)
        return found

    monkeypatch.setattr(speechattn_kernels.entmax, "entmax_attention", counted)
    monkeypatch.setattr(soft, "runs", lambda q: True)
    return shapes


def heard(device: torch.device, *frames: int, dim: int = 24) -> Memory:
    return Memory.of(tree.map(lambda x: x.to(device), random_frames(list(frames), dim)))


def made_of(network: nn.Module, device: torch.device) -> Any:
    """With weights so large that attention chooses."""
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return network.to(device)


def same(found: list[tuple[Tensor, ...]], tolerance: float = 1e-4) -> None:
    """Both ways, to a share of the largest number of each tensor."""
    for one, two in zip(*found, strict=True):
        largest = float(two.detach().abs().max()) if two.numel() else 0.0
        torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance * max(1.0, largest))


@pytest.mark.parametrize(
    ("alpha", "beam", "frames"),
    [(None, 1, (40, 9, 0)), (None, 3, (20, 9, 0)), (1.0, 1, (20, 9, 0)), (1.7, 1, (9, 20, 0)), (None, 2, (0, 0, 0))],
)
def test_sparse_attention_without_weights_is_that_with_weights(
    alpha: float | None, beam: int, frames: tuple[int, ...], asked: list[tuple[int, ...]], device: torch.device
) -> None:
    """Values, and gradients of queries, frames, weights and alphas; one recording has no frame."""
    cross = made_of(Soft(24, 2, key_bias=False, normaliser=lambda heads: Entmax(heads, alpha)), device)
    x, query = heard(device, *frames), torch.randn(3 * beam, 5, 24, device=device, requires_grad=True)
    values = x.frames.values.requires_grad_()
    found = []
    for heads in ((), (1, 0)):
        seen, _ = cross.attend(query, cross.read(x), (), heads=heads)
        assert seen.alignment.shape == (3 * beam, len(heads), 5, max(frames))
        wanted = [query, values, *cross.parameters()]
        grads = torch.autograd.grad(seen.context.square().sum(), wanted, allow_unused=True, materialize_grads=True)
        found.append((seen.context, *grads))
    assert asked == [(3, 2, 5 * beam, 12)]
    same(found)
    torch.testing.assert_close(found[0][0][2 * beam :], cross.out.bias.expand(beam, 5, -1))


def test_a_decoder_with_sparse_attention_learns_by_the_kernel(
    asked: list[tuple[int, ...]], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = made_of(AttentionDecoder(11, 30, 24, 2, 2, cross=lambda d, h: Soft(d, h, normaliser=Entmax)), device).train()
    x, tokens = heard(device, 33, 12), torch.randint(9, (2, 6), device=device)
    lengths, found = torch.tensor([6, 4], device=device), []
    for runs in (lambda q: True, lambda q: False):
        monkeypatch.setattr(soft, "runs", runs)
        losses = net.losses(x, tokens, lengths, sos=9, eos=10)
        found.append((losses, *torch.autograd.grad(losses.sum(), list(net.parameters()))))
    assert asked == [(2, 2, 7, 12)] * 2
    same(found)
    grads = dict(zip(dict(net.named_parameters()), found[0][1:], strict=True))
    assert [bool((g != 0).all()) for name, g in grads.items() if "normaliser" in name] == [True, True]


class Steeper(Entmax):
    """Not what the kernel computes."""

    def forward(self, scores: Tensor, mask: Tensor) -> Tensor:
        return super().forward(2 * scores, mask)


@pytest.mark.parametrize("normaliser", [Steeper, Softmax, None])
def test_other_weights_are_not_those_of_the_kernel(
    normaliser: Callable[[int], nn.Module] | None, asked: list[tuple[int, ...]], device: torch.device
) -> None:
    cross = made_of(Soft(24, 2, normaliser=normaliser), device)
    query, read = torch.randn(1, 5, 24, device=device), cross.read(heard(device, 9))
    one, two, three = (cross.attend(query, read, (), heads=heads)[0].context for heads in ((), (0,), None))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-4)
    torch.testing.assert_close(one, three, rtol=0, atol=1e-4)
    assert asked == []


def test_where_kernels_run_by_themselves(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA, with a gradient too; in the interpreter never. The kernel `policy` without a gradient alone."""
    q = torch.zeros(1, 2, 1, 64, device=device)
    assert soft.runs(q) == (device.type == "cuda")
    assert not soft.runs(q.double())
    assert not soft.runs(torch.zeros(1, 1, 1, 300, device=device))
    on_gpu: Any = SimpleNamespace(is_cuda=True, shape=(1, 2, 1, 64))
    monkeypatch.setattr(soft, "installed", lambda: False)
    assert not soft.runs(on_gpu)
    monkeypatch.setattr(soft, "runs", lambda q: True)
    assert soft.serving(q) is None
    with torch.no_grad():
        assert soft.serving(q) is policy


PIECES = Pieces(["<blank>", "▁", *"abcdef", "<sos/eos>"])


def listener(device: torch.device) -> Recognizer:
    head = Transducer(StatelessPredictor(9, 16), Joint(16, 16, 20, 9))
    encoder = Conformer(8, 16, 1, 2, 24, span=Span(16, 4), kernel=5, conv_right=None)
    return Recognizer(LogMel(8, rate=8000), encoder, {"transducer": head}, PIECES, sample_rate=8000).to(device)


@pytest.mark.parametrize("frames", [(13, 1, 0, 0, 7), ()])
def test_the_fused_objective_is_that_of_the_whole_lattice(frames: tuple[int, ...], device: torch.device) -> None:
    """Nobody at all; and with one frame, without any (which costs nothing), and with nothing to say."""
    model, x = listener(device), Frames.from_lengths(torch.randn(len(frames), 13, 16), torch.tensor(frames).long())
    x = Frames.of(x.values.to(device).requires_grad_(), x.mask.to(device))
    tokens, lengths = torch.randint(1, 8, (len(frames), 4)), torch.tensor([4, 2, 3, 0, 0][: len(frames)]).long()
    said, sound, found = Said(tokens.to(device), lengths.to(device)), Heard(x, x, x), []
    objectives: tuple[Objective, ...] = (FusedTransducerObjective(), TransducerObjective())
    for objective in objectives:
        objective.fit(model)
        losses = objective.losses(model, sound, said)
        wanted = [x.values, *model.heads["transducer"].parameters()]
        found.append((losses, *torch.autograd.grad(losses.sum(), wanted)))
    same(found)
    if frames:
        assert (found[0][0] > 0).tolist() == [True, True, False, False, True]


def test_expected_alignment_by_a_form_that_a_recipe_names(device: torch.device) -> None:
    tokens, x, found = torch.randn(2, 4, 16, device=device), heard(device, 21, 8, dim=16), []
    for form in ("fused", "doubling"):
        torch.manual_seed(1)
        name = "speechattn.cross.monotonic.MoChA"
        args = {"dim": 16, "heads": 2, "offset": 0.0, "noise": 0.0, "form": f"speechattn.cross.expected.{form}"}
        cross = build({"class_path": name, "init_args": args}, "here").to(device).train()
        assert cross.form.__name__ == form
        seen, _ = cross.attend(tokens, cross.read(x), cross.place(tokens))
        found.append((seen.context, *torch.autograd.grad(seen.context.square().sum(), list(cross.parameters()))))
    same(found, 2e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("frames", "said"),
    [
        ((9, 6, 1), (4, 2, 3)), ((2,), (0,)), ((1, 1), (0, 3)), ((0, 2, 0, 5, 1), (0, 1, 2, 0, 2)), ((4, 2), (1, 4)),
        ((300, 200, 1, 250), (40, 0, 7, 1)), ((), ()),
    ],
)  # fmt: skip
def test_the_whole_loss_on_a_gpu(
    frames: tuple[int, ...], said: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """Of rows with one frame or no label too, which torchaudio 2.11.0 gets wrong on CUDA; and their gradients."""
    n, t, u = len(frames), max(frames, default=0), max(said, default=0)
    scores = torch.randn(n, t, u + 1, 50).to(device, dtype).requires_grad_()
    labels = torch.randint(1, 50, (n, u)).to(device)
    given = labels, *(torch.tensor(x, dtype=torch.long, device=device) for x in (frames, said))
    found, wanted = transducer_loss(scores, *given), transducer_loss(scores.double(), *given)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-4)
    grads = [torch.autograd.grad(x[x.isfinite()].sum(), scores)[0].float() for x in (found, wanted)]
    torch.testing.assert_close(*grads, rtol=0, atol={torch.float32: 1e-3, torch.float16: 3e-3}.get(dtype, 1e-2))


def deciders(heads: tuple[tuple[int, int], ...]) -> list[Policy]:
    """Those that look at attention, at many settings."""
    whisper = [AlignAtt.whisper(heads, n) for n in (1, 4, 9, 20, 33)]
    plain = [AlignAtt(heads, n, n, drop, False, 1, None) for n in (1, 2, 7, 16, 30) for drop in (0, 1)]
    return [*whisper, *plain, *(EDAtt(heads, a, drop_last=drop, power=power) for a in (0.03, 2 / 64, 0.1, 0.4)
                                for drop in (0, 1) for power in (1, 2))]  # fmt: skip


def decided(draft: Draft) -> list[int]:
    now = Source(draft.weights.shape[2], 0.02, finished=False)
    return [policy.accept(draft, now, policy.initial())[0] for policy in deciders(draft.heads)]


@pytest.mark.parametrize("ties", [False, True])
def test_policies_decide_by_the_kernel_as_without_it(ties: bool, device: torch.device) -> None:
    """With ties every frame has a twin, whose scores are the same to the last bit: products of whole numbers."""
    found = set()
    for seed in range(12):
        torch.manual_seed(seed)
        tokens, frames = 1 + seed % 5, 64
        q = torch.randn(1, 4, tokens + 1, 32) if not ties else torch.randint(-2, 3, (1, 4, tokens + 1, 32)).float()
        k = torch.randn(1, 4, frames, 32) if not ties else torch.randint(-1, 2, (1, 4, frames // 2, 32)).float()
        k = k.repeat(1, 1, 1 + ties, 1)[:, :, torch.randperm(frames)]
        for u in range(tokens):  # each token has a peak somewhere, late ones later
            q[:, :, u] += (seed % 3) * k[:, :, min(frames - 1, (u + 1) * 10 + seed)]
        if ties and seed == 11:
            q.zero_()  # all frames alike
        q, k = q.to(device), k.to(device)
        valid, heads = torch.ones(1, frames, dtype=torch.bool, device=device), (2, 0, 3)
        _, _, each = policy(q, k, k, valid, heads=heads, newest=tokens + 1)
        whole = naive.weights(q, k, valid)[:, list(heads)]
        counts = []
        for rows in (each, whole):
            names = tuple((0, head) for head in heads)
            counts.append(decided(Draft(torch.arange(tokens), torch.zeros(tokens), rows[0].cpu(), names, 0, False)))
        assert counts[0] == counts[1]
        found |= set(counts[0])
        peaks = whole[0].mean(0).topk(2).values
        assert bool((peaks[:, 0] == peaks[:, 1]).all()) == ties
    assert len(found) > 3


def test_drafts_of_a_search_are_decided_alike(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    net = AttentionDecoder(20, 40, 64, 2, 2).eval().to(device).requires_grad_(False)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    served, lengths = [], set()

    def counted(*given: Tensor, heads: list[int], newest: int) -> tuple[Tensor, Tensor, Tensor]:
        served.append(newest)
        return policy(*given, heads=heads, newest=newest)

    for n in (9, 33, 40):
        values = torch.randn(1, n, 64, device=device)
        memory = Memory.of(Frames(values, values.new_ones(1, n, dtype=torch.bool)))
        drafts = []
        for serving in (lambda q: counted, lambda q: None):
            monkeypatch.setattr(soft, "serving", serving)
            drafts.append(Greedy(net, 19).draft(memory, [1], [2, 3], heads=((1, 0), (0, 1)), max_tokens=6))
        assert drafts[0].tokens.tolist() == drafts[1].tokens.tolist()
        assert decided(drafts[0]) == decided(drafts[1])
        lengths.add(tuple(decided(drafts[0])))
    assert served
    assert len(lengths) > 1
