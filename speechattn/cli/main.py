"""The parser, and how errors leave the program."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from speechattn.errors import SpeechAttnError
from speechattn.version import __version__

__all__ = ["main", "parser"]


def parser() -> argparse.ArgumentParser:
    """All commands; abbreviations of options are not accepted, so that a typo is an error."""
    from speechattn.cli import (
        align,
        attention,
        curves,
        demo,
        doctor,
        evaluate,
        export,
        fit,
        prepare,
        score,
        simulstream,
        sinks,
        stream,
        tokenizer,
        transcribe,
        translate,
    )  # fmt: skip

    top = argparse.ArgumentParser(prog="speechattn", description="Speech attention that streams.", allow_abbrev=False)
    top.add_argument("--version", action="version", version=f"speechattn {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in (
        transcribe,
        stream,
        translate,
        align,
        attention,
        sinks,
        prepare,
        tokenizer,
        fit,
        export,
        evaluate,
        curves,
        score,
        simulstream,
        demo,
        doctor,
    ):
        module.add_parser(commands)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Exit codes: 0 done, 2 with one line of what was wrong and what to do."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if arguments[:1] == ["fit"]:
            from speechattn.cli.fit import fit

            return fit(arguments[1:])
        options = parser().parse_args(arguments)
        code: int = options.run(options)
        sys.stdout.flush()
        return code
    except SpeechAttnError as error:
        return complain(str(error))
    except KeyboardInterrupt:
        return complain("interrupted")
    except BrokenPipeError:  # the reader of our output has gone: nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2
    except OSError as error:
        return complain(f"{error.filename + ': ' if error.filename else ''}{error.strerror or error}")


def complain(message: str) -> int:
    """One line on standard error; whatever could not be written before is dropped."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    print(f"speechattn: {message}", file=sys.stderr)
    return 2
