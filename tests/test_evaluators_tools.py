"""Our agent and our processor inside the real tools: what these wrote (see latency/run_doors.py), and how it scores."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from evaluator_doubles import evaluate, install, parser, process
from latency.run_doors import CLIPS, MODEL, OURS, STEP_MS, clips, prepare

from speechattn.score.latency.clocks import Apart
from speechattn.score.latency.instances import read_instances
from speechattn.score.latency.said import SIMULSTREAM, Said
from speechattn.score.latency.segments import by_talk, read_sentences
from speechattn.score.latency.simulstream import Recording, read_simulstream
from speechattn.score.latency.table import METRICS, mean, talk_figures

HERE = Path(__file__).parent / "latency"
LOGS = ("digits", "digits.http", "digits.unstable")
EXACT = {"rel": 1e-9, "abs": 1e-6}


@pytest.fixture(autouse=True)
def _doubles() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        install(patch)
        yield


def scores(folder: Path = HERE) -> dict[str, Any]:
    """What the tools said."""
    found: dict[str, Any] = json.loads((folder / "digits.scores.json").read_text(encoding="utf-8"))
    return found


def instances(folder: Path = HERE) -> list[Said]:
    return read_instances((folder / "digits.instances.log").read_text(encoding="utf-8").splitlines())


def recordings(name: str, folder: Path = HERE) -> list[Recording]:
    return read_simulstream((folder / f"{name}.simulstream.jsonl").read_text(encoding="utf-8").splitlines())


def tokens(name: str, folder: Path = HERE) -> list[Any]:
    """The log without the time of computing."""
    return [[(c.arrival, c.generated, c.deleted) for c in one.chunks] for one in recordings(name, folder)]


def test_simuleval_logged_what_the_agent_says() -> None:
    from speechattn.evaluators.simuleval import SpeechAttnAgent

    options = parser()
    SpeechAttnAgent.add_args(options)
    agent = SpeechAttnAgent(options.parse_args([f"--{k.replace('_', '-')}={v}" for k, v in MODEL.items()]))
    found = evaluate(agent, [(samples.astype(np.float32) / 32768, 16000) for samples, _ in clips()], STEP_MS)
    logged = instances()
    assert [[word for word, _ in said] for said in found] == [list(one.units) for one in logged]
    for said, one in zip(found, logged, strict=True):
        assert [delay for _, delay in said] == pytest.approx(one.delays)
        assert one.elapsed
        assert all(late > early for early, late in zip(one.delays, one.elapsed, strict=True))


@pytest.mark.parametrize("name", ["digits", "digits.unstable"])
def test_simulstream_logged_what_the_processor_says(name: str) -> None:
    from speechattn.evaluators.simulstream import SpeechAttnProcessor

    processor = SpeechAttnProcessor(
        SimpleNamespace(
            type=OURS, detokenizer_type="simuleval", latency_unit="spm", speech_chunk_size=STEP_MS / 1000,
            unstable=name.endswith("unstable"), **MODEL,
        )
    )  # fmt: skip
    for (samples, _), logged in zip(clips(), tokens(name), strict=True):
        found = process(processor, samples.astype(np.float32) / 32768)
        assert [one.new_tokens for _, one in found] == [list(generated) for _, generated, _ in logged]
        assert [one.deleted_tokens for _, one in found] == [list(deleted) for *_, deleted in logged]
        assert [1000 * at for at, _ in found] == pytest.approx([arrival for arrival, *_ in logged])


def test_the_proxy_logs_the_same_and_shown_words_are_earlier() -> None:
    assert tokens("digits.http") == tokens("digits")
    fixed, shown = ([one.said(tokens="spm") for one in recordings(name)] for name in ("digits", "digits.unstable"))
    assert [one.units for one in shown] == [one.units for one in fixed] == [one.units for one in instances()]
    assert sum(sum(one.delays) for one in shown) < sum(sum(one.delays) for one in fixed)
    assert all(not deleted for log in tokens("digits") for *_, deleted in log)


def test_our_numbers_are_those_of_simuleval() -> None:
    for name, value in scores()["simuleval"].items():
        found = mean(instances(), METRICS[name.removesuffix("_CA")], aware=name.endswith("_CA"))
        assert found is not None
        assert found.value == pytest.approx(value, **EXACT)


@pytest.mark.parametrize("name", LOGS)
def test_our_numbers_are_those_of_simulstream(name: str, tmp_path: Path) -> None:
    prepare(tmp_path)
    said, logs = scores()["simulstream"][name], recordings(name)
    lines = (tmp_path / "clips.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) == sum(map(len, CLIPS))
    talks = [one.said(tokens="spm", clock=Apart()) for one in logs]
    both = by_talk(talks, read_sentences(tmp_path / "clips.yaml", lines))
    figure = talk_figures(both, counting=SIMULSTREAM)[0]
    assert figure.unaware is not None
    assert figure.aware is not None
    assert [figure.unaware.value / 1000, figure.aware.value / 1000] == pytest.approx(said["stream_laal"], **EXACT)
    erased = [one.erasure(tokens="spm") for one in logs]
    assert sum(one.erased for one in erased) / sum(one.last for one in erased) == pytest.approx(
        said["normalized_erasure"], **EXACT
    )


@pytest.mark.slow
def test_the_tools_still_do_so(tmp_path: Path) -> None:
    """Where both are installed, in processes of their own."""
    if not all(importlib.util.find_spec(tool) for tool in ("mweralign", "librosa")) or subprocess.run(
        [sys.executable, "-c", "import simuleval.cli, simulstream.inference"], capture_output=True, check=False
    ).returncode:  # fmt: skip
        pytest.skip("SimulEval and simulstream are not installed")
    run = [sys.executable, str(HERE / "run_doors.py"), str(tmp_path)]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [(one.units, one.delays) for one in instances(tmp_path)] == [(one.units, one.delays) for one in instances()]
    for name in LOGS:
        assert tokens(name, tmp_path) == tokens(name)
        now, then = scores(tmp_path)["simulstream"][name], scores()["simulstream"][name]
        assert now["normalized_erasure"] == then["normalized_erasure"]
        assert now["stream_laal"][0] == pytest.approx(then["stream_laal"][0], rel=1e-9)
