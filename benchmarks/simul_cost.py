"""What a policy's decision costs beside the decoding that it decides about; `cost` of `benchmarks/simul.py`.

    python benchmarks/simul_cost.py [--fast]

All policies decide about the same drafts of one session, turn by turn, each in the processor time of one thread; what
AlignAtt says is committed. A step is what the decoder does between two decisions: its draft of a window (tiny.en), or
the search over a chunk (the shipped model), where handing the draft over counts as a part of the decision. For
`wait-k-ctc` so does counting words: the head's pass over the frames.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from report import Report

from speechattn import Session, load_model
from speechattn.data.fotaq import default_folder, prepare, read_split
from speechattn.data.streams import join
from speechattn.errors import SpeechAttnError
from speechattn.frames import Frames
from speechattn.model import Recognizer
from speechattn.model.load import DEFAULT
from speechattn.policy import Policy, Source
from speechattn.policy.adaptive import CTCWaitK, WordCounter, WordsHeard
from speechattn.policy.align_att import AlignAtt
from speechattn.policy.ed_att import EDAtt
from speechattn.policy.hold import Hold, WaitK
from speechattn.policy.local_agreement import LocalAgreement
from speechattn.policy.retranslation import Retranslation
from speechattn.search import Draft

__all__ = ["costs"]

RATE = 16000
MOST = 2.0  # percent of a decoding step


class Watch:
    """Seconds of processor time that calls took, by name."""

    def __init__(self) -> None:
        self.took: dict[str, list[float]] = defaultdict(list)

    def call(self, name: str, f: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """What `f` returns."""
        began = time.process_time()
        found = f(*args, **options)
        self.took[name].append(time.process_time() - began)
        return found

    def watched(self, name: str, f: Callable[..., Any]) -> Callable[..., Any]:
        """`f`, whose calls are timed."""
        return lambda *args, **options: self.call(name, f, *args, **options)

    def since(self, name: str) -> float:
        """What was not asked for before."""
        return sum(self.took.pop(name, ()))


class WatchedCounter(WordCounter):
    """Its work is `counting`."""

    watch: Watch

    def labels(self, frames: Frames) -> list[list[int]]:
        return self.watch.call("counting", super().labels, frames)  # type: ignore[no-any-return]

    def hear(self, labels: Iterable[int], before: WordsHeard | None = None) -> WordsHeard:
        return self.watch.call("counting", super().hear, labels, before)  # type: ignore[no-any-return]


class Rivals:
    """All decide about every draft; what the first one says is done. A decision is noted with the step before it."""

    def __init__(self, policies: Mapping[str, Policy], watch: Watch, counter: WordCounter | None) -> None:
        self.policies, self.watch = policies, watch
        self.heads = tuple(dict.fromkeys(head for policy in policies.values() for head in policy.heads))
        self.steps: list[float] = []
        self.decisions: dict[str, list[float]] = defaultdict(list)
        if counter is not None:
            self.counter = counter

    def initial(self) -> tuple[Any, ...]:
        """Of each."""
        return tuple(policy.initial() for policy in self.policies.values())

    def accept(self, draft: Draft, source: Source, state: tuple[Any, ...]) -> tuple[int, tuple[Any, ...]]:
        """Of each; a step without a draft is not noted."""
        said, step = [], self.watch.since("step")
        handed, counting = self.watch.since("looks"), self.watch.since("counting")
        for (name, policy), before in zip(self.policies.items(), state, strict=True):
            said.append(self.watch.call(name, policy.accept, draft, source, before))
            took = self.watch.since(name) + handed + (counting if name == "wait-k-ctc" else 0.0)
            if len(draft.tokens) and not source.finished:
                self.decisions[name].append(took)
        if len(draft.tokens) and not source.finished:
            self.steps.append(step)
        return said[0][0], tuple(after for _, after in said)

    def why(self, draft: Draft, source: Source, state: tuple[Any, ...], n: int) -> str:
        """Nobody asks."""
        return ""


def rivals(model: Any, watch: Watch) -> Rivals:
    """Of either kind of model, with heads that look."""
    streams = isinstance(model, Recognizer)
    decoder = model.heads["attention"] if streams else model.decoder
    heads, words, counter = decoder.alignment_heads, model.tokenizer.words, None
    if not streams:
        heads = model.alignment_heads
    layer = tuple((len(decoder.layers) // 2, head) for head in range(decoder.heads))
    policies: dict[str, Policy] = {"alignatt": AlignAtt.whisper(heads)}
    if not streams:  # a search gives its alignment heads
        policies["alignatt-fbk"] = replace(AlignAtt.fbk(0, 1), heads=layer)
    policies |= {
        "edatt": EDAtt(heads), "local-agreement": LocalAgreement(), "hold-n": Hold(), "wait-k": WaitK(3, words),
        "retranslation": Retranslation(),
    }  # fmt: skip
    if streams and model.counter is not None:
        counter = WatchedCounter(model.counter.head, model.counter.pieces, model.counter.spaceless)
        object.__setattr__(counter, "watch", watch)
        policies["wait-k-ctc"] = CTCWaitK(3, words, counter=counter)
    return Rivals(policies, watch, counter)


def heard(name: str, sound: np.ndarray) -> tuple[Rivals, Watch]:
    """A session of the model, whose decoding and decisions are timed."""
    watch, model = Watch(), load_model(name)
    decide = rivals(model, watch)
    if isinstance(model, Recognizer):
        search = model.search()
        search.decoder.step = watch.watched("pass", search.decoder.step)  # type: ignore[attr-defined]
        search.peek = watch.watched("step", search.peek)  # type: ignore[method-assign]
        search.looks = watch.watched("looks", search.looks)  # type: ignore[method-assign]
        session = Session(model, policy=decide, search=search)
    else:
        model.decoder.step = watch.watched("pass", model.decoder.step)
        model.draft = watch.watched("step", model.draft)
        session = Session(model, policy=decide)
    session.feed(sound, RATE)
    session.finish()
    return decide, watch


def interval(values: np.ndarray) -> str:
    """95 % bootstrap of a median."""
    drawn = np.random.default_rng(0).choice(values, (1000, len(values)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    return f"[{low:.2g}, {high:.2g}]"


def costs(report: Report, *, fast: bool = False, models: Sequence[str] = (DEFAULT, "tiny.en")) -> None:
    """A row for each policy and model; a model whose package is missing is left out, which the report says."""
    torch.set_num_threads(1)
    lines = read_split(prepare(default_folder(), ("test",)), "test")
    stream = join("dialogue", lines[: 4 if fast else 40])
    for name in models:
        kind = "stream" if name == DEFAULT else "window"
        try:
            decide, watch = heard(name, stream.samples)
        except SpeechAttnError as error:
            print(f"cost of {name}: not measured, {error}")
            continue
        steps, one = np.array(decide.steps), float(np.median(watch.took["pass"]))
        for policy, took in decide.decisions.items():
            share = 100 * np.array(took) / steps
            note = (
                f"median {interval(share)} of {len(share)} decisions, p95 {np.percentile(share, 95):.2g}; "
                f"{1e3 * np.median(took):.3f} of {1e3 * np.median(steps):.1f} ms (one pass {1e3 * one:.1f}); "
                f"{name}, {stream.duration_s:.0f} s, processor time of one thread"
            )
            report.row(f"cost_{kind}_{policy}", float(np.median(share)), "%", note, f"below {MOST:g}",
                       lambda v: v < MOST)  # fmt: skip


def main() -> None:
    """Alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="a few seconds of sound, for development")
    report = Report()
    costs(report, fast=parser.parse_args().fast)
    report.print()


if __name__ == "__main__":
    main()
