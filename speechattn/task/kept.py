"""What an encoder that is not trained says of each utterance: computed once, and read again in every other epoch."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor, nn

from speechattn.attention.pattern import Blocks, Span
from speechattn.audio.clip import Clip
from speechattn.data.batch import Batch
from speechattn.errors import InputError
from speechattn.frames import Frames
from speechattn.model import Recognizer as Model
from speechattn.task.objectives import Heard

if TYPE_CHECKING:
    from speechattn.task.recognizer import Recognizer

__all__ = ["Kept"]

MARK = "encoder.txt"  # says whose frames these are
PLAIN = (bool, int, float, str, Span, Blocks)
AGAIN = re.compile(r"#\d+$")  # of the id of an utterance that is heard several times in an epoch


class Kept:
    """The encoder's frames of utterances, as `listening` makes them in float16, each in a file of `folder`.

    Law: the frames of a batch are those that the model makes of it, to the rounding of the precision that it is
    trained in and of float16. So nothing may change from epoch to epoch: neither the weights nor the sound. Sound and
    pictures of which the frames are there are not read again in training.
    """

    def __init__(self, folder: Path, model: Model) -> None:
        self.folder, self.model, self.marked = folder, model, False

    @classmethod
    def of(cls, folder: str, task: Recognizer, frozen: Sequence[str]) -> Kept:
        """ValueError where what the encoder says is not always the same, or where more than that is wanted."""
        wrong = {
            "an encoder that is trained (frozen: [encoder])": "encoder" not in frozen,
            "spans": task.spans is not None,
            "augment": task.augment is not None,
            "objectives that look inside the encoder": any(objective.layers for objective in task.objectives),
        }
        if names := [name for name, there in wrong.items() if there]:
            raise ValueError(f"keep: not with {', '.join(names)}")
        return cls(Path(folder), task.model)

    def fit(self, data: Any) -> None:
        """InputError where `data` changes the sound from epoch to epoch."""
        if getattr(data, "augment", ()) or getattr(data, "join", None) is not None:
            raise InputError("keep: not with data.augment or data.join: the sound would be another one in every epoch")
        if hasattr(data, "kept"):
            data.kept = There(self.folder)

    def mark(self) -> None:
        """Say whose frames these are; InputError where they are another encoder's."""
        self.folder.mkdir(parents=True, exist_ok=True)
        mark, mine = self.folder / MARK, digest(self.model.front_end, self.model.encoder)
        if mark.exists() and mark.read_text() != mine:
            raise InputError(f"{self.folder}: frames of another encoder; name another folder, or remove this one")
        part = self.folder / f".{uuid4().hex}.part"
        part.write_text(mine)
        part.replace(mark)
        self.marked = True

    def __call__(self, batch: Batch) -> Heard:
        """What the encoder says of the utterances; the features are not made again, and are empty."""
        if not self.marked:
            self.mark()
        sound = batch.sound
        seen = sound.lips.mask.any(1).tolist() if isinstance(sound, Clip) else [False] * len(batch)
        paths = [self.folder / named(name, pictures) for name, pictures in zip(batch.ids, seen, strict=True)]
        if any(not path.exists() for path in paths):
            with torch.no_grad(), torch.autocast(sound.mask.device.type, enabled=False):
                frames = self.model.listening(sound)
            for path, x, there in zip(paths, frames.values, frames.mask, strict=True):
                if not path.exists():  # else its sound may not have been read
                    write(path, x[there])
        rows = [torch.from_numpy(np.load(path)) for path in paths]
        like = next(self.model.encoder.parameters())
        values = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(like)
        lengths = torch.tensor([len(row) for row in rows], device=like.device)
        mask = torch.arange(values.shape[1], device=like.device) < lengths[:, None]
        return Heard(sound, Frames(sound.values[:, :0, None], sound.mask[:, :0]), Frames(values, mask))


@dataclass(frozen=True)
class There:
    """Whether the frames of an utterance lie in a folder."""

    folder: Path

    def __call__(self, name: str, pictures: bool) -> bool:
        """By its id, and whether there are pictures of it."""
        return (self.folder / named(name, pictures)).exists()


def named(name: str, pictures: bool) -> str:
    """The file of an utterance, which is another one with its pictures."""
    return f"{hashlib.sha256(AGAIN.sub('', name).encode()).hexdigest()[:32]}{'-lips' if pictures else ''}.npy"


def write(path: Path, x: Tensor) -> None:
    """Whole or not at all."""
    part = path.with_name(f".{uuid4().hex}.part")
    with part.open("wb") as file:
        np.save(file, x.half().cpu().numpy())
    part.replace(path)


def digest(*parts: nn.Module) -> str:
    """Of weights, and of what modules know besides (spans, numbers of a front-end), as far as that is plain."""
    found = hashlib.sha256()
    for part in parts:
        for place, module in part.named_modules():
            for name, value in sorted(vars(module).items()):
                if isinstance(value, PLAIN) and name != "training" and not name.startswith("_"):
                    found.update(f"{place}.{name}={value!r}".encode())
        for name, tensor in sorted(part.state_dict().items()):
            found.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()
