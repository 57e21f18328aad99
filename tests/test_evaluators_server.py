"""`speechattn simulstream` over HTTP: a client that speaks as simulstream's proxy does, and clients that do not."""

from __future__ import annotations

import base64
import http.client
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from evaluator_doubles import process

from speechattn.cli import main
from speechattn.cli import simulstream as command
from speechattn.cli.main import parser
from speechattn.evaluators import server as served
from speechattn.evaluators.server import BODY, Server, Sessions
from speechattn.evaluators.shown import Output
from speechattn.evaluators.talk import Talk
from speechattn.evaluators.voice import Voice

FOLDER = Path(__file__).parent / "digits"
GIVEN = ["--model", str(FOLDER), "--search", "ctc", "--beam-size", "1", "--speech-chunk-size", "0.25"]
TYPE = {"Content-Type": "application/json"}
Ask = Callable[..., tuple[int, Any]]


def sound(*numbers: int) -> Any:
    return np.concatenate([soundfile.read(FOLDER / f"{n:02d}.flac", dtype="float32")[0] for n in numbers])


SOUNDS = [sound(4, 10, 13), sound(12, 10), sound(13, 4)]


@pytest.fixture(scope="module")
def voice() -> Voice:
    return Voice(parser().parse_args(["simulstream", *GIVEN]))


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def sessions(voice: Voice) -> Sessions:
    return Sessions(voice, most=3, idle_s=10, clock=Clock())


@pytest.fixture
def ask(sessions: Sessions) -> Iterator[Ask]:
    with Server(("127.0.0.1", 0), sessions) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def ask(method: str, path: str, body: Any = None, headers: dict[str, str] = TYPE) -> tuple[int, Any]:
            """One request -> status and JSON."""
            line = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=300)
            text = body if isinstance(body, bytes) else json.dumps(body)
            line.request(method, f"/{path}", text, headers)
            answer = line.getresponse()
            said = answer.read()
            line.close()
            return answer.status, json.loads(said) if said else None

        yield ask
        server.shutdown()


class Proxy:
    """As simulstream's `HttpProxySpeechProcessor`."""

    def __init__(self, ask: Ask, name: str) -> None:
        self.ask, self.name = ask, name

    def call(self, method: str, path: str, **fields: Any) -> Any:
        status, said = self.ask(method, path, {"session_id": self.name, **fields})
        assert status == (200 if said is not None else 204), said
        return said

    @property
    def speech_chunk_size(self) -> float:
        return float(self.call("GET", "speech_chunk_size")["speech_chunk_size"])

    def process_chunk(self, waveform: Any) -> Output:
        return Output(**self.call("POST", "process_chunk", waveform=base64.b64encode(waveform.tobytes()).decode()))

    def end_of_stream(self) -> Output:
        return Output(**self.call("POST", "end_of_stream"))

    def tokens_to_string(self, tokens: list[str]) -> str:
        return str(self.call("GET", "tokens_to_string", tokens=tokens)["tokens_as_string"])

    def clear(self) -> None:
        self.call("POST", "clear")


class Here:
    """The same without a wire."""

    def __init__(self, voice: Voice) -> None:
        self.talk = Talk(voice)
        self.speech_chunk_size = self.talk.chunk_s
        self.process_chunk, self.end_of_stream = self.talk.hear, self.talk.end
        self.tokens_to_string, self.clear = self.talk.text, self.talk.clear


def test_many_clients_at_once_get_what_each_gets_alone(voice: Voice, ask: Ask, sessions: Sessions) -> None:
    here = Here(voice)
    alone = [process(here, x) for x in SOUNDS]
    assert all(any(output.new_tokens for _, output in said[:-1]) for said in alone)
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda i: process(Proxy(ask, f"client {i}"), SOUNDS[i]), range(3)))
    assert together == alone
    assert sessions.talks == {}


