"""`speechattn sinks MODEL MANIFEST`: attention sinks and massive activations of a speech language model."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from speechattn.analysis.picture import FORMATS, need_matplotlib, save
from speechattn.audio.clip import AudioVisual
from speechattn.cli.attention import apart, writable
from speechattn.errors import InputError, ModelError
from speechattn.frames import Frames
from speechattn.model import Recognizer
from speechattn.model.load import load_model, located
from speechattn.multimodal.causal import Inspected
from speechattn.multimodal.sinks import GROUPS, Thresholds
from speechattn.multimodal.sinks_report import Report, Tally
from speechattn.score.evaluation import aligned_table
from speechattn.text.normal import NORMALISERS, normaliser

if TYPE_CHECKING:
    from speechattn.data.batch import Batch

__all__ = ["add_parser"]

HEAD = "llm"
HELP = {
    "received": "a sink gets more than this share of the attention of later queries",
    "even": "and at least so many times what even attention would give it",
    "queries": "places with fewer later queries are not judged",
    "absolute": "an activation is massive if it is larger than this",
    "relative": "and at least so many times the median of its row and layer",
    "alike": "cosine with BOS from which a sink is like it",
    "top": "so many largest features of BOS and of sinks are compared",
}


@runtime_checkable
class Inspects(Protocol):
    """A head that shows what is inside it."""

    def inspect(self, x: Frames, tokens: Tensor, lengths: Tensor) -> tuple[Inspected, Tensor]:
        """Encoder frames [B, T, D] and the first `lengths` [B] of `tokens` [B, U] -> states, and kinds [B, S]."""


def add_parser(commands: Any) -> None:
    """Options of the command."""
    parser = commands.add_parser(
        "sinks", help="attention sinks and massive activations of a speech language model", allow_abbrev=False
    )
    parser.add_argument("model", metavar="MODEL", help="a model folder, or a checkpoint of `speechattn fit`")
    parser.add_argument("manifest", metavar="MANIFEST", help="cuts of lhotse (.jsonl.gz) with their texts")
    parser.add_argument("--output", "-o", metavar="FILE", help="all numbers, as JSON")
    parser.add_argument("--picture", metavar="FILE", help=f"who gets attention, layer by layer: {', '.join(FORMATS)}")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N utterances")
    parser.add_argument("--batch-seconds", type=float, default=60.0, metavar="S", help="sound of a batch (default 60)")
    parser.add_argument("--normalise", default="none", choices=NORMALISERS, help="of texts, as in training")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps (default cpu)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--plugin", action="append", default=[], metavar="MODULE", help="whose classes the model uses")
    group = parser.add_argument_group("what counts")
    for field in fields(Thresholds):
        kind = type(field.default)
        group.add_argument(f"--{field.name}", type=kind, default=field.default, metavar="X",
                           help=f"{HELP[field.name]} (default {field.default:g})")  # fmt: skip
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Look inside for every utterance; what cannot be written or used is said before the work begins."""
    for name, least in (("limit", 1), ("batch_seconds", 0.001), ("threads", 1)):
        value = getattr(options, name)
        if value is not None and not value >= least:
            raise InputError(f"--{name.replace('_', '-')} {value}: at least {least}")
    output, picture = (Path(name) if name else None for name in (options.output, options.picture))
    apart({"MODEL": Path(options.model), "MANIFEST": Path(options.manifest), "--output": output, "--picture": picture})
    if picture is not None:
        need_matplotlib()
        if picture.suffix.lower() not in FORMATS:
            raise InputError(f"--picture {picture}: a picture ends in {', '.join(FORMATS)}")
    for path in (output, picture):
        if path is not None:
            writable(path)
    try:
        thresholds = Thresholds(**{field.name: getattr(options, field.name) for field in fields(Thresholds)})
    except ValueError as error:
        raise InputError(f"--{error}") from error
    if not located(options.model).exists():
        raise InputError(f"{options.model}: no such model: wanted a model folder, or a checkpoint of `speechattn fit`")
    if not Path(options.manifest).exists():
        raise InputError(f"{options.manifest}: no such manifest; `speechattn prepare` makes one")
    torch.set_num_threads(options.threads)
    report = looked(options, thresholds)
    if output is not None:
        output.write_text(json.dumps(report.to_json(), indent=1) + "\n", encoding="utf-8")
    if picture is not None:
        from speechattn.multimodal.sinks_picture import draw

        title = f"Attention sinks of {Path(options.model).name} on {Path(options.manifest).name}"
        save(draw(report, title=title), picture)
    print(text(report))
    return 0


