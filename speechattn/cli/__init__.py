"""The command `speechattn`: every option that a model cannot honour is an error, and every error says what to do."""

from speechattn.cli.main import main

__all__ = ["main"]
