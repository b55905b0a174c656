"""A release as a plain Llama or Qwen2 that other engines run: merged weights, tokenizer, token ids of the prompts."""

from __future__ import annotations

import json
import shlex
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2
import torch
from huggingface_hub import save_torch_state_dict

from ..files.durable import publish_folder, write_json, write_text
from ..files.sealed import seal
from ..model.adapter_loading import merged_state
from ..model.backbone_loading import save_tokenizer
from ..model.bidirectional_layers import parameter_shapes
from ..model.configuration_diffretriever import FIELDS
from ..model.saved_folder import whole_state
from ..store.identity import describe_model

VLLM_VERSION = "0.32.0"  # with which all of this was tried
SERVING_FILE, README = "serving.json", "README.md"
ARCHITECTURES = {"llama": "LlamaModel", "qwen2": "Qwen2Model"}  # by the config's model_type, as vLLM names them
SIDES = {"query": True, "passage": False}


def export_plain(model: Any, folder: Path) -> dict[str, Any]:
    """Write a model so that an engine serves its dense vectors without any code of ours.

    Args:
        model: a DiffRetriever, as `AutoModel.from_pretrained` returns it; its adapter is merged in float32.
        folder: to be made; it appears whole or not at all.

    Returns:
        What serving.json says: `serving_facts`.

    Raises:
        FileExistsError: the folder holds something.
        ValueError: no DiffRetriever, or one that a single forward pass over a fixed prompt does not serve.
    """
    _check(model)
    if folder.is_file() or (folder.exists() and any(folder.iterdir())):
        raise FileExistsError(f"{folder} is there and not empty; choose another folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    facts = serving_facts(model)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        made = Path(scratch) / "folder"
        made.mkdir()
        write_json(made / "config.json", _plain_config(model))
        save_torch_state_dict(_plain_state(model), made)
        for file in made.glob("*.safetensors"):  # which its library writes for nobody but their owner
            file.chmod((made / "config.json").stat().st_mode)
        save_tokenizer(model.tokenizer, made)
        write_json(made / SERVING_FILE, facts)
        write_text(made / README, _readme(folder, facts))
        seal(made, {"made_from": facts["settings"]["passage"]["model"]})
        publish_folder(made, folder)
    return facts


def _check(model: Any) -> None:
    config = model.config
    if getattr(config, "model_type", None) != "diffretriever":
        raise ValueError(f"{type(model).__name__} cannot be exported; a DiffRetriever can.")
    if getattr(model, "hf_quantizer", None) is not None or any(weight.is_meta for weight in model.parameters()):
        raise ValueError("Quantised or offloaded weights cannot be exported merged; load the model without.")
    if config.num_denoise_steps > 1:
        raise ValueError(
            f"the release takes {config.num_denoise_steps} forward passes a text (`num_denoise_steps`), an engine one."
        )
    if config.query_budget_table is not None:
        raise ValueError(
            "the release chooses K_q for each query (`query_budget_table`), and a plain prompt has one; say which: "
            "--num-query-masks K."
        )


def _plain_state(model: Any) -> dict[str, torch.Tensor]:
    """Return the merged weights under the names of LlamaForCausalLM and Qwen2ForCausalLM."""
    shapes = parameter_shapes(model.config.backbone_type, model.config.backbone_config)
    return {
        f"model.{name.removeprefix('backbone.')}" if name.startswith("backbone.") else name: weight.contiguous()
        for name, weight in whole_state(merged_state(model), shapes).items()
    }


def _plain_config(model: Any) -> dict[str, Any]:
    """Return the backbone's config.json; `is_causal` is what vLLM, and transformers 5, ask for the attention's mask."""
    fields: dict[str, Any] = model.config.to_dict()["backbone_config"]
    dtype = str(model.dtype).removeprefix("torch.")
    more = {"architectures": [ARCHITECTURES[fields["model_type"]]], "is_causal": False, "torch_dtype": dtype}
    return fields | more


def serving_facts(model: Any) -> dict[str, Any]:
    """Return what a server of the plain model, and who asks it, must know, as JSON values.

    Args:
        model: a DiffRetriever with one K a side.

    Returns:
        `mask_id`; `pooler_config`, vLLM's; `max_model_len` in tokens; `dtype`; `prompts`, for each side the ids before
        a text, how many ids of the text are read (`room`) and the ids behind it, K masks among them; `config`, the
        release's own; `settings`, which model this is, as the stores of its vectors say it.
    """
    texts, config = model.texts, model.config
    prompts = {
        side: {"before": layout.prefix, "room": layout.room, "after": layout.closing}
        for side, layout in ((side, texts.layouts[is_query]) for side, is_query in SIDES.items())
    }
    pooler = {"task": "token_embed", "tok_pooling_type": "STEP", "step_tag_id": texts.mask_id}
    return {
        "mask_id": texts.mask_id,
        "pooler_config": pooler | {"use_activation": config.normalize},
        "max_model_len": max(len(one["before"]) + one["room"] + len(one["after"]) for one in prompts.values()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "prompts": prompts,
        "config": {name: value for name, value in model.config.merged().to_dict().items() if name in FIELDS},
        "settings": {side: asdict(describe_model(model, is_query, "float32")) for side, is_query in SIDES.items()},
    }


def start_command(folder: Path, facts: dict[str, Any]) -> str:
    """Return the command that starts vLLM on an exported folder.

    Args:
        folder: as `export_plain` made it.
        facts: its serving.json.
    """
    pooler = json.dumps(facts["pooler_config"])
    return (
        f"python -m vllm.entrypoints.openai.api_server --model {shlex.quote(str(folder))} --runner pooling "
        f"--dtype {facts['dtype']} --max-model-len {facts['max_model_len']} --pooler-config '{pooler}'"
    )


def _readme(folder: Path, facts: dict[str, Any]) -> str:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, keep_trailing_newline=True, undefined=jinja2.StrictUndefined)
    family = {"llama": "Llama", "qwen2": "Qwen2"}[facts["settings"]["passage"]["model_parts"]["backbone"]["model_type"]]
    about = {"name": Path(facts["settings"]["passage"]["model"]).name, "family": family, "vllm": VLLM_VERSION}
    page: str = environment.get_template("plain_model.md.jinja").render(
        facts=facts, folder=folder.resolve(), command=start_command(folder.resolve(), facts), **about
    )
    return page