def looked(options: argparse.Namespace, thresholds: Thresholds) -> Report:
    """The report of all utterances; those that cannot be read are named and left out."""
    model = model_of(options)
    head: object = dict(model.heads).get(HEAD)
    if not isinstance(head, Inspects):
        raise InputError(f"{options.model}: no speech language model: it has the heads {', '.join(model.heads)}, and "
                         f"sinks are looked for in a head {HEAD}")  # fmt: skip
    tally = Tally(thresholds)
    with torch.inference_mode():
        for batch in batches(options, model):
            frames = model.listening(batch.sound)
            rows = [torch.tensor(model.tokenizer.encode(said), dtype=torch.long) for said in batch.texts]
            lengths = torch.tensor([len(row) for row in rows], device=options.device)
            tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(options.device)
            tally.add(*head.inspect(frames, tokens, lengths))
    if tally.example is None:
        raise InputError(f"{options.manifest}: no utterance of it could be heard")
    return tally.result()


def model_of(options: argparse.Namespace) -> Recognizer:
    """Of a folder or a checkpoint."""
    path = located(options.model)
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # where plugins are
    if not path.is_file():
        model = load_model(options.model, device=options.device, plugins=options.plugin)
        if not isinstance(model, Recognizer):
            raise InputError(f"{options.model}: no speech language model: a Whisper")
        return model
    from speechattn.model.folder import from_config
    from speechattn.task.checkpoint import parts_of, weights_of

    config, tokenizer = parts_of(path, options.plugin)
    model = from_config(config, tokenizer, where=str(path), plugins=options.plugin)
    try:
        model.load_state_dict(weights_of(path, options.plugin))
        return model.eval().requires_grad_(False).to(options.device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"{path}: {str(error)[:300]}") from error


def batches(options: argparse.Namespace, model: Recognizer) -> Iterator[Batch]:
    """The utterances of the manifest, longest first, with their pictures where the model looks at any."""
    from speechattn.data.cuts import Manifest
    from speechattn.data.loader import SILENCE, Sounds
    from speechattn.data.plan import Plan

    try:
        manifest = Manifest.read([Path(options.manifest)])
    except ImportError as error:
        raise InputError("cuts of lhotse need lhotse: pip install 'speechattn[train]'") from error
    manifest = manifest.select(np.arange(len(manifest))[: options.limit])
    if not len(manifest):
        raise InputError(f"{options.manifest}: no utterances")
    size = next((part.size for part in model.front_end.modules() if isinstance(part, AudioVisual)), None)
    sounds = Sounds(
        manifest, model.sample_rate, normaliser(options.normalise),
        check=lambda said, _: model.tokenizer.encode(said), video_size=size if manifest.filmed else None,
    )  # fmt: skip
    longest = float(manifest.durations_s.max())
    plan = Plan(manifest.durations_s, max(options.batch_seconds, longest), seed=None)
    with tqdm(total=len(manifest), unit=" utterances", desc="sinks", disable=not sys.stderr.isatty()) as bar:
        for rows in plan.epoch(0):
            batch, broken = sounds.batch(rows, 0)
            for one in broken:
                print(f"speechattn: skipped {one.id}: {one.reason}", file=sys.stderr)
            if SILENCE not in batch.ids:
                yield batch.to(options.device)
            bar.update(len(rows))


def text(report: Report) -> str:
    """Three tables and a summary."""
    kinds = list(report.places)
    first = [["sinks in a sequence", *kinds, "% on BOS", "% on sinks between"]]
    for number, layer in enumerate(report.layers, 1):
        shares = [percent(layer.share.get("BOS", 0.0)), percent(report.between(layer.share))]
        first.append([f"layer {number}", *(number_of(layer.sinks[name]) for name in kinds), *shares])
    groups = [name for name in GROUPS if any(name in state.ratio for state in report.states)]
    second = [["largest activation / median", *groups, "massive in a sequence"]]
    others = [name for name in kinds if name != "BOS"]
    third = [["cos² to BOS", *others, "sinks between"]]
    for number, state in enumerate(report.states):
        name = f"behind layer {number}" if number else "embeddings"
        massive = number_of(sum(state.massive.values()))
        second.append([name, *(figure(state.ratio.get(group), 1) for group in groups), massive])
        third.append([name, *(figure(state.cosine2[kind], 3) for kind in others), figure(state.sink_cosine2, 3)])
    there = ", ".join(f"{name} {number_of(value)}" for name, value in report.places.items())
    tables = [aligned_table(rows) for rows in (first, second, third)]
    return "\n\n".join([f"{report.sequences} sequences; places in each: {there}", *tables, report.summary()])


def figure(value: float | None, digits: int) -> str:
    """With so many digits; a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def number_of(value: float) -> str:
    """Whole numbers as such."""
    return f"{value:.0f}" if value == round(value) else f"{value:.2f}"


def percent(value: float) -> str:
    """Of a share."""
    return f"{100 * value:.1f}" if value else "0"
