"""`save_pretrained`: folders that need no backbone, no adapter and no peft, on either transformers line."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fresh
import peft
import pytest
import torch
from checkpoint_folders import ADAPTERS, KINDS, PARITY, REMOVED, TEXTS, edit_json, run_python, vectors
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoTokenizer

from diffretriever.publishing import build as building

Load = Callable[..., Any]
Build = Callable[..., Path]

# Loads folders with the named packages out of reach, and keeps what each returns for the texts.
LOADER = """
import importlib.metadata, importlib.util, json, sys
import torch

BLOCKED = {"peft", "accelerate"}

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r} (blocked)", name=name)

sys.meta_path.insert(0, Blocker())
find_spec, version = importlib.util.find_spec, importlib.metadata.version

def find_spec_of_others(name, package=None):
    return None if name.split(".")[0] in BLOCKED else find_spec(name, package)

def version_of_others(name):
    if name in BLOCKED:
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)

importlib.util.find_spec, importlib.metadata.version = find_spec_of_others, version_of_others
from transformers import AutoModel, AutoTokenizer

texts = json.loads(sys.argv[1])
for folder, kept, dtype in zip(*[iter(sys.argv[2:])] * 3):
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, torch_dtype=getattr(torch, dtype))
    torch.save([list(model.encode_texts(texts, side).values()) for side in (True, False)], kept)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert tokenizer.get_vocab() == model.tokenizer.get_vocab()
    assert tokenizer(texts)["input_ids"] == model.tokenizer(texts)["input_ids"]
