"""Whole models of ESPnet in our modules, against ESPnet itself."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import yaml
from torch import Tensor, nn

from speechattn.attention import Span
from speechattn.errors import ModelError
from speechattn.frames import Frames, Memory
from speechattn.live import Session, StreamSettings
from speechattn.model import Recognizer, load_model, save_model
from speechattn.pretrained.espnet import is_espnet, load_encoder, load_espnet
from speechattn.search.transducer import TransducerGreedy

pytest.importorskip("espnet2")
espnet_model = pytest.importorskip("espnet2.asr.espnet_model")

from espnet.nets.batch_beam_search import BatchBeamSearch  # noqa: E402
from espnet.nets.scorers.ctc import CTCPrefixScorer  # noqa: E402
from espnet2.asr.ctc import CTC  # noqa: E402
from espnet2.asr.decoder.transducer_decoder import TransducerDecoder  # noqa: E402
from espnet2.asr.decoder.transformer_decoder import TransformerDecoder  # noqa: E402
from espnet2.asr.encoder.conformer_encoder import ConformerEncoder  # noqa: E402
from espnet2.asr.encoder.e_branchformer_encoder import EBranchformerEncoder  # noqa: E402
from espnet2.asr.frontend.default import DefaultFrontend  # noqa: E402
from espnet2.asr_transducer.joint_network import JointNetwork  # noqa: E402
from espnet2.layers.global_mvn import GlobalMVN  # noqa: E402
from test_espnet import make_exact  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.cuda.amp.autocast:FutureWarning")

MELS = 24
LETTERS = ["<blank>", "<unk>", "<space>", *"abcdefg", "<sos/eos>"]
SAID: dict[str, Any] = {
    "token_list": LETTERS, "token_type": "char", "bpemodel": None, "input_size": None, "model": "espnet",
    "frontend": "default", "frontend_conf": {"fs": "16k", "n_mels": MELS},
    "normalize": "global_mvn", "normalize_conf": {"stats_file": "exp/asr_stats/train/feats_stats.npz"},
    "specaug": "specaug", "specaug_conf": {"apply_time_warp": True}, "preencoder": None, "postencoder": None,
    "encoder": "conformer",
    "encoder_conf": {
        "output_size": 16, "attention_heads": 2, "linear_units": 24, "num_blocks": 2, "cnn_module_kernel": 3,
        "macaron_style": True, "rel_pos_type": "latest",
    },
    "decoder": "transformer", "decoder_conf": {"attention_heads": 2, "linear_units": 12, "num_blocks": 2},
    "ctc_conf": {"dropout_rate": 0.1, "ctc_type": "builtin"}, "model_conf": {"ctc_weight": 0.3, "lsm_weight": 0.1},
    "optim": "adam", "max_epoch": 50,
}  # fmt: skip
TRANSDUCER: dict[str, Any] = {
    "decoder": "transducer", "decoder_conf": {"rnn_type": "lstm", "num_layers": 2, "hidden_size": 10},
    "joint_net_conf": {"joint_space_size": 14},
}  # fmt: skip


class NoLoss(nn.Module):
    def __init__(self, **options: object) -> None:
        super().__init__()


@pytest.fixture(autouse=True)
def _loss_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    stub = ModuleType("warprnnt_pytorch")
    stub.RNNTLoss = NoLoss  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "warprnnt_pytorch", stub)


def espnets(said: dict[str, Any], folder: Path) -> Any:
    """The model that ESPnet builds of such a config, every parameter and statistic random."""
    size, stats = len(said["token_list"]), folder / "feats_stats.npz"
    values = np.random.default_rng(0).normal(-8, 3, (50, said["frontend_conf"]["n_mels"]))
    np.savez(stats, count=50, sum=values.sum(0), sum_square=(values**2).sum(0))
    normal = {key: value for key, value in said["normalize_conf"].items() if key != "stats_file"}
    encoder = {"conformer": ConformerEncoder, "e_branchformer": EBranchformerEncoder}[said["encoder"]](
        input_size=said["frontend_conf"]["n_mels"], **said["encoder_conf"]
    )
    decoder, joint = None, None
    if said["decoder"] == "transducer":
        decoder = TransducerDecoder(size, **said["decoder_conf"])
        joint = JointNetwork(size, encoder.output_size(), decoder.dunits, **said["joint_net_conf"])
    elif said["decoder"] is not None:
        decoder = TransformerDecoder(size, encoder.output_size(), **said["decoder_conf"])
    model = espnet_model.ESPnetASRModel(
        size, said["token_list"], DefaultFrontend(**said["frontend_conf"]), None,
        GlobalMVN(stats, **normal) if said["normalize"] else None, None, encoder, None, decoder,
        CTC(size, encoder.output_size(), **said["ctc_conf"]), joint,
        **said["model_conf"], report_cer=False, report_wer=False,
    ).eval()  # fmt: skip
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.3, 3)
        elif not name.startswith(("frontend", "normalize")) and tensor.is_floating_point():
            tensor.normal_(float(tensor.dim() == 1 and name.endswith("weight")), 0.4)
    return model.requires_grad_(False)


def made(folder: Path, *, double: bool = True, **changes: Any) -> tuple[Any, Path]:
    """ESPnet's model and the folder that its training leaves."""
    said = SAID | changes
    theirs = espnets(said, folder)
    if double:
        theirs = theirs.double()
        make_exact(next(m for m in theirs.encoder.modules() if type(m).__name__.endswith("PositionalEncoding")))
    (folder / "config.yaml").write_text(yaml.safe_dump(said, allow_unicode=True), encoding="utf-8")
    torch.save(theirs.state_dict(), folder / "valid.acc.ave.pth")
    return theirs, folder


