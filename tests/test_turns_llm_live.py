"""The search, the objective and live sessions of a speech language model that reads and writes in turns."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_turns_llm import END, drawn, model_of
from torch import Tensor, nn

from speechattn.decoder.groups import Wait
from speechattn.decoder.in_turns import InTurns
from speechattn.errors import ModelError
from speechattn.frames import Frames
from speechattn.live.endings import StreamSettings
from speechattn.live.session import Session
from speechattn.model.folder import from_config, load_folder, save_model
from speechattn.multimodal.turns_llm import TurnsLLM
from speechattn.search.turns import Turns
from speechattn.task.objectives import Heard, Said
from speechattn.task.turns import DecoderOnlyObjective
from speechattn.text.pieces import Pieces

pytestmark = pytest.mark.usefixtures("precise")


def walked(model: TurnsLLM, x: Tensor, most: float, never: int) -> list[int]:
    """The search by its definition, frame by frame and then behind the end; each token by a masked pass of all."""
    said, read, turn, frames = list[int](), list[int](), 0, len(x)
    whole = Frames(x[None], torch.ones(1, frames, dtype=torch.bool))
    for heard in range(frames + 2):
        finished, heard = heard > frames, min(heard, frames)
        while (len(said) if finished else turn) < int(heard * most):
            needed = int(model.schedule.needed(torch.tensor(turn)))
            if needed > heard and not finished:
                break
            now = heard if model.forgets else min(needed, heard)
            now += finished and now == frames
            hidden = model(whole, torch.tensor([[0, *said]]), torch.tensor([[*read, now]]))[1]
            scores, turn = model.logits(hidden)[0, -1], turn + 1
            scores[never] = -torch.inf
            best = int(scores.argmax())
            if best != END:
                said, read = [*said, best], [*read, now]
            elif finished:
                return said
    return said


@pytest.mark.parametrize("window", [None, (1, 2)])
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10**6))
@torch.no_grad()
def test_a_search_says_what_masked_passes_say_for_any_split_and_company(window: Any, seed: int) -> None:
    torch.manual_seed(seed)
    chance, model = random.Random(seed), model_of(window)
    model.schedule = Wait(chance.randint(0, 4), chance.randint(0, 2))
    lengths = [chance.randint(0, 9) for _ in range(3)]
    rows = [drawn(chance, n) for n in lengths]
    padded = torch.stack([nn.functional.pad(row, [0, 0, 0, 10 - len(row)]) for row in rows])
    x = Frames.from_lengths(padded, torch.tensor(lengths))
    search = Turns(model, sos=0, eos=END, never=[3], most=1.5)
    beam, at = search.start(x), [0, 0, 0]
    while at != lengths:
        size = [min(chance.randint(0, 3), n - i) for i, n in zip(at, lengths, strict=True)]
        mask = torch.arange(4) < torch.tensor(size)[:, None]
        which = (torch.tensor(at)[:, None] + torch.arange(4)).clamp(max=9)
        beam = search.step(Frames.of(x.values[torch.arange(3)[:, None], which], mask), beam)
        at = [i + n for i, n in zip(at, size, strict=True)]
    found, whole = search.hypotheses(search.finish(beam)), search.decode(x)
    for row, (one,), (two,) in zip(rows, found, whole, strict=True):
        assert list(one.tokens) == list(two.tokens) == walked(model, row, 1.5, 3)
        assert one.spans == two.spans


def part(name: str, **options: Any) -> dict[str, Any]:
    return {"class_path": f"speechattn.{name}", "init_args": options}


def config(**options: Any) -> dict[str, Any]:
    subsample = part("encoder.layers.Subsample", mels=20, dim=8)
    delay = part("stream.Delay", n=0)
    head = part(
        "multimodal.turns_llm.TurnsLLM", lm=part("multimodal.llama.Llama", vocab=7, dim=8, heads=2, depth=2),
        sound=part("multimodal.speech_llm.Stacked", width=8, dim=8, every=3, inner=8),
        schedule=part("decoder.groups.Wait", first=9, every=6), **options,
    )  # fmt: skip
    return {
        "format": 1, "front_end": part("audio.spectrum.LogMel", mels=20, right=159),
        "encoder": part("encoder.Encoder", subsample=subsample, layers=[], dim=8, norm=delay),
        "heads": {"decoder_only": head, "ctc": part("decoder.ctc.CTC", dim=8, vocab=7)},
    }  # fmt: skip


PIECES = Pieces(["<blank>", "▁a", "▁b", "c", "▁d", "▁e", "<sos/eos>"])


@pytest.mark.parametrize("options", [{"prompt": [1, 4], "bos": 0}, {"window": [2, 4]}])
def test_a_model_folder_is_heard_live_as_offline(options: dict[str, Any], tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    made = from_config(config(**options), PIECES)
    for parameter in made.heads.parameters():
        nn.init.normal_(parameter, std=0.5)
    head: Any = made.heads["decoder_only"]
    nn.init.zeros_(head.lm.lm_head.weight[END:])  # it has more to say
    save_model(made, tmp_path)
    model = load_folder(tmp_path).double()
    samples = np.random.default_rng(0).standard_normal(40000).astype(np.float32) * np.sin(np.arange(40000) / 5000)
    x = Frames(torch.from_numpy(samples)[None].double(), torch.ones(1, len(samples), dtype=torch.bool))
    search = model.search("turns")
    assert isinstance(search, Turns)
    expected = PIECES.decode(search.decode(model.listening(x))[0][0].tokens)
    assert len(expected.split()) > 3
    settings_ = StreamSettings(1e6, 1e6, 1e6, 1e6, 1e6, certainty=1.0)
    for cuts in (1, 13):
        session = Session(model, search=search, settings=settings_)
        events = [event for piece in np.array_split(samples, cuts) for event in session.feed(piece, 16000)]
        said = "".join(event.committed for event in [*events, *session.finish()])
        assert " ".join(said.split()) == expected


def test_it_is_trained_by_the_objective_of_its_kind() -> None:
    torch.set_default_dtype(torch.float32)
    model = from_config(config(), PIECES).double()
    assert isinstance(model.heads["decoder_only"], InTurns)
    head: Any = model.heads["decoder_only"]
    x = Frames.from_lengths(torch.randn(2, 7, 8).double(), torch.tensor([7, 5]))
    said = Said(torch.tensor([[2, 3, 4], [5, 1, 1]]), torch.tensor([3, 1]))
    objective = DecoderOnlyObjective(smoothing=0.2)
    objective.fit(model)
    losses = objective.losses(model, Heard(x, x, x), said)
    torch.testing.assert_close(losses, head.losses(x, said.tokens, said.lengths, sos=6, eos=6, smoothing=0.2))
    grads = torch.autograd.grad(losses.sum(), [head.opening, head.sound.project[0].weight])
    assert all(grad.any() for grad in grads)
    with pytest.raises(ModelError, match=r"heads\.decoder_only says 7 tokens; there are 3"):
        from_config(config(), Pieces(["<blank>", "▁a", "<sos/eos>"]))