assert not BLOCKED & set(sys.modules)
"""


def both_sides(model: Any) -> list[list[torch.Tensor]]:
    return [vectors(model, True), vectors(model, False)]


def same(got: list[list[torch.Tensor]], expected: list[list[torch.Tensor]]) -> bool:
    return all(torch.equal(a, b) for one, two in zip(got, expected, strict=True) for a, b in zip(one, two, strict=True))


def movable_release(kind: str, adapted: bool, tmp_path: Path) -> Path:
    shutil.copytree(PARITY / "backbones" / f"tiny-{kind}", tmp_path / "base")
    adapter = str(PARITY / "adapters" / ADAPTERS[kind]) if adapted else None
    release = tmp_path / f"release-{kind}-{tmp_path.name}"
    building.build(str(tmp_path / "base"), release, adapter)
    return release


CASES: list[tuple[str, bool, torch.dtype, dict[str, Any], dict[str, str]]] = [
    ("llada", True, torch.float32, {}, {}),
    ("dream", True, torch.float32, {}, {"max_shard_size": "500KB"}),
    ("llada", True, torch.float32, {"merge_adapter": False}, {"max_shard_size": "500KB"}),
    ("dream", False, torch.float32, {}, {}),
    ("llada", True, torch.bfloat16, {}, {}),
    ("dream", True, torch.bfloat16, {"merge_adapter": False}, {}),
]


@pytest.mark.slow
def test_saved_folders_load_alone_in_a_fresh_process(tmp_path: Path) -> None:
    """Backbone and adapter deleted, peft and accelerate out of reach, perhaps another transformers (OTHER_PYTHON)."""
    expected: list[Any] = []
    arguments: list[Any] = []
    for number, (kind, adapted, dtype, options, save_options) in enumerate(CASES):
        place = tmp_path / f"case-{number}-{tmp_path.name}"
        place.mkdir()
        release = movable_release(kind, adapted, place)
        options = {"trust_remote_code": True, "torch_dtype": dtype, **options}
        model = AutoModel.from_pretrained(release, **options)
        saved = place / f"saved-{number}"
        model.save_pretrained(saved, **save_options)
        assert len(list(saved.glob("*.safetensors"))) == (4 if save_options else 1)
        # unmerged outputs differ from merged ones by rounding: the saved weights are the merged model's
        expected.append(both_sides(AutoModel.from_pretrained(release, **{**options, "merge_adapter": None})))
        shutil.rmtree(place / "base")
        shutil.rmtree(release)
        arguments += [saved, place / "kept.pt", str(dtype).removeprefix("torch.")]
    for python in {None, os.environ.get("OTHER_PYTHON")}:
        modules = tmp_path / ("other-modules" if python else "modules")
        run_python(LOADER, json.dumps(TEXTS), *arguments, python=python, HF_MODULES_CACHE=modules)
        for kept, want, case in zip(arguments[1::3], expected, CASES, strict=True):
            got = torch.load(kept)
            if python is None:
                assert same(got, want), case
            for a, b in zip(got[0] + got[1], want[0] + want[1], strict=True):
                tolerance = 3e-6 if case[2] is torch.float32 else 0.02
                assert a.is_floating_point() is False or torch.allclose(a, b, rtol=0, atol=tolerance), case
            kept.unlink()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved(kind: str, load_release: Load, tmp_path: Path) -> None:
    model = load_release(f"tiny-{kind}", ADAPTERS[kind])
    saved = tmp_path / f"saved-{kind}"
    model.save_pretrained(saved)
    with safe_open(saved / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(model.state_dict())  # our names, not the backbone's
        assert file.metadata()["format"] == "pt"
    fields = json.loads((saved / "config.json").read_text())
    assert fields["auto_map"] == building.AUTO_MAP
    assert fields["model_type"] == "diffretriever"
    assert fields["architectures"] == ["DiffRetriever"]
    assert fields["backbone_type"] == kind
    assert fields["backbone_config"]["rope_theta"] == {"llada": 500000.0, "dream": 1000000.0}[kind]
    assert fields["backbone_config"]["rms_norm_eps"] == {"llada": 1e-5, "dream": 1e-6}[kind]
    assert (fields["num_query_masks"], fields["num_passage_masks"], fields["max_length"]) == (4, 4, 256)
    for name in ("base_model_name_or_path", "base_model_revision", "adapter_name_or_path", "merge_adapter"):
        assert fields.get(name) is None
    assert str(PARITY) not in json.dumps(fields)
    assert {file.name for file in saved.glob("*.py")} == {*building.CODE_FILES, building.SENTENCE_TRANSFORMERS_FILE}
    assert not (saved / "adapter").exists()
    settings = json.loads((saved / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not isinstance(settings.get("extra_special_tokens"), list)  # transformers 4.54 cannot read a list
    again = AutoModel.from_pretrained(saved, trust_remote_code=True, torch_dtype=torch.float32)
    assert same(both_sides(again), both_sides(model))
    assert again.config.query_prompt == model.config.query_prompt


def test_saving_again_over_a_save(load_release: Load, tmp_path: Path) -> None:
    """Shards and single file replace each other, also where the model's weights lie in the files replaced."""
    model = load_release("tiny-llada", "llada-q4p4")
    expected = both_sides(model)
    saved = tmp_path / "saved-again"
    model.save_pretrained(saved, max_shard_size="500KB")
    assert (saved / "model.safetensors.index.json").is_file()
    for size in ("5GB", "500KB", "300KB", "5GB"):
        model = AutoModel.from_pretrained(saved, trust_remote_code=True, torch_dtype=torch.float32)
        model.save_pretrained(saved, max_shard_size=size)
        assert (saved / "model.safetensors").is_file() == (size == "5GB")
        assert (saved / "model.safetensors.index.json").is_file() == (size != "5GB")
        assert same(both_sides(model), expected)
    again = AutoModel.from_pretrained(saved, trust_remote_code=True, torch_dtype=torch.float32)
    assert same(both_sides(again), expected)
    assert (saved / "modeling_diffretriever.py").stat().st_size > 0


def test_saving_over_the_release_it_came_from(tmp_path: Path) -> None:
    release = movable_release("llada", True, tmp_path)
    model = AutoModel.from_pretrained(release, trust_remote_code=True, torch_dtype=torch.float32)
    model.save_pretrained(release)
    shutil.rmtree(tmp_path / "base")
    again = AutoModel.from_pretrained(release, trust_remote_code=True, torch_dtype=torch.float32)
    assert same(both_sides(again), both_sides(model))


