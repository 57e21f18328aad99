"""Searches beside their peers: same posteriors, same beam, one thread, in turn in one process.

    make bench-search                      # the figures that are quoted
    python benchmarks/search.py --quick

CTC posteriors are made, of 500 tokens in 1,000 frames: "spiky" as of a trained model (blank nearly everywhere, a spike
every sixth frame, often with a rival), and "flat" (random, blank as likely as any), where a beam is busy all the time.
Peers without language model: flashlight-text (sums over paths, as ours) and pyctcdecode, where they are installed.
The encoder is the 12-layer Conformer of benchmarks/encoder.py in steps of 16 frames.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import logging
import random
from collections.abc import Callable

import joint_search
import long_recordings
import torch
import transducer_search
from encoder import CHUNK, Live, conformer
from report import Report, interleaved
from torch import Tensor

from speechattn.frames import Frames
from speechattn.search.beam import Beam
from speechattn.search.ctc import CTCGreedy, CTCPrefixBeam
from speechattn.search.phrases import Phrases

VOCAB, FRAMES, BEAM, CANDIDATES = 500, 1000, 10, 40
Run = Callable[[], object]


def spiky(frames: int) -> Tensor:
    """Log-probabilities [T, V] as of a trained model."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(frames, VOCAB, generator=g)
    x[:, 0] += 10
    for t in range(3, frames - 1, 6):
        token, rival = torch.randint(1, VOCAB, (2,), generator=g).tolist()
        x[t, token] += 11 + torch.randn((), generator=g)
        x[t, rival] += 9
        if t % 4 == 0:  # some last
            x[t + 1, token] += 10
    return x.log_softmax(-1)


def flat(frames: int) -> Tensor:
    """Log-probabilities [T, V] of nothing."""
    return torch.randn(frames, VOCAB, generator=torch.Generator().manual_seed(0)).log_softmax(-1)


def flashlight(x: Tensor) -> Callable[[], tuple[list[int], float]] | None:
    """The lexicon-free decoder of flashlight-text: its best answer and score."""
    if importlib.util.find_spec("flashlight") is None:
        return None
    from flashlight.lib.text.decoder import CriterionType, LexiconFreeDecoder, LexiconFreeDecoderOptions, ZeroLM

    options = LexiconFreeDecoderOptions(
        beam_size=BEAM, beam_size_token=CANDIDATES, beam_threshold=1e9, lm_weight=0, sil_score=0, log_add=True,
        criterion_type=CriterionType.CTC,
    )  # fmt: skip
    decoder = LexiconFreeDecoder(options, ZeroLM(), -1, 0, [])

    def run() -> tuple[list[int], float]:
        best = decoder.decode(x.data_ptr(), *x.shape)[0]
        return [k for k, _ in itertools.groupby(best.tokens) if k > 0], best.score

    return run


def pyctcdecode(x: Tensor) -> Callable[[], tuple[list[int], float]] | None:
    """pyctcdecode, whose candidates are those above a log-probability: its default."""
    if importlib.util.find_spec("pyctcdecode") is None:
        return None
    logging.disable(logging.WARNING)  # that there is no language model
    from pyctcdecode import build_ctcdecoder

    decoder = build_ctcdecoder(["", *(chr(0x4E00 + i) for i in range(VOCAB - 1))])
    values = x.numpy()

    def run() -> tuple[list[int], float]:
        text, *_, score = decoder.decode_beams(values, beam_width=BEAM, beam_prune_logp=-1e9)[0]
        return [ord(c) - 0x4E00 + 1 for c in text], score

    return run


def book() -> Phrases:
    """1,000 random phrases of two to seven tokens."""
    draw = random.Random(0)
    texts = [[draw.randrange(1, VOCAB) for _ in range(draw.randint(2, 7))] for _ in range(1000)]
    return Phrases(texts, bonus=1.5, vocab=VOCAB)


def whole(x: Tensor) -> Frames:
    """One row."""
    return Frames(x[None], torch.ones(1, len(x), dtype=torch.bool))