def test_languages_and_strings(ask: Ask) -> None:
    proxy = Proxy(ask, "a")
    assert proxy.tokens_to_string(["▁one", "▁two", "."]) == "one two."
    proxy.call("PUT", "source_language", language="en")
    proxy.call("PUT", "target_language", language="en")
    status, said = ask("PUT", "target_language", {"session_id": "a", "language": "de"})
    assert (status, said) == (400, {"error": f"{FOLDER} writes en, not de"})
    assert proxy.end_of_stream() == Output([], "", [], "")
    status, said = ask("POST", "process_chunk", {"session_id": "a", "waveform": "AAAAAA=="})
    assert (status, "finished" in said["error"]) == (400, True)
    proxy.clear()
    assert proxy.process_chunk(np.zeros(1, np.float32)) == Output([], "", [], "")


WAVE = base64.b64encode(np.zeros(4, np.float32).tobytes()).decode()


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status"),
    [
        ("GET", "", {}, TYPE, 404), ("POST", "speech_chunk_size", {"session_id": "a"}, TYPE, 405),
        ("POST", "process_chunk", {"session_id": "a"}, TYPE, 400), ("POST", "clear", {}, TYPE, 400),
        ("POST", "clear", {"session_id": "a", "more": 1}, TYPE, 400), ("POST", "clear", [], TYPE, 400),
        ("POST", "clear", {"session_id": 7}, TYPE, 400), ("POST", "clear", {"session_id": "x" * 201}, TYPE, 400),
        ("POST", "clear", b"{", TYPE, 400), ("POST", "clear", b"[" * 99999, TYPE, 400),
        ("POST", "clear", b"\xff", TYPE, 400),
        ("POST", "clear", {"session_id": "a"}, {"Content-Type": "text/plain"}, 415),
        ("POST", "clear", {"session_id": "a"}, {**TYPE, "Content-Length": "-1"}, 411),
        ("POST", "clear", {"session_id": "a"}, {**TYPE, "Content-Length": "9" * 20}, 411),
        ("POST", "process_chunk", b" " * (BODY + 1), TYPE, 413),
        ("POST", "process_chunk", {"session_id": "a", "waveform": "AAA"}, TYPE, 400),
        ("POST", "process_chunk", {"session_id": "a", "waveform": "AAA?AAA=="}, TYPE, 400),
        ("POST", "process_chunk", {"session_id": "a", "waveform": "AAAA"}, TYPE, 400),
        ("POST", "process_chunk", {"session_id": "a", "waveform": 3}, TYPE, 400),
        ("POST", "process_chunk", {"session_id": "a", "waveform": "AADAfw=="}, TYPE, 400),
        ("PUT", "source_language", {"session_id": "a", "language": None}, TYPE, 400),
        ("GET", "tokens_to_string", {"session_id": "a", "tokens": [1]}, TYPE, 400),
    ],
)  # fmt: skip
def test_what_is_refused_has_a_reason(ask: Ask, method: str, path: str, body: Any, headers: Any, status: int) -> None:
    found, said = ask(method, path, body, headers)
    assert found == status
    assert list(said) == ["error"]
    assert said["error"]


def test_sessions_are_few_and_do_not_last_for_ever(ask: Ask, sessions: Sessions) -> None:
    def chunk(name: str) -> int:
        return ask("POST", "process_chunk", {"session_id": name, "waveform": WAVE})[0]

    assert [chunk(name) for name in "abcd"] == [200, 200, 200, 503]
    assert ask("GET", "speech_chunk_size", {"session_id": "d"}) == (200, {"speech_chunk_size": 0.25})
    assert ask("GET", "tokens_to_string", {"session_id": "d", "tokens": []})[0] == 200
    sessions.clock.now = 6  # type: ignore[attr-defined]
    assert chunk("a") == 200
    sessions.clock.now = 12  # type: ignore[attr-defined]
    assert chunk("d") == 200  # b and c have slept
    status, said = ask("POST", "end_of_stream", {"session_id": "b"})
    assert (status, "clear it" in said["error"]) == (410, True)
    assert ask("POST", "clear", {"session_id": "b"}) == (204, None)
    assert chunk("b") == 200
    assert sorted(sessions.talks) == ["a", "b", "d"]


