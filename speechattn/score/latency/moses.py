"""Words cut as the tokeniser of Moses does, for OmniSTEval's `--lang`."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from speechattn.errors import InputError

__all__ = ["WHOLE", "moses"]

WHOLE = ("zh", "ja")  # languages whose words OmniSTEval does not cut


def moses(language: str) -> Callable[[str], list[str]] | None:
    """A word -> its pieces; None for a language that is not cut.

    It is the program that OmniSTEval runs (of the package mosestokenizer, in Perl); InputError where there is none.
    """
    if language in WHOLE:
        return None
    try:
        from mosestokenizer import MosesTokenizer

        tokenizer = MosesTokenizer(lang=language, no_escape=True)
    except (ImportError, OSError) as error:
        raise InputError(
            f"--lang {language} needs Perl and the tokeniser of Moses: pip install 'speechattn[evaluators]' ({error})"
        ) from error
    return cache(lambda word: list(tokenizer(word)))