def test_changed_settings_are_saved(build_release: Build, tmp_path: Path) -> None:
    prompt = {"system": "s", "user": 'u "{text}"', "assistant": 'a "'}
    options = {"num_query_masks": 3, "normalize": False, "query_prompt": prompt, "torch_dtype": torch.float32}
    model = AutoModel.from_pretrained(build_release("tiny-llada"), trust_remote_code=True, **options)
    model.save_pretrained(tmp_path / "saved-settings")
    again = AutoModel.from_pretrained(tmp_path / "saved-settings", trust_remote_code=True, torch_dtype=torch.float32)
    assert (again.config.num_query_masks, again.config.normalize, again.config.query_prompt) == (3, False, prompt)
    assert same(both_sides(again), both_sides(model))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"adapter_name_or_path": str(PARITY / "adapters" / "llada-single")}, "`adapter_name_or_path` cannot be set"),
        ({"base_model_name_or_path": "GSAI-ML/LLaDA-8B-Instruct"}, "`base_model_name_or_path` cannot be set"),
        ({"backbone_type": "dream"}, "`backbone_type` cannot be set"),
    ],
)
def test_merged_weights_take_no_backbone_or_adapter(
    options: dict[str, str], words: str, load_release: Load, tmp_path: Path
) -> None:
    saved = tmp_path / "saved-merged"
    load_release("tiny-llada", "llada-q4p4").save_pretrained(saved)
    with pytest.raises(ValueError, match=f"holds its own merged weights, so {words}"):
        AutoModel.from_pretrained(saved, trust_remote_code=True, **options)
    edit_json(saved / "config.json", backbone_config=REMOVED)
    with pytest.raises(ValueError, match=r"config\.json lacks `backbone_type` or `backbone_config`"):
        AutoModel.from_pretrained(saved, trust_remote_code=True)


def test_save_refuses_to_upload(load_release: Load, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"writes a folder only; call model\.push_to_hub"):
        load_release("tiny-llada").save_pretrained(tmp_path / "no", push_to_hub=True)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("options", [{"safe_serialization": False}, {"variant": "fp16"}], ids=str)
def test_save_writes_no_file_that_would_not_load(options: dict[str, Any], load_release: Load, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"writes model\.safetensors; leave out variant and safe_serialization"):
        load_release("tiny-llada").save_pretrained(tmp_path / "no", **options)
    assert not (tmp_path / "no").exists()


def test_save_takes_all_weights_of_a_model_with_an_adapter_of_transformers(load_release: Load, tmp_path: Path) -> None:
    model = copy.deepcopy(load_release("tiny-llada", "llada-q4p4"))
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False), model)
    model._hf_peft_config_loaded = True  # as `model.add_adapter` leaves it, which wants a peft that is not everywhere
    model.save_pretrained(tmp_path / "saved-added")
    assert model._hf_peft_config_loaded
    saved = AutoModel.from_pretrained(tmp_path / "saved-added", trust_remote_code=True, torch_dtype=torch.float32)
    for found, expected in zip(both_sides(saved), both_sides(model), strict=True):
        torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-5)  # the dense vectors


