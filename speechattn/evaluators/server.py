"""simulstream's HTTP speech processor (version 1.0), served by us: its proxy can talk to a model on another machine.

JSON both ways: `GET /speech_chunk_size`, `POST /process_chunk {waveform}` (base64 of float32 at 16 kHz),
`POST /end_of_stream`, `POST /clear`, `PUT /source_language {language}`, `PUT /target_language {language}`,
`GET /tokens_to_string {tokens}`; every body, also of a GET, has a `session_id`. An error is `{"error": text}`.
"""

from __future__ import annotations

import base64
import binascii
import json
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

from speechattn.audio.resample import Samples
from speechattn.errors import SpeechAttnError
from speechattn.evaluators.shown import string_of
from speechattn.evaluators.talk import RATE, Talk
from speechattn.evaluators.voice import Voice

__all__ = ["Refused", "Server", "Sessions"]

LONGEST_S = 60.0  # of sound in one request
BODY = int(LONGEST_S * RATE * 4 * 4 / 3) + 65536  # bytes
CONNECTIONS = 64
REMEMBERED = 1000  # sessions that were closed, though not by their clients
NAME = 200  # letters of a session's name, or of a language


class Refused(Exception):
    """A request that is not answered: the status and the reason."""

    def __init__(self, status: HTTPStatus, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Sessions:
    """Recordings of clients, by the names that they choose: at most `most`, each closed after `idle_s` without use."""

    def __init__(self, voice: Voice, *, most: int, idle_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.voice, self.most, self.idle_s, self.clock = voice, most, idle_s, clock
        self.lock = threading.Lock()
        self.talks: dict[str, tuple[Talk, threading.Lock]] = {}
        self.used: dict[str, float] = {}
        self.gone: dict[str, None] = {}

    @contextmanager
    def talk(self, name: str) -> Iterator[Talk]:
        """The recording of this name, for one request at a time; a new one where there is none.

        Refused when all are taken, and for one that was closed, so that half of a text is not taken for all of it.
        """
        with self.lock:
            self.sweep()
            if name in self.gone:
                reason = f"the session was closed, by a fault or after {self.idle_s:g} s without use; clear it"
                raise Refused(HTTPStatus.GONE, reason)
            if name not in self.talks:
                if len(self.talks) >= self.most:
                    raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, f"all {self.most} sessions are taken")
                self.talks[name] = Talk(self.voice), threading.Lock()
            talk, mine = self.talks[name]
            self.used[name] = self.clock()
        with mine:
            try:
                yield talk
            except SpeechAttnError:
                raise
            except Exception:  # nobody knows what it has heard
                self.clear(name)
                self.gone[name] = None
                raise
            finally:
                with self.lock:
                    if name in self.used:
                        self.used[name] = self.clock()

    def clear(self, name: str) -> None:
        """The name is free for another recording."""
        with self.lock:
            for known in (self.talks, self.used, self.gone):
                known.pop(name, None)

    def sweep(self) -> None:
        """Close what was not used for long; `lock` is held."""
        for name, (_, mine) in list(self.talks.items()):
            if not mine.locked() and self.clock() - self.used[name] > self.idle_s:
                del self.talks[name], self.used[name]
                self.gone[name] = None
        while len(self.gone) > REMEMBERED:
            del self.gone[next(iter(self.gone))]


class Server(ThreadingHTTPServer):
    """Answers at `address` until `shutdown`; no authentication, and no encryption."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], sessions: Sessions) -> None:
        self.sessions, self.free = sessions, threading.BoundedSemaphore(CONNECTIONS)
        super().__init__(address, Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """In a thread of its own, while there are not too many."""
        if self.free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """The thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.free.release()


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Server
    timeout = 30  # seconds that a client may be silent

    def do_GET(self) -> None:
        self.answer("GET")

    def do_POST(self) -> None:
        self.answer("POST")

    def do_PUT(self) -> None:
        self.answer("PUT")

    def answer(self, method: str) -> None:
        """Find out what is wanted, do it, and say what came of it, or why not."""
        try:
            text = self.body()
            wanted = {path: verb for verb, path in ROUTES}.get(self.path)
            if wanted != method:
                status = HTTPStatus.METHOD_NOT_ALLOWED if wanted else HTTPStatus.NOT_FOUND
                raise Refused(status, f"{self.path} wants {wanted}" if wanted else f"{self.path}: not here")
            fields, act = ROUTES[method, self.path]
            found = act(self.server.sessions, *arguments(text, fields))
            self.reply(HTTPStatus.NO_CONTENT if found is None else HTTPStatus.OK, found)
        except Refused as refused:
            self.reply(refused.status, {"error": str(refused)})
        except SpeechAttnError as error:
            self.reply(HTTPStatus.BAD_REQUEST, {"error": str(error)})
        except OSError:  # the client has gone
            self.close_connection = True
        except Exception:
            traceback.print_exc()
            self.reply(HTTPStatus.INTERNAL_SERVER_ERROR, {"error": "this is a fault of speechattn, which has told why"})

    def body(self) -> bytes:
        """All of it is read before anything is refused, so that the client listens to the answer."""
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdecimal() and len(length) < 12):
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "wanted a Content-Length")
        left = int(length)
        if left > BODY:
            while left > 0 and (piece := self.rfile.read(min(left, BODY))):
                left -= len(piece)
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"more than {BODY} bytes: send less sound at once")
        text = self.rfile.read(left)
        if self.headers.get_content_type() != "application/json":  # which no browser sends to another site unasked
            raise Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "wanted Content-Type: application/json")
        return text

    def reply(self, status: HTTPStatus, said: dict[str, Any] | None) -> None:
        """Status and JSON, if any; the connection ends."""
        text = b"" if said is None else json.dumps(said).encode()
        self.close_connection = True
        self.send_response(status)
        if said is not None:
            self.send_header("Content-Type", "application/json; charset=utf-8")
            self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing: only faults are told."""


def arguments(text: bytes, fields: dict[str, Callable[[Any], Any]]) -> list[Any]:
    """The session's name and the fields of a body, which has these and no others."""
    fields = {"session_id": short, **fields}
    try:
        body = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Refused(HTTPStatus.BAD_REQUEST, "the body is not JSON") from error
    if not isinstance(body, dict) or body.keys() != fields.keys():
        raise Refused(HTTPStatus.BAD_REQUEST, f"wanted an object with {', '.join(fields)}")
    return [read(body[name]) for name, read in fields.items()]