def sure(theirs: Any, folder: Path) -> tuple[Any, Path]:
    """With a CTC head as sure as if it had been trained."""
    theirs.ctc.ctc_lo.weight *= 4
    theirs.ctc.ctc_lo.bias[-1] -= 40
    theirs.ctc.ctc_lo.bias[0] -= 10
    theirs.decoder.output_layer.weight *= 0.2
    torch.save(theirs.state_dict(), folder / "valid.acc.ave.pth")
    return theirs, folder


def tones(samples: int = 48000) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Sound that changes every 150 ms."""
    draw, at = np.random.default_rng(0), np.arange(2400) / 16000
    drawn = draw.uniform((100, 0.01), (6000, 0.9), (samples // 2400, 2))
    parts = [np.sin(2 * np.pi * hz * at) * loud for hz, loud in drawn]
    return (np.concatenate(parts) + draw.normal(0, 0.01, len(parts) * 2400)).astype(np.float32)


def heard(values: Tensor) -> Frames:
    return Frames(values, torch.ones(values.shape[:2], dtype=torch.bool))


def encoded(theirs: Any, frames: int = 90) -> tuple[Tensor, Frames]:
    """Features, and what ESPnet's encoder makes of them."""
    x = torch.randn(1, frames, MELS, dtype=torch.float64)
    values, _, _ = theirs.encoder(x, torch.tensor([frames]))
    return x, heard(values)


