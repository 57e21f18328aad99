"""`speechattn simulstream`: a speech processor for simulstream, over HTTP."""

from __future__ import annotations

import argparse
import ipaddress
import sys
from typing import Any

from speechattn.cli.options import resolved
from speechattn.errors import InputError
from speechattn.evaluators.server import Server, Sessions
from speechattn.evaluators.talk import Talk, add_talk_options
from speechattn.evaluators.voice import Voice, add_voice_options

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Options of the command."""
    parser = commands.add_parser(
        "simulstream", help="a speech processor that simulstream's HTTP proxy talks to", allow_abbrev=False
    )
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address (default 127.0.0.1: this machine alone)")
    group.add_argument("--port", type=int, default=8080, help="default 8080; 0 is any that is free")
    group.add_argument("--sessions", type=int, default=4, metavar="N", help="recordings at the same time (default 4)")
    group.add_argument(
        "--idle", type=float, default=300.0, metavar="S", help="close a session that nobody used for S s (default 300)"
    )
    add_talk_options(parser)
    add_voice_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Serve until Ctrl-C."""
    if options.sessions < 1 or not options.idle > 0:
        raise InputError(f"--sessions {options.sessions}, --idle {options.idle}: at least 1, more than 0 s")
    if not 0 <= options.port <= 65535:
        raise InputError(f"--port {options.port}: 0 to 65535")
    voice = Voice(options)
    talk = Talk(voice)
    try:
        server = Server((options.host, options.port), Sessions(voice, most=options.sessions, idle_s=options.idle))
    except OSError as error:
        raise InputError(f"--host {options.host} --port {options.port}: {error.strerror or error}") from error
    with server:
        host, port = str(server.server_address[0]), server.server_address[1]
        print(f"speechattn: {resolved(options, talk.session)}", file=sys.stderr)
        if not ipaddress.ip_address(host).is_loopback:
            print("speechattn: whoever reaches this machine can use it: no password, no encryption", file=sys.stderr)
        print(f"speechattn: http://{host}:{port}", file=sys.stderr, flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return 0
    return 0
