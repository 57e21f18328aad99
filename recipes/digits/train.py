"""Trains the small recogniser of digits and names: `python train.py CACHE FOLDER`."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from corpus import Batch, Corpus, TrainingData
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm

from speechattn.audio.augment import SpecAugment
from speechattn.audio.normal import GlobalCMVN
from speechattn.frames import Frames, Memory
from speechattn.model import Recognizer, from_config, save_model
from speechattn.model.config import read_yaml
from speechattn.text.pieces import Pieces

WEIGHTS = {"frames": 0.5, "ctc": 0.4, "attention": 0.3, "transducer": 0.3}
WARM = 0.15  # share of the steps in which frames are told what they say


def losses(model: Recognizer, y: Frames, batch: Batch, *, warm: bool) -> dict[str, Tensor]:
    """Per token, and while `warm` per frame; the transducer's over every other utterance, for it costs most."""
    heads, tokens, end = model.heads, batch.lengths.sum().clamp(min=1), model.tokenizer.end
    attention = heads["attention"].losses(Memory.of(y), batch.targets, batch.lengths, sos=end, eos=end)
    parts = {"ctc": heads["ctc"].losses(y, batch.targets, batch.lengths).sum() / tokens}
    parts["attention"] = attention.sum() / tokens
    if warm:
        frames = min(y.mask.shape[1], batch.said.shape[1])
        said = batch.said[:, :frames].where(y.mask[:, :frames], -1)
        parts["frames"] = F.nll_loss(heads["ctc"](y).values[:, :frames].transpose(1, 2), said, ignore_index=-1)
    else:
        some = slice(None, None, 2)
        part, lengths = Frames(y.values[some], y.mask[some]), batch.lengths[some]
        found = heads["transducer"].loss(part, batch.targets[some], lengths)
        parts["transducer"] = found.sum() / lengths.sum().clamp(min=1)
    return parts


def optimisers(model: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for matrices, which needs about half the steps; AdamW for embeddings, filters, vectors."""
    named = dict(model.named_parameters())
    matrices = {n for n, p in named.items() if p.dim() == 2 and "embed" not in n and "positions" not in n}
    return [
        torch.optim.Muon(
            [named[n] for n in sorted(matrices)], lr=1.5 * rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW([p for n, p in named.items() if n not in matrices], lr=rate, weight_decay=0.01),
    ]


def train(model: Recognizer, data: TrainingData, *, steps: int, size: int, rate: float) -> None:
    """One cycle of the learning rate."""
    batches = data.batches(size)
    spectrum, normal = model.front_end.spectrum, model.front_end.normal
    with torch.no_grad():
        normal.load_state_dict(GlobalCMVN.estimate(spectrum(next(batches).sound) for _ in range(16)).state_dict())
    nn.init.normal_(model.heads["attention"].embed.weight, std=0.1)  # it makes the scores, too
    augment = SpecAugment(time_masks=2, time_share=0.05, frequency_masks=1, frequency_width=8)
    both = optimisers(model, rate)
    schedules = [OneCycleLR(o, o.param_groups[0]["lr"], steps, pct_start=0.1, cycle_momentum=False) for o in both]
    model.train()
    bar = tqdm(range(steps), mininterval=5)
    for step in bar:
        batch = next(batches)
        with torch.no_grad():
            x = augment(model.front_end(batch.sound))
        parts = losses(model, model.encoder(x), batch, warm=step < WARM * steps)
        model.zero_grad()
        sum((WEIGHTS[name] * loss for name, loss in parts.items()), torch.zeros(())).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for each in (*both, *schedules):
            each.step()
        if step % 20 == 0:
            bar.set_postfix({name: f"{float(loss.detach()):.2f}" for name, loss in parts.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cache", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--threads", type=int, default=1, help="a second one pays only where no core has other work")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    here = Path(__file__).parent
    tokenizer = Pieces.load(here)
    model = from_config(read_yaml(here / "config.yaml"), tokenizer)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    data = TrainingData(Corpus(args.cache, "train"), tokenizer, total=args.steps * args.batch)
    began, busy = time.perf_counter(), time.process_time()
    train(model, data, steps=args.steps, size=args.batch, rate=args.rate)
    print(f"trained in {time.perf_counter() - began:.0f} s ({time.process_time() - busy:.0f} s of CPU)")
    model.eval()
    save_model(model, args.folder)


if __name__ == "__main__":
    main()
