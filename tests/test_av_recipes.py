"""Every recipe for sound and lips parses, builds, makes a step, validates, is exported and decodes, on noise."""

from __future__ import annotations

import json
import warnings
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lipreader import pictures, voice

pytest.importorskip("lhotse")
pytest.importorskip("jsonargparse")
pytest.importorskip("av")
pytest.importorskip("transformers")
pytest.importorskip("peft")

import transformers
from jsonargparse import Namespace
from test_llm_tokens import END, bytewise
from test_recipes import QUICK, RECIPES, Parsed, parsed, read

from speechattn.audio.clip import AudioVisual, Clip
from speechattn.audio.vision import write_video
from speechattn.data.cuts import Manifest, load_lips
from speechattn.data.prepare.manifests import Utterance, write_manifests
from speechattn.errors import InputError
from speechattn.frames import Frames
from speechattn.model import Recognizer, load_model
from speechattn.multimodal.speech_llm import SpeechLLM
from speechattn.multimodal.tokens import HuggingFaceTokens, load_tokenizer
from speechattn.task.checkpoint import export, packed, parts_of, tokenizer_of, unpacked
from speechattn.text.pieces import Pieces

ALONE = ["av/synthetic.yaml", "av/babble.yaml", "av/llm.yaml", "av/lrs3.yaml", "av/lrs3_llm.yaml"]
OVER = {
    "av/sound.yaml": ["av/synthetic.yaml", "av/babble.yaml", "av/lrs3.yaml"],
    "av/lrs3_ebranchformer.yaml": ["av/lrs3.yaml"],
    "av/lrs3_decorrelated.yaml": ["av/lrs3_llm.yaml"],
}
COMBINED = [*ALONE, *(f"{base}+{name}" for name, bases in OVER.items() for base in bases)]
QUICKEST = {"av/synthetic.yaml", "av/lrs3_llm.yaml"}
LLAMA = "models/Llama-3.2-1B"
DIM, SECONDS = 16, 0.6
LAYERS = {"dim": DIM, "depth": 1, "heads": 2, "inner": 24, "kernel": 5}
TINY = {
    "Conformer": LAYERS,
    "EBranchformer": LAYERS | {"gate": 24, "merge_kernel": 3},
    "Ears": {"dim": DIM, "channels": 4},
    "Eyes": {"features": 8, "dim": DIM},
    "LipNet": {"channels": [4, 8], "blocks": [1, 1]},
    "Fusion": {"inputs": 2 * DIM, "dim": DIM, "inner": 24},
    "CTC": {"dim": DIM},
    "usual": {"dim": DIM, "heads": 2, "depth": 1, "inner": 24},
    "Stacked": {"width": DIM, "dim": DIM, "inner": 24},
    "Llama": {"dim": DIM, "heads": 2, "depth": 2},
    "Lora": {"rank": 2},
    "SpeechLLM": {},
    "Encoder": {},
}
every = pytest.mark.parametrize(
    "recipe", [pytest.param(name, marks=() if name in QUICKEST else pytest.mark.slow) for name in COMBINED]
)
quiet = pytest.mark.filterwarnings("ignore:.*LeafSpec", "ignore:.*isinstance.treespec", "ignore:.*smaller than the log")


def shrink(part: Any, sizes: dict[str, dict[str, Any]]) -> None:
    """Put small numbers into every class that has some."""
    if isinstance(part, Namespace | dict):
        inside = vars(part) if isinstance(part, Namespace) else part
        for value in inside.values():
            shrink(value, sizes)
        if "class_path" in inside and "init_args" in inside:
            args = inside["init_args"]
            small = sizes.get(inside["class_path"].rpartition(".")[2], {})
            (vars(args) if isinstance(args, Namespace) else args).update(small)
    elif isinstance(part, list):
        for value in part:
            shrink(value, sizes)


def letters() -> Pieces:
    return Pieces(["<blank>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz", "<sos/eos>"])


