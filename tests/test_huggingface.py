"""Language models of others: the same numbers as transformers, in pieces as in one, adapters, their tokens."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from speechattn import tree
from speechattn.errors import InputError, ModelError
from speechattn.frames import Frames
from speechattn.model.config import build
from speechattn.multimodal.attention import Gated
from speechattn.multimodal.huggingface import HuggingFaceLM, Lora, adapt
from speechattn.multimodal.llama import Llama
from speechattn.multimodal.llama_weights import from_hugging_face, renamed

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

VOCAB, DIM, HEADS = 31, 16, 4
SIZES = {"vocab_size": VOCAB, "hidden_size": DIM, "num_hidden_layers": 2, "num_attention_heads": HEADS,
         "num_key_value_heads": 2, "intermediate_size": 24, "bos_token_id": 0, "eos_token_id": 1}  # fmt: skip


def lively(model: Any) -> Any:
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def llama(**options: Any) -> Any:
    said = SIZES | {"rope_theta": 500.0, "rms_norm_eps": 1e-3} | options
    return lively(transformers.LlamaForCausalLM(transformers.LlamaConfig(**said)))


def gpt2(**options: Any) -> Any:
    sizes = {"vocab_size": VOCAB, "n_embd": DIM, "n_layer": 2, "n_head": HEADS, "n_positions": 40}
    return lively(transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **options)))


def mistral() -> Any:
    return lively(transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES, sliding_window=3)))


def qwen2() -> Any:
    return lively(transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES, tie_word_embeddings=True)))


def ours(theirs: Any, **options: Any) -> Llama:
    c = theirs.config
    made = Llama(
        VOCAB, DIM, HEADS, 2, inner=24, key_heads=2, base=500.0, eps=1e-3, tied=c.tie_word_embeddings, **options
    )
    tensors = renamed(theirs.state_dict())
    if c.tie_word_embeddings:
        del tensors["lm_head.weight"]
    made.load_state_dict(tensors)
    return made.eval()


def drawn(chance: random.Random, rows: int = 3, frames: int = 10) -> Frames:
    """Frames of which some are missing anywhere, with NaN there."""
    mask = torch.tensor([[chance.random() < 0.7 for _ in range(frames)] for _ in range(rows)])
    mask[0] = True
    mask[1, 0] = False
    return Frames(torch.randn(rows, frames, DIM).masked_fill(~mask[..., None], torch.nan), mask)


def theirs_alone(model: Any, x: Frames, row: int) -> Any:
    """What transformers says of one row without the frames that are missing."""
    return model(inputs_embeds=x.values[row, x.mask[row]][None], output_hidden_states=True, output_attentions=True)


def stepped(lm: Any, x: Frames, splits: list[int]) -> Tensor:
    cache, outs = lm.start(len(x.mask)), []
    for a, b in zip([0, *splits], [*splits, x.mask.shape[1]], strict=True):
        hidden, cache = lm.extend(x[a:b], cache)
        outs.append(lm.logits(hidden))
    return torch.cat(outs, 1)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["ours", "wrapped"])
def test_llama_says_what_transformers_says(kind: str, tied: bool) -> None:
    theirs = llama(tie_word_embeddings=tied, attn_implementation="eager")
    lm: Any = ours(theirs) if kind == "ours" else HuggingFaceLM(theirs)
    x = drawn(random.Random(0))
    hidden, inside = lm.inspect(x)
    pieces = stepped(lm, x, [1, 2, 6])
    for row in range(3):
        there = x.mask[row]
        wanted = theirs_alone(theirs, x, row)
        close(lm.logits(hidden)[row, there], wanted.logits[0])
        close(pieces[row, there], wanted.logits[0])
        for state, theirs_state in zip(inside.states[:-1], wanted.hidden_states[:-1], strict=True):
            close(state[row, there], theirs_state[0])
        close(theirs.model.norm(inside.states[-1])[row, there], wanted.hidden_states[-1][0])
        for looks, theirs_looks in zip(inside.weights, wanted.attentions, strict=True):
            close(looks[row][:, there][:, :, there], theirs_looks[0])
    assert not hidden[~x.mask].any()
    assert not any(state[~x.mask].any() for state in inside.states)


@torch.no_grad()
@pytest.mark.parametrize("make", [llama, gpt2, mistral, qwen2])
def test_any_model_in_pieces_is_the_whole_and_a_row_does_not_know_its_batch(make: Any) -> None:
    theirs = make()
    lm, x = HuggingFaceLM(theirs), drawn(random.Random(1))
    whole, inside = lm.inspect(x, weights=False)
    assert inside.weights is None
    assert (lm.dim, lm.vocab, len(inside.states)) == (DIM, VOCAB, 3)
    assert theirs.config._attn_implementation == "sdpa"
    for splits in ([3, 3, 4], list(range(1, 10))):
        close(stepped(lm, x, splits)[x.mask], lm.logits(whole)[x.mask])
    with_weights, looked = lm.inspect(x)
    assert theirs.config._attn_implementation == "sdpa"
    hooks = [len(part._forward_hooks) for part in theirs.modules()]
    lm.inspect(x)
    assert [len(part._forward_hooks) for part in theirs.modules()] == hooks
    close(with_weights, whole)
    assert looked.weights is not None
    for looks in looked.weights:
        close(looks.sum(-1), x.mask[:, None].expand(-1, HEADS, -1).float())
    for row in range(3):
        wanted = theirs_alone(theirs, x, row)
        close(lm.logits(whole)[row, x.mask[row]], wanted.logits[0])
        close(inside.states[1][row, x.mask[row]], wanted.hidden_states[1][0])
    tokens = torch.tensor([[4, 9, 2]])
    hidden, _ = lm.extend(Frames(lm.embed(tokens), torch.ones(1, 3, dtype=torch.bool)), lm.start(1))
    close(lm.logits(hidden), theirs(tokens).logits)


@torch.no_grad()
def test_rows_of_a_cache_are_chosen_and_put_together() -> None:
    lm, x, more = HuggingFaceLM(llama()), drawn(random.Random(2)), drawn(random.Random(3), frames=3)
    _, cache = lm.extend(x, lm.start(3))
    _, early = lm.extend(x[:4], lm.start(3))
    chosen = torch.tensor([2, 0, 2, 1])
    again, _ = lm.extend(Frames(more.values[chosen], more.mask[chosen]), tree.select(cache, chosen))
    close(again, lm.extend(more, cache)[0][chosen])
    both, _ = lm.extend(Frames(more.values.repeat(2, 1, 1), more.mask.repeat(2, 1)), tree.concat([cache, early]))
    close(both[3:], lm.extend(more, early)[0])


@torch.no_grad()
@pytest.mark.parametrize("weights", [False, True])
def test_half_precision_is_near(weights: bool) -> None:
    theirs, x = llama(), drawn(random.Random(7))
    wanted, _ = ours(theirs).inspect(x)
    for lm in (ours(theirs), HuggingFaceLM(theirs)):
        with torch.autocast("cpu", torch.bfloat16):
            hidden, inside = lm.inspect(x, weights=weights)
        torch.testing.assert_close(hidden.float(), wanted, rtol=0.1, atol=0.1)
        assert all(state.isfinite().all() for state in inside.states)


def test_gradients_flow_through_the_states() -> None:
    for lm in (HuggingFaceLM(llama()), HuggingFaceLM(gpt2(attn_pdrop=0.0))):
        values = torch.randn(2, 5, DIM, requires_grad=True)
        _, inside = lm.inspect(Frames(values, torch.ones(2, 5, dtype=torch.bool)), weights=False)
        for state in inside.states[1:]:
            (grad,) = torch.autograd.grad(state.square().sum(), values, retain_graph=True)
            assert grad.all()


def test_adapters_learn_and_the_rest_is_frozen() -> None:
    theirs = llama()
    x = drawn(random.Random(4))
    plain, _ = HuggingFaceLM(theirs).inspect(x)
    lm = HuggingFaceLM(theirs, lora=Lora(rank=3, alpha=6))
    close(lm.inspect(x)[0], plain)
    learn = {name: p for name, p in lm.named_parameters() if p.requires_grad}
    assert len(learn) == 2 * 2 * 2  # layers, targets, matrices
    assert {p.shape for p in learn.values()} == {(3, DIM), (DIM, 3), (8, 3)}
    with torch.no_grad():
        for parameter in learn.values():
            nn.init.normal_(parameter, std=0.3)
    first = theirs.model.layers[0].self_attn.v_proj
    y = torch.randn(2, DIM)
    a, b = (first.get_submodule(name).default.weight for name in ("lora_A", "lora_B"))
    close(first(y), y @ first.base_layer.weight.T + 6 / 3 * y @ a.T @ b.T)
    lm.inspect(x)[0].sum().backward()
    assert all((p.grad is not None and p.grad.any()) == p.requires_grad for p in lm.parameters())


def test_any_module_is_adapted() -> None:
    assert sum(p.requires_grad for p in HuggingFaceLM(gpt2(), lora=Lora(2, 2.0, ("c_attn",))).parameters()) == 4
    lm = Llama(VOCAB, DIM, HEADS, 2).eval()
    x = drawn(random.Random(5))
    plain, _ = lm.inspect(x)
    adapt(lm, Lora(2, 2.0, ("gate_proj",)))
    close(lm.inspect(x)[0], plain)
    assert sum(p.requires_grad for p in lm.parameters()) == 4
    with pytest.raises(InputError, match="query"):
        adapt(lm, Lora(2, 2.0, ("query",)))
    with pytest.raises(ValueError, match="rank"):
        Lora(0, 1.0)


@torch.no_grad()
def test_folders(tmp_path: Path) -> None:
    theirs, x = llama(tie_word_embeddings=True), drawn(random.Random(6))
    theirs.save_pretrained(tmp_path / "llama")
    wanted, _ = ours(theirs).inspect(x)
    close(HuggingFaceLM(str(tmp_path / "llama")).inspect(x)[0], wanted)
    read = from_hugging_face(tmp_path / "llama", window=(2, 20))
    close(read.inspect(x)[0], wanted)
    assert isinstance(from_hugging_face(tmp_path / "llama", attention=Gated).layers[0].self_attn.attend, Gated)
    whole = HuggingFaceLM(llama(tie_word_embeddings=True))
    assert len({p.data_ptr() for p in whole.state_dict().values()}) == len(whole.state_dict())  # a file takes it
    llama(rope_scaling={"rope_type": "linear", "factor": 2.0}).save_pretrained(tmp_path / "far")
    with pytest.raises(InputError, match="rope_scaling"):
        from_hugging_face(tmp_path / "far")
    llama(head_dim=8).save_pretrained(tmp_path / "wide")
    with pytest.raises(InputError, match="head_dim 8"):
        from_hugging_face(tmp_path / "wide")
    wide = HuggingFaceLM(tmp_path / "wide")
    close(stepped(wide, x, [5])[x.mask], wide.logits(wide.inspect(x)[0])[x.mask])
    (tmp_path / "llama" / "model.safetensors").rename(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match="missing"):
        from_hugging_face(tmp_path / "llama")
    for path in (tmp_path / "llama", tmp_path / "none", "gpt2"):
        with pytest.raises(InputError):
            HuggingFaceLM(path)
    with pytest.raises(InputError, match=r"config\.json|folder"):
        from_hugging_face(tmp_path / "none")


def test_models_that_it_cannot_carry() -> None:
    sizes = SIZES | {"head_dim": 4, "sliding_window": 4}
    gemma = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**sizes))
    with pytest.raises(InputError, match="kinds"):
        HuggingFaceLM(gemma)
    cohere = lively(transformers.CohereForCausalLM(transformers.CohereConfig(**SIZES, logit_scale=0.1)))
    with pytest.raises(InputError, match="scores"):
        HuggingFaceLM(cohere)
    bloom = transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=VOCAB, hidden_size=DIM, n_layer=1, n_head=2)
    )
    with pytest.raises(InputError, match="position_ids"):
        HuggingFaceLM(bloom)


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r"peft.*speechattn\[lm\]"):
        adapt(Llama(5, 8, 2, 1), Lora(1, 1.0))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"transformers.*speechattn\[lm\]"):
        HuggingFaceLM(tmp_path)


def test_a_configuration_makes_it(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    where, args = "speechattn.multimodal.huggingface", {"rank": 2, "alpha": 4, "targets": ["k_proj"]}
    lora = {"class_path": f"{where}.Lora", "init_args": args}
    lm = build({"class_path": f"{where}.HuggingFaceLM", "init_args": {"model": str(tmp_path), "lora": lora}}, "lm")
    assert isinstance(lm, HuggingFaceLM)
    assert {name.split(".")[4] for name, p in lm.named_parameters() if p.requires_grad} == {"k_proj"}
