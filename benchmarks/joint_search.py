"""Joint CTC/attention search: time of a beam of 10 beside ESPnet's, and of an hour of a stream.

The attention decoder has 6 layers of 256 features, 4 heads, feed-forward of 2048 and 500 tokens, random weights that
both sides share. Frames of 40 ms are noise; CTC's log-probabilities are peaks for a text that the decoder itself
finds likely, so that beams have the length and the ends that they have in speech.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from report import Report
from torch import Tensor, nn

from speechattn.decoder.attention import AttentionDecoder
from speechattn.frames import Frames, Memory
from speechattn.search.attention import AttentionScorer
from speechattn.search.ctc_prefix import CTCPrefixScorer
from speechattn.search.joint import JointBeam

__all__ = ["figures"]

VOCAB, DIM, HEADS, DEPTH, INNER, BEAM, END = 500, 256, 4, 6, 2048, 10, 499
WEIGHTS = {"decoder": 0.7, "ctc": 0.3}
FRAME_S = 0.04
BLOCK = 16


def decoders() -> tuple[AttentionDecoder, Any]:
    """Ours and ESPnet's with the same weights; None where ESPnet is not installed."""
    from speechattn.pretrained.espnet.decoder import load_decoder

    try:
        from espnet2.asr.decoder.transformer_decoder import TransformerDecoder
    except ImportError:
        made = AttentionDecoder.usual(VOCAB, DIM, HEADS, DEPTH, INNER)
        return made.eval(), None
    theirs = TransformerDecoder(VOCAB, DIM, attention_heads=HEADS, linear_units=INNER, num_blocks=DEPTH).eval()
    nn.init.normal_(theirs.output_layer.weight, std=0.15)
    return load_decoder(dict(theirs.state_dict()), HEADS), theirs


def likely(decoder: AttentionDecoder, x: Frames, tokens: int) -> list[int]:
    """A text each of whose tokens is among the five that the decoder finds most probable there."""
    state, said = decoder.start(Memory.of(x)), [END]
    for _ in range(tokens):
        hidden, _, state = decoder.step(torch.tensor([said[-1:]]), state)
        scores = decoder.logits(hidden[0, 0])
        scores[[0, END]] = -torch.inf
        said.append(int(scores.topk(5).indices[torch.randint(5, ())]))
    return said[1:]


def peaks(text: list[int], frames: int) -> Tensor:
    """Log-probabilities [1, T, V] of a CTC head that hears the text, evenly spread, and is not always sure of it."""
    logits = torch.randn(1, frames, VOCAB)
    logits[..., 0] += 12.0
    for at, token in zip(torch.linspace(2, frames - 3, len(text)).long().tolist(), text, strict=True):
        logits[0, at, token] += 10.0 + 6 * float(torch.rand(()))
        logits[0, at, 1 + int(torch.randint(VOCAB - 2, ()))] += 10.0
    return logits.log_softmax(-1)


def ours(decoder: AttentionDecoder, log_probs: Tensor, block: int | None = None) -> JointBeam:
    """The search; its CTC head gives out the peaks in turn."""
    at = [0]

    def head(x: Frames) -> Frames:
        begin, at[0] = at[0], at[0] + x.mask.shape[1]
        return Frames(log_probs[:, begin : at[0]], x.mask)

    scorers = [(WEIGHTS["decoder"], AttentionScorer(decoder, END, END)), (WEIGHTS["ctc"], CTCPrefixScorer(head, END))]
    return JointBeam(scorers, BEAM, eos=END, block=block, repeat=None)


class Peaks(nn.Module):
    """ESPnet's CTC head."""

    def __init__(self, log_probs: Tensor) -> None:
        super().__init__()
        self.log_probs = log_probs

    def log_softmax(self, x: Tensor) -> Tensor:
        """As ESPnet calls it."""
        return self.log_probs[:, : x.shape[1]].clone()


