"""Our agent in SimulEval and our processor in simulstream, over the small model of `tests/digits`.

`python run_doors.py [FOLDER]` writes `digits.instances.log`, `digits.simulstream.jsonl` (and `digits.http...`, the same
through the HTTP server and simulstream's proxy) and `digits.scores.json` there, for each tool that is installed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import soundfile

HERE = Path(__file__).parent
DIGITS = HERE.parent / "digits"
CLIPS = ((4, 10, 13), (12, 10))
PROXY = "simulstream.server.speech_processors.remote.http_proxy_speech_processor.HttpProxySpeechProcessor"
OURS = "speechattn.evaluators.simulstream.SpeechAttnProcessor"
MODEL = {"model": str(DIGITS), "search": "ctc", "beam_size": 1}
STEP_MS = 250
PAUSE_S = 0.01  # where a talk ends with its last sentence rounding decides, in simulstream, which words come behind it


def clips() -> list[tuple[Any, list[str]]]:
    """16-bit samples at 16 kHz, and the text of each clip in them."""
    texts = [line["text"] for line in json.loads((DIGITS / "transcripts.json").read_text(encoding="utf-8"))]
    sounds = {n: soundfile.read(DIGITS / f"{n:02d}.flac", dtype="int16")[0] for part in CLIPS for n in part}
    return [(np.concatenate([sounds[n] for n in part]), [texts[n] for n in part]) for part in CLIPS]


def prepare(folder: Path) -> None:
    """Recordings, lists and references."""
    names, segments, lines = [], [], []
    for i, (samples, texts) in enumerate(clips()):
        soundfile.write(folder / f"talk{i}.wav", samples, 16000, subtype="PCM_16")
        names.append(str(folder / f"talk{i}.wav"))
        lines += texts
        at = 0.0
        for n in CLIPS[i]:
            length = soundfile.info(DIGITS / f"{n:02d}.flac").duration
            segments.append({"wav": f"talk{i}.wav", "offset": at, "duration": length - PAUSE_S})
            at += length
    (folder / "wavs.txt").write_text("\n".join(names) + "\n")
    (folder / "talks.txt").write_text("\n".join(" ".join(texts) for _, texts in clips()) + "\n")
    (folder / "clips.txt").write_text("\n".join(lines) + "\n")
    (folder / "clips.yaml").write_text(json.dumps(segments))


def call(*words: object) -> str:
    """A module as a program; its output."""
    done = subprocess.run([sys.executable, "-m", *map(str, words)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{words[0]}: {done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout


def simuleval(folder: Path, out: Path) -> dict[str, Any]:
    """The log, and SimulEval's scores."""
    options = [word for name, value in MODEL.items() for word in (f"--{name.replace('_', '-')}", value)]
    call(
        "simuleval.cli", "--agent-class", "speechattn.evaluators.simuleval.SpeechAttnAgent", *options,
        "--source", folder / "wavs.txt", "--target", folder / "talks.txt", "--source-segment-size", STEP_MS,
        "--output", folder / "simuleval", "--no-progress-bar",
    )  # fmt: skip
    rows = [json.loads(line) for line in (folder / "simuleval" / "instances.log").read_text().splitlines()]
    (out / "digits.instances.log").write_text("".join(f"{json.dumps({**row, 'source': ['talk']})}\n" for row in rows))
    return simuleval_scores(out)


def simuleval_scores(out: Path) -> dict[str, float]:
    """Of the log: what SimulEval prints, but not rounded, and with computing counted too (CA)."""
    from simuleval.evaluator.instance import LogInstance
    from simuleval.evaluator.scorers.latency_scorer import LATENCY_SCORERS_DICT

    rows = dict(enumerate(map(LogInstance, (out / "digits.instances.log").read_text().splitlines())))
    found = {}
    for name in ("AL", "LAAL", "AP", "DAL", "ATD"):
        for aware in (False, True):
            found[f"{name}{'_CA' * aware}"] = LATENCY_SCORERS_DICT[name](computation_aware=aware)(rows)
    return found


def simulstream(folder: Path, out: Path) -> dict[str, Any]:
    """Logs of our processor, and through HTTP; StreamLAAL, erasure and real-time factor."""
    usual = {"detokenizer_type": "simuleval", "latency_unit": "spm"}
    own = {"type": OURS, **usual, **MODEL, "speech_chunk_size": STEP_MS / 1000}
    options = [word for name, value in MODEL.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    serve = [sys.executable, "-m", "speechattn", "simulstream", "--port", "0", *options]
    serve += ["--speech-chunk-size", str(STEP_MS / 1000)]
    with subprocess.Popen(serve, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            lines = iter(server.stderr.readline, "")
            port = next(int(line.rsplit(":", 1)[1]) for line in lines if "http://" in line)
            configs = {"digits": own, "digits.http": {"type": PROXY, **usual, "hostname": "127.0.0.1", "port": port}}
            found = {}
            for name, config in {**configs, "digits.unstable": {**own, "unstable": True}}.items():
                found[name] = run(name, config, folder, out)
            return found
        finally:
            server.terminate()


def run(name: str, config: dict[str, Any], folder: Path, out: Path) -> dict[str, Any]:
    """One configuration."""
    yaml, log = folder / f"{name}.yaml", out / f"{name}.simulstream.jsonl"
    yaml.write_text(json.dumps(config))
    log.unlink(missing_ok=True)
    call(
        "simulstream.inference", "--speech-processor-config", yaml, "--wav-list-file", folder / "wavs.txt",
        "--metrics-log-file", log, "--src-lang", "en", "--tgt-lang", "en",
    )  # fmt: skip
    log.write_text(log.read_text().replace(f"{folder}/", ""))
    return simulstream_scores(yaml, log, folder)


def simulstream_scores(yaml: Path, log: Path, folder: Path) -> dict[str, Any]:
    """What its programs print."""
    given = ["--eval-config", yaml, "--log-file", log]
    latency = call(
        "simulstream.metrics.score_latency", *given, "--scorer", "stream_laal", "-r", folder / "clips.txt",
        "-a", folder / "clips.yaml",
    )  # fmt: skip
    ideal, aware = (float(part.split("=")[1].rstrip(")\n")) for part in latency.rsplit("LatencyScores(")[1].split(","))
    stats = json.loads(call("simulstream.metrics.stats", *given).split("Stats: ")[1])
    return {"stream_laal": [ideal, aware], **{key: value["value"] for key, value in stats.items()}}


if __name__ == "__main__":
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE
    with TemporaryDirectory() as scratch:
        prepare(Path(scratch))
        scores = {
            tool: run_tool(Path(scratch), out)
            for tool, run_tool in (("simuleval", simuleval), ("simulstream", simulstream))
            if find_spec(tool) is not None
        }
    (out / "digits.scores.json").write_text(json.dumps(scores, indent=1) + "\n")
