"""What adapter_config.json may say: fields that are known, numbers that are numbers, expressions that end."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from checkpoint_folders import PARITY, REMOVED, copy_adapter, edit_weights
from transformers import AutoModel

from diffretriever.model.backbone_loading import original_name, our_name
from diffretriever.model.bidirectional_layers import linear_shapes, parameter_shapes
from diffretriever.model.checked_files import read_backbone_config
from diffretriever.model.modeling_diffretriever import read_adapter

pytestmark = pytest.mark.once
Build = Callable[..., Path]
HUGE = 10**4000


def read_tiny_adapter(kind: str, folder: Path) -> Any:
    layers = linear_shapes(parameter_shapes(*read_backbone_config(PARITY / "backbones" / f"tiny-{kind}")))
    return read_adapter(folder, layers, partial(our_name, kind), partial(original_name, kind))


# What each peft writes for LoraConfig(r=4, target_modules=["q_proj"]), beyond what 0.18.0 does.
OF_PEFT_18: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": False,
    "init_lora_weights": True,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_bias": False,
    "lora_dropout": 0.0,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "peft_type": "LORA",
    "peft_version": "0.18.0",
    "qalora_group_size": 16,
    "r": 4,
    "rank_pattern": {},
    "revision": None,
    "target_modules": ["q_proj"],
    "target_parameters": None,
    "task_type": None,
    "trainable_token_indices": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
}
LATER_PEFT: dict[str, dict[str, None]] = {
    "0.18.0": {},
    "0.19.0": {"lora_ga_config": None, "use_bdlora": None},
    "0.20.0": {"lora_ga_config": None, "use_bdlora": None, "monteclora_config": None, "velora_config": None},
    "0.21.0": {"lora_ga_config": None, "use_bdlora": None, "monteclora_config": None, "kasa_config": None},
}


def with_config(adapter: Path, fields: dict[str, Any]) -> Path:
    """Keep an adapter's rank and targets, and take all else of its config from `fields`."""
    file = adapter / "adapter_config.json"
    kept = {name: json.loads(file.read_text())[name] for name in ("r", "lora_alpha", "target_modules")}
    file.write_text(json.dumps({**fields, **kept}))
    return adapter


@pytest.mark.parametrize("version", LATER_PEFT)
def test_fields_at_the_defaults_of_every_peft(version: str, tmp_path: Path) -> None:
    fields = {**OF_PEFT_18, **LATER_PEFT[version], "peft_version": version}
    adapter = with_config(copy_adapter("llada-q4p4", tmp_path / "adapter"), fields)
    assert len(read_tiny_adapter("llada", adapter).modules) == 29


@pytest.mark.parametrize("name", ["llada-single", "llada-q4p4", "dream-q4p4", "dream-q4p16"])
def test_what_the_installed_peft_writes(name: str, tmp_path: Path) -> None:
    peft.LoraConfig(task_type="FEATURE_EXTRACTION", inference_mode=True).save_pretrained(str(tmp_path))
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    kind = name.partition("-")[0]
    as_released = read_tiny_adapter(kind, PARITY / "adapters" / name)
    adapter = read_tiny_adapter(kind, with_config(copy_adapter(name, tmp_path / "adapter"), fields))
    assert adapter.config.rank_pattern == as_released.config.rank_pattern
    assert adapter.config.alpha_pattern == as_released.config.alpha_pattern


@pytest.mark.parametrize("config", [{"a": 1}, 5, "x", True])
def test_no_module_that_an_adapter_names_is_imported(
    config: Any, tmp_path: Path, build_release: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evilmod.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    adapter = copy_adapter("llada-single", tmp_path / "adapter", megatron_config=config, megatron_core="evilmod")
    with pytest.raises(ValueError, match=r"adapter_config\.json: `megatron_(config|core)` is .*; only .* is supported"):
        AutoModel.from_pretrained(build_release("tiny-llada"), adapter_name_or_path=adapter, trust_remote_code=True)
    assert "evilmod" not in sys.modules


WRONG_ADAPTER_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"megatron_core": "evilmod"}, r"`megatron_core` is 'evilmod'; only 'megatron\.core' is supported"),
    ({"arrow_config": {"top_k": 3}}, r"`arrow_config` is \{'top_k': 3\}; only None"),
    ({"corda_config": {}}, r"`corda_config` is \{\}"),
    ({"runtime_config": {"x": 1}}, "`runtime_config` is a field that is not known here; remove it, or set it to null"),
    ({"some_new_maths": False}, "`some_new_maths` is a field that is not known"),
    ({"y" * 1_000_000: 1}, r"`y{80}` is a field that is not known"),
    ({"lora_alpha": "16 |\n\n```python\nprint()"}, "`lora_alpha` must be a number of at least -1000000.0, got '16"),
    ({"lora_alpha": True}, "`lora_alpha` must be a number"),
    ({"lora_alpha": None}, "`lora_alpha` must be a number"),
    ({"lora_alpha": 1e300}, r"`lora_alpha` must be a number of at most 1000000\.0, got 1e\+300"),
    ({"lora_alpha": HUGE}, "`lora_alpha` must be a number of at most"),
    ({"lora_alpha": float("nan")}, "NaN is no number of JSON"),
    ({"lora_alpha": float("-inf")}, "-Infinity is no number of JSON"),
    ({"r": 16.0}, r"`r` must be a whole number of at least 1, got 16\.0"),
    ({"r": 0}, "`r` must be a whole number of at least 1, got 0"),
    ({"r": HUGE}, "`r` must be a whole number of at most 65536, got 1000"),
    ({"lora_dropout": 1.5}, "`lora_dropout` must be a number of at most 1, got 1.5"),
    ({"use_dora": "no"}, "`use_dora` must be true or false, got 'no'"),
    ({"use_rslora": 1}, "`use_rslora` must be true or false, got 1"),
    ({"rank_pattern": []}, r"`rank_pattern` must be an object or null, got \[\]"),
    ({"rank_pattern": {"q_proj": "16"}}, r"`rank_pattern\.q_proj` must be a whole number of at least 1, got '16'"),
    ({"alpha_pattern": {"q_proj": [1]}}, r"`alpha_pattern\.q_proj` must be a number .* got \[1\]"),
    ({"target_modules": None}, "`target_modules` must be a string or a list of at most 10000 strings, got None"),
    ({"target_modules": REMOVED}, "`target_modules` must name the adapted layers"),
    ({"target_modules": []}, "`target_modules` must name the adapted layers"),
    ({"target_modules": ["q_proj", 5]}, "`target_modules` must be a string or a list"),
    ({"target_modules": ["q_proj"] * 10_001}, "`target_modules` must be a string or a list of at most 10000 strings"),
    ({"target_modules": {"q_proj": 1}}, "`target_modules` must be a string or a list"),
    ({"exclude_modules": 3}, "`exclude_modules` must be a string or a list"),
    ({"layers_to_transform": "0"}, "`layers_to_transform` must be a whole number or a list"),
    ({"layers_pattern": "blocks"}, "`layers_pattern` needs `layers_to_transform`"),
    ({"layers_pattern": "(a+)+", "layers_to_transform": 1}, r"`layers_pattern` must hold plain names: '\(a\+\)\+'"),
    ({"target_modules": ".*", "layers_to_transform": 1}, "`layers_to_transform` needs `target_modules` to be a list"),
    ({"task_type": ["x"]}, "`task_type` must be a string of at most 4096 characters or null"),
    ({"peft_version": "1" * 5000}, "`peft_version` must be a string of at most 4096 characters or null"),
]


