"""The backbone against transformers' own LlamaForCausalLM and Qwen2ForCausalLM, and flash attention's code path."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from diffretriever.model.backbone_loading import our_name
from diffretriever.model.checked_files import read_backbone_config

FOLDERS = Path(__file__).parents[1] / "parity" / "backbones"
TEXTS = ["what causes the seasons on earth?", "", "a cat", "the tilt of the axis " * 8]


@pytest.fixture(scope="module", params=["llada", "dream"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def theirs(kind: str) -> Any:
    """transformers' causal model with the zero-shot weights, copied by name; causal until it gets a 4-D mask."""
    folder = FOLDERS / f"tiny-{kind}"
    _, config = read_backbone_config(folder)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    weights = {our_name(kind, name): weight.float() for name, weight in load_file(folder / "model.safetensors").items()}
    model.load_state_dict({name.replace("backbone.", "model.", 1): weight for name, weight in weights.items()})
    return model


@pytest.fixture(params=["sdpa", "eager"])
def ours(request: pytest.FixtureRequest, kind: str, load_release: Callable[..., Any]) -> Any:
    return load_release(f"tiny-{kind}", num_query_masks=3, num_passage_masks=5, attn_implementation=request.param)


def run_theirs(theirs: Any, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return final states [B, L, H] and logits [B, L, V] under a full additive mask [B, 1, L, L]."""
    batch, length = ids.shape
    full = torch.zeros(batch, 1, length, length).masked_fill(
        mask[:, None, None, :] == 0, torch.finfo(torch.float32).min
    )
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    states = theirs.model(inputs_embeds=theirs.model.embed_tokens(ids), attention_mask=full, position_ids=positions)
    hidden = states.last_hidden_state
    return hidden, theirs.lm_head(hidden)


def at_masks(states: torch.Tensor, ids: torch.Tensor, mask_id: int) -> torch.Tensor:
    return torch.stack([row[tokens == mask_id] for row, tokens in zip(states, ids, strict=True)])


@pytest.mark.parametrize("is_query", [True, False])
@pytest.mark.parametrize("texts", [TEXTS[:1], TEXTS], ids=["one text", "padded batch"])
@torch.no_grad()
def test_states_logits_and_weights(ours: Any, theirs: Any, texts: list[str], is_query: bool) -> None:
    ids, mask = ours.tokenize(texts, is_query=is_query)
    hidden, logits = run_theirs(theirs, ids, mask)
    expected = at_masks(hidden, ids, ours.texts.mask_id)
    got = ours(ids, mask, is_query=is_query).mask_hidden
    assert torch.allclose(got, expected, rtol=0, atol=1e-5)
    real = mask.bool()
    assert torch.allclose(ours.hidden_states(ids, mask)[real], hidden[real], rtol=0, atol=1e-5)
    out = ours.encode(
        ids, mask, is_query, compute_sparse=True, content_filter=False, sparse_top_k=ours.config.vocab_size
    )
    assert torch.allclose(out.repr_hidden, F.normalize(expected, dim=-1), rtol=0, atol=3e-6)
    weights = torch.log1p(F.relu(at_masks(logits, ids, ours.texts.mask_id).amax(dim=1)))
    weights[:, ours.texts.mask_id] = 0.0
    found = torch.zeros_like(weights).scatter_add_(1, out.sparse_indices, out.sparse_values)
    assert torch.allclose(found, weights, rtol=0, atol=2e-5)


@torch.no_grad()
def test_a_causal_model_gives_something_else(ours: Any, theirs: Any) -> None:
    # The comparison above would be worth nothing if attention were causal on both sides.
    ids, mask = ours.tokenize(TEXTS[:1], is_query=True)
    causal = theirs.model(input_ids=ids).last_hidden_state
    assert (ours.hidden_states(ids, mask) - causal).abs().max() > 0.1


@torch.no_grad()
def test_the_trimmed_last_layer_equals_the_whole_one(ours: Any) -> None:
    ids, mask = ours.tokenize(TEXTS, is_query=False)
    trimmed = ours(ids, mask, is_query=False).mask_hidden
    whole = at_masks(ours.hidden_states(ids, mask), ids, ours.texts.mask_id)
    assert torch.allclose(trimmed, whole, rtol=0, atol=1e-6)


def test_gradients(ours: Any, theirs: Any) -> None:
    ids, mask = ours.tokenize(TEXTS, is_query=True)
    ours.zero_grad()
    theirs.zero_grad()
    direction = torch.linspace(-1, 1, 64)
    (ours(ids, mask, is_query=True).mask_hidden @ direction).square().sum().backward()
    (at_masks(run_theirs(theirs, ids, mask)[0], ids, ours.texts.mask_id) @ direction).square().sum().backward()
    expected = {name: weight.grad for name, weight in theirs.model.named_parameters()}
    for name, weight in ours.backbone.named_parameters():
        scale = expected[name].abs().max()
        assert scale > 0
        assert torch.allclose(weight.grad, expected[name], rtol=0, atol=float(2e-5 * scale)), name
    ours.zero_grad()


# ------------------------------------------------------------------------------------------------ flash attention


FLASH_LAYERS: list[int] = []  # of the calls since the fixture was made


def emulated_flash(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    scaling: float,
    dropout: float = 0.0,
    **rest: Any,
) -> tuple[torch.Tensor, None]:
    """What flash_attention_2's integration computes: [B, heads, L, D] in, [B, L, heads, D] out.

    Like the real one, it takes a mask [B, L] or None and is causal unless told not to be; transformers 4.54 takes a
    batch for packed rows, and attends within row 0 alone, unless `position_ids` have a row for each text.
    """
    assert attention_mask is None or attention_mask.shape == (query.shape[0], key.shape[2])
    positions = rest.get("position_ids")
    assert positions is None or positions.shape == (query.shape[0], query.shape[2])
    causal = rest.get("is_causal")
    causal = module.is_causal if causal is None else causal
    assert not causal
    FLASH_LAYERS.append(module.layer_idx)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores.masked_fill(attention_mask[:, None, None, :] == 0, -math.inf)
    return (scores.softmax(dim=-1) @ value).transpose(1, 2), None


@pytest.fixture
def flash(kind: str, load_release: Callable[..., Any]) -> Iterator[Any]:
    """A model whose attention is the emulated kernel; the real one needs a GPU."""
    model = load_release(f"tiny-{kind}", num_query_masks=3, num_passage_masks=5, attn_implementation="sdpa")
    configs = [model.config, model.backbone.config]
    FLASH_LAYERS.clear()
    registered = ALL_ATTENTION_FUNCTIONS["flash_attention_2"]
    ALL_ATTENTION_FUNCTIONS["flash_attention_2"] = emulated_flash
    for config in configs:
        config._attn_implementation = "flash_attention_2"
    yield model
    for config in configs:
        config._attn_implementation = "sdpa"
    ALL_ATTENTION_FUNCTIONS["flash_attention_2"] = registered


@pytest.mark.parametrize(
    "texts", [TEXTS[:1], TEXTS, [TEXTS[0]] * 3], ids=["one text", "padded batch", "batch without padding"]
)
def test_flash_attention_equals_sdpa(flash: Any, texts: list[str]) -> None:
    ids, mask = flash.tokenize(texts, is_query=True)
    got = flash.encode(ids, mask, True, compute_sparse=True)
    assert FLASH_LAYERS == [0, 1, 2, 3]
    for config in (flash.config, flash.backbone.config):
        config._attn_implementation = "sdpa"
    expected = flash.encode(ids, mask, True, compute_sparse=True)
    assert torch.allclose(got.repr_hidden, expected.repr_hidden, rtol=0, atol=3e-6)
    assert torch.allclose(got.sparse_values, expected.sparse_values, rtol=0, atol=2e-5)


def test_other_attention_is_refused(ours: Any) -> None:
    ids, mask = ours.tokenize(TEXTS, is_query=True)
    saved = ours.config._attn_implementation
    try:
        ours.config._attn_implementation = "flex_attention"
        with pytest.raises(ValueError, match="'flex_attention' is not supported; use sdpa, eager or flash_attention_2"):
            ours.encode(ids, mask, True)
    finally:
        ours.config._attn_implementation = saved
