"""Causal language models of Hugging Face's transformers, and adapters that learn where the rest is frozen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from speechattn.decoder.decoder_only import before
from speechattn.errors import InputError
from speechattn.frames import Frames
from speechattn.linear import linear, run
from speechattn.multimodal.causal import Inspected
from speechattn.stream import Buffer
from speechattn.tree import node

__all__ = ["HuggingFaceLM", "HuggingFaceState", "Lora", "adapt"]

EXTRA = "pip install 'speechattn[lm]'"
FULL, SLIDING = "full_attention", "sliding_attention"  # kinds of layers in a configuration


@dataclass(frozen=True)
class Lora:
    """Adapters of low rank: W + alpha / rank * B A (arXiv 2106.09685, section 4.1), in layers called `targets`."""

    rank: int
    alpha: float
    targets: tuple[str, ...] = ("q_proj", "v_proj")

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank {self.rank}: wanted 1 or more")


def adapt(module: nn.Module, lora: Lora) -> None:
    """Freeze any module, and put adapters into it, which learn; at first they change nothing.

    InputError where there is no layer of one of these names.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise InputError(f"adapters need peft: {EXTRA}") from error
    called: dict[str, nn.Module] = {name.rpartition(".")[2]: part for name, part in module.named_modules()}
    if missing := [target for target in lora.targets if target not in called]:
        raise InputError(f"no layer is called {', '.join(missing)}: none to adapt")
    module.requires_grad_(False)
    turned = all(type(called[target]).__name__ == "Conv1D" for target in lora.targets)  # as GPT-2's
    inject_adapter_in_model(
        LoraConfig(
            r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets), fan_in_fan_out=turned,
        ), module,
    )  # fmt: skip


@node
class HuggingFaceState:
    """What each layer made of what was read: keys and values [B, N, 2, G, D / H]; their `places` [B, N]."""

    layers: tuple[Buffer, ...]
    places: Buffer