@pytest.mark.parametrize(
    ("options", "normal"),
    [
        ({"fs": "16k", "n_mels": MELS}, {}),
        ({"fs": 16000, "n_fft": 512, "win_length": 400, "hop_length": 160, "n_mels": 80, "frontend_conf": None}, {}),
        ({"fs": "8 kHz", "n_fft": 256, "hop_length": 80, "n_mels": 20, "fmin": 80, "fmax": 3000}, None),
        ({"fs": 16000, "n_mels": 20, "htk": True, "fmax": 7000}, {"norm_means": False}),
        ({"fs": 22050, "n_fft": 1024, "hop_length": 256, "n_mels": 20, "htk": True}, {"norm_vars": False}),
    ],
    ids=str,
)
def test_features_are_espnets_but_for_the_last_windows(
    options: dict[str, Any], normal: dict[str, Any] | None, tmp_path: Path
) -> None:
    """Window t ends half a window behind sample t * hop. Where that is beyond the end of the sound, ESPnet mirrors the

    sound and ours is over; and a window in the middle of which the sound is over is none here.
    """
    changes: dict[str, Any] = {"frontend_conf": options, "normalize_conf": normal or {}}
    theirs, folder = made(tmp_path, double=False, **changes, normalize=None if normal is None else "global_mvn")
    ours = load_espnet(folder)
    rate = {"16k": 16000, "8 kHz": 8000}.get(options["fs"], options["fs"])
    assert ours.sample_rate == rate
    hop, window = options.get("hop_length", 128), options.get("win_length", options.get("n_fft", 512))
    for samples in (4000, 4096, 4097, 5119):
        x = torch.randn(1, samples)
        expected, lengths = theirs._extract_feats(x, torch.tensor([samples]))
        if normal is not None:
            expected, _ = theirs.normalize(expected, lengths)
        y = ours.front_end(heard(x))
        y = y[: int(y.lengths[0])]
        same = (samples - window // 2) // hop + 1
        assert same > 10
        assert y.values.shape[1] == int(lengths[0]) - (samples % hop == 0) <= same + -(-window // 2 // hop)
        torch.testing.assert_close(y.values[:, :same], expected[:, :same], rtol=1e-6, atol=5e-5)
        assert (y.values[:, -1] - expected[:, y.values.shape[1] - 1]).abs().max() > 1e-3  # and the last one is another


def test_sound_that_ends_in_silence_gives_the_same_frames(tmp_path: Path) -> None:
    """There is nothing to mirror then: from samples to the encoder's frames, with ESPnet's own method."""
    theirs, folder = made(tmp_path, double=False)
    ours = load_espnet(folder)
    x = torch.randn(1, 12000)
    x[:, -300:] = 0
    expected, lengths = theirs.encode(x, torch.tensor([12000]))
    y = ours.listening(heard(x))
    assert y.lengths.tolist() == lengths.tolist()
    assert expected.std() > 0.1
    torch.testing.assert_close(y.values[:, : lengths[0]], expected, rtol=0, atol=1e-3)


def test_frames_and_scores_are_espnets(tmp_path: Path) -> None:
    theirs, folder = made(tmp_path)
    ours = load_espnet(folder)
    x, frames = encoded(theirs)
    y = ours.encoder(heard(x))
    y = y[: int(y.lengths[0])]
    torch.testing.assert_close(y.values, frames.values, rtol=0, atol=1e-9)
    torch.testing.assert_close(ours.ctc(y).values, theirs.ctc.log_softmax(frames.values), rtol=0, atol=1e-9)
    tokens, decoder = torch.randint(1, 10, (1, 6)), ours.heads["attention"]
    theirs.decoder.embed[1].pe = decoder.positions[None]
    after = torch.cat([torch.tensor([[10]]), tokens], 1)
    expected, _ = theirs.decoder(frames.values, torch.tensor([frames.mask.shape[1]]), after, torch.tensor([7]))
    start = decoder.start(Memory.of(y))
    scores, _, _, _ = decoder.forced(start, tokens, torch.tensor([6]), sos=10, eos=10)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-9)
    assert len({float(norm.eps) for norm in ours.modules() if isinstance(norm, nn.LayerNorm)}) == 1
    assert not any(parameter.requires_grad for parameter in ours.parameters())


@pytest.mark.parametrize("kind", ["ctc", "joint"])
def test_searches_find_what_espnets_beam_finds(kind: str, tmp_path: Path) -> None:
    theirs, folder = sure(*made(tmp_path))
    ours = load_espnet(folder)
    theirs.decoder.embed[1].pe = ours.heads["attention"].positions[None]
    weight = 1.0 if kind == "ctc" else 0.3
    scorers = {"decoder": theirs.decoder, "ctc": CTCPrefixScorer(theirs.ctc, 10)}
    search = BatchBeamSearch(
        scorers if kind == "joint" else {"ctc": scorers["ctc"]}, {"decoder": 1 - weight, "ctc": weight}, 10, 11, 10, 10,
        pre_beam_score_key="full" if kind == "joint" else None,
    )  # fmt: skip
    for frames in (60, 90):
        _, x = encoded(theirs, frames)
        expected = search(x.values[0])[0]
        found = ours.search(kind).decode(x)[0][0]
        assert list(found.tokens) == expected.yseq.tolist()[1:-1]
        assert len(found.tokens) > 2
        assert kind == "ctc" or found.score == pytest.approx(float(expected.score), abs=1e-6)


def test_the_transducer_is_espnets(tmp_path: Path) -> None:
    from espnet2.asr.transducer.beam_search_transducer import BeamSearchTransducer

    theirs, folder = made(tmp_path, **TRANSDUCER)
    ours = load_espnet(folder)
    assert list(ours.heads) == ["ctc", "transducer"]
    _, x = encoded(theirs)
    labels = torch.randint(1, 11, (1, 5))
    theirs.decoder.float()  # ESPnet's states are float32 always
    out = theirs.decoder(torch.cat([torch.zeros(1, 1, dtype=torch.long), labels], 1)).double()
    expected = theirs.joint_network(x.values[:, :, None], out[:, None])
    head = ours.heads["transducer"]
    torch.testing.assert_close(head(x, labels), expected, rtol=0, atol=1e-4)
    theirs.float()
    search = BeamSearchTransducer(theirs.decoder, theirs.joint_network, beam_size=1, search_type="default")
    found = TransducerGreedy(head, max_symbols=1).decode(x)[0][0]  # ESPnet's says no more in a frame
    assert list(found.tokens) == search(x.values[0].float())[0].yseq[1:]
    assert found.tokens
    assert ours.search().decode(x)[0][0].tokens  # by the transducer too


def test_characters_are_espnets(tmp_path: Path) -> None:
    from espnet2.text.char_tokenizer import CharTokenizer
    from espnet2.text.token_id_converter import TokenIDConverter

    _, folder = made(tmp_path)
    ours, spelling, ids = load_espnet(folder).tokenizer, CharTokenizer(), TokenIDConverter(LETTERS)
    for text in ("abc", "a bad cab", "fag egg"):
        tokens = ids.tokens2ids(spelling.text2tokens(text))
        assert ours.encode(text) == tokens
        assert ours.decode(tokens) == text == spelling.tokens2text(ids.ids2tokens(tokens))
    assert ours.words(ours.encode("a bad cab")) == [1, 4, 4]
    assert ours.end == 10


def test_pieces_are_espnets(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    from espnet2.text.sentencepiece_tokenizer import SentencepiecesTokenizer
    from espnet2.text.token_id_converter import TokenIDConverter

    exp = tmp_path / "exp" / "asr_train"
    (tmp_path / "data" / "bpe_28").mkdir(parents=True)
    exp.mkdir(parents=True)
    lines = ["the cat sat on the mat", "a dog and the other cat", "that mat is an old one", "the sad dog sat"] * 5
    (tmp_path / "text").write_text("\n".join(lines))
    path = tmp_path / "data" / "bpe_28" / "bpe"
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(path), vocab_size=28, model_type="unigram", minloglevel=2
    )
    model = sentencepiece.SentencePieceProcessor(model_file=f"{path}.model")
    said = [model.id_to_piece(i) for i in range(model.get_piece_size())]
    pieces = ["<blank>", "<unk>", *(piece for piece in said if piece not in ("<unk>", "<s>", "</s>")), "<sos/eos>"]
    _, folder = made(exp, token_list=pieces, token_type="bpe", bpemodel="data/bpe_28/bpe.model")
    ours = load_espnet(folder).tokenizer
    theirs, ids = SentencepiecesTokenizer(f"{path}.model"), TokenIDConverter(pieces)
    for text in (*lines[:4], "oh no a tame cat"):
        tokens = ids.tokens2ids(theirs.text2tokens(text))
        assert ours.encode(text) == tokens
        assert ours.decode(tokens) == text == theirs.tokens2text(ids.ids2tokens(tokens))
    (tmp_path / "data" / "bpe_28" / "bpe.model").rename(exp / "bpe.model")  # as a folder that was handed on
    assert load_espnet(folder).tokenizer.model == exp / "bpe.model"
    (exp / "bpe.model").unlink()
    alone = load_espnet(folder).tokenizer
    assert alone.model is None
    assert alone.decode(tokens) == text
    assert alone.decode(alone.encode(text)) == text


def test_words_are_tokens(tmp_path: Path) -> None:
    words = ["<blank>", "<unk>", "good", "morning", "all", "<sos/eos>"]
    _, folder = made(tmp_path, token_list=words, token_type="word")
    ours = load_espnet(folder).tokenizer
    assert ours.encode("good morning all") == [2, 3, 4]
    assert ours.decode([2, 3, 4]) == "good morning all"
    assert ours.words([2, 3, 4]) == [1, 1, 1]


@pytest.mark.parametrize(
    ("weight", "decoder", "wanted"),
    [
        (0.0, "transformer", ["attention"]), (0.3, "transformer", ["ctc", "attention"]),
        (1.0, "transformer", ["ctc"]), (1.0, "rnn", ["ctc"]), (1.0, None, ["ctc"]),
    ],
)  # fmt: skip
def test_heads_are_those_that_were_trained(
    weight: float, decoder: str | None, wanted: list[str], tmp_path: Path
) -> None:
    """With `ctc_weight: 1.0` ESPnet drops the decoder that the config names, and with 0.0 the CTC."""
    theirs, folder = made(tmp_path, model_conf={"ctc_weight": weight}, decoder=decoder)
    assert (theirs.decoder is None, theirs.ctc is None) == (weight == 1, weight == 0)
    assert list(load_espnet(folder).heads) == wanted


def test_where_no_normalisation_is_named_it_is_that_of_the_utterance(trained: Path, tmp_path: Path) -> None:
    said = {key: value for key, value in SAID.items() if key != "normalize"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(said))
    with pytest.raises(ModelError, match="normalize: utterance_mvn needs the mean of the whole utterance"):
        load_espnet(tmp_path, trained / "valid.acc.ave.pth")


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"input_size": 83}, "input_size: 83"),
    ({"frontend": "s3prl"}, "frontend: s3prl cannot be honoured; wanted default"),
    ({"frontend_conf": {"window": "hamming"}}, "frontend_conf: window: hamming cannot be honoured; wanted hann"),
    ({"frontend_conf": {"center": False}}, "center: False cannot be honoured; wanted true"),
    ({"frontend_conf": {"normalized": True}}, "normalized: True"),
    ({"frontend_conf": {"onesided": False}}, "onesided: False"),
    ({"frontend_conf": {"apply_stft": False}}, "apply_stft: False"),
    ({"frontend_conf": {"win_length": 401}}, "win_length: 401 is odd"),
    ({"frontend_conf": {"win_length": 600}}, "win_length: 600 is more than n_fft, 512"),
    ({"frontend_conf": {"n_fft": 511}}, "n_fft: 511 is odd"),
    ({"frontend_conf": {"hop_length": 0}}, "hop_length: 0 is not a positive"),
    ({"frontend_conf": {"fs": "high"}}, "fs: high is no number of samples"),
    ({"frontend_conf": {"fs": "0.5"}}, "fs: 0.5 is no number"),
    ({"frontend_conf": {"fmax": 7000}}, r"valid\.acc\.ave\.pth: frontend.logmel.melmat: other filters"),
    ({"frontend_conf": {"fmax": 9000}}, "fmax: 9000 is no frequency of sound at 16000"),
    ({"frontend_conf": {"warp": 1}}, "frontend_conf has options that are not known here: warp"),
    ({"frontend_conf": [1]}, "frontend_conf: .* is not a mapping"),
    ({"frontend_conf": {"frontend_conf": {"use_wpe": True}}}, "frontend_conf: use_wpe: True"),
    ({"frontend_conf": {"frontend_conf": {"use_beamformer": True}}}, "use_beamformer: True"),
    ({"normalize": "utterance_mvn"}, "normalize: utterance_mvn needs the mean of the whole utterance"),
    ({"normalize": "other"}, "normalize: other cannot be honoured; wanted global_mvn or null"),
    ({"normalize_conf": {"norm": 1}}, "normalize_conf has options that are not known here: norm"),
    ({"normalize_conf": {"norm_vars": 2}}, "norm_vars: 2"),
    ({"speech_volume_normalize": 0.5}, "speech_volume_normalize needs the loudest"),
    ({"preencoder": "linear"}, "preencoder: linear cannot be honoured; wanted null"),
    ({"postencoder": "length_adaptor"}, "postencoder: length_adaptor"),
    ({"encoder": "rnn"}, "encoder: rnn"),
    ({"decoder": "rnn"}, "decoder: rnn cannot be honoured; wanted transformer or transducer or null"),
    ({"decoder_conf": {"input_layer": "linear"}}, "decoder_conf: input_layer: linear"),
    ({"decoder_conf": {"use_output_layer": False}}, "use_output_layer: False"),
    ({"decoder_conf": {"normalize_before": False}}, "decoder_conf: normalize_before: False"),
    ({"decoder_conf": {"concat_after": True}}, "decoder_conf: concat_after: True"),
    ({"decoder_conf": {"qk_norm": True}}, "qk_norm: True"),
    ({"decoder_conf": {"rnn_type": "gru"}}, "decoder_conf has options that are not known here: rnn_type"),
    ({"decoder_conf": {"num_blocks": 3}}, r"tensors do not fit .* missing \(heads.attention.layers.2"),
    ({"decoder_conf": {"linear_units": 13}}, "heads.attention.layers.0.ff.0.bias"),
    ({"decoder_conf": {"attention_heads": 3}}, "16 .*3"),
    ({"decoder": "transducer", "decoder_conf": {"rnn_type": "gru"}}, "rnn_type: gru cannot be honoured; wanted lstm"),
    ({"decoder": "transducer", "decoder_conf": {"embed_pad": 1}}, "embed_pad: 1"),
    (
        {"decoder": "transducer", "decoder_conf": {}, "joint_net_conf": {"joint_activation_type": "relu"}},
        "joint_net_conf: joint_activation_type: relu",
    ),
    ({"model": "maskctc"}, "model: maskctc cannot be honoured; wanted espnet"),
    ({"model_conf": {"sym_blank": "<b>"}}, "model_conf: sym_blank: <b>"),
    ({"model_conf": {"sym_sos": "<s>"}}, "model_conf: sym_sos: <s>"),
    ({"model_conf": {"sym_eos": "</s>"}}, "model_conf: sym_eos: </s>"),
    ({"model_conf": {"transducer_multi_blank_durations": [2]}}, "transducer_multi_blank_durations"),
    ({"model_conf": {"ctc_weight": 2}}, "ctc_weight: 2 is not between 0 and 1"),
    ({"model_conf": {"mystery": 2}}, "model_conf has options that are not known here: mystery"),
    ({"ctc_conf": {"shift": 2}}, "ctc_conf has options that are not known here: shift"),
    ({"use_lang_prompt": True}, "use_lang_prompt: True"),
    ({"use_nlp_prompt": True}, "use_nlp_prompt: True"),
    ({"token_type": "phn"}, "token_type: phn cannot be honoured; wanted bpe or char or word"),
    ({"token_list": "data/tokens.txt"}, "token_list: not a list of tokens"),
    ({"token_list": ["a", *LETTERS]}, "token_list: the first of the 12 pieces is not <blank>"),
    ({"token_list": LETTERS[:-1]}, "token_list: the last token is not <sos/eos>"),
    ({"token_list": [*LETTERS[:-1], "h", "<sos/eos>"]}, "of the wrong shape"),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    return made(tmp_path_factory.mktemp("asr"), double=False)[1]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_cannot_be_honoured_is_named(changes: dict[str, Any], message: str, trained: Path, tmp_path: Path) -> None:
    said = dict(SAID)
    for key, value in changes.items():
        merged = isinstance(value, dict) and key != "joint_net_conf" and "decoder" not in changes
        said[key] = said[key] | value if merged else value
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(said))
    with pytest.raises(ModelError, match=message) as error:
        load_espnet(config, trained / "valid.acc.ave.pth")
    assert str(tmp_path) in str(error.value) or str(trained) in str(error.value)


