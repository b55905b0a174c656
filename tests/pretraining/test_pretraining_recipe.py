"""The recipe of pretraining."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffretriever.pretraining.recipe import Shape, read_pretrain_recipe

RECIPES = Path(__file__).parents[2] / "diffretriever" / "pretraining" / "recipes"


@pytest.mark.parametrize(("kind", "budgets"), [("llada", [1, 4]), ("dream", [1, 4, 16])])
def test_shipped_recipes_read(kind: str, budgets: list[int]) -> None:
    recipe = read_pretrain_recipe(RECIPES / f"{kind}-tiny.yaml")
    assert (recipe.backbone_type, recipe.stages[1].budgets) == (kind, budgets)
    assert recipe.shape == Shape(12288, d_model=192, n_layers=4, n_heads=3, mlp_hidden_size=576)


def test_an_open_value_may_be_given_or_left_out(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("shape: {rope_theta: 1e4, rms_norm_eps: null}")
    recipe = read_pretrain_recipe(tmp_path / "r.yaml", seed=7)
    assert (recipe.shape.rope_theta, recipe.shape.rms_norm_eps, recipe.seed) == (10_000.0, None, 7)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stagez: 3", r"r.yaml: unknown key 'stagez'; expected backbone_type, bf16, "),
        ("stages: [{steps: many}]", r"steps must be of type int, got 'many'"),
        ("stages: [{steps: 0}]", r"steps must be at least 1, got 0"),
        ("stages: [{temperature: hot}]", r"temperature must be a number, got 'hot'"),
        ("stages: [{temperature: -1}]", r"temperature must be positive, got -1"),
        ("stages: [{budgets: [4, 0]}]", r"budgets must be at least 1, got \[4, 0\]"),
        ("stages: [{pattern: [pears]}]", r"unknown kind of step 'pears'; expected one of pairs, neighbours"),
        ("stages: [{batch_size: 1}]", r"batch_size must be at least 2, or a query of 'pairs' steps has no negative"),
        ("seed: -1", r"r.yaml: seed must be at least 0, got -1"),
        ("log_every: 0", r"r.yaml: log_every must be at least 1, got 0"),
        ("backbone_type: lama", r"r.yaml: unknown backbone_type 'lama'; expected one of llada, dream"),
        ("backbone_type: 3", r"backbone_type must be of type str, got 3"),
        ("shape: {rope_theta: big}", r"shape: rope_theta must be a number, got 'big'"),
        ("shape: {n_layers: 0}", r"shape: n_layers must be positive, got 0"),
        (
            "shape: {d_model: 100, n_heads: 4}",
            r"d_model must be a multiple of twice n_heads.*got d_model 100 and n_heads 4",
        ),
        ("a: [", r"r.yaml: not valid YAML"),
        ("- 1", r"expected keys and values, got list"),
    ],
)
def test_recipe_errors(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ValueError, match=words):
        read_pretrain_recipe(tmp_path / "r.yaml")
