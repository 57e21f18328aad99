"""Figures of the transducer: its beam beside torchaudio's, with the same networks, and the memory of its losses."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from report import Report, interleaved
from torch import Tensor, nn
from torchaudio.models import RNNTBeamSearch

from speechattn.decoder.predictor import LSTMPredictor
from speechattn.decoder.transducer import Joint, PrunedLoss, Transducer
from speechattn.frames import Frames
from speechattn.search.transducer import TransducerBeam, TransducerGreedy

VOCAB, DIM, FRAMES = 500, 256, 1000


class Theirs(nn.Module):
    """Our networks as torchaudio's search calls them: its blank is the last symbol, ours the first."""

    def __init__(self, model: Transducer) -> None:
        super().__init__()
        self.model = model

    def transcribe(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        return self.model.joint.frames(x), lengths

    def predict(self, tokens: Tensor, lengths: Tensor, state: list[list[Tensor]] | None):  # type: ignore[no-untyped-def]
        before = self.model.predictor.init_state(len(tokens)) if state is None else tuple(state[0])
        vocab = self.model.joint.out.out_features
        g, after = self.model.predictor.step((tokens[:, 0] + 1) % vocab, before)
        return self.model.joint.labels(g)[:, None], lengths, [list(after)]

    def join(self, a: Tensor, na: Tensor, b: Tensor, nb: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.model.joint.scores(a[:, :, None], b[:, None]).roll(-1, -1), na, nb


def spiky(frames: int) -> tuple[Transducer, Tensor]:
    """An untrained transducer that behaves as a trained one: blank in most frames, a label in every tenth, once.

    Frames are sums of the output's own rows; the label encoder gives the last label's row, which is taken away.
    """
    torch.manual_seed(0)
    model = Transducer(LSTMPredictor(VOCAB, DIM), Joint(DIM, DIM, DIM, VOCAB)).eval()
    rows = torch.randn(VOCAB, DIM) / DIM**0.5
    x, spikes = 0.25 * torch.randn(1, frames, DIM), torch.arange(5, frames, 10)
    said, rival = torch.randint(1, VOCAB, (2, len(spikes)))
    x[0, spikes] += DIM**0.5 * (0.3 * rows[said] + 0.15 * rows[rival])
    lstm, joint = model.predictor.lstm, model.joint  # type: ignore[union-attr]
    with torch.no_grad():
        for weight in lstm.parameters():
            weight.mul_(0.1)
        lstm.weight_ih_l0[2 * DIM : 3 * DIM] += torch.eye(DIM)  # the cell is the embedding
        lstm.bias_ih_l0.copy_(torch.tensor([9.0, -9.0, 0.0, 9.0]).repeat_interleave(DIM))
        model.predictor.embed.weight.copy_(0.3 * DIM**0.5 * rows)  # type: ignore[union-attr]
        model.predictor.embed.weight[0] = 0  # type: ignore[union-attr]
        joint.frames.weight.copy_(torch.eye(DIM))
        joint.labels.weight.copy_(-torch.eye(DIM))
        joint.out.weight.copy_(4 * rows)
        joint.out.bias.zero_()
        joint.out.bias[0] = 11
    return model, x


def kept(run: Callable[[], Tensor]) -> int:
    """Bytes that a loss keeps for its backward pass."""
    stores: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        store = x.untyped_storage()
        stores[store.data_ptr()] = store.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        run().sum().backward()
    return sum(stores.values())


def searches(report: Report, frames: int) -> None:
    """Our beam and torchaudio's, over the same networks; one utterance, then eight."""
    model, x = spiky(frames)
    # Ranked by log-probability, as ours: by default theirs divides by the number of labels, and says more of them.
    peer = RNNTBeamSearch(Theirs(model), VOCAB - 1, step_max_tokens=5, hypo_sort_key=lambda h: h[3])
    one = torch.tensor([frames])
    for size, batch in ((5, 1), (10, 1), (10, 8)):
        xs = torch.cat([x] * batch) + 0.05 * torch.randn(batch, frames, DIM) * (batch > 1)
        ours, heard = TransducerBeam(model, size, max_symbols=5), Frames(xs, torch.ones(xs.shape[:2], dtype=torch.bool))
        runs: dict[str, Callable[[], object]] = {
            "theirs": lambda xs=xs, n=size: [peer(row[None], one, n) for row in xs],  # type: ignore[misc]
            "ours": lambda ours=ours, heard=heard: ours.decode(heard),  # type: ignore[misc]
        }
        with torch.inference_mode():
            took = interleaved(runs, 3)
            best = [h[0].tokens for h in ours.decode(heard)]
            other = [tuple(token + 1 for token in peer(row[None], one, size)[0][0][1:]) for row in xs]
        theirs_ms, ours_ms = (took[name] / frames / batch for name in ("theirs", "ours"))
        equal = sum(a == b for a, b in zip(best, other, strict=True))
        note = f"{batch} utterances, V {VOCAB}, d {DIM}, {frames} frames, same networks; CPU time of a frame: theirs "
        note += f"{theirs_ms:.2f} ms, ours {ours_ms:.2f} ms; {len(best[0])} labels, {equal} of {batch} equal"
        goal = "faster than torchaudio"
        report.row(f"transducer beam {size} x {batch}", theirs_ms / ours_ms, "x", note, goal, lambda value: value > 1.2)
    greedy = TransducerGreedy(model, max_symbols=5)
    with torch.inference_mode():
        took = interleaved({"greedy": lambda: greedy.decode(heard)}, 3)
    report.row("transducer greedy x 8", took["greedy"] / frames / 8, "ms", "CPU time of a frame of one utterance")


def losses(report: Report, quick: bool) -> None:
    """The full loss and the pruned one: what they keep, and how long they take."""
    torch.manual_seed(0)
    rows, frames, said, width = 2, 100 if quick else 250, 20 if quick else 60, 5
    model = Transducer(LSTMPredictor(VOCAB, DIM), Joint(DIM, DIM, DIM, VOCAB))
    pruned = PrunedLoss(DIM, DIM, VOCAB, width=width)
    x = Frames(torch.randn(rows, frames, DIM), torch.ones(rows, frames, dtype=torch.bool))
    labels, lengths = torch.randint(1, VOCAB, (rows, said)), torch.tensor([said] * rows)
    runs: dict[str, Callable[[], Tensor]] = {
        "full": lambda: model.loss(x, labels, lengths),
        "pruned": lambda: (lambda found: found.loss + found.simple)(pruned(model, x, labels, lengths)),
    }
    bytes_kept = {name: kept(run) for name, run in runs.items()}
    took = interleaved({name: lambda run=run: run().sum().backward() for name, run in runs.items()}, 3)  # type: ignore[misc]
    note = f"B {rows}, T {frames}, U {said}, V {VOCAB}, bands of {width}: "
    note += ", ".join(f"{name} {bytes_kept[name] / 2**20:.0f} MiB and {took[name] / 1e3:.2f} s" for name in runs)
    ratio = bytes_kept["full"] / bytes_kept["pruned"]
    report.row("transducer pruned loss, memory", ratio, "x", note, "less than the full loss", lambda value: value > 1)


def figures(report: Report, quick: bool) -> None:
    """Every figure of this group."""
    searches(report, 200 if quick else FRAMES)
    losses(report, quick)


if __name__ == "__main__":
    torch.set_num_threads(1)
    report = Report()
    figures(report, "--quick" in sys.argv)
    report.print()
