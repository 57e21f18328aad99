"""What an ESPnet2 config.yaml says about its tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from speechattn.errors import ModelError
from speechattn.pretrained.espnet.config import Options
from speechattn.text.pieces import Pieces

__all__ = ["read_tokens"]

SPACE = "<space>"  # of `token_type: char`
MARK = "▁"  # what begins a word in SentencePiece's pieces
ABOVE = 3  # a path in a config counts from the recipe, whose exp/NAME/config.yaml it is


def read_tokens(path: Path, said: Mapping[str, Any], which: str = "") -> Pieces:
    """`token_list` as pieces, or with `which` in front of all keys (`src_`) those of another language.

    Of `token_type: word` each token is a word. ModelError for what cannot be spelled.
    """
    options = Options(str(path), said)
    kind = options.one_of(f"{which}token_type", ("bpe", "char", "word"))
    tokens = said.get(f"{which}token_list")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise ModelError(f"{path}: {which}token_list: not a list of tokens")
    if kind == "char":
        tokens = [" " if token == SPACE else token for token in tokens]
    if kind == "word":
        special = {"<blank>", "<unk>", "<sos/eos>"}
        tokens = [token if token in special else MARK + token for token in tokens]
    try:
        return Pieces(tokens, model=find_model(path.parent, said.get(f"{which}bpemodel")) if kind == "bpe" else None)
    except ModelError as error:
        raise ModelError(f"{path}: {which}token_list: {error}") from error


def find_model(folder: Path, name: Any) -> Path | None:
    """The file `bpemodel`, from the folder of the config or from one above it, or beside the config; or none."""
    if not name:
        return None
    places = [place / str(name) for place in [folder, *folder.resolve().parents[:ABOVE]]]
    return next((place for place in [*places, folder / Path(str(name)).name] if place.is_file()), None)
