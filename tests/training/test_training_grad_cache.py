"""A step in parts (GradCache, texts of similar length together) or compiled: the same gradient as the plain one."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_folders import copy_backbone, edit_weights
from training_data import batch_of, contrastive_model, gradients, made_up_pairs, small_recipe

from diffretriever.publishing import build as building
from diffretriever.training.objective import ContrastiveModel
from diffretriever.training.train import checkpoint_layers


@pytest.fixture(scope="module", params=["tiny-llada", "tiny-dream"])
def release(request: pytest.FixtureRequest, build_release: Callable[..., Path]) -> Path:
    return build_release(request.param)


def gradient_of(model: ContrastiveModel, batch: dict[str, Any], chunk: int) -> dict[str, torch.Tensor]:
    model.recipe.grad_cache_chunk = chunk
    model.zero_grad(set_to_none=True)
    torch.manual_seed(11)
    model(batch)["loss"].backward()
    return gradients(model)


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], share: float) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        assert scale > 0, name
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=share * scale, msg=name)


@pytest.mark.parametrize("chunk", [1, 2, 5, 100])
def test_gradients_equal_the_plain_ones(release: Path, tmp_path: Path, chunk: int) -> None:
    model = contrastive_model(release, small_recipe(num_query_masks=2, num_passage_masks=3, dropout=0.0))
    records = made_up_pairs(4, negatives=2)
    plain = gradient_of(model, batch_of(model, records, tmp_path / "p.jsonl"), 0)
    model.recipe.grad_cache_chunk = chunk
    cached = gradient_of(model, batch_of(model, records, tmp_path / "q.jsonl"), chunk)
    assert_equal(cached, plain, 2e-4)


def test_reading_similar_lengths_together_has_the_plain_gradients(release: Path, tmp_path: Path) -> None:
    model = contrastive_model(release, small_recipe(num_query_masks=2, num_passage_masks=3, dropout=0.0))
    records = [row | {"positive": row["positive"] + " more" * 9 * n} for n, row in enumerate(made_up_pairs(4))]
    plain = gradient_of(model, batch_of(model, records, tmp_path / "p.jsonl"), 0)
    model.recipe.forward_texts = 2
    batch = batch_of(model, records, tmp_path / "q.jsonl")
    assert [len(chunk["ids"]) for chunk in batch["passage"]["chunks"]] == [2, 2]
    assert batch["passage"]["chunks"][0]["ids"].shape[1] < batch["passage"]["chunks"][1]["ids"].shape[1]
    assert_equal(gradient_of(model, batch, 0), plain, 2e-4)


@pytest.mark.slow
@pytest.mark.once
def test_compiled_layers_have_the_plain_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch.compile sees of two layers, and of lengths that vary; the code that it would write takes 40 s."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    backbone, release = copy_backbone("llada", tmp_path / "two-layers", n_layers=2), tmp_path / "of-two-layers"
    edit_weights(
        backbone / "model.safetensors",
        lambda tensors: [tensors.pop(name) for name in {*tensors} if ".blocks.2." in name or ".blocks.3." in name],
    )
    building.build(str(backbone), release)
    found = []
    for compiled in (False, True):
        recipe = small_recipe(dropout=0.0, forward_texts=2, compile_layers=compiled)
        model = contrastive_model(release, recipe)
        first = next(part for name, part in model.named_modules() if name.endswith("layers.0"))
        assert (first._compiled_call_impl is not None) == compiled
        batch = batch_of(model, made_up_pairs(4, negatives=1), tmp_path / "p.jsonl")
        found.append(gradient_of(model, batch, 0))
    assert_equal(found[1], found[0], 2e-4)


def test_in_bfloat16_the_casts_left_out_change_nothing(build_release: Callable[..., Path], tmp_path: Path) -> None:
    model = contrastive_model(build_release("tiny-llada"), small_recipe(dropout=0.0, bf16=True))
    batch, found = batch_of(model, made_up_pairs(4), tmp_path / "p.jsonl"), []
    layers = [part for part in model.modules() if hasattr(part, "cast_input_dtype_enabled")]
    for casts in (False, True):
        assert {layer.cast_input_dtype_enabled for layer in layers} == {casts}
        with torch.autocast("cpu", torch.bfloat16):
            found.append(gradient_of(model, batch, 0))
        for layer in layers:
            layer.cast_input_dtype_enabled = True
    assert_equal(found[0], found[1], 0)


def test_dropout_is_the_same_in_both_forward_passes(release: Path, tmp_path: Path) -> None:
    model = contrastive_model(release, small_recipe(dropout=0.3, grad_cache_chunk=3))
    batch = batch_of(model, made_up_pairs(4, negatives=2), tmp_path / "p.jsonl")  # chunks of three, with or without
    plain = gradient_of(model, batch, 0)
    assert_equal(gradient_of(model, batch, 3), plain, 2e-5)
    model.zero_grad(set_to_none=True)
    torch.manual_seed(12)
    model(batch)["loss"].backward()
    other = gradients(model)
    name = next(iter(other))
    assert not torch.allclose(other[name], plain[name])  # other dropout, another gradient


def test_gradient_checkpointing_inside_gives_the_same(release: Path, tmp_path: Path) -> None:
    model = contrastive_model(release, small_recipe(dropout=0.0, grad_cache_chunk=3))
    batch = batch_of(model, made_up_pairs(4, negatives=2), tmp_path / "p.jsonl")
    plain = gradient_of(model, batch, 0)
    checkpoint_layers(model.retriever)
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    for chunk in (0, 3):
        assert_equal(gradient_of(model, batch, chunk), plain, 2e-4)


def test_gradient_checkpointing_inside_keeps_the_dropout(release: Path, tmp_path: Path) -> None:
    model = contrastive_model(release, small_recipe(dropout=0.3, grad_cache_chunk=3))
    batch = batch_of(model, made_up_pairs(4, negatives=2), tmp_path / "p.jsonl")
    checkpoint_layers(model.retriever)
    assert_equal(gradient_of(model, batch, 3), gradient_of(model, batch, 0), 2e-5)


def most_alive(model: ContrastiveModel, batch: dict[str, Any], chunk: int) -> int:
    """Return how many of the MLP activations of all layers and chunks are alive at once in a step."""
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def note(module: Any, inputs: Any, output: torch.Tensor) -> None:
        nonlocal most
        alive.append(weakref.ref(output))
        most = max(most, sum(reference() is not None for reference in alive))

    hooks = [layer.mlp.act_fn.register_forward_hook(note) for layer in model.retriever.backbone.layers]
    gradient_of(model, batch, chunk)
    for hook in hooks:
        hook.remove()
    return most


def test_memory_is_that_of_one_chunk(build_release: Callable[..., Path], tmp_path: Path) -> None:
    model = contrastive_model(build_release("tiny-llada"), small_recipe(grad_cache_chunk=2, dropout=0.0))
    batch = batch_of(model, made_up_pairs(8, negatives=2), tmp_path / "p.jsonl")
    chunks = len(batch["passage"]["chunks"]) + len(batch["query"]["chunks"])
    layers = len(model.retriever.backbone.layers)
    assert chunks == 16
    assert most_alive(model, batch, 0) == chunks * layers
    assert most_alive(model, batch, 2) <= 2 * layers


def test_memory_of_a_recipe_with_checkpointing_is_that_of_one_layer(release: Path, tmp_path: Path) -> None:
    found = {}
    for checkpointing in (False, True):
        model = contrastive_model(release, small_recipe(gradient_checkpointing=checkpointing, dropout=0.0))
        batch = batch_of(model, made_up_pairs(4, negatives=2), tmp_path / "p.jsonl")
        found[checkpointing] = most_alive(model, batch, 0)
    assert found[False] == 2 * len(model.retriever.backbone.layers)  # of the queries and of the passages
    assert found[True] <= 2