def test_silent_sections_mean_espnets_defaults() -> None:
    """Of ESPnet's own signatures."""
    import inspect

    from speechattn.pretrained.espnet import heads, sound

    for defaults, ignored, cls, given in (
        (sound.FRONT_END, set(), DefaultFrontend, set()),
        (sound.NORMAL, {"eps"}, GlobalMVN, {"stats_file"}),
        (heads.TRANSFORMER, heads.TRANSFORMER_TRAINING, TransformerDecoder,
         {"vocab_size", "encoder_output_size", "pos_enc_class"}),
        (heads.TRANSDUCER, {"dropout_embed"}, TransducerDecoder, {"vocab_size"}),
        (heads.JOINT, set(), JointNetwork,
         {"output_size", "encoder_size", "decoder_size", "activation_parameters"}),
        ({}, heads.CTC_TRAINING, CTC, {"odim", "encoder_output_size"}),
    ):  # fmt: skip
        theirs = {name: p.default for name, p in inspect.signature(cls).parameters.items() if name not in given}
        assert theirs.keys() - ignored == defaults.keys()
        different = {name for name in defaults if theirs[name] != defaults[name]}
        assert different <= {"frontend_conf"}  # ESPnet's says with many words that it does nothing
    model = inspect.signature(espnet_model.ESPnetASRModel).parameters
    task = heads.RECOGNITION
    assert {name: model[name].default for name in {**task.shares, **task.fixed}} == {**task.shares, **task.fixed}
    assert model.keys() >= task.training


