"""The head that reads sound and lips with a language model: layout, loss, search."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from speechattn import Session
from speechattn.errors import InputError, ModelError
from speechattn.frames import Frames
from speechattn.live.endings import StreamSettings
from speechattn.model.folder import from_config, load_folder, save_model
from speechattn.model.searches import SEARCHES
from speechattn.multimodal.layout import BOS, LIPS, MARK, NOTHING, PROMPT, SINK, SOUND, TEXT, laid
from speechattn.multimodal.llama import Llama
from speechattn.multimodal.speech_llm import Pool, Pooled, SpeechLLM, Stacked
from speechattn.task.objectives import Heard, Said
from speechattn.task.speech_llm import SpeechLLMObjective
from speechattn.testing import check_stream, random_frames
from speechattn.text.pieces import Pieces

pytestmark = pytest.mark.usefixtures("precise")

DIM, VOCAB, END = 8, 7, 6
HEAR, SEE = 3, 4


def head(**options: Any) -> SpeechLLM:
    torch.manual_seed(1)
    options = {"sound": Stacked(HEAR, DIM, every=2, inner=10), "lips": Pooled(SEE, DIM, every=3, inner=10),
               "prompt": (2, 5), **options}  # fmt: skip
    made = SpeechLLM(Llama(VOCAB, DIM, 2, 3, inner=12), **options)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.5)
    return made.eval().requires_grad_(False)


def encoded() -> Frames:
    """Rows with both, without lips, without sound, and a short one."""
    x = random_frames([9, 7, 8, 1], HEAR + SEE, seed=2)
    values = x.values.clone()
    values[1, :, HEAR:] = 0
    values[2, :, :HEAR] = 0
    return Frames(values, x.mask)


TOKENS, LENGTHS = torch.tensor([[1, 3, 4], [2, 0, 0], [5, 5, 0], [0, 0, 0]]), torch.tensor([3, 1, 2, 0])


def by_hand(model: SpeechLLM, row: Tensor, said: list[int]) -> tuple[Tensor, list[int]]:
    """The sequence [S, D] of a row of frames [T, D], one embedding after the other, and its kinds."""
    assert model.sound is not None
    assert model.lips is not None
    parts, kinds = [model.marks[0]], [BOS]
    for sink in model.sinks:
        parts.append(sink)
        kinds.append(SINK)
    heard, seen = row[:, :HEAR], row[:, HEAR:]
    if heard.any():
        parts.append(model.marks[1])
        for t in range(0, len(row), 2):
            pair = [heard[i] if i < len(row) else torch.zeros(HEAR) for i in (t, t + 1)]
            parts.append(model.sound.project(torch.cat(pair)))
        parts.append(model.marks[2])
        kinds += [MARK, *[SOUND] * -(-len(row) // 2), MARK]
    if seen.any():
        parts.append(model.marks[3])
        for t in range(0, len(row), 3):
            parts.append(model.lips.project(seen[t : t + 3].mean(0)))
        parts.append(model.marks[4])
        kinds += [MARK, *[LIPS] * -(-len(row) // 3), MARK]
    for token in [*model.prompt, *said]:
        parts.append(model.lm.embed(torch.tensor([token]))[0])
    return torch.stack(parts), [*kinds, *[PROMPT] * len(model.prompt), *[TEXT] * len(said)]


def rows(x: Frames) -> list[Tensor]:
    return [values[mask] for values, mask in zip(x.values, x.mask, strict=True)]


def scores(model: SpeechLLM, row: Tensor, said: list[int]) -> Tensor:
    """Log-probabilities behind each place of a row's sequence [S, V], alone and in one pass."""
    x, _ = by_hand(model, row, said)
    there = torch.ones(1, len(x), dtype=torch.bool)
    hidden, _ = model.lm.extend(Frames(x[None], there), model.lm.start(1))
    return model.lm.logits(hidden[0]).log_softmax(-1)


