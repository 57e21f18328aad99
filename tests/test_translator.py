"""A translator: what it is told, what it says, and what its validation counts."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sacrebleu
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader

from speechattn.attention import Span
from speechattn.attention.position import Relative
from speechattn.audio.normal import GlobalCMVN
from speechattn.audio.spectrum import LogMel
from speechattn.data.batch import Batch, collate
from speechattn.decoder.attention import AttentionDecoder
from speechattn.decoder.ctc import CTC
from speechattn.decoder.predictor import StatelessPredictor
from speechattn.decoder.transducer import Joint, Transducer
from speechattn.encoder import Conformer
from speechattn.errors import InputError, ModelError
from speechattn.frames import Frames, Memory
from speechattn.model import Recognizer as Model
from speechattn.stream import Serial
from speechattn.task.objectives import AttentionObjective, CTCObjective, Objective, TransducerObjective
from speechattn.task.tally import TranslationTally, WordTally
from speechattn.task.translator import Translator
from speechattn.text.pieces import Pieces

RATE, MELS, DIM, STEPS = 8000, 12, 32, 140
PAIRS = (
    ("uno due tre", "one and two three"), ("due tre uno", "two three one more"),
    ("tre uno", "a three and one"), ("uno", "here one is all"),
)  # fmt: skip
WORDS = sorted({word for pair in PAIRS for text in pair for word in text.split()})
PIECES = Pieces(["<blank>", *(f"▁{word}" for word in WORDS), "<sos/eos>"])


def tone(text: str, seed: int) -> np.ndarray[Any, Any]:
    """Synthetic sound of a text: 60 ms of a tone for each letter."""
    at = np.arange(round(0.06 * RATE)) / RATE
    sound = 0.1 * np.concatenate([np.sin(2 * np.pi * (300 + 120 * (ord(c) % 32)) * at) for c in text])
    noise = np.random.default_rng(seed).standard_normal(len(sound))
    return (sound + 0.005 * noise).astype(np.float32)


def batch(pairs: tuple[tuple[str, str], ...] = PAIRS) -> Batch:
    return collate(
        [tone(said, i) for i, (said, _) in enumerate(pairs)], texts=[said for said, _ in pairs],
        translations=[other for _, other in pairs], ids=[f"u{i}" for i in range(len(pairs))], rate=RATE,
    )  # fmt: skip


class Few(LightningDataModule):
    """The same utterances again and again."""

    names = valid_names = ("valid",)

    def __init__(self, repeat: int, pairs: tuple[tuple[str, str], ...] = PAIRS) -> None:
        super().__init__()
        self.repeat, self.batch = repeat, batch(pairs)

    def first(self, n: int) -> list[Batch]:
        return [self.batch]

    def train_dataloader(self) -> Any:
        return DataLoader([self.batch] * self.repeat, batch_size=None)  # type: ignore[arg-type]

    def val_dataloader(self) -> Any:
        return DataLoader([self.batch], batch_size=None)  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> str:
    PIECES.save(tmp_path / "tokens")
    return str(tmp_path / "tokens")


def heads_of(*names: str) -> dict[str, nn.Module]:
    vocab = PIECES.size
    made: dict[str, nn.Module] = {
        "source": CTC(DIM, vocab), "ctc": CTC(DIM, vocab),
        "attention": AttentionDecoder.usual(vocab, DIM, 2, 1, 64, context=60, dropout=0.0),
        "transducer": Transducer(StatelessPredictor(vocab, DIM), Joint(DIM, DIM, DIM, vocab)),
    }  # fmt: skip
    return {name: made[name] for name in names}


def model_of(*heads: str) -> Model:
    spectrum = LogMel(MELS, rate=RATE, window=200, hop=80)
    front_end = Serial(spectrum=spectrum, normal=GlobalCMVN.estimate([spectrum(batch().sound)]))
    encoder = Conformer(MELS, DIM, 1, 2, 64, span=Span(32, 8), kernel=5, position=Relative)
    return Model(front_end, encoder, heads_of(*heads), PIECES, sample_rate=RATE).eval()


def translator(folder: str, objectives: list[Objective], *heads: str, **options: Any) -> Translator:
    made: Any = model_of(*heads)
    return Translator(
        made.front_end, made.encoder, dict(made.heads), folder, objectives, sample_rate=RATE, **options
    ).train()  # fmt: skip


def trained(task: Translator, steps: int, data: LightningDataModule | None = None) -> dict[str, float]:
    """So many steps, then the figures of the validation."""
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, gradient_clip_val=5.0,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Lightning: about workers, and loggers that are not there
        trainer.fit(task, data or Few(steps))
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def objectives(head: str) -> list[Objective]:
    main: Objective = AttentionObjective(0.7, smoothing=0.0) if head == "attention" else TransducerObjective(0.7)
    return [main, CTCObjective(0.3, head="source")]


@pytest.mark.parametrize("head", ["attention", pytest.param("transducer", marks=pytest.mark.slow)])
def test_a_few_utterances_are_learnt_by_heart_offline_and_streamed(folder: str, head: str) -> None:
    def once(optimizer: torch.optim.Optimizer) -> OneCycleLR:
        return OneCycleLR(optimizer, max_lr=1.5e-2, total_steps=STEPS)

    task = translator(folder, objectives(head), head, "source", optimizer=lambda p: AdamW(p), scheduler=once)
    found = trained(task, STEPS)
    assert found["valid/bleu"] == pytest.approx(100)
    assert found["valid/bleu_streamed"] == pytest.approx(100)
    assert found["valid/chrf"] == found["valid/chrf_streamed"]
    assert found["train/source"] < 0.1
    model = task.model.eval()
    source = model.heads["source"](model.listening(batch().sound)).values.argmax(-1)
    said = [model.tokenizer.decode(row.unique_consecutive().tolist()) for row in source]
    assert said == [pair[0] for pair in PAIRS]
    for i, (said_here, other) in enumerate(PAIRS[:2]):  # live, through a session, which the head `source` cuts
        assert model.transcribe(tone(said_here, i), search=model.search(beam_size=1)).text == other


def test_source_and_translation_are_told_apart(folder: str) -> None:
    task = translator(folder, objectives("attention"), "attention", "source")
    said = task.said(batch())
    assert said.source is not None
    texts = [PIECES.decode(row[:n].tolist()) for row, n in zip(said.tokens, said.lengths, strict=True)]
    assert tuple(texts) == task.references(batch()) == tuple(pair[1] for pair in PAIRS)
    texts = [PIECES.decode(row[:n].tolist()) for row, n in zip(said.source.tokens, said.source.lengths, strict=True)]
    assert texts == [pair[0] for pair in PAIRS]
    assert translator(folder, [AttentionObjective()], "attention").said(batch()).source is None
    heard = task.hear(batch().sound)
    head = task.model.heads["source"]
    assert isinstance(head, CTC)
    expected = head.losses(heard.frames, said.source.tokens, said.source.lengths)
    torch.testing.assert_close(task.objectives[1].losses(task.model, heard, said), expected)
    lacking = collate([tone("uno", 0)], texts=["uno"], translations=[None], ids=["u7"], rate=RATE)
    with pytest.raises(InputError, match="learns from translations; not all of u7"):
        task.said(lacking)
    with pytest.raises(ModelError, match="use the task Translator"):
        task.objectives[1].losses(task.model, heard, task.tokens(batch().texts))


def test_the_source_head_never_gives_the_text() -> None:
    model = model_of("attention", "source")
    with pytest.raises(InputError, match=r"search ctc: this model's heads allow attention, aligned$"):
        model.search("ctc")
    before = model.search(beam_size=3).decode(model.listening(batch().sound))
    nn.init.normal_(model.heads["source"].head.weight, std=5.0)  # type: ignore[union-attr, arg-type]
    after = model.search(beam_size=3).decode(model.listening(batch().sound))
    assert [row[0].tokens for row in before] == [row[0].tokens for row in after]
    with pytest.raises(InputError, match="this model's heads allow none"):
        model_of("source").search()
    alone = model_of("attention")
    frames = alone.listening(batch().sound)
    with pytest.raises(InputError, match="no head hears where nobody speaks"):
        alone.blank(frames)


def test_silence_is_heard_by_the_source_head() -> None:
    model = model_of("ctc", "source")
    frames = model.listening(batch().sound)
    with torch.no_grad():
        model.heads["source"].head.bias[0] = 50.0  # type: ignore[index, union-attr]
        model.heads["ctc"].head.bias[1] = 50.0  # type: ignore[index, union-attr]
    assert bool(model.blank(frames).all())


@torch.inference_mode()
def test_attention_alone_waits_for_the_end_and_is_the_search_of_the_whole() -> None:
    model = model_of("attention", "source")
    for parameter in model.heads["attention"].parameters():
        nn.init.normal_(parameter, std=0.3)
    frames, search = model.listening(batch().sound), model.search("attention", beam_size=4)
    beam = search.start(frames)
    for at in range(0, frames.mask.shape[1], 3):
        beam = search.step(frames[at : at + 3], beam)
        assert all(not hypothesis.tokens for row in search.hypotheses(beam) for hypothesis in row)
    whole, pieces = search.decode(frames), search.hypotheses(search.finish(beam))
    assert [[h.tokens for h in row] for row in whole] == [[h.tokens for h in row] for row in pieces]
    decoder, end = model.heads["attention"], PIECES.end
    assert isinstance(decoder, AttentionDecoder)
    assert end is not None
    for i, row in enumerate(pieces):  # the score is what the decoder gives to the text, and the reward
        n, length = int(frames.lengths[i]), len(row[0].tokens)
        memory = Memory.of(Frames(frames.values[i : i + 1, :n], frames.mask[i : i + 1, :n]))
        tokens = torch.tensor([row[0].tokens], dtype=torch.long)
        expected = decoder.log_prob(memory, tokens, torch.tensor([length]), sos=end, eos=end) + 0.1 * (length + 1)
        assert row[0].score == pytest.approx(float(expected), abs=1e-4)
        assert length <= 2 * n
        assert not {*row[0].tokens} & {0, end}


def test_figures_are_those_of_sacrebleu_over_the_whole_set() -> None:
    references = ["the cat sat on the mat", "a dog", "hello there my friend", "", "one two three four five"]
    hypotheses = ["the cat sat on a mat", "a dog barks", "", "what", "one two three four five"]
    tally = TranslationTally()
    for begin, end in ((0, 2), (2, 2), (2, 5)):
        tally.compare("", references[begin:end], hypotheses[begin:end])
    tally.compare("_streamed", references, references)
    tally.add("loss", 3.0, 2)
    found = tally.result()
    assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(hypotheses, [references]).score)
    assert found["chrf"] == pytest.approx(sacrebleu.corpus_chrf(hypotheses, [references]).score)
    assert found["bleu"] < 90
    assert (found["bleu_streamed"], found["chrf_streamed"]) == (pytest.approx(100), pytest.approx(100))
    assert found["loss"] == 1.5
    nobody = TranslationTally()
    nobody.compare("", [], [])
    assert nobody.result() == {"bleu": 0.0, "chrf": 0.0}


def test_sums_of_processes_are_added(monkeypatch: pytest.MonkeyPatch) -> None:
    def both(tensor: Tensor) -> None:
        tensor.mul_(2)  # two processes with the same texts

    for name, value in {"is_initialized": lambda: True, "get_backend": lambda: "gloo", "all_reduce": both}.items():
        monkeypatch.setattr(torch.distributed, name, value)
    tally, words = TranslationTally(), WordTally()
    tally.compare("", ["a b c d e"], ["a b c d x"])
    words.compare("", ["a b c d e"], ["a b c d x"])
    assert tally.result()["bleu"] == pytest.approx(
        sacrebleu.corpus_bleu(2 * ["a b c d x"], [2 * ["a b c d e"]]).score
    )  # fmt: skip
    assert words.result()["wer"] == pytest.approx(0.2)
    empty = WordTally()
    empty.compare("", [], [])
    assert empty.sums.keys() == words.sums.keys()  # so that processes add up the same