def test_save_refuses_what_would_not_load(load_release: Load, tmp_path: Path) -> None:
    model = copy.deepcopy(load_release("tiny-llada", "llada-q4p4", merge_adapter=False))
    with pytest.raises(ValueError, match=r"lora_A.* would not load again\. Leave `state_dict` out"):
        model.save_pretrained(tmp_path / "no", state_dict=model.state_dict())
    model.config.my_note = "run 7"
    with pytest.raises(ValueError, match="`my_note` is a field that is not known here"):
        model.save_pretrained(tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_save_onto_a_file(load_release: Load, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(NotADirectoryError, match="taken is a file"):
        load_release("tiny-llada").save_pretrained(tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"


def test_tokenizer_and_config_through_their_auto_classes(load_release: Load, tmp_path: Path) -> None:
    model = load_release("tiny-dream", "dream-q4p16")
    model.save_pretrained(tmp_path / "saved-auto")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved-auto", trust_remote_code=True)
    assert tokenizer.get_vocab() == model.tokenizer.get_vocab()
    messages = [{"role": "user", "content": "hi"}]
    rendered = (t.apply_chat_template(messages, tokenize=False) for t in (tokenizer, model.tokenizer))
    assert len(set(rendered)) == 1
    config = AutoConfig.from_pretrained(tmp_path / "saved-auto", trust_remote_code=True)
    assert config.num_passage_masks == 16
    assert config.to_dict()["backbone_config"] == model.config.to_dict()["backbone_config"]


# ------------------------------------------------------------------------------------------ a model like any other


def test_deepcopy_and_pickle_of_the_model(load_release: Load) -> None:
    model = load_release("tiny-llada", "llada-q4p4", merge_adapter=False)
    twin = copy.deepcopy(model)
    assert same(both_sides(twin), both_sides(model))
    with torch.no_grad():
        twin.lm_head.get_base_layer().weight.zero_()
    assert not same(both_sides(twin), both_sides(model))
    merged = load_release("tiny-llada", "llada-q4p4")
    stream = io.BytesIO()
    torch.save(merged.state_dict(), stream)
    stream.seek(0)
    assert torch.load(stream).keys() == merged.state_dict().keys()


def doubled(output: Any) -> Any:
    output["repr_hidden"] = output.repr_hidden * 2
    return output


def test_outputs_survive_pickling_and_worker_processes(load_release: Load) -> None:
    out = load_release("tiny-llada", "llada-q4p4").encode_texts(TEXTS, True)
    again = pickle.loads(pickle.dumps(out))
    assert type(again) is type(out)
    assert list(again) == ["repr_hidden", "sparse_indices", "sparse_values"]
    assert torch.equal(again.repr_hidden, out["repr_hidden"])
    assert again.mask_hidden is None
    assert torch.equal(copy.deepcopy(out).sparse_values, out.sparse_values)


@pytest.mark.slow
def test_outputs_travel_to_a_worker_and_back(load_release: Load) -> None:
    out = load_release("tiny-llada", "llada-q4p4").encode_texts(TEXTS, True)
    expected = out.repr_hidden * 2
    with fresh.CONTEXT.Pool(1) as pool:
        returned = pool.apply(doubled, (out,))
    assert torch.equal(returned.repr_hidden, expected)
    assert torch.equal(returned["sparse_indices"], out.sparse_indices)


def test_moves_and_modes(build_release: Build) -> None:
    options = {"trust_remote_code": True, "torch_dtype": torch.float32}
    model = AutoModel.from_pretrained(build_release("tiny-llada", "llada-q4p4"), **options)
    expected = both_sides(model)
    assert model.train().training
    assert not model.eval().training
    assert model.to("cpu").device == torch.device("cpu")
    assert same(both_sides(model.to(torch.float64).to(torch.float32)), expected)
    assert model.to(torch.bfloat16).dtype == torch.bfloat16
    dense = model.encode_texts(TEXTS, True).repr_hidden
    assert dense.dtype == torch.float32
    assert ((dense * expected[0][0]).sum(dim=-1) > 0.99).all()
    assert model.float().num_parameters() == sum(weight.numel() for weight in model.parameters())
    assert model.num_parameters(exclude_embeddings=True) < model.num_parameters()
    assert model.get_input_embeddings() is model.backbone.embed_tokens
    assert model.get_output_embeddings() is model.lm_head
    assert model.get_input_embeddings().padding_idx is None
    assert repr(model)
    assert json.loads(model.config.to_json_string())["model_type"] == "diffretriever"


def test_bfloat16_save_holds_the_rounded_merge(build_release: Build, tmp_path: Path) -> None:
    folder = build_release("tiny-llada", "llada-q4p4")
    for name, options in (("merged", {}), ("unmerged", {"merge_adapter": False})):
        model = AutoModel.from_pretrained(folder, trust_remote_code=True, torch_dtype=torch.bfloat16, **options)
        model.save_pretrained(tmp_path / f"bf16-{name}")
    merged, unmerged = (load_file(tmp_path / f"bf16-{name}" / "model.safetensors") for name in ("merged", "unmerged"))
    assert merged.keys() == unmerged.keys()
    for name, weight in merged.items():
        assert weight.dtype == torch.bfloat16
        # peft adds in the same float32 steps whether it has some rows or all; the rounding may still differ by a bit
        assert torch.allclose(weight.float(), unmerged[name].float(), rtol=2**-7, atol=1e-6), name


@pytest.mark.slow
def test_torch_compile(build_release: Build) -> None:
    backend = "eager"  # what is traced matters here, not what is generated from it, which takes long
    folder = build_release("tiny-llada", "llada-q4p4")
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, torch_dtype=torch.float32)
    ids, mask = model.tokenize(TEXTS, is_query=True)
    expected_hidden = model(ids, mask, is_query=True).mask_hidden
    expected = model.encode(ids, mask, is_query=True, compute_sparse=True)
    compiled = torch.compile(model, backend=backend)
    assert torch.allclose(compiled(ids, mask, is_query=True).mask_hidden, expected_hidden, atol=1e-5)
    model.compile(backend=backend)
    out = model.encode(ids, mask, is_query=True, compute_sparse=True)
    assert torch.allclose(out.repr_hidden, expected.repr_hidden, atol=1e-5)
    assert torch.allclose(out.sparse_values, expected.sparse_values, atol=1e-5)
