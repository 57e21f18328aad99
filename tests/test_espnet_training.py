"""Our encoders in ESPnet's training."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from speechattn.encoder import Encoder
from speechattn.errors import ModelError
from speechattn.frames import Frames
from speechattn.pretrained.espnet import register
from speechattn.pretrained.espnet.__main__ import main

pytest.importorskip("espnet2")
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.cuda.amp.autocast:FutureWarning:espnet2")

TRAINING = {
    "token_list": ["<blank>", "<unk>", "a", "b", "<sos/eos>"], "token_type": "char", "input_size": 20,
    "decoder": "transformer", "decoder_conf": {"attention_heads": 2, "linear_units": 16, "num_blocks": 1},
    "model_conf": {"ctc_weight": 0.5}, "encoder_conf": {"dim": 16, "depth": 1, "heads": 2, "inner": 16, "chunk": 4},
}  # fmt: skip


@pytest.mark.parametrize("encoder", ["speechattn_conformer", "speechattn_ebranchformer", "speechattn_transformer"])
def test_espnet_builds_and_trains_our_encoders(encoder: str, tmp_path: Path) -> None:
    """As its training does: from a config file, with the loss of a batch of two lengths."""
    asr = pytest.importorskip("espnet2.tasks.asr")
    register()
    register()  # twice is as good as once
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(TRAINING | {"encoder": encoder}))
    parser = asr.ASRTask.get_parser()
    args = parser.parse_args(["--config", str(tmp_path / "train.yaml"), "--output_dir", str(tmp_path)])
    model = asr.ASRTask.build_model(args)
    assert isinstance(model.encoder.encoder, Encoder)
    assert model.encoder.output_size() == 16
    text, text_lengths = torch.tensor([[2, 3, 2], [3, -1, -1]]), torch.tensor([3, 1])
    loss, stats, _ = model(torch.randn(2, 60, 20), torch.tensor([60, 41]), text, text_lengths)
    assert loss.isfinite()
    assert stats["loss_ctc"].isfinite()
    loss.backward()
    gradients = {name: p.grad for name, p in model.encoder.named_parameters()}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    assert max(float(gradient.abs().max()) for gradient in gradients.values() if gradient is not None) > 0


def test_interface_keeps_lengths_and_the_longest_row() -> None:
    pytest.importorskip("espnet2.tasks.asr")
    from speechattn.pretrained.espnet.encoders import EspnetConformer

    encoder = EspnetConformer(20, dim=16, depth=1, heads=2, inner=16, left=None, chunk=None).eval()
    x = torch.randn(2, 50, 20)
    y, lengths, states = encoder(x, torch.tensor([33, 21]))
    assert (y.shape, lengths.tolist(), states) == ((2, 9, 16), [9, 6], None)
    alone, _, _ = encoder(x[1:, :21], torch.tensor([21]))
    torch.testing.assert_close(y[1:, :6], alone, rtol=0, atol=1e-5)


def test_training_program_knows_our_encoders(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("espnet2.tasks.asr")
    task = pytest.importorskip("speechattn.pretrained.espnet.task")
    monkeypatch.setattr(sys, "argv", ["pytest"])
    printed: list[dict[str, Any]] = []
    monkeypatch.setattr(task.Task, "print_config", classmethod(lambda cls: printed.append(cls.get_default_config())))
    with pytest.raises(SystemExit) as ended:
        main(["asr_train", "--encoder", "speechattn_conformer", "--encoder_conf", "chunk=8", "--print_config"])
    assert ended.value.code == 0
    (config,) = printed
    assert config["encoder"] == "speechattn_conformer"
    assert (config["encoder_conf"]["chunk"], config["encoder_conf"]["left"]) == (8, 64)
    assert main(["asr_fly"]) == 2
    assert "asr_train" in capsys.readouterr().err


@pytest.mark.slow
def test_one_epoch_of_espnets_training_and_its_encoder_streams(tmp_path: Path) -> None:
    """The program as documented, on four utterances of noise; then the trained encoder from what ESPnet wrote."""
    asr = pytest.importorskip("espnet2.tasks.asr")
    pytest.importorskip("editdistance")
    lists: dict[str, list[str]] = {"speech.scp": [], "text": [], "shape": []}
    for i in range(4):
        np.save(tmp_path / f"u{i}.npy", np.random.default_rng(i).standard_normal((60 + i, 20)).astype("float32"))
        lists["speech.scp"].append(f"u{i} {tmp_path / f'u{i}.npy'}")
        lists["text"].append(f"u{i} ab")
        lists["shape"].append(f"u{i} {60 + i},20")
    for name, lines in lists.items():
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    data = [[str(tmp_path / "speech.scp"), "speech", "npy"], [str(tmp_path / "text"), "text", "text"]]
    shape = [str(tmp_path / "shape")]
    config = TRAINING | {
        "encoder": "speechattn_conformer", "max_epoch": 1, "optim": "adam", "batch_type": "unsorted", "batch_size": 2,
        "num_workers": 0, "train_data_path_and_name_and_type": data, "valid_data_path_and_name_and_type": data,
        "train_shape_file": shape, "valid_shape_file": shape, "use_tensorboard": False, "use_matplotlib": False,
        "output_dir": str(tmp_path / "exp"),
    }  # fmt: skip
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "speechattn.pretrained.espnet", "asr_train"]
    subprocess.run([*command, "--config", str(tmp_path / "train.yaml")], capture_output=True, check=True)
    register()
    exp = tmp_path / "exp"
    model, _ = asr.ASRTask.build_model_from_file(exp / "config.yaml", exp / "valid.acc.ave.pth")
    encoder = model.encoder.encoder.eval()
    assert encoder.plan().block == 16
    x = Frames.from_lengths(torch.randn(1, 16, 20), torch.tensor([16]))
    y, _ = encoder.step(x, encoder.init_state(x))
    assert y.values.shape == (1, 4, 16)


@pytest.mark.slow
def test_processes_that_espnet_spawns_know_our_encoders() -> None:
    """One a GPU, each begins with what it was sent: a method of the task."""
    pytest.importorskip("espnet2.tasks.asr")
    task = pytest.importorskip("speechattn.pretrained.espnet.task")
    sent = pickle.dumps(task.Task.main_worker)
    code = (
        f"import pickle; pickle.loads({sent!r}); from espnet2.tasks.asr import encoder_choices;"
        "print(sorted(name for name in encoder_choices.classes if name.startswith('speechattn')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "['speechattn_conformer', 'speechattn_ebranchformer', 'speechattn_transformer']" in done.stdout


def test_without_espnet_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "espnet2.tasks.asr", None)
    with pytest.raises(ModelError, match=r"speechattn\[espnet\].*--no-deps espnet"):
        register()
    assert main(["asr_train"]) == 2