@pytest.mark.parametrize(("names", "meet"), [("aa", False), ("ab", True)])
def test_a_session_hears_one_request_at_a_time_and_waits_for_no_other_session(
    ask: Ask, monkeypatch: pytest.MonkeyPatch, names: str, meet: bool
) -> None:
    door = threading.Barrier(2)

    def hear(talk: Talk, samples: Any) -> Output:
        """Whether another request is in here at the same time."""
        try:
            door.wait(60 if meet else 1)
        except threading.BrokenBarrierError:
            return Output(["alone"], "", [], "")
        return Output(["together"], "", [], "")

    monkeypatch.setattr(Talk, "hear", hear)
    with ThreadPoolExecutor(2) as pool:
        said = list(pool.map(lambda name: ask("POST", "process_chunk", {"session_id": name, "waveform": WAVE}), names))
    assert [(status, found["new_tokens"]) for status, found in said] == [(200, ["together" if meet else "alone"])] * 2


def test_a_session_that_hears_for_long_is_not_closed_meanwhile(
    ask: Ask, sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = iter("bc")

    def hear(talk: Talk, samples: Any) -> Output:
        sessions.clock.now += 20  # type: ignore[attr-defined]
        assert ask("PUT", "source_language", {"session_id": next(others), "language": "en"}) == (204, None)
        return Output([], "", [], "")

    monkeypatch.setattr(Talk, "hear", hear)
    for _ in range(2):
        assert ask("POST", "process_chunk", {"session_id": "a", "waveform": WAVE})[0] == 200


def test_a_fault_is_told_and_does_not_stop_the_server(
    ask: Ask, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(talk: Talk, samples: Any) -> Output:
        raise ZeroDivisionError("of a model")

    monkeypatch.setattr(Talk, "hear", fail)
    assert ask("POST", "process_chunk", {"session_id": "a", "waveform": WAVE})[0] == 500
    assert "of a model" in capsys.readouterr().err
    assert ask("POST", "end_of_stream", {"session_id": "a"})[0] == 410  # nobody knows what it has heard
    assert ask("POST", "clear", {"session_id": "a"})[0] == 204
    assert ask("POST", "end_of_stream", {"session_id": "a"})[0] == 200


def test_too_many_connections_are_closed(sessions: Sessions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "CONNECTIONS", 1)
    with Server(("127.0.0.1", 0), sessions) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        lines = [http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=60) for _ in range(2)]
        lines[0].connect()
        lines[0].send(b"GET /speech_chunk_size HTTP/1.0\r\n")
        lines[1].connect()
        assert lines[1].sock.recv(100) == b""
        body = b'{"session_id": "a"}'
        lines[0].send(b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        assert lines[0].sock.recv(100).startswith(b"HTTP/1.0 200")
        for line in lines:
            line.close()
        server.shutdown()


def test_the_command(voice: Voice, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(command, "Voice", lambda options: voice)

    def interrupted(server: Server) -> None:
        assert server.server_address[0] in ("127.0.0.1", "0.0.0.0")
        assert (server.sessions.most, server.sessions.idle_s) == (2, 5)
        raise KeyboardInterrupt

    monkeypatch.setattr(Server, "serve_forever", interrupted)
    given = ["simulstream", *GIVEN, "--port", "0", "--sessions", "2", "--idle", "5"]
    assert main(given) == 0
    said = capsys.readouterr().err
    assert "http://127.0.0.1:" in said
    assert "no password" not in said
    assert main([*given, "--host", "0.0.0.0"]) == 0
    assert "no password, no encryption" in capsys.readouterr().err
    for words, what in (
        (["--sessions", "0"], "--sessions 0"), (["--idle", "0"], "more than 0 s"), (["--port", "70000"], "0 to 65535"),
        (["--host", "203.0.113.1"], "--host 203.0.113.1"), (["--speech-chunk-size", "nan"], "0.01 to 60"),
    ):  # fmt: skip
        monkeypatch.setattr(voice, "options", parser().parse_args([*given, *words]))
        assert main([*given, *words]) == 2
        assert what in capsys.readouterr().err
