"""What SimulEval, OmniSTEval and simulstream say of the synthetic logs in this folder.

`python run_tools.py [FOLDER]` writes NAME-VERSION.json for each tool that is installed; simulstream needs mweralign.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).parent
METRICS = ("AL", "LAAL", "AP", "DAL", "ATD", "StartOffset", "EndOffset")


def simuleval() -> dict[str, Any]:
    """Each metric of each utterance (None where SimulEval skips it), and the mean: words and characters."""
    from simuleval.evaluator.instance import LogInstance
    from simuleval.evaluator.scorers.latency_scorer import LATENCY_SCORERS_DICT

    found: dict[str, Any] = {}
    for unit, name in (("word", "words.instances.log"), ("char", "letters.instances.log")):
        rows = [LogInstance(line, unit) for line in (HERE / name).read_text(encoding="utf-8").splitlines()]
        for metric in METRICS:
            for aware in (False, True):
                judge = LATENCY_SCORERS_DICT[metric](computation_aware=aware)
                each = [judge({0: row}) if row.delays else None for row in rows]
                key = f"{name}/{metric}{'_CA' if aware else ''}"
                found[key] = {"each": each, "mean": judge(dict(enumerate(rows)))}
    return found


def omnisteval(folder: Path) -> dict[str, Any]:
    """All latency scores: utterances, and talks cut by the soft segmenter, with and without repaired times."""
    from mosestokenizer import MosesTokenizer
    from omnisteval.io import load_resegmentation_inputs, load_shortform_instances
    from omnisteval.resegment import resegment
    from omnisteval.scoring import evaluate_instances
    from omnisteval.tokenization import unicode_normalize

    found: dict[str, Any] = {}
    for unit, name in (("word", "words.instances.log"), ("char", "letters.instances.log")):
        lines = (HERE / name).read_text(encoding="utf-8").splitlines()
        (folder / "references.txt").write_text("".join(json.loads(line)["reference"] + "\n" for line in lines))
        rows = load_shortform_instances(
            str(HERE / name), str(folder / "references.txt"), "delays", "elapsed", unit == "char"
        )
        found[name] = evaluate_instances(rows, compute_quality=False, is_longform=False)[0]
    for fixed in (False, True):
        given = load_resegmentation_inputs(
            str(HERE / "talks.yaml"), None, str(HERE / "talks.txt"), str(HERE / "talks.instances.log"),
            fix_emission_ca_flag=fixed,
        )  # fmt: skip
        rows, cut = resegment(*given)
        scores = evaluate_instances(rows, compute_quality=False, is_longform=True)[0]
        found[f"talks{'/fixed' if fixed else ''}"] = {"scores": scores, "cut": [row["prediction"] for row in cut]}
    given = load_resegmentation_inputs(
        str(HERE / "talks.yaml"), None, str(HERE / "marks.txt"), str(HERE / "marks.instances.log")
    )
    words = sorted({unicode_normalize(word.text).lower() for part in given[:2] for talk in part for word in talk})
    pieces = MosesTokenizer(lang="en", no_escape=True)
    for language in (None, "en"):
        rows, cut = resegment(*given, lang=language)
        found[f"marks/{language}"] = {
            "scores": evaluate_instances(rows, compute_quality=False, is_longform=True)[0],
            "cut": [row["prediction"] for row in cut], "pieces": {word: pieces(word) for word in words},
        }  # fmt: skip
    found["cuts"] = cuts("omnisteval")
    return found


def cuts(tool: str) -> list[list[int | None]]:
    """The sentence of each word of every case of `cuts.json` (None for a word that is dropped)."""
    from mweralign import mweralign as align
    from omnisteval.alignment import Word, align_sequences, process_alignment
    from omnisteval.tokenization import unicode_normalize

    found = list[list[int | None]]()
    for case in json.loads((HERE / "cuts.json").read_text(encoding="utf-8")):
        references, said = case["references"], case["said"]
        if tool == "mweralign":
            text = align.align_texts("\n".join(" ".join(words) for words in references), " ".join(said))
            found.append([s for s, line in enumerate(text.split("\n")) for _ in line.split()])
            continue
        wanted = [
            Word(unicode_normalize(word).lower(), seq_id=s) for s, words in enumerate(references) for word in words
        ]
        given = [Word(unicode_normalize(word).lower(), original=str(j)) for j, word in enumerate(said)]
        owners: list[int | None] = [None] * len(said)
        for word in process_alignment(*align_sequences(wanted, given, False), False):
            owners[int(word.original)] = word.seq_id
        found.append(owners)
    return found


def simulstream() -> dict[str, Any]:
    """Texts with their times, StreamLAAL, erasure and real-time factor of each log."""
    from simulstream.metrics.readers import LogReader, YamlReferenceReader
    from simulstream.metrics.scorers.latency import LatencyScoringSample
    from simulstream.metrics.scorers.latency.stream_laal import StreamLaal
    from simulstream.metrics.stats import NormalizedErasure, RealTimeFactor

    found: dict[str, Any] = {"mweralign": version("mweralign")}
    for name, talks, tokens, unit in (
        ("words", "talks", "word", "word"), ("pieces", "talks", "spm", "word"), ("zh", "zh", "char", "char"),
    ):  # fmt: skip
        config = SimpleNamespace(detokenizer_type="simuleval", latency_unit=tokens)
        reader = LogReader(config, str(HERE / f"{name}.simulstream.jsonl"), latency_unit=unit)
        wanted = YamlReferenceReader(str(HERE / f"{talks}.yaml"), str(HERE / f"{talks}.txt")).references
        said = reader.final_outputs_and_latencies()
        scores = StreamLaal(Namespace(latency_unit=unit)).score(
            [LatencyScoringSample(talk, said[talk], sentences) for talk, sentences in wanted.items()]
        )
        found[name] = {
            "talks": {
                talk: [one.final_text, one.ideal_delays, one.computational_aware_delays] for talk, one in said.items()
            },
            "stream_laal": [scores.ideal_latency, scores.computational_aware_latency],
            "normalized_erasure": NormalizedErasure().compute(reader),
            "real_time_factor": RealTimeFactor().compute(reader),
        }
    return found


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE
    with TemporaryDirectory() as scratch:
        runs = {
            "simuleval": simuleval, "omnisteval": lambda: omnisteval(Path(scratch)), "simulstream": simulstream,
            "mweralign": lambda: {"cuts": cuts("mweralign")},
        }  # fmt: skip
        for tool, run in runs.items():
            if find_spec(tool) is not None:
                text = json.dumps(run(), ensure_ascii=False).replace("}, ", "},\n").replace("], ", "],\n")
                (folder / f"{tool}-{version(tool)}.json").write_text(text + "\n", encoding="utf-8")
