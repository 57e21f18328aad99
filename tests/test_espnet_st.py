"""Translators of ESPnet's ST task in our modules, against ESPnet itself."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from speechattn.decoder.letters import OwnTokens
from speechattn.errors import ModelError
from speechattn.frames import Frames, Memory
from speechattn.model import Recognizer
from speechattn.pretrained.espnet import load_espnet
from speechattn.search.transducer import TransducerGreedy
from speechattn.task.checkpoint import recipe

pytest.importorskip("espnet2")
st = pytest.importorskip("espnet2.tasks.st")

from test_espnet import make_exact  # noqa: E402
from test_espnet_model import MELS, SAID, NoLoss, encoded, heard, tones  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.cuda.amp.autocast:FutureWarning")

LETTERS: list[str] = SAID["token_list"]
END = len(LETTERS) - 1
HEARD = ["<blank>", "<unk>", "<space>", *"pqrstu", "<sos/eos>"]
TEXTS = ["ab cde", "fg aab e", "c gf"]
DECODER = {"attention_heads": 2, "linear_units": 12, "num_blocks": 2}
TRAIN: dict[str, Any] = {
    **{key: SAID[key] for key in ("token_list", "token_type", "frontend", "frontend_conf", "encoder", "encoder_conf")},
    "src_token_list": HEARD, "src_token_type": "char", "normalize": "global_mvn",
    "decoder": "transformer", "decoder_conf": DECODER,
    "extra_asr_decoder": "transformer", "extra_asr_decoder_conf": {**DECODER, "num_blocks": 1},
    "model_conf": {"asr_weight": 0.3, "mtlalpha": 0.5, "st_mtlalpha": 0.3, "lsm_weight": 0.1, "report_bleu": False},
}  # fmt: skip
TRANSDUCER: dict[str, Any] = {
    "decoder": "transducer", "decoder_conf": {"rnn_type": "lstm", "num_layers": 2, "hidden_size": 10},
    "st_joint_net_conf": {"joint_space_size": 14},
}  # fmt: skip


@pytest.fixture(scope="module")
def speech2text() -> Any:
    """ESPnet's own inference. The task of enhancement, which it imports too, wants more packages and is not used."""
    with pytest.MonkeyPatch.context() as patch:
        task = ModuleType("espnet2.tasks.enh_s2t")
        task.EnhS2TTask = None  # type: ignore[attr-defined]
        patch.setitem(sys.modules, task.__name__, task)
        return importlib.import_module("espnet2.bin.st_inference").Speech2Text


@pytest.fixture(autouse=True)
def _loss_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = ModuleType("warprnnt_pytorch")
    loss.RNNTLoss = NoLoss  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "warprnnt_pytorch", loss)


def made(folder: Path, *, double: bool = False, **changes: Any) -> tuple[Any, Path]:
    """The model that ESPnet's training begins with, every parameter random, and the folder that it leaves."""
    values = np.random.default_rng(0).normal(-8, 3, (50, MELS))
    np.savez(folder / "stats.npz", count=50, sum=values.sum(0), sum_square=(values**2).sum(0))
    said = TRAIN | changes | {"normalize_conf": {"stats_file": str(folder / "stats.npz")}}
    (folder / "train.yaml").write_text(yaml.safe_dump(said))
    given = ["--config", str(folder / "train.yaml"), "--output_dir", str(folder)]
    args = st.STTask.get_parser().parse_args(given)
    theirs = st.STTask.build_model(args).eval().requires_grad_(False)
    for name, tensor in theirs.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.3, 3)
        elif not name.startswith(("frontend", "normalize")) and tensor.is_floating_point():
            tensor.normal_(float(tensor.dim() == 1 and name.endswith("weight")), 0.4)
    for head in (getattr(theirs, name) for name in ("ctc", "st_ctc") if hasattr(theirs, name)):
        head.ctc_lo.weight *= 4  # as sure as if it had been trained
        head.ctc_lo.bias[-1] -= 40
        head.ctc_lo.bias[0] -= 10
    if said["decoder"] == "transformer" and hasattr(theirs, "decoder"):
        theirs.decoder.output_layer.weight *= 0.2
        theirs.decoder.output_layer.bias[:2] -= 40
    if double:
        theirs = theirs.double()
        make_exact(next(m for m in theirs.encoder.modules() if type(m).__name__.endswith("PositionalEncoding")))
    torch.save(theirs.state_dict(), folder / "valid.acc.ave.pth")
    dump = importlib.import_module("espnet2.utils.yaml_no_alias_safe_dump").yaml_no_alias_safe_dump
    (folder / "config.yaml").write_text(dump(vars(args), indent=4, sort_keys=False), encoding="utf-8")
    return theirs, folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return taught(tmp_path_factory.mktemp("st"))