@pytest.mark.usefixtures("within")
@pytest.mark.parametrize(("fields", "words"), WRONG_ADAPTER_FIELDS, ids=lambda case: str(case)[:40])
def test_wrong_adapter_fields(fields: dict[str, Any], words: str, tmp_path: Path) -> None:
    adapter = copy_adapter("llada-single", tmp_path / "adapter", **fields)
    with pytest.raises(ValueError, match=words) as failure:
        read_tiny_adapter("llada", adapter)
    assert str(adapter / "adapter_config.json") in str(failure.value)
    assert len(str(failure.value)) < 500


HANGING = [
    r"(a+)+$",
    r"(.*)*x",
    r"(.|..)" * 40 + "x",
    r"(.*|.*)*y",
    r".*.*.*.*.*.*.*.*x",
    r"\d*" * 30 + "x",
    r"(?=(.*)*x).*",
    r"(\w+\.)*x",
    r"(?:.?){60}.{60}x",
    r".?" * 200 + "x",
    r"(a)\1*",
    "[" * 500,
    "(" * 5000,
    "x" * 1_000_000,
    r"(?P<n>.*)(?P=n)*z",
    "[z-a]",
]


@pytest.mark.usefixtures("within")
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("expression", HANGING, ids=lambda text: text[:20])
def test_regular_expressions_that_never_end_or_are_broken(field: str, expression: str, tmp_path: Path) -> None:
    """Python would look for ever: without a bound, each of the first ten takes hours on a name of 30 characters."""
    value: Any = {expression: 16} if "pattern" in field else expression
    adapter = copy_adapter("llada-single", tmp_path / "adapter", **{field: value})
    with pytest.raises(ValueError, match=r"adapter_config\.json(: `\w+`| does not target)") as failure:
        read_tiny_adapter("llada", adapter)
    assert len(str(failure.value)) < 500


@pytest.mark.usefixtures("within")
def test_the_costliest_expressions_that_are_run(tmp_path: Path) -> None:
    layers = {f"backbone.layers.{n}.self_attn.q_proj": (64, 64) for n in range(225)}
    fields = {"target_modules": r".*.*.*[a-z]q", "alpha_pattern": {f"x{n}.*": 1 for n in range(4000)}}
    adapter = copy_adapter("dream-q4p4", tmp_path / "adapter", **fields)
    with pytest.raises(ValueError, match=r"would take too long|does not target"):
        read_adapter(adapter, layers, partial(our_name, "dream"), partial(original_name, "dream"))


@pytest.mark.parametrize(
    ("expression", "projections"),
    [
        (r".*\.(q_proj|v_proj)", {"q_proj", "v_proj"}),
        (r"model\.layers\.\d+\.self_attn\.[qk]_proj", {"q_proj", "k_proj"}),
        (r"^model\.layers\.[0-9]+\..*(?:gate|up|down)_proj$", {"gate_proj", "up_proj", "down_proj"}),
        ("nothing|.*o_proj", {"o_proj"}),
    ],
)
def test_regular_expressions_as_people_write_them(expression: str, projections: set[str], tmp_path: Path) -> None:
    adapter = copy_adapter("dream-q4p4", tmp_path / "adapter", target_modules=expression)
    with pytest.raises(ValueError, match=r"does not target model\.layers\.0\.\w+\.\w+, but .* holds weights for it"):
        read_tiny_adapter("dream", adapter)

    def keep(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if key.split(".")[-3] not in projections]:
            del tensors[key]

    edit_weights(adapter / "adapter_model.safetensors", keep)
    modules = read_tiny_adapter("dream", adapter).modules
    assert {name.rsplit(".", 1)[-1] for name in modules} == projections
    assert len(modules) == 4 * len(projections)