class HuggingFaceLM(nn.Module):
    """A `CausalLM` made of one of transformers: of a local folder with safetensors, or of a model object.

    Nothing is fetched, and no code of the folder is run. With `lora` the model is frozen and adapters learn. InputError
    for a model that cannot be told places, or that does other things between its layers and its scores.
    """

    def __init__(self, model: str | Path | nn.Module, *, lora: Lora | None = None) -> None:
        super().__init__()
        made: Any = model if isinstance(model, nn.Module) else loaded(Path(model))
        name, head = type(made).__name__, made.get_output_embeddings()
        self.body = made.base_model
        embedding = self.body.get_input_embeddings()
        if "position_ids" not in signature(self.body.forward).parameters:
            raise InputError(f"{name} takes no position_ids: frames that are missing would count")
        self.window = window_of(made.config, name)
        tied = head.weight is embedding.weight and head.bias is None
        self.head: nn.Module | None = None if tied else head
        self.vocab, self.dim = head.weight.shape
        if embedding.weight.shape[1] != self.dim:
            raise InputError(f"{name} reads {embedding.weight.shape[1]} features and says {self.dim}: wanted as many")
        self._shapes = self._probed(made, name)
        found = [x for x in self.body.modules() if isinstance(x, nn.ModuleList) and len(x) == len(self._shapes)]
        if not found:
            raise InputError(f"{name} has no list of {len(self._shapes)} layers")
        self._blocks = tuple(found[0])  # which `body` owns
        if lora is not None:
            adapt(self.requires_grad_(False).body, lora)

    @torch.no_grad()
    def _probed(self, made: Any, name: str) -> list[tuple[int, int]]:
        """Heads and width of each layer's keys, and that the scores are what `logits` makes of the hidden states."""
        mode = made.training
        made.eval()
        x = self.embed(torch.zeros(1, 1, dtype=torch.long, device=self.body.device))
        past, places = cache_of([]), torch.zeros(1, 1, dtype=torch.long, device=x.device)
        hidden = self.body(inputs_embeds=x, position_ids=places, past_key_values=past, use_cache=True)
        wanted = made(inputs_embeds=x, position_ids=places, use_cache=False).logits
        made.train(mode)
        found = self.logits(hidden.last_hidden_state)
        if not torch.allclose(found, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max())):
            raise InputError(f"{name} does more to its scores than one linear layer")
        shapes = [(keys.shape, values.shape) for keys, values, *_ in past]
        if not shapes or any(k != v or len(k) != 4 for k, v in shapes):
            raise InputError(f"{name} keeps no keys and values of one size in each layer")
        return [(k[1], k[3]) for k, _ in shapes]

    def embed(self, tokens: Tensor) -> Tensor:
        """[B, U] -> [B, U, D]."""
        embedded: Tensor = self.body.get_input_embeddings()(tokens)
        return embedded

    def start(self, rows: int) -> HuggingFaceState:
        """Nothing read."""
        like = self.body.get_input_embeddings().weight
        layers = [Buffer.empty(like.new_zeros(rows, 0, 2, *shape)) for shape in self._shapes]
        return HuggingFaceState(tuple(layers), Buffer.empty(torch.zeros(rows, 0, dtype=torch.long, device=like.device)))

    def extend(self, x: Frames, cache: HuggingFaceState) -> tuple[Tensor, HuggingFaceState]:
        """The next embeddings [B, T, D] -> hidden [B, T, D], of which `logits` says what follows; the next cache."""
        new = x.mask.shape[1]
        if not new:
            return x.values, cache
        past = cache_of([layer.values.permute(2, 0, 3, 1, 4) for layer in cache.layers])
        hidden, places, _ = self._read(x, cache.places, past_key_values=past, use_cache=True)
        made = [torch.stack([k[:, :, -new:], v[:, :, -new:]]).permute(1, 3, 0, 2, 4) for k, v, *_ in past]
        layers = [old.append(values, x.mask) for old, values in zip(cache.layers, made, strict=True)]
        return hidden, HuggingFaceState(tuple(layers), places)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden [..., D] -> unnormalised scores of the next token [..., V]."""
        if self.head is None:
            return linear(hidden, self.body.get_input_embeddings().weight, None)
        return run(self.head, hidden)

    def inspect(self, x: Frames, *, weights: bool = True) -> tuple[Tensor, Inspected]:
        """As `extend` from nothing, and what is inside, zero where `x` [B, T, D] is not valid."""
        states, there = [x], x.mask[:, None, :, None]
        with listened(self._blocks, x.mask, states), attentive(self.body, weights):
            hidden, _, said = self._read(x, self.start(len(x.mask)).places, use_cache=False, output_attentions=weights)
        looks = tuple(look * there for look in said.attentions) if weights else None
        return hidden, Inspected(tuple(Frames.of(y.values, y.mask).values for y in states), looks, x.mask)

    def _read(self, x: Frames, past: Buffer, **how: Any) -> tuple[Tensor, Buffer, Any]:
        """Embeddings behind a cache -> hidden [B, T, D], the places of all, and all that the model said."""
        new, dtype = x.mask.shape[1], self.body.dtype
        at = (past.length[:, None] + x.mask.cumsum(1) - 1).clamp(min=0)
        places = past.append(at, x.mask)
        seen = before(places, new)
        if self.window is not None:
            seen = seen & (at[..., None] - places.values[:, None] < self.window)
        # Half of the lowest number: under autocast it becomes one of fewer bits, and shall stay finite.
        shut = torch.zeros((), dtype=dtype, device=seen.device).where(seen, torch.finfo(dtype).min / 2)
        said = self.body(
            inputs_embeds=Frames.of(x.values, x.mask).values.to(dtype), attention_mask=shut[:, None],
            position_ids=at, **how,
        )  # fmt: skip
        return Frames.of(said.last_hidden_state, x.mask).values, places, said


def loaded(folder: Path) -> Any:
    """The model of a local folder, in float32."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise InputError(f"models of Hugging Face need transformers: {EXTRA}") from error
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: no folder with a config.json; models are not fetched")
    try:
        return AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=torch.float32
        )
    except Exception as error:
        raise InputError(f"{folder}: cannot be read as a causal language model ({str(error)[:200]})") from error


def window_of(config: Any, name: str) -> int | None:
    """How many frames each sees, itself among them. InputError where layers differ in it."""
    window = getattr(config, "sliding_window", None)
    usual = [SLIDING if window else FULL]
    kinds = {*(getattr(config, "layer_types", None) or usual)}
    if kinds == {FULL}:
        return None
    if kinds == {SLIDING} and window:
        return int(window)
    raise InputError(f"{name}: layers of the kinds {', '.join(sorted(kinds))}: wanted one kind that attends")


def cache_of(layers: list[Tensor]) -> Any:
    """transformers' own, of keys and values [2, B, G, N, D / H] of each layer."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for i, (keys, values) in enumerate(layers):
        if keys.shape[2]:
            cache.update(keys, values, i)
    return cache


@contextmanager
def listened(blocks: tuple[nn.Module, ...], mask: Tensor, states: list[Frames]) -> Iterator[None]:
    """What each of the layers says is put behind the `states`."""

    def hear(_: nn.Module, __: Any, said: Any) -> None:
        states.append(Frames(said if isinstance(said, Tensor) else said[0], mask))

    hooks = [block.register_forward_hook(hear) for block in blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def attentive(body: Any, weights: bool) -> Iterator[None]:
    """With `weights` the model computes attention in the way that gives them."""
    usual = body.config._attn_implementation
    if weights:
        body.set_attn_implementation("eager")
    try:
        yield
    finally:
        if weights:
            body.set_attn_implementation(usual)