@pytest.mark.parametrize("sinks", [0, 2])
def test_the_loss_is_that_of_the_text_and_its_end(sinks: int) -> None:
    model, x = head(sinks=sinks), encoded()
    found, _, _ = model.losses(x, TOKENS, LENGTHS, eos=END)
    for i, row in enumerate(rows(x)):
        said = TOKENS[i, : LENGTHS[i]].tolist()
        each = scores(model, row, said)
        first = len(each) - len(said) - 1
        expected = -sum(each[first + u, token] for u, token in enumerate([*said, END]))
        assert found[i].item() == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("sinks", [0, 2])
def test_the_layout(sinks: int) -> None:
    model, x = head(sinks=sinks), encoded()
    inside, kinds = model.inspect(x, TOKENS, LENGTHS)
    assert inside.weights is not None
    assert torch.equal(inside.mask, kinds != NOTHING)
    for i, row in enumerate(rows(x)):
        embedded, expected = by_hand(model, row, TOKENS[i, : LENGTHS[i]].tolist())
        assert kinds[i].tolist() == expected + [NOTHING] * (kinds.shape[1] - len(expected))
        assert torch.allclose(inside.states[0][i, : len(embedded)], embedded, atol=1e-12)
        assert torch.allclose(inside.weights[0][i].sum(-1), inside.mask[i].double().expand(2, -1))


def test_a_row_does_not_know_its_batch() -> None:
    model, x = head(), encoded()
    found, inside, kinds = model.losses(x, TOKENS, LENGTHS, eos=END)
    for i, length in enumerate([9, 7, 8, 1]):
        one = Frames(x.values[i : i + 1, :length], x.mask[i : i + 1, :length])
        alone, states, its = model.losses(one, TOKENS[i : i + 1], LENGTHS[i : i + 1], eos=END)
        assert alone.item() == pytest.approx(found[i].item(), rel=1e-10)
        n = its.shape[1]
        assert torch.equal(its[0], kinds[i, :n])
        assert torch.allclose(states.states[2][0], inside.states[2][i, :n], atol=1e-10)


def test_what_follows_the_text_does_not_matter() -> None:
    model, x = head(), encoded()
    other = TOKENS.clone()
    other[1, 1:] = 4
    assert torch.equal(model.losses(x, TOKENS, LENGTHS, eos=END)[0], model.losses(x, other, LENGTHS, eos=END)[0])


def tokenizer() -> Pieces:
    return Pieces(["<blank>", "▁a", "▁b", "c", "▁d", "▁e", "<sos/eos>"])


def greedy(model: SpeechLLM, row: Tensor, most: int) -> list[int]:
    """The best token again and again, the whole sequence read anew each time."""
    said: list[int] = []
    while len(said) < most:
        each = scores(model, row, said)[-1]
        each[0] = -torch.inf
        best = int(each.argmax())
        if best == END:
            break
        said.append(best)
    return said


def test_greedy_search_with_a_cache_is_greedy_search_without() -> None:
    model, x = head(sinks=1), encoded()
    search = SEARCHES["llm"].make({"llm": model}, tokenizer(), 1, None)
    found = [list(row[0].tokens) for row in search.decode(x)]
    expected = [greedy(model, row, 2 * len(row)) for row in rows(x)]
    assert found == expected
    assert sum(map(len, found)) > 8


def test_a_wide_beam_finds_the_best_of_all_texts() -> None:
    model = head()
    x = Frames(encoded().values[:1, :1], encoded().mask[:1, :1])
    search = SEARCHES["llm"].make({"llm": model}, tokenizer(), 60, None)
    best = search.decode(x)[0][0]
    texts = [text for n in range(3) for text in itertools.product(range(1, 6), repeat=n)]  # two tokens a frame

    def total(text: tuple[int, ...]) -> float:
        each = scores(model, rows(x)[0], list(text))
        ended = [*text, END]
        at = len(each) - len(ended)
        return float(sum(each[at + u, token] for u, token in enumerate(ended))) + 0.1 * len(text)

    assert tuple(best.tokens) == max(texts, key=total)


def test_a_beam_follows_each_hypothesis_with_its_own_cache() -> None:
    model, x = head(), encoded()
    found = SEARCHES["llm"].make({"llm": model}, tokenizer(), 3, None).decode(x)
    for row, hypotheses in zip(rows(x), found, strict=True):
        for one in hypotheses:
            each = scores(model, row, list(one.tokens))
            at = len(each) - len(one.tokens) - 1
            expected = [each[at + u, token].item() for u, token in enumerate(one.tokens)]
            assert one.log_probs == pytest.approx(expected, abs=1e-9)
    assert len({tuple(one.tokens) for hypotheses in found for one in hypotheses}) > 6


