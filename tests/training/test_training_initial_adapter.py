"""`train --adapter`: training goes on from an adapter, the method's own and ours, and refuses what is none for it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from causal_backbones import make_backbone
from safetensors.torch import load_file, save_file
from training_runs import arguments, weights, write_pairs, write_recipe

from diffretriever.cli.main import main
from diffretriever.publishing import build as building

MASK, ANOTHER = "<|mdm_mask|>", "<|reserved_token_0|>"  # of those that the tokenizer has and the prompts leave unused
ADAPTERS = Path(__file__).parents[1] / "parity" / "adapters"


@pytest.fixture
def command(build_release: Callable[..., Path], tmp_path: Path) -> Callable[..., list[str]]:
    """Return a function that gives the command of a step that moves nothing, on tiny-llada where no other is named."""
    recipe = write_recipe(tmp_path / "recipe.yaml", rank=16, alpha=64, max_steps=1, learning_rate=1e-12, save_steps=1)
    pairs = write_pairs(tmp_path / "pairs.jsonl", 8, negatives=0)

    def build(adapter: Path | None, *more: str, model: Path | None = None) -> list[str]:
        start = ["--adapter", str(adapter)] if adapter else []
        return arguments(
            recipe, model or build_release("tiny-llada"), pairs, tmp_path / "out", "--threads", "1", *start, *more
        )

    return build


@pytest.mark.parametrize("name", ["llada-q4p4", "dream-q4p4"])
def test_the_methods_own_adapters_are_gone_on_from(
    command: Callable[..., list[str]], build_release: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    model = build_release(f"tiny-{name.split('-')[0]}")
    assert main(command(ADAPTERS / name, model=model)) == 0
    found, expected = weights(tmp_path / "out"), weights(ADAPTERS / name)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value.float(), rtol=0, atol=1e-6)


def test_a_release_that_holds_an_adapter_stands_for_it(
    command: Callable[..., list[str]],
    build_release: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    release = build_release("tiny-llada", "llada-single")
    assert main(command(None, model=release)) == 2
    assert f"zero-shot release as --model and --adapter {release}" in capsys.readouterr().err
    assert main(command(release)) == 0
    key = next(key for key in weights(ADAPTERS / "llada-single") if "lora_B" in key)
    expected = weights(ADAPTERS / "llada-single")[key].float()
    torch.testing.assert_close(weights(tmp_path / "out")[key], expected, rtol=0, atol=1e-6)


def test_the_row_of_the_mask_is_gone_on_from(
    command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backbone, first = make_backbone("llama", tmp_path / "backbone"), tmp_path / "first"
    for token in (MASK, ANOTHER):
        building.build(str(backbone), tmp_path / token.strip("<|>"), max_length=140, mask_token=token)
    zero, other = (tmp_path / token.strip("<|>") for token in (MASK, ANOTHER))
    assert main(command(None, "--set", "learning_rate=0.1", model=zero)) == 0
    (tmp_path / "out").rename(first)
    assert main(command(first, model=other)) == 2
    assert "but the model's mask token is " in capsys.readouterr().err
    assert main(command(first, model=zero)) == 0
    key = next(key for key in weights(first) if key.endswith("trainable_tokens_delta"))
    torch.testing.assert_close(weights(tmp_path / "out")[key], weights(first)[key], rtol=0, atol=1e-6)


def changed(
    folder: Path, fields: dict[str, Any], tensors: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> Path:
    """Return a copy of the single adapter with other fields, or all tensors changed."""
    shutil.copytree(ADAPTERS / "llada-single", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | fields))
    if tensors is not None:
        held = load_file(folder / "adapter_model.safetensors")
        save_file({key: tensors(value) for key, value in held.items()}, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"r": 8}, "adapter_config.json: r is 8, the recipe's rank 16; --set rank=8"),
        ({"lora_alpha": 32}, "adapter_config.json: lora_alpha is 32, the recipe's alpha 64; --set alpha=32"),
        ({"use_dora": True}, "adapter_config.json: use_dora is True; such an adapter is not trained here"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern is {'q_proj': 4}; such an adapter is not trained here"),
    ],
)
def test_another_form_than_the_recipes(
    command: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    fields: dict[str, Any],
    told: str,
) -> None:
    assert main(command(changed(tmp_path / "adapter", fields))) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_what_is_no_adapter_for_the_model(
    command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (empty := tmp_path / "empty").mkdir()
    broken = changed(tmp_path / "broken", {}, lambda value: value * float("nan"))
    short = changed(tmp_path / "short", {}, lambda value: value[:, :-1].contiguous())
    for adapter, told in (
        (empty, f"{empty} holds no adapter_config.json; it is no LoRA adapter"),
        (tmp_path / "nowhere", "nowhere: no such folder"),
        (broken, "holds NaN or infinite values"),
        (short, "adapter_model.safetensors: base_model.model."),
        (ADAPTERS / "dream-q4p4", "it is the adapter of another model or recipe"),
    ):
        assert main(command(adapter)) == 2
        assert told in capsys.readouterr().err


def test_a_run_is_resumed_with_the_adapter_that_it_began_with(
    command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(ADAPTERS / "llada-single")) == 0
    for other in (None, changed(tmp_path / "other", {}, lambda value: value * 2)):
        assert main(command(other)) == 2
        assert "this run was started with another --adapter: " in capsys.readouterr().err
    again = shutil.copytree(ADAPTERS / "llada-single", tmp_path / "elsewhere")
    assert main(command(again)) == 0
    assert "all 1 steps were done before" in capsys.readouterr().out