def test_weights_must_be_all_known(trained: Path, tmp_path: Path) -> None:
    tensors = torch.load(trained / "valid.acc.ave.pth", weights_only=True)
    for changes, message in (
        ({"lang.weight": torch.zeros(1)}, r"1 tensors of parts that are not known here \(lang\.weight\)"),
        ({"normalize.mean": None}, "normalize.mean is missing"),
        ({"decoder.decoders.0.norm7.weight": torch.zeros(1)}, r"1 unknown \(heads.attention.decoders.0.norm7"),
        ({"ctc.ctc_lo.weight": None}, r"1 missing \(heads.ctc.head.weight\)"),
        ({"frontend.logmel.melmat": torch.zeros(257, MELS)}, "logmel.melmat: other filters than frontend_conf"),
        ({"frontend.logmel.melmat": torch.zeros(257, 80)}, "logmel.melmat: other filters than frontend_conf"),
        ({"ctc.more": torch.zeros(1)}, r"1 unknown \(heads.ctc.more\)"),
    ):
        kept = {name: tensor for name, tensor in (tensors | changes).items() if tensor is not None}
        torch.save(kept, tmp_path / "model.pth")
        with pytest.raises(ModelError, match=rf"model\.pth: .*{message}"):
            load_espnet(trained, tmp_path / "model.pth")