def part(folder: Path, name: str, split: str, size: int) -> None:
    """Two clips of noise, with noise to see."""
    rows = []
    for i in range(2):
        video = folder / f"{name}-{split}-{i}.mkv"
        folder.mkdir(parents=True, exist_ok=True)
        write_video(video, pictures(15, i, size=size))
        sound = voice(SECONDS, i)
        rows.append(Utterance(f"{name}-{split}-{i}", lambda x=sound: x, ("the cat", "a mat")[i], "nobody", "en",
                              custom={"video": str(video)}))  # fmt: skip
    write_manifests(folder, name, split, rows)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the recipes name, small: data, tokens, and a Llama of random weights."""
    root = tmp_path_factory.mktemp("av")
    for split in ("train", "dev"):
        part(root / "data" / "av", "avsynth", split, 88)
    for split in ("trainval", "pretrain", "valid"):
        part(root / "data" / "lrs3", "lrs3", split, 96)
    for recipe in ALONE[:4]:
        said = yaml.safe_load((RECIPES / recipe).read_text(encoding="utf-8"))
        letters().save(root / said["model"]["init_args"]["tokenizer"])
    torch.manual_seed(0)
    folder = root / LLAMA
    tokens = bytewise()
    size = tokens.get_vocab_size()
    config = transformers.LlamaConfig(
        vocab_size=size, hidden_size=DIM, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=24, bos_token_id=size - 2, eos_token_id=size - 1,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokens.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    return root


def run(recipe: str, place: Path) -> Parsed:
    """One step and one validation at tiny width, in that folder."""
    cli = parsed()
    cli.config = read(recipe)
    vars(cli.config.trainer).update(QUICK)
    model, data = cli.config.model.init_args, cli.config.data.init_args
    vocab = load_tokenizer(place / model.tokenizer).size
    kinds = {name: {"vocab": vocab} for name in ("CTC", "usual", "Llama")}
    wide = {"Encoder": {"dim": DIM if "Fusion" in str(model.encoder) else 2 * DIM}, "SpeechLLM": {"bos": vocab - 2}}
    sizes = {name: TINY[name] | kinds.get(name, {}) | wide.get(name, {}) for name in TINY}
    shrink(model.encoder, sizes)
    shrink(model.heads, sizes)
    data.workers = 0
    cli.told = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Lightning: about loggers and workers that are not there
        cli.instantiate_classes()
        cli.fit()
    return cli


def test_every_file_is_tried() -> None:
    files = {f"av/{path.name}" for path in (RECIPES / "av").glob("*.yaml")}
    assert files == {*chain.from_iterable(name.split("+") for name in COMBINED)}


def adapted(head: Any, checkpoint: Path) -> None:
    """The language model is that of the folder, adapters in it learn, and the checkpoint has its tokens."""
    assert isinstance(head, SpeechLLM)
    moving = [name for name, p in head.named_parameters() if p.requires_grad and name.startswith("lm.")]
    assert {name.rpartition("lora_")[2][0] for name in moving} == {"A", "B"}
    frozen = transformers.LlamaForCausalLM.from_pretrained(LLAMA).state_dict()
    assert torch.equal(head.lm.embed(torch.arange(5)), frozen["model.embed_tokens.weight"][:5])
    config, tokens = parts_of(checkpoint)
    assert isinstance(tokens, HuggingFaceTokens)
    assert config["heads"]["llm"]["init_args"]["lm"]["init_args"]["model"] == LLAMA
    assert tokens.decode(tokens.encode("the cat sat")) == "the cat sat"


@every
def test_a_recipe_says_everything_consistently(recipe: str) -> None:
    config = read(recipe)
    model, data = config.model.init_args, config.data.init_args
    assert model.scheduler.init_args.total == config.trainer.max_steps
    size = model.front_end.init_args.size
    assert size == data.video_size
    assert ("lrs3" in recipe) == ("lrs3" in str(data.train))
    llm = "llm" in recipe
    assert (model.frozen == ["encoder"], model.search == "llm") == (llm, llm)
    if llm and "lrs3" in recipe:
        sides = model.heads["llm"].init_args
        assert (sides.sound.init_args.every, sides.lips.init_args.every) == (2, 2), "12.5 a second"
        assert model.tokenizer == sides.lm.init_args.model == LLAMA


@quiet
@every
def test_a_recipe_trains_and_what_it_makes_decodes(
    recipe: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    cli = run(recipe, place)
    found = {name: float(value) for name, value in cli.trainer.callback_metrics.items()}
    assert cli.trainer.global_step == 1
    assert 0 < found["train/loss"] < (1e5 if "decorrelated" in recipe else 100)
    assert np.isfinite(found[cli.model.monitor[0]])
    learnt = {name.split(".")[0] for name, p in cli.model.model.named_parameters() if p.requires_grad}
    assert learnt == ({"heads"} if "llm" in recipe else {"encoder", "heads"})
    cli.trainer.save_checkpoint(tmp_path / "step=1.ckpt")
    if "lrs3_llm" in recipe:
        adapted(cli.model.model.heads["llm"], tmp_path / "step=1.ckpt")
    export([tmp_path / "step=1.ckpt"], tmp_path / "model")
    model = load_model(tmp_path / "model")
    assert isinstance(model, Recognizer)
    for name, tensor in cli.model.model.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert isinstance(model.front_end, AudioVisual)
    manifest = Manifest.read([next(iter(cli.datamodule.valid_paths.values()))])
    size = cli.datamodule.video_size
    sound = Frames.from_lengths(torch.from_numpy(voice(SECONDS))[None], torch.tensor([round(SECONDS * 16000)]))
    found_lips = load_lips(manifest[0], round(SECONDS * 16000), size=size)
    assert found_lips is not None
    seen = torch.from_numpy(found_lips)[None]
    clip = Clip.together(sound, Frames(seen, torch.ones(seen.shape[:2], dtype=torch.bool)))
    assert clip.lips.mask.sum() == 15
    answers = model.search(cli.model.search, beam_size=2)
    with torch.no_grad():
        for heard in (clip, sound):
            best = answers.decode(model.listening(heard))[0][0]
            assert isinstance(model.tokenizer.decode(best.tokens), str)
            assert np.isfinite(best.score)


@quiet
def test_pictures_of_another_size_are_found_before_the_training(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    model = run("av/synthetic.yaml", place).model
    data = SimpleNamespace(rate=16000, video=True, video_size=96, check=None)
    monkeypatch.setattr(type(model), "trainer", SimpleNamespace(datamodule=data))
    with pytest.raises(InputError, match="video_size 96: the model sees pictures of 88 x 88"):
        model.setup("fit")
    data.video = False
    model.setup("fit")


def test_whichever_tokenizer_a_folder_has_is_loaded(place: Path, tmp_path: Path) -> None:
    theirs, ours = load_tokenizer(place / LLAMA), load_tokenizer(place / "data" / "lrs3" / "unigram5000")
    assert isinstance(theirs, HuggingFaceTokens)
    assert isinstance(ours, Pieces)
    assert isinstance(tokenizer_of(str(place / LLAMA)), HuggingFaceTokens)
    theirs.save(tmp_path)
    ours.save(tmp_path)
    assert isinstance(load_tokenizer(tmp_path), Pieces), "the last one that was saved there"
    theirs.save(tmp_path)
    assert isinstance(load_tokenizer(tmp_path), HuggingFaceTokens)
    ours.save(tmp_path / "model")
    assert isinstance(unpacked(packed(None, theirs), tmp_path / "model"), HuggingFaceTokens)