def short(value: Any) -> str:
    """A name."""
    if not isinstance(value, str) or not 0 < len(value) <= NAME:
        raise Refused(HTTPStatus.BAD_REQUEST, f"a session and a language are texts of 1 to {NAME} letters")
    return value


def texts(value: Any) -> list[str]:
    """Tokens."""
    if not isinstance(value, list) or not all(isinstance(token, str) for token in value):
        raise Refused(HTTPStatus.BAD_REQUEST, "tokens are a list of texts")
    return value


def sound(value: Any) -> Samples:
    """Samples [n]."""
    try:
        found = np.frombuffer(base64.b64decode(value, validate=True), "<f4").astype(np.float32)
    except (TypeError, ValueError, binascii.Error) as error:
        raise Refused(HTTPStatus.BAD_REQUEST, "a waveform is base64 of float32 samples") from error
    return found


def chunk_size(sessions: Sessions, name: str) -> dict[str, Any]:
    """Of every session."""
    return {"speech_chunk_size": float(sessions.voice.options.speech_chunk_size)}


def process(sessions: Sessions, name: str, samples: Samples) -> dict[str, Any]:
    """More sound."""
    with sessions.talk(name) as talk:
        return vars(talk.hear(samples))


def end(sessions: Sessions, name: str) -> dict[str, Any]:
    """No more sound."""
    with sessions.talk(name) as talk:
        return vars(talk.end())


def source_language(sessions: Sessions, name: str, language: str) -> None:
    """What is heard."""
    with sessions.talk(name) as talk:
        talk.speak(source=language)


def target_language(sessions: Sessions, name: str, language: str) -> None:
    """What is wanted."""
    with sessions.talk(name) as talk:
        talk.speak(target=language)


def to_string(sessions: Sessions, name: str, tokens: list[str]) -> dict[str, Any]:
    """The text of tokens."""
    if name not in sessions.talks:
        return {"tokens_as_string": string_of(tokens, sessions.voice.options.latency_unit, begun=False)}
    with sessions.talk(name) as talk:
        return {"tokens_as_string": talk.text(tokens)}


def clear(sessions: Sessions, name: str) -> None:
    """The recording is over."""
    sessions.clear(name)


ROUTES: dict[tuple[str, str], tuple[dict[str, Callable[[Any], Any]], Callable[..., dict[str, Any] | None]]] = {
    ("GET", "/speech_chunk_size"): ({}, chunk_size),
    ("POST", "/process_chunk"): ({"waveform": sound}, process),
    ("PUT", "/source_language"): ({"language": short}, source_language),
    ("PUT", "/target_language"): ({"language": short}, target_language),
    ("POST", "/end_of_stream"): ({}, end),
    ("POST", "/clear"): ({}, clear),
    ("GET", "/tokens_to_string"): ({"tokens": texts}, to_string),
}  # fmt: skip
