"""benchmarks/latency.py at its tiny size: what is timed are the methods, and its file can be drawn."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from diffretriever.evaluation.plots.latency import plot_latency, read_latency


@pytest.fixture
def latency(load_benchmark: Callable[[str], Any]) -> ModuleType:
    return load_benchmark("latency")


def test_every_method_is_timed_at_every_length(
    latency: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    passes: list[tuple[str, int]] = []  # of the backbone's first layer: the method that asks, and tokens read
    systems_of = latency.systems_of

    def noted(model: Any) -> Any:
        systems = systems_of(model)
        for system in (systems[0], systems[3]):  # a DiffRetriever's layers and their causal twin's
            masked = system.method == "DiffRetriever"
            layers = system.model.backbone.layers if masked else system.model.backbone.model.layers

            def note(_: Any, args: Any, kwargs: Any, name: str = system.method) -> None:
                passes.append((name, (args[0] if args else kwargs["hidden_states"]).shape[1]))

            layers[0].register_forward_pre_hook(note, with_kwargs=True)
        assert torch.equal(systems[0].model.lm_head.weight, systems[3].model.backbone.lm_head.weight)
        return systems

    monkeypatch.setattr(latency, "systems_of", noted)
    monkeypatch.setattr(
        sys, "argv", ["latency.py", "--tiny", "--device", "cpu", "--json", str(tmp_path / "latency.json")]
    )
    latency.main()
    content = json.loads((tmp_path / "latency.json").read_text())
    names = [f"{method}, K = {count}" for method in ("DiffRetriever", "PromptReps") for count in (1, 4, 20)]
    names += ["RepLLaMA", "DiffEmbed"]
    found = [(point["system"], point["tokens"]) for point in content["encoding"]]
    assert found == [(name, tokens) for tokens in (4, 12) for name in names]
    decoding = [tokens for name, tokens in passes if name == "PromptReps"].count(1)
    assert decoding == 2 * 2 * (3 + 19)  # K - 1 steps of one token, at two lengths, twice (a round that warms up)
    assert len([name for name, _ in passes if name == "DiffRetriever"]) == 2 * 2 * (3 + 1)  # one pass whatever K
    by_name = {(point["system"], point["tokens"]): point["latency_ms"] for point in content["encoding"]}
    for ratio in content["ratios"]:
        words = by_name[f"PromptReps, K = {ratio['words']}", ratio["tokens"]]
        assert ratio["ratio"] == words / by_name[f"DiffRetriever, K = {ratio['masks']}", ratio["tokens"]]
    pairs = {(ratio["words"], ratio["masks"]) for ratio in content["ratios"]}
    assert pairs == {(1, 1), (4, 4), (20, 20), (20, 4)}
    assert [point["passages"] for point in content["search"]] == [20, 50] * 3
    parts, made_on = read_latency(tmp_path / "latency.json")
    assert len(plot_latency(parts, made_on).axes) == 2
    assert "PromptReps, K = 20 / 20 masks" in capsys.readouterr().out
    assert [file.name for file in tmp_path.iterdir()] == ["latency.json"]


def test_lengths_are_of_the_text_whatever_stands_around_it(latency: ModuleType, load_release: Any) -> None:
    model = copy.deepcopy(load_release("tiny-llada"))  # other tests share it, and `settle` changes its lengths
    for system in latency.systems_of(model):
        lengths = []
        for tokens in (4, 12):
            system.settle(tokens)
            lengths.append(len(system.model.tokenize([latency.random_text(12)], is_query=True)[0][0]))
        assert lengths[1] - lengths[0] == 8
