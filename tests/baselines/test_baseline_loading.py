"""Loading baselines: adapters as peft has them, folders that say what they are, and what does not go together."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from causal_backbones import EACH_KIND, PARITY, TEXTS, make_adapter, make_backbone, with_peft
from checkpoint_folders import edit_json, edit_weights, hub_repository
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForSequenceClassification

from diffretriever.baselines import METHODS, BaselineConfig, DiffEmbed, PromptReps, RepLLaMA, load_baseline
from diffretriever.store.identity import describe_model

Makes = Callable[..., Path]
VECTORS: dict[str, Any] = {"num_query_vectors": 4, "num_passage_vectors": 2}


def same(one: Any, two: Any, tolerance: float = 0.0) -> None:
    """Assert that two models give the same vectors on both sides."""
    for is_query in (True, False):
        first, second = one.encode_texts(TEXTS, is_query), two.encode_texts(TEXTS, is_query)
        assert first.keys() == second.keys()
        for name, values in first.items():
            assert torch.allclose(values.float(), second[name].float(), rtol=0, atol=tolerance), name


# ------------------------------------------------------------------------------------------------ adapters


@pytest.mark.parametrize("kind", EACH_KIND)
@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("merge", [None, False])
def test_an_adapter_is_what_peft_makes_of_it(
    backbone: Makes, adapter: Makes, kind: str, head: bool, merge: Any
) -> None:
    model: Any = load_baseline(
        backbone(kind), "promptreps", dtype=torch.float32, adapter_name_or_path=adapter(kind, head), merge_adapter=merge
    )
    ids, mask = model.tokenize(TEXTS, True)
    with torch.no_grad():
        expected = with_peft(backbone(kind), adapter(kind, head))(ids, attention_mask=mask, output_hidden_states=True)
        found = model.backbone(ids, attention_mask=mask, output_hidden_states=True)
    real = mask.bool()
    assert torch.allclose(found.hidden_states[-1][real], expected.hidden_states[-1][real], rtol=0, atol=1e-4)
    assert torch.allclose(found.logits[real], expected.logits[real], rtol=1e-5, atol=1e-3)


def test_merging_is_done_in_float32_and_rounded_once(tmp_path: Path, backbone: Makes, adapter: Makes) -> None:
    half = shutil.copytree(backbone("llama"), tmp_path / "half")
    edit_weights(half / "model.safetensors", lambda w: w.update({name: v.bfloat16() for name, v in w.items()}))
    model: Any = load_baseline(half, "repllama", dtype=torch.bfloat16, adapter_name_or_path=adapter("llama"))
    beside = with_peft(half, adapter("llama")).base_model.model  # in float32
    for name, layer in beside.named_modules():
        if name.endswith("_proj"):
            expected = layer.base_layer.weight + layer.get_delta_weight("default")
            assert torch.equal(model.backbone.get_parameter(f"{name}.weight"), expected.bfloat16()), name
    assert model.encode_texts(["a"], True).repr_hidden.dtype == torch.float32


def test_tied_weights_part_when_an_adapter_is_the_heads(backbone: Makes, adapter: Makes) -> None:
    model: Any = load_baseline(
        backbone("qwen2-tied"), "promptreps", dtype=torch.float32, adapter_name_or_path=adapter("qwen2-tied", True)
    )
    embedding = model.backbone.model.embed_tokens.weight
    stored = load_file(backbone("qwen2-tied") / "model.safetensors")
    assert torch.equal(embedding, stored["model.embed_tokens.weight"])
    assert not torch.equal(embedding, model.backbone.lm_head.weight)


# ------------------------------------------------------------------------------------------------ folders


def write_folder(folder: Path, **fields: Any) -> Path:
    """Write a baseline.json."""
    BaselineConfig(**fields).save(folder)
    return folder


@pytest.mark.parametrize(("method", "kind"), [*zip(METHODS, (PromptReps, RepLLaMA, DiffEmbed), strict=True)])
def test_a_folder_says_what_it_is(
    tmp_path: Path, backbone: Makes, adapter: Makes, method: str, kind: type[Any]
) -> None:
    shutil.copytree(backbone("llama"), tmp_path / "base")
    shutil.copytree(adapter("llama"), tmp_path / "trained" / "adapter")
    fields: dict[str, Any] = VECTORS if method == "promptreps" else {}
    fields = {**fields, "adapter_name_or_path": "adapter", "query_length": 9}
    folder = write_folder(tmp_path / "trained", method=method, base_model_name_or_path="../base", **fields)
    model: Any = load_baseline(folder, dtype=torch.float32)
    assert type(model) is kind
    assert not model.training
    assert (model.config.query_length, model.config.passage_length) == (9, 156)
    assert model.loaded_from.release == folder.resolve()
    assert model.loaded_from.weights == (tmp_path / "base").resolve()
    assert model.loaded_from.adapter == (folder / "adapter").resolve()
    direct: Any = load_baseline(
        backbone("llama"), method, dtype=torch.float32, **{**fields, "adapter_name_or_path": adapter("llama")}
    )
    same(model, direct)


@pytest.mark.parametrize("kind", ["llama", "qwen2-tied", "tiny-llada", "tiny-dream"])
def test_what_is_saved_is_what_was_loaded(tmp_path: Path, backbone: Makes, adapter: Makes, kind: str) -> None:
    diffusion = kind.startswith("tiny-")
    base = PARITY / "backbones" / kind if diffusion else backbone(kind)
    method = "diffembed" if diffusion else "promptreps"
    options: dict[str, Any] = {} if diffusion else {**VECTORS, "adapter_name_or_path": adapter(kind, True)}
    model: Any = load_baseline(base, method, dtype=torch.float32, query_length=20, **options)
    model.save_pretrained(tmp_path / "whole")
    (tmp_path / "whole").rename(tmp_path / "elsewhere")
    again: Any = load_baseline(tmp_path / "elsewhere", dtype=torch.float32)
    assert again.config.query_length == 20
    assert again.config.adapter_name_or_path is None
    same(model, again, 1e-6)  # equal weights at other addresses
    with pytest.raises(FileExistsError, match="elsewhere is there already"):
        again.save_pretrained(tmp_path / "elsewhere")


@pytest.mark.once
@pytest.mark.parametrize(
    ("name", "value", "part"),
    [
        ("query_length", 9, "model_parts.text_tokens.query"),
        ("passage_length", 9, "model_parts.text_tokens.passage"),
        ("num_query_vectors", 3, "model_parts.num_masks.query"),
        ("normalize", False, "options.normalize"),
    ],
)
def test_an_identity_tells_settings_apart(load: Callable[..., Any], name: str, value: Any, part: str) -> None:
    one, other = (
        describe_model(load("promptreps", "llama", **options), True, "float32") for options in ({}, {name: value})
    )
    assert part in one.differences(other)


def test_a_hub_repository(tmp_path: Path, backbone: Makes) -> None:
    commit = hub_repository(tmp_path, "someone/tiny-llama", backbone("llama"))
    options: dict[str, Any] = {"dtype": torch.float32, "cache_dir": str(tmp_path), "local_files_only": True}
    model: Any = load_baseline("someone/tiny-llama", "repllama", **options)
    assert model.config.name_or_path == "someone/tiny-llama"
    assert model.loaded_from.weights.name == commit
    same(model, load_baseline(backbone("llama"), "repllama", dtype=torch.float32))
    other = write_folder(tmp_path / "own", method="diffembed", base_model_name_or_path="someone/tiny-llama")
    again: Any = load_baseline(other, **options)
    assert again.loaded_from.weights.name == commit


def test_the_base_of_rope_as_transformers_5_writes_it(tmp_path: Path, backbone: Makes) -> None:
    new = shutil.copytree(backbone("llama"), tmp_path / "new")
    old = shutil.copytree(backbone("llama"), tmp_path / "old")
    for folder, kept in ((new, "rope_parameters"), (old, "rope_theta")):
        fields = json.loads((folder / "config.json").read_text())
        fields = {name: value for name, value in fields.items() if not name.startswith("rope_")}
        fields[kept] = 5000.0 if kept == "rope_theta" else {"rope_type": "default", "rope_theta": 5000.0}
        (folder / "config.json").write_text(json.dumps(fields))
    expected = load_baseline(backbone("llama"), "repllama", dtype=torch.float32)
    same(load_baseline(new, "repllama", dtype=torch.float32), expected)
    same(load_baseline(old, "repllama", dtype=torch.float32), expected)


# ------------------------------------------------------------------------------------------------ what does not go


@pytest.mark.parametrize("method", ["promptreps", "repllama"])
@pytest.mark.parametrize("name", ["tiny-llada", "tiny-dream"])
def test_a_diffusion_backbone_where_a_causal_one_is_needed(method: str, name: str) -> None:
    kind, wanted = name.removeprefix("tiny-"), {"promptreps": "PromptReps", "repllama": "RepLLaMA"}[method]
    said = (
        rf"config.json: model_type '{kind}' is a diffusion backbone, .* that {wanted} could read; it needs one of llama"
    )
    with pytest.raises(ValueError, match=said):
        load_baseline(PARITY / "backbones" / name, method)


@pytest.mark.parametrize("method", METHODS)
def test_an_encoder_where_a_language_model_is_needed(tmp_path: Path, backbone: Makes, method: str) -> None:
    folder = shutil.copytree(backbone("llama"), tmp_path / "bert")
    edit_json(folder / "config.json", model_type="bert")
    with pytest.raises(ValueError, match="model_type 'bert' is no causal language model"):
        load_baseline(folder, method)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_hidden_layers": 10**6}, r"`num_hidden_layers` must be a whole number of at most 512, got 1000000"),
        ({"hidden_size": None}, r"`head_dim` is \d+; only hidden_size / num_attention_heads is read|lacks hidden_size"),
        ({"hidden_act": {}}, r"`hidden_act` is \{\}; only 'silu' is supported"),
        ({"rope_parameters": {"rope_type": "yarn"}}, r"`rope_scaling.rope_type` is 'yarn'; only 'llama3' is supported"),
    ],
    ids=str,
)
def test_a_config_without_end_or_sense(fields: dict[str, Any], said: str, tmp_path: Path, backbone: Makes) -> None:
    folder = shutil.copytree(backbone("llama"), tmp_path / "odd")
    edit_json(folder / "config.json", **fields)
    with pytest.raises(ValueError, match=rf"odd/config\.json:? .*({said})"):
        load_baseline(folder, "repllama")


def test_a_model_without_its_head(tmp_path: Path, backbone: Makes) -> None:
    folder = shutil.copytree(backbone("llama"), tmp_path / "classifier")
    fields = json.loads((folder / "config.json").read_text())
    LlamaForSequenceClassification(LlamaConfig(**fields)).save_pretrained(folder)
    edit_json(folder / "config.json", tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"lacks 1 of \d+ weights: lm_head.weight"):
        load_baseline(folder, "repllama")


def test_no_chat_template(tmp_path: Path, backbone: Makes) -> None:
    folder = shutil.copytree(backbone("llama"), tmp_path / "untold")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="has no chat template"):
        load_baseline(folder, "promptreps", dtype=torch.float32)
    load_baseline(folder, "repllama", dtype=torch.float32)  # which needs none


@pytest.mark.parametrize("other", ["repllama", "diffembed"])
def test_an_adapter_of_another_method(tmp_path: Path, backbone: Makes, adapter: Makes, other: str) -> None:
    folder = shutil.copytree(adapter("llama"), tmp_path / "adapter")
    write_folder(folder, method=other, base_model_name_or_path="base")
    with pytest.raises(ValueError, match=f"the adapter is of method '{other}', not 'promptreps'"):
        load_baseline(backbone("llama"), "promptreps", adapter_name_or_path=folder)


def test_an_adapter_of_a_diffretriever() -> None:
    with pytest.raises(
        ValueError, match=r"is the adapter of a DiffRetriever \(retriever_config.json\), not of diffembed"
    ):
        load_baseline(
            PARITY / "backbones" / "tiny-dream", "diffembed", adapter_name_or_path=PARITY / "adapters" / "dream-q4p4"
        )


def test_an_adapter_of_another_backbone(tmp_path: Path, backbone: Makes, adapter: Makes) -> None:
    wider = make_adapter(make_backbone("llama", tmp_path / "wider", intermediate_size=80), tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"has shape .* needs"):
        load_baseline(backbone("llama"), "repllama", adapter_name_or_path=wider)
    deeper = make_adapter(make_backbone("llama", tmp_path / "deeper", num_hidden_layers=4), tmp_path / "adapter2")
    with pytest.raises(ValueError, match="belongs to no linear layer of this backbone"):
        load_baseline(backbone("llama"), "repllama", adapter_name_or_path=deeper)
    with pytest.raises(ValueError, match="belongs to no linear layer of this backbone"):
        load_baseline(PARITY / "backbones" / "tiny-llada", "diffembed", adapter_name_or_path=adapter("llama"))


def test_more_vectors_than_the_adapter_was_trained_with(tmp_path: Path, backbone: Makes, adapter: Makes) -> None:
    folder = shutil.copytree(adapter("llama"), tmp_path / "adapter")
    fields = {"method": "promptreps", "num_query_vectors": 4, "num_passage_vectors": 4, "query_length": 17}
    write_folder(folder, base_model_name_or_path=str(backbone("llama")), **fields)
    trained: dict[str, Any] = {"adapter_name_or_path": folder, "dtype": torch.float32}
    model: Any = load_baseline(backbone("llama"), "promptreps", **trained, num_passage_vectors=2)
    assert [model.config.num_masks(side) for side in (True, False)] == [4, 2]  # the adapter's, and the caller's
    assert model.config.query_length == 17
    said = "`num_query_vectors` is 20, but .*baseline.json says that its adapter was trained with at most 4"
    with pytest.raises(ValueError, match=said):
        load_baseline(backbone("llama"), "promptreps", **trained, num_query_vectors=20)
    whole = write_folder(
        tmp_path / "whole", base_model_name_or_path=str(backbone("llama")), adapter_name_or_path=str(folder), **fields
    )
    with pytest.raises(ValueError, match=said):
        load_baseline(whole, dtype=torch.float32, num_query_vectors=20)
    zero_shot: Any = load_baseline(whole, dtype=torch.float32, num_query_vectors=20, adapter_name_or_path=None)
    assert zero_shot.config.num_query_vectors == 20
    edit_json(whole / "baseline.json", query_length=30)
    assert load_baseline(whole, dtype=torch.float32).config.query_length == 30  # the folder's own, not the adapter's
    edit_json(whole / "baseline.json", num_query_vectors=20)
    with pytest.raises(ValueError, match=said):
        load_baseline(whole, dtype=torch.float32)


def test_an_adapter_among_the_weights(tmp_path: Path, backbone: Makes, adapter: Makes) -> None:
    folder = shutil.copytree(backbone("llama"), tmp_path / "mixed")
    shutil.copyfile(adapter("llama") / "adapter_config.json", folder / "adapter_config.json")
    with pytest.raises(ValueError, match="would make transformers load another model than these weights"):
        load_baseline(folder, "repllama")


def test_broken_weights(tmp_path: Path, backbone: Makes) -> None:
    folder = shutil.copytree(backbone("llama"), tmp_path / "broken")
    file, name = folder / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    edit_weights(file, lambda weights: weights.update({name: weights[name] * float("nan")}))
    with pytest.raises(ValueError, match=rf"{name} hold NaN or infinite values"):
        load_baseline(folder, "repllama", dtype=torch.float32)
    edit_weights(file, lambda weights: weights.update({name: torch.zeros(3, 3)}))
    with pytest.raises(ValueError, match=rf"{name} has shape \[3, 3\]; config.json asks for \[96, 48\]"):
        load_baseline(folder, "repllama", dtype=torch.float32)
    edit_weights(file, lambda weights: weights.pop(name))
    with pytest.raises(ValueError, match=f"lacks 1 of 30 weights: {name}"):
        load_baseline(folder, "repllama", dtype=torch.float32)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="it is truncated or corrupt"):
        load_baseline(folder, "repllama", dtype=torch.float32)
    file.rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="are never loaded; convert them"):
        load_baseline(folder, "repllama", dtype=torch.float32)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "colbert"}, "`method` must be one of promptreps, repllama, diffembed, got 'colbert'"),
        ({"base_model_name_or_path": None}, "`base_model_name_or_path` must be a string, got None"),
        ({"base_model_revision": 3}, "`base_model_revision` must be a string or null, got 3"),
        ({"adapter_name_or_path": ""}, "`adapter_name_or_path` must be a string or null, got ''"),
        ({"num_query_vectors": 0}, "`num_query_vectors` must be a whole number of at least 1, got 0"),
        ({"num_passage_vectors": True}, "`num_passage_vectors` must be a whole number of at least 1, got True"),
        ({"query_length": "32"}, "`query_length` must be a whole number of at least 1, got '32'"),
        ({"sparse_top_k": 0}, "`sparse_top_k` must be a whole number of at least 1 for promptreps"),
        ({"normalize": None}, "`normalize` must be true or false, got None"),
        ({"merge_adapter": 1}, "`merge_adapter` must be true or false or null, got 1"),
        ({"query_prompt": {"user": "{text}"}}, "`query_prompt` must be null .* system, user, assistant"),
        ({"append_end_of_text": True}, "`append_end_of_text` of promptreps can only be False, got True"),
        ({"method": "repllama", "num_query_vectors": 4}, "`num_query_vectors` of repllama can only be 1, got 4"),
        ({"method": "diffembed", "sparse_top_k": 128}, "`sparse_top_k` of diffembed can only be 0, got 128"),
        ({"pooling": "mean"}, "unknown field `pooling`; the fields are method, "),
    ],
)
def test_every_field_is_checked(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    fields = {"method": "promptreps", "base_model_name_or_path": "base", **changes}
    (tmp_path / "baseline.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=rf"baseline.json: .*{said}"):
        load_baseline(tmp_path)


def test_a_baseline_json_that_is_none(tmp_path: Path) -> None:
    for content, said in (("{", "is not valid JSON"), ("[]", "must hold a JSON object"), ("{}", "lacks `method`")):
        (tmp_path / "baseline.json").write_text(content)
        with pytest.raises(ValueError, match=f"baseline.json {said}"):
            load_baseline(tmp_path)


def test_methods_that_are_not_said_or_not_meant(tmp_path: Path, backbone: Makes) -> None:
    with pytest.raises(ValueError, match=r"holds no baseline.json; say which `method` to use it for: promptreps, "):
        load_baseline(backbone("llama"))
    folder = write_folder(tmp_path, method="repllama", base_model_name_or_path="base")
    with pytest.raises(ValueError, match="is of method 'repllama', not 'promptreps'"):
        load_baseline(folder, "promptreps")
    with pytest.raises(TypeError, match="takes no option 'num_masks'"):
        load_baseline(folder, num_masks=4)
    with pytest.raises(FileNotFoundError, match=r"nowhere is not there"):
        load_baseline(tmp_path / "nowhere", "repllama")