def test_pieces_of_compression() -> None:
    check_stream(Pool(3), random_frames([10, 0, 7], 4), reference=pooled)
    x = random_frames([5], HEAR, seed=3)
    y = Stacked(HEAR, DIM, every=2)(x)
    assert y.mask.tolist() == [[True, True, True]]
    assert Pooled(HEAR, DIM, every=5)(x).values.shape == (1, 1, DIM)
    normal = Stacked(HEAR, DIM, every=1, norm=True)(x).values
    assert torch.allclose(normal.mean(-1), torch.zeros(1, 5), atol=1e-6)


def pooled(stream: Pool, x: Frames) -> Frames:  # type: ignore[override]
    outs = -(-x.mask.shape[1] // 3)
    found = x.values.new_zeros(len(x.mask), outs, 4)
    for b in range(len(x.mask)):
        for o in range(outs):
            piece = x.values[b, 3 * o : 3 * o + 3][x.mask[b, 3 * o : 3 * o + 3]]
            if len(piece):
                found[b, o] = piece.mean(0)
    return Frames.of(found, x.mask[:, ::3])


def test_laid_rows_begin_in_front() -> None:
    a, b = random_frames([2, 0], 3, seed=1, frames=2), random_frames([1, 2], 3, seed=2)
    found = laid([(a, SOUND), (b, TEXT)])
    assert found.kinds.tolist() == [[SOUND, SOUND, TEXT], [TEXT, TEXT, NOTHING]]
    assert torch.equal(found.x.values[0, :2], a.values[0])
    assert torch.equal(found.x.values[1, :2], b.values[1])
    assert not found.x.values[1, 2].any()


def test_one_sense_alone_reads_all_features() -> None:
    model = head(lips=None, sound=Stacked(5, DIM, every=2))
    x = random_frames([4, 2], 5)
    _, kinds = model.inspect(Frames.of(0 * x.values, x.mask), TOKENS[:2], LENGTHS[:2])
    assert (kinds == SOUND).sum(1).tolist() == [2, 1]  # zeros are no missing sense there
    with pytest.raises(ValueError, match="reads 5"):
        model.inspect(random_frames([4], 6), TOKENS[:1], LENGTHS[:1])
    with pytest.raises(ValueError, match="token 7 of prompt or bos: the language model has 0 to 6"):
        head(prompt=(2, 7))
    with pytest.raises(ValueError, match="wanted one of both"):
        head(sound=None, lips=None)


CONFIG = {
    "format": 1,
    "front_end": {"class_path": "speechattn.audio.spectrum.LogMel", "init_args": {"mels": 20, "right": 159}},
    "encoder": {
        "class_path": "speechattn.encoder.Encoder",
        "init_args": {
            "subsample": {"class_path": "speechattn.encoder.layers.Subsample", "init_args": {"mels": 20, "dim": 8}},
            "layers": [], "dim": 8,
            "norm": {"class_path": "speechattn.stream.Delay", "init_args": {"n": 0}},
        },
    },
    "heads": {"llm": {
        "class_path": "speechattn.multimodal.speech_llm.SpeechLLM",
        "init_args": {
            "lm": {"class_path": "speechattn.multimodal.llama.Llama",
                   "init_args": {"vocab": 7, "dim": 8, "heads": 2, "depth": 2}},
            "sound": {"class_path": "speechattn.multimodal.speech_llm.Stacked",
                      "init_args": {"width": 8, "dim": 8, "every": 2, "inner": 8}},
        },
    }},
}  # fmt: skip


def test_a_model_folder_keeps_it(tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    model = from_config(CONFIG, tokenizer()).eval()
    save_model(model, tmp_path)
    again = load_folder(tmp_path)
    sound = random_frames([16000, 9000])
    x, y = model.listening(sound), again.listening(sound)
    said = model.search("llm", beam_size=2).decode(x)
    assert [row[0].tokens for row in said] == [row[0].tokens for row in again.search(beam_size=2).decode(y)]
    with pytest.raises(InputError, match="allow llm"):
        model.search("ctc")


@pytest.mark.parametrize("hearing", [False, True])
def test_a_session_hears_what_a_search_says(hearing: bool) -> None:
    """Without a head that hears the end of an utterance it is the end of the sound."""
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(3)
    ctc = {"class_path": "speechattn.decoder.ctc.CTC", "init_args": {"dim": 8, "vocab": 7}}
    heads = {**CONFIG["heads"], **({"ctc": ctc} if hearing else {})}  # type: ignore[dict-item]
    model = from_config({**CONFIG, "heads": heads}, tokenizer()).eval().requires_grad_(False)
    model.heads["llm"].lm.lm_head.weight[END] = 0.0  # type: ignore[union-attr, index]
    model.heads["llm"].lm.lm_head.weight.mul_(3.0)  # type: ignore[union-attr, operator]
    if hearing:
        model.ctc.head.bias[0] = -20.0
    sound = random_frames([8000])
    best = model.search("llm", beam_size=1).decode(model.listening(sound))[0][0]
    assert len(best.tokens) > 3
    session, samples = Session(model, search=model.search("llm", beam_size=1)), sound.values[0].numpy()
    events = [event for at in range(0, 8000, 3000) for event in session.feed(samples[at : at + 3000], 16000)]
    events += session.finish()
    assert "".join(event.committed for event in events).split() == model.tokenizer.decode(best.tokens).split()


def test_a_session_without_end_has_utterances_that_end() -> None:
    torch.set_default_dtype(torch.float32)
    model = from_config(CONFIG, tokenizer()).eval()
    session = Session(model, settings=StreamSettings(longest_s=1.0))
    noise = random_frames([16000]).values[0].numpy()
    ends = [at for at in range(9) if any(event.final for event in session.feed(noise, 16000))]
    assert len(ends) == 2


def test_a_vocabulary_that_does_not_fit_is_an_error() -> None:
    torch.set_default_dtype(torch.float32)
    with pytest.raises(ModelError, match=r"heads\.llm says 7 tokens; there are 3"):
        from_config(CONFIG, Pieces(["<blank>", "▁a", "<sos/eos>"]))


def test_the_objective_adds_the_mean_over_rows() -> None:
    """For each token: cross-entropy + weight * mean of the rows' cos^2."""
    torch.set_default_dtype(torch.float32)
    model = from_config(CONFIG, tokenizer())
    model.double().requires_grad_(False)
    torch.set_default_dtype(torch.float64)
    llm: Any = model.heads["llm"]
    llm.prompt = (3, 5)
    x = random_frames([9, 6, 5], 8)
    tokens, lengths = torch.tensor([[1, 2, 3], [4, 0, 0], [5, 2, 0]]), torch.tensor([3, 1, 2])
    heard, said = Heard(x, x, x), Said(tokens, lengths)
    plain = SpeechLLMObjective().losses(model, heard, said)
    both = SpeechLLMObjective(decorrelate=100.0).losses(model, heard, said)
    _, inside, kinds = llm.losses(x, tokens, lengths, eos=END)
    alike = []
    for b in range(3):
        h = inside.states[1][b]  # one layer lies between
        read = [s for s in range(1, h.shape[0]) if kinds[b, s] in (MARK, SOUND, PROMPT)]
        alike.append(sum(float(torch.cosine_similarity(h[0], h[s], dim=0)) ** 2 for s in read) / len(read))
    step = (both.sum() - plain.sum()) / lengths.sum()
    assert step.item() == pytest.approx(100.0 * sum(alike) / 3, rel=1e-6)
    with pytest.raises(ValueError, match="wanted 0 or more"):
        SpeechLLMObjective(decorrelate=-1.0)


def test_the_page_runs() -> None:
    torch.set_default_dtype(torch.float32)
    text = (Path(__file__).parents[1] / "docs" / "speech-llm.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    exec(compile(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0], "docs/speech-llm.md", "exec"), names)
    assert names["loss"].shape == (2,)
    assert (names["kinds"] == LIPS).sum(1).tolist() == [13, 10]