def espnet(decoder: Any, log_probs: Tensor) -> Any:
    """Its batched beam search with the same scorers."""
    from espnet.nets.batch_beam_search import BatchBeamSearch
    from espnet.nets.scorers.ctc import CTCPrefixScorer as Theirs

    return BatchBeamSearch(
        scorers={"decoder": decoder, "ctc": Theirs(Peaks(log_probs), END)}, weights=WEIGHTS, beam_size=BEAM,
        vocab_size=VOCAB, sos=END, eos=END, pre_beam_score_key="full",
    )  # fmt: skip


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what came of it."""
    began = time.perf_counter()
    found = run()
    return time.perf_counter() - began, found


@torch.inference_mode()
def offline(report: Report, repeats: int, lengths_s: tuple[int, ...]) -> None:
    """Whole utterances, the two searches in turn."""
    mine, theirs = decoders()
    equal, errors, ratios, speeds, notes = 0, 0.0, [], [], []
    for seconds in lengths_s:
        frames = round(seconds / FRAME_S)
        x = Frames(torch.randn(1, frames, DIM), torch.ones(1, frames, dtype=torch.bool))
        log_probs = peaks(likely(mine, x, 3 * seconds), frames)
        taken: dict[str, list[float]] = {"mine": [], "theirs": []}
        for i in range(repeats + 1):
            mine_s, found = timed(lambda x=x, p=log_probs: ours(mine, p).decode(x)[0])
            theirs_s, expected = timed(lambda x=x, p=log_probs: espnet(theirs, p)(x.values[0])) if theirs else (0, [])
            if i:  # the first is a warm-up
                taken["mine"].append(mine_s)
                taken["theirs"].append(theirs_s)
        speeds.append(median(taken["mine"]) / seconds)
        if theirs:
            ratios.append(median(taken["theirs"]) / median(taken["mine"]))
            equal += list(found[0].tokens) == expected[0].yseq.tolist()[1:-1]
            errors = max(errors, abs(found[0].score - float(expected[0].score)))
            notes.append(f"{seconds} s, {len(found[0].tokens)} tokens: {1e3 * median(taken['mine']):.0f} ms for "
                         f"{1e3 * median(taken['theirs']):.0f}")  # fmt: skip
    report.row("joint_beam10_real_time_factor", max(speeds), "x", "of one thread; the slowest of the utterances")
    if theirs:
        report.row("joint_beam10_speed_over_espnet", min(ratios), "x", "; ".join(notes), "at least 2", lambda v: v >= 2)
        report.row("joint_beam10_same_best", equal / len(lengths_s), "", f"largest difference of scores {errors:.1g}",
                   "all", lambda v: v == 1)  # fmt: skip


@torch.inference_mode()
def hour(report: Report, minutes: int, reset_s: int = 30) -> None:
    """A stream in blocks of 640 ms that is finished and begins anew every half minute, as pauses make it."""
    mine, _ = decoders()
    frames = round(reset_s / FRAME_S) // BLOCK * BLOCK
    x = Frames(torch.randn(1, frames, DIM), torch.ones(1, frames, dtype=torch.bool))
    log_probs = peaks(likely(mine, x, 3 * reset_s), frames)
    rounds = max(2, round(60 * minutes / reset_s))
    taken, heard, tokens = [], torch.zeros(1, dtype=torch.long), 0
    for _ in range(rounds):
        search = ours(mine, log_probs, BLOCK)
        began = time.process_time()
        beam = search.start_at(x, heard)
        for at in range(0, frames, BLOCK):
            beam = search.step(x[at : at + BLOCK], beam)
        tokens += len(search.hypotheses(search.finish(beam))[0][0].tokens)
        taken.append((time.process_time() - began) / reset_s)
        heard = beam.frames
    tenth = max(1, rounds // 10)
    first, last = median(taken[1 : 1 + tenth]), median(taken[-tenth:])
    report.row("joint_stream_real_time_factor", median(taken), "x",
               f"beam {BEAM}, blocks of {BLOCK * FRAME_S:.2f} s, {tokens / rounds / reset_s:.1f} tokens a second, one "
               "thread")  # fmt: skip
    report.row("joint_stream_last_over_first", last / first, "x",
               f"CPU time per second of audio, last tenth of {minutes} minutes over the first",
               "at most 1.2", lambda v: v <= 1.2)  # fmt: skip


@torch.inference_mode()
def growth(report: Report, piece_s: int = 6, pieces: int = 4) -> None:
    """One utterance without a pause, block by block: the last seconds beside the first, here and in ESPnet."""
    mine, theirs = decoders()
    frames, n = round(piece_s * pieces / FRAME_S), round(piece_s / FRAME_S)
    x = Frames(torch.randn(1, frames, DIM), torch.ones(1, frames, dtype=torch.bool))
    log_probs = peaks(likely(mine, x, 3 * piece_s * pieces), frames)
    search = ours(mine, log_probs, BLOCK)
    beam, taken = search.start(x), []
    for at in range(0, frames, n):
        began = time.process_time()
        beam = search.step(x[at : at + n], beam)
        taken.append((time.process_time() - began) / piece_s)
    report.row("joint_unbroken_last_over_first", taken[-1] / taken[0], "x",
               f"seconds {piece_s * (pieces - 1)} to {piece_s * pieces} of one utterance over the first {piece_s}: "
               f"{taken[-1]:.2f} for {taken[0]:.2f} s per second")  # fmt: skip
    if theirs is None:
        return
    from espnet.nets.batch_beam_search_online import BatchBeamSearchOnline
    from espnet.nets.scorers.ctc import CTCPrefixScorer as Theirs

    online = BatchBeamSearchOnline(
        scorers={"decoder": theirs, "ctc": Theirs(Peaks(log_probs), END)}, weights=WEIGHTS, beam_size=BEAM,
        vocab_size=VOCAB, sos=END, eos=END, pre_beam_score_key="full", block_size=2 * BLOCK, hop_size=BLOCK,
        look_ahead=0, disable_repetition_detection=True,
    )  # fmt: skip
    taken = []
    for at in range(0, frames, n):
        began = time.process_time()
        online(x.values[0, at : at + n], is_final=False)
        taken.append((time.process_time() - began) / piece_s)
    report.row("espnet_online_last_over_first", taken[-1] / taken[0], "x",
               f"the same in ESPnet's online search: {taken[-1]:.2f} for {taken[0]:.2f} s per second")  # fmt: skip


def figures(report: Report, quick: bool) -> None:
    """All figures; `quick` takes shorter utterances and fewer repetitions."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    offline(report, 1 if quick else 3, (5,) if quick else (5, 10, 20))
    hour(report, 2 if quick else 60)
    if not quick:
        growth(report)


if __name__ == "__main__":
    import sys

    found = Report()
    figures(found, "--quick" in sys.argv)
    found.print()