def taught(folder: Path) -> Path:
    """With a decoder that was taught what to say of the three sounds: a random one never ends."""
    torch.manual_seed(3)
    theirs, _ = made(folder)
    spoken = [torch.from_numpy(sound(i))[None] for i in range(len(TEXTS))]
    frames = [theirs.encode(x, torch.tensor([x.shape[1]])) for x in spoken]
    optimizer = torch.optim.Adam(theirs.decoder.requires_grad_(True).parameters(), lr=0.02)
    for _ in range(60):
        loss = torch.zeros(())
        for (x, length), text in zip(frames, TEXTS, strict=True):
            tokens = [LETTERS.index("<space>" if letter == " " else letter) for letter in text]
            scores, _ = theirs.decoder(x, length, torch.tensor([[END, *tokens]]), torch.tensor([len(text) + 1]))
            loss = loss + nn.functional.cross_entropy(scores[0], torch.tensor([*tokens, END]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.save(theirs.state_dict(), folder / "valid.acc.ave.pth")
    return folder


def sound(i: int = 0) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Tones and half a window of silence, so that ESPnet has nothing to mirror."""
    x = tones(32000)[i * 900 :]
    x[-400:] = 0
    return x


def listened(model: Recognizer, x: np.ndarray[Any, Any]) -> Frames:
    y: Frames = model.listening(heard(torch.from_numpy(x)[None]))
    return y[: int(y.lengths[0])]


def test_frames_and_scores_are_espnets(tmp_path: Path) -> None:
    theirs, folder = made(tmp_path, double=True)
    ours = load_espnet(folder)
    assert list(ours.heads) == ["ctc", "source", "attention"]
    x, frames = encoded(theirs)
    y = ours.encoder(heard(x))
    y = y[: int(y.lengths[0])]
    torch.testing.assert_close(y.values, frames.values, rtol=0, atol=1e-9)
    for head, name in (("ctc", "st_ctc"), ("source", "ctc")):
        expected = getattr(theirs, name).log_softmax(frames.values)
        torch.testing.assert_close(ours.heads[head](y).values, expected, rtol=0, atol=1e-9)
    assert ours.heads["ctc"](y).values.shape != ours.heads["source"](y).values.shape
    tokens, decoder = torch.randint(1, 10, (1, 6)), ours.heads["attention"]
    theirs.decoder.embed[1].pe = decoder.positions[None]
    after = torch.cat([torch.tensor([[10]]), tokens], 1)
    expected, _ = theirs.decoder(frames.values, torch.tensor([frames.mask.shape[1]]), after, torch.tensor([7]))
    scores, _, _, _ = decoder.forced(decoder.start(Memory.of(y)), tokens, torch.tensor([6]), sos=10, eos=10)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("joint", {"ctc_weight": 0.3}), ("attention", {"penalty": 0.1}), ("ctc", {"ctc_greedy": True})],
)
def test_translations_are_those_of_espnets_inference(
    kind: str, options: dict[str, Any], speech2text: Any, trained: Path
) -> None:
    """From samples to tokens and text, with its own program."""
    theirs = speech2text(str(trained / "config.yaml"), str(trained / "valid.acc.ave.pth"), beam_size=10, **options)
    ours = load_espnet(trained)
    found = []
    for i in range(len(TEXTS)):
        text, _, expected, best = theirs(sound(i))[0]
        hypothesis = ours.search(kind, beam_size=1 if kind == "ctc" else 10).decode(listened(ours, sound(i)))[0][0]
        assert list(hypothesis.tokens) == expected
        assert kind == "ctc" or hypothesis.score == pytest.approx(float(best.score), abs=1e-2)
        found.append(ours.tokenizer.decode(hypothesis.tokens))
        assert found[-1] == " ".join(text.split())
    assert found == TEXTS if kind == "attention" else len({*found}) == 3
    assert min(map(len, found)) > 3


def test_the_transducer_is_that_of_espnets_inference(speech2text: Any, tmp_path: Path) -> None:
    _, folder = made(tmp_path, **TRANSDUCER)
    files, conf = [str(folder / name) for name in ("config.yaml", "valid.acc.ave.pth")], {"search_type": "default"}
    theirs, ours = speech2text(*files, transducer_conf=conf, beam_size=1), load_espnet(folder)
    assert list(ours.heads) == ["ctc", "source", "transducer"]
    found = TransducerGreedy(ours.heads["transducer"], max_symbols=1).decode(listened(ours, sound()))[0][0]
    assert list(found.tokens) == theirs(sound())[0][2]
    assert found.tokens


def test_the_source_hears_what_espnets_ctc_hears(tmp_path: Path) -> None:
    """Its words are counted in its own tokens, of which there are others than of the translation."""
    theirs, folder = made(tmp_path, double=True)
    ours = load_espnet(folder)
    head, counter = ours.heads["source"], ours.counter
    assert isinstance(head, OwnTokens)
    assert counter is not None
    assert ours.heads["ctc"].head.out_features == len(LETTERS) != len(HEARD)
    frames = heard(torch.randn(1, 60, 16, dtype=torch.float64))
    path = theirs.ctc.argmax(frames.values)[0]
    said = "".join(HEARD[int(i)] for i in torch.unique_consecutive(path) if i)
    words = said.replace("<space>", " ").split()
    assert len(words) > 2
    assert head.pieces.decode(torch.unique_consecutive(path).tolist()) == " ".join(words)
    assert counter.count(counter.hear(counter.labels(frames)[0])) == len(words)
    silent = ours.blank(frames)[0]
    assert silent[path == 0].all()
    assert not silent.all()


@pytest.mark.parametrize(
    ("shares", "wanted"),
    [
        ({"st_mtlalpha": 0.0}, ["source", "attention"]), ({"st_mtlalpha": 1.0}, ["ctc", "source"]),
        ({"asr_weight": 0.0}, ["ctc", "attention"]), ({"mtlalpha": 0.0}, ["ctc", "attention"]),
        ({"asr_weight": 0.0, "st_mtlalpha": 0.0}, ["attention"]),
    ],
)  # fmt: skip
def test_heads_are_those_that_were_trained(shares: dict[str, float], wanted: list[str], tmp_path: Path) -> None:
    _, folder = made(tmp_path, model_conf=TRAIN["model_conf"] | shares)
    model = load_espnet(folder)
    assert list(model.heads) == wanted
    assert model.translates
    assert recipe(folder)["model"]["class_path"] == "speechattn.task.translator.Translator"


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"hier_encoder": "conformer"}, "hier_encoder: conformer cannot be honoured; wanted null"),
    ({"md_encoder": "conformer"}, "md_encoder: conformer cannot be honoured; wanted null"),
    ({"postencoder": "length_adaptor"}, "postencoder: length_adaptor"),
    ({"decoder": "transformer_md"}, "decoder: transformer_md cannot be honoured; wanted transformer or transducer"),
    ({"src_token_type": "phn"}, "src_token_type: phn cannot be honoured; wanted bpe or char or word"),
    ({"src_token_list": "data/tokens.txt"}, "src_token_list: not a list of tokens"),
    ({"src_token_list": HEARD[1:]}, "src_token_list: the first of the 9 pieces is not <blank>"),
    ({"src_token_list": [*HEARD[:-1], "v", "<sos/eos>"]}, "of the wrong shape .*heads.source.head"),
    ({"model_conf": {"tgt_sym_sos": "<s>"}}, "model_conf: tgt_sym_sos: <s> cannot be honoured"),
    ({"model_conf": {"tgt_sym_eos": "</s>"}}, "tgt_sym_eos: </s>"),
    ({"model_conf": {"tgt_sym_blank": "<b>"}}, "tgt_sym_blank: <b>"),
    ({"model_conf": {"asr_weight": 2}}, "asr_weight: 2 is not between 0 and 1"),
    ({"model_conf": {"ctc_weight": 0.3}}, "model_conf has options that are not known here: ctc_weight"),
    ({"model_conf": {"st_mtlalpha": 0.0}}, r"tensors of parts that are not known here \(st_ctc"),
    ({"model_conf": {"asr_weight": 0.0}}, r"tensors of parts that are not known here \(ctc\.ctc_lo"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_cannot_be_honoured_is_named(changes: dict[str, Any], message: str, trained: Path, tmp_path: Path) -> None:
    said = yaml.safe_load((trained / "config.yaml").read_text())
    said |= {key: said[key] | value if isinstance(value, dict) else value for key, value in changes.items()}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(said))
    with pytest.raises(ModelError, match=message) as error:
        load_espnet(tmp_path / "config.yaml", trained / "valid.acc.ave.pth")
    assert str(tmp_path) in str(error.value) or str(trained) in str(error.value)


def test_only_what_espnets_inference_leaves_alone_is_dropped(trained: Path, tmp_path: Path) -> None:
    tensors = torch.load(trained / "valid.acc.ave.pth", weights_only=True)
    assert any(name.startswith("extra_asr_decoder.") for name in tensors)
    for name, ok in (
        ("extra_mt_decoder.x", True), ("extra_mt_encoder.x", True), ("md_encoder.x", False), ("hier_encoder.x", False),
        ("joint_network.x", False), ("st_joint_network.x", False), ("st_ctc.x", False), ("ctc.x", False),
    ):  # fmt: skip
        torch.save(tensors | {name: torch.zeros(1)}, tmp_path / "model.pth")
        if ok:
            load_espnet(trained, tmp_path / "model.pth")
        else:
            with pytest.raises(ModelError, match=r"model\.pth: "):
                load_espnet(trained, tmp_path / "model.pth")


def test_silent_options_mean_espnets_defaults() -> None:
    import inspect

    from speechattn.pretrained.espnet.heads import TRANSLATION

    model = inspect.signature(importlib.import_module("espnet2.st.espnet_model").ESPnetSTModel).parameters
    known = {**TRANSLATION.shares, **TRANSLATION.fixed}
    assert {name: model[name].default for name in known} == known
    options = {name for name, p in model.items() if p.default is not inspect.Parameter.empty}
    assert options == known.keys() | TRANSLATION.training
