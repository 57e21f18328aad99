"""What a task does with the model it trains."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training import DIGITS

from speechattn.attention import Span
from speechattn.attention.self_attention import Spanned, set_span
from speechattn.audio.augment import SpecAugment
from speechattn.audio.normal import GlobalCMVN
from speechattn.audio.spectrum import LogMel
from speechattn.decoder.ctc import CTC
from speechattn.decoder.predictor import LSTMPredictor
from speechattn.decoder.transducer import Joint, Transducer
from speechattn.encoder import Conformer
from speechattn.errors import ModelError
from speechattn.frames import Frames
from speechattn.stream import Serial
from speechattn.task.chunks import DynamicChunks
from speechattn.task.objectives import CTCObjective
from speechattn.task.recognizer import Recognizer, seeded
from speechattn.task.translator import Translator


def task(kind: type[Recognizer] = Recognizer, **changes: Any) -> Recognizer:
    """A small one with a CTC head."""
    front_end = Serial(spectrum=LogMel(mels=40, low=20.0, floor=1e-6), normal=GlobalCMVN.unknown(40))
    encoder = Conformer(mels=40, dim=16, depth=1, heads=2, inner=32, kernel=5, span=Span(left=16, chunk=8))
    usual = {"heads": {"ctc": CTC(16, 39)}, "tokenizer": str(DIGITS), "objectives": [CTCObjective()]}
    return kind(front_end, encoder, **(usual | changes))


@given(seed=st.integers(0, 2**20), batch=st.integers(0, 2**40), who=st.integers(0, 4096))
@settings(deadline=None, max_examples=50)
def test_seeds_fit_and_differ(seed: int, batch: int, who: int) -> None:
    found = {
        seeded(seed, batch, who),
        seeded(seed + 1, batch, who),
        seeded(seed, batch + 1, who),
        seeded(seed, batch, who + 1),
    }
    assert len(found) == 4
    assert all(0 <= one < 2**63 for one in found)
    assert seeded(seed, batch, who) in found


def test_spans_are_drawn_as_often_as_said() -> None:
    chunks, generator = DynamicChunks(chunks=[4, 8], left=[None, 16], full=0.25), torch.Generator().manual_seed(0)
    drawn = Counter(chunks.draw(generator) for _ in range(2000))
    assert set(drawn) == {Span.full(), *(Span.chunked(left, chunk) for left in (None, 16) for chunk in (4, 8))}
    assert abs(drawn[Span.full()] / 2000 - 0.25) < 0.04
    assert all(abs(n / 2000 - 0.75 / 4) < 0.04 for span, n in drawn.items() if span != Span.full())
    assert chunks.draw(torch.Generator().manual_seed(5)) == chunks.draw(torch.Generator().manual_seed(5))
    for wrong in ({"chunks": []}, {"left": []}, {"full": 1.5}):
        with pytest.raises(ValueError, match="wanted some of each"):
            DynamicChunks(**wrong)


def test_validation_hears_with_the_span_of_the_recipe() -> None:
    one = task(spans=DynamicChunks())
    spans = [module.span for module in one.model.encoder.modules() if isinstance(module, Spanned)]
    set_span(one.model.encoder, Span.full())
    assert one.model.listening.plan().block is None
    one.on_validation_epoch_start()
    assert [module.span for module in one.model.encoder.modules() if isinstance(module, Spanned)] == spans
    assert one.model.listening.plan().block is not None


def test_a_head_that_nobody_trains_is_named_and_stays() -> None:
    transducer = Transducer(LSTMPredictor(39, 8), Joint(16, 8, 8, 39))
    with pytest.warns(UserWarning, match="no objective trains the head transducer"):
        one = task(heads={"ctc": CTC(16, 39), "transducer": transducer})
    assert not any(p.requires_grad for p in one.model.heads["transducer"].parameters())
    assert all(p.requires_grad for p in one.model.heads["ctc"].parameters())


def test_what_does_not_fit_together_is_refused() -> None:
    with pytest.raises(ModelError, match="40 tokens; there are 39"):
        task(heads={"ctc": CTC(16, 40)})
    with pytest.raises(ValueError, match="objectives ctc, ctc: wanted some, each once"):
        task(objectives=[CTCObjective(), CTCObjective()])
    with pytest.raises(ValueError, match="objectives none"):
        task(objectives=[])
    with pytest.raises(ModelError, match=r"tokens\.txt"):
        task(tokenizer="/nowhere")


def test_the_best_is_judged_by_what_the_bar_shows() -> None:
    assert task().monitor == ("valid/wer", "min")
    assert task(Translator).monitor == ("valid/bleu", "max")


def test_features_are_not_rounded_under_autocast() -> None:
    one = task(augment=SpecAugment(time_masks=0, frequency_masks=0)).eval()
    samples = torch.randn(1, 16000)
    sound = Frames(samples, torch.ones_like(samples, dtype=torch.bool))
    exact = one.hear(sound).features.values
    with torch.autocast("cpu", dtype=torch.bfloat16):
        heard = one.hear(sound)
        losses = one.objectives[0].losses(one.model, heard, one.tokens(["one two"]))
    assert torch.equal(heard.features.values, exact)
    assert losses.dtype == torch.float32