def test_both_loaders_read_the_same_encoder(trained: Path) -> None:
    mine, other = load_encoder(trained).state_dict(), load_espnet(trained).encoder.state_dict()
    assert mine.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in mine.items())


def test_with_a_span_it_hears_live_what_it_hears_offline(tmp_path: Path) -> None:
    _, folder = sure(*made(tmp_path, double=False))
    ours = load_espnet(folder, span=Span(16, 4))
    sound, settings = tones(), StreamSettings(silence_s=60, patience_s=60, certainty=1)
    x = heard(torch.from_numpy(sound)[None])
    for kind in ("ctc", "joint"):
        with torch.inference_mode():
            y = ours.listening(x)
            expected = ours.search(kind).decode(y[: int(y.lengths[0])])[0][0]
        assert len(expected.tokens) > 5
        events: list[Any] = []
        session = Session(ours, search=ours.search(kind), settings=settings, on_event=events.append)
        for at in range(0, len(sound), 1700):
            session.feed(sound[at : at + 1700], 16000)
        session.finish()
        said = "".join(event.committed for event in events)
        assert " ".join(said.split()) == ours.tokenizer.decode(expected.tokens)


@pytest.mark.parametrize(
    "changes", [{}, TRANSDUCER, {"encoder_conf": SAID["encoder_conf"] | {"rel_pos_type": "legacy"}}]
)
def test_it_can_be_written_as_one_of_ours(changes: dict[str, Any], tmp_path: Path) -> None:
    _, folder = made(tmp_path, double=False, **changes)
    legacy = "encoder_conf" in changes
    model = load_espnet(folder, span=None if legacy else Span(16, 4))
    save_model(model, tmp_path / "ours")
    again = load_model(tmp_path / "ours")
    assert isinstance(again, Recognizer)
    x = heard(torch.randn(1, 9000))
    with torch.inference_mode():
        first, second = model.listening(x), again.listening(x)
        assert first.values.std() > 0.1
        torch.testing.assert_close(first.values, second.values, rtol=0, atol=0)
        assert (model.listening.plan().block is None) == legacy == (again.listening.plan().block is None)
        for kind in ("joint", "transducer"):
            if kind == "transducer" if changes is TRANSDUCER else kind == "joint":
                found = [one.search(kind).decode(first)[0][0] for one in (model, again)]
                assert found[0] == found[1]
    eps = [[m.eps for m in one.modules() if isinstance(m, nn.LayerNorm)] for one in (model, again)]
    assert eps[0] == eps[1]