def ctc_peers(report: Report, quick: bool) -> None:
    """The prefix beam of a whole utterance."""
    frames = 200 if quick else FRAMES
    for name, x in (("spiky", spiky(frames)), ("flat", flat(frames))):
        ours, heard = CTCPrefixBeam(BEAM, candidates=CANDIDATES), whole(x)
        runs: dict[str, Run] = {"ours": lambda ours=ours, heard=heard: ours.decode(heard)}
        peers = {"flashlight-text": flashlight(x)} | ({"pyctcdecode": pyctcdecode(x)} if name == "spiky" else {})
        there = {key: run for key, run in peers.items() if run is not None}
        took = interleaved(runs | there, 3 if quick else 9)
        best = ours.decode(heard)[0][0]
        note = f"beam {BEAM}, {CANDIDATES} candidates of {VOCAB}, {frames} frames, float32"
        report.row(f"ctc_beam_{name}", took["ours"], "ms", f"{note}; score {best.score:.3f}")
        for peer, run in there.items():
            text, score = run()
            found = "the same text" if text == list(best.tokens) else "another text"
            report.row(f"{peer}_{name}", took[peer], "ms", f"{found}, score {score:.3f}")
        if there:
            ratio = min(took[peer] for peer in there) / took["ours"]
            report.row(f"ctc_beam_{name}_speedup", ratio, "x", "over the faster peer, same run", "at least 1",
                       lambda v: v >= 1)  # fmt: skip
        reference = interleaved({"readable": lambda heard=heard: CTCPrefixBeam(BEAM, compiled=False).decode(heard),
                                 "greedy": lambda heard=heard: CTCGreedy().decode(heard)}, 1)  # fmt: skip
        report.row(f"ctc_readable_{name}", reference["readable"], "ms", "the same beam without numba")
        report.row(f"ctc_greedy_{name}", reference["greedy"], "ms", "")


def streamed(search: CTCPrefixBeam, x: Frames) -> Beam:
    """Steps of 16 frames; behind each what all agree on is committed."""
    beam = search.start(x)
    for at in range(0, x.mask.shape[1], CHUNK):
        beam = search.step(x[at : at + CHUNK], beam)
        beam = search.commit(beam, beam.agreed())
    return search.finish(beam)


def ctc_phrases(report: Report, quick: bool) -> None:
    """1,000 phrases, beside the encoder that the same sound needs."""
    frames = 200 if quick else FRAMES
    encoder = Live(conformer())
    step = interleaved({"step": encoder}, 20 if quick else 60)["step"]
    needed = step * frames / CHUNK
    report.row("encoder", needed, "ms", f"of {frames} frames, in steps of {CHUNK} ({step:.1f} ms)")
    for name, x in (("spiky", spiky(frames)), ("flat", flat(frames))):
        heard = whole(x)
        plain, biased = CTCPrefixBeam(BEAM), CTCPrefixBeam(BEAM, phrases=book())
        took = interleaved({
            "plain": lambda s=plain, x=heard: s.decode(x), "phrases": lambda s=biased, x=heard: s.decode(x),
            "streamed": lambda s=biased, x=heard: streamed(s, x),
        }, 3 if quick else 9)  # fmt: skip
        report.row(f"ctc_phrases_{name}", took["phrases"], "ms", f"1,000 phrases; without {took['plain']:.1f} ms")
        report.row(f"ctc_phrases_{name}_share", 100 * took["phrases"] / needed, "%", "of the encoder's time",
                   "at most 5", lambda v: v <= 5)  # fmt: skip
        report.row(f"ctc_phrases_{name}_streamed_share", 100 * took["streamed"] / needed, "%",
                   f"in steps of {CHUNK} frames with commits ({took['streamed']:.1f} ms)",
                   "at most 5", lambda v: v <= 5)  # fmt: skip


def main() -> None:
    """Run everything; `--quick` repeats less and takes shorter utterances."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under a minute, for development")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    torch.manual_seed(0)
    report = Report()
    with torch.inference_mode():
        for group in (ctc_peers, ctc_phrases, joint_search.figures):
            group(report, quick)
    for group in (transducer_search.figures, long_recordings.figures):
        group(report, quick)
    report.print()


if __name__ == "__main__":
    main()