def test_positions_that_need_the_whole_utterance_take_no_span(tmp_path: Path) -> None:
    _, folder = made(tmp_path, double=False, encoder_conf=SAID["encoder_conf"] | {"rel_pos_type": "legacy"})
    with pytest.raises(ModelError, match=r"config\.yaml: encoder: .*only Span\.full\(\) works"):
        load_espnet(folder, span=Span(16, 4))


def test_folders_of_espnet_are_known(trained: Path, tmp_path: Path) -> None:
    assert is_espnet(trained)
    assert is_espnet(trained / "config.yaml")
    assert not is_espnet(trained / "valid.acc.ave.pth")
    assert not is_espnet(tmp_path)
    assert not is_espnet(Path("tiny.en"))
    save_model(load_espnet(trained, span=Span(16, 4)), tmp_path / "ours")
    assert not is_espnet(tmp_path / "ours")
    (tmp_path / "config.yaml").write_text("[")
    assert not is_espnet(tmp_path)


def test_the_documented_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[1] / "docs" / "espnet.md").read_text(encoding="utf-8")
    example = next(block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "load_espnet" in block)
    folder = tmp_path / "exp" / "asr_train_conformer"
    folder.mkdir(parents=True)
    sure(*made(folder, double=False))
    soundfile.write(tmp_path / "talk.wav", tones(), 16000)
    monkeypatch.chdir(tmp_path)
    seen: dict[str, Any] = {}
    exec(compile(example, "espnet.md", "exec"), seen)
    assert seen["transcript"].text
    assert seen["again"].transcribe("talk.wav").text == seen["transcript"].text
