"""`from_pretrained`: its arguments, the original formats, and what is in memory afterwards."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoint_folders import (
    ADAPTERS,
    KINDS,
    PARITY,
    REMOVED,
    TEXTS,
    copy_adapter,
    copy_backbone,
    edit_json,
    original_key,
    shard,
    vectors,
)
from pretend_cpu import UNITS, pretend_cpu
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

from diffretriever.model import backbone_loading
from diffretriever.model.configuration_diffretriever import DiffRetrieverConfig
from diffretriever.publishing import build as building

Load = Callable[..., Any]
Build = Callable[..., Path]


def load(folder: Path | str, **options: Any) -> Any:
    if not {"dtype", "torch_dtype"} & options.keys():
        options["torch_dtype"] = torch.float32
    return AutoModel.from_pretrained(folder, trust_remote_code=True, **options)


def frequencies(model: Any) -> torch.Tensor:
    config = model.config.backbone_config
    theta = {"llada": 500000.0, "dream": 1000000.0}[model.config.backbone_type]
    size = config.hidden_size // config.num_attention_heads
    return 1.0 / theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size)


# ------------------------------------------------------------------------------------------ what is in memory


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_weight_is_the_files(kind: str, dtype: torch.dtype, load_release: Load) -> None:
    model = load_release(f"tiny-{kind}", torch_dtype=dtype)
    stored = load_file(PARITY / "backbones" / f"tiny-{kind}" / "model.safetensors")
    held = {original_key(kind, name): weight for name, weight in model.state_dict().items()}
    assert held.keys() == stored.keys()
    for name, weight in held.items():
        assert weight.dtype == dtype
        assert torch.equal(weight, stored[name].to(dtype)), name
    assert model.lm_head.weight.data_ptr() != model.get_input_embeddings().weight.data_ptr()
    assert not torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)
    assert model.num_parameters() == sum(weight.numel() for weight in stored.values())
    assert model.dtype == dtype
    assert model.device == torch.device("cpu")
    assert not model.training


@pytest.mark.parametrize("kind", KINDS)
def test_rope_frequencies_stay_float32(kind: str, build_release: Build) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = load(build_release(f"tiny-{kind}"), torch_dtype=dtype)
        for cast in (lambda m: m, lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.to("cpu")):
            buffer = cast(model).backbone.rotary_emb.inv_freq
            assert buffer.dtype == torch.float32
            assert torch.allclose(buffer, frequencies(model), rtol=1e-6)


def test_nothing_depends_on_the_random_state(build_release: Build) -> None:
    folder = build_release("tiny-dream", "dream-q4p4")
    torch.manual_seed(1)
    first = load(folder).state_dict()
    torch.manual_seed(2)
    second = load(folder).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


# ------------------------------------------------------------------------------------------ arguments for transformers


@pytest.mark.parametrize("argument", ["dtype", "torch_dtype"])
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.bfloat16, torch.bfloat16),
        ("bfloat16", torch.bfloat16),
        ("float32", torch.float32),
        (torch.float16, torch.float16),
        ("auto", torch.bfloat16),  # the files' own
    ],
    ids=str,
)
def test_dtype(argument: str, value: Any, expected: torch.dtype, build_release: Build) -> None:
    model = load(build_release("tiny-llada", "llada-single"), **{argument: value})
    assert {weight.dtype for weight in model.parameters()} == {expected}


def test_dtype_of_a_float32_checkpoint(tmp_path: Path) -> None:
    base = copy_backbone("llada", tmp_path / "base-f32")
    tensors = {name: tensor.float() for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    building.build(str(base), tmp_path / "release-f32")
    assert load(tmp_path / "release-f32", torch_dtype="auto").dtype == torch.float32


@pytest.mark.parametrize(
    ("device_map", "accelerator", "units", "expected"),
    [
        (None, False, [], torch.float32),
        *[(None, False, [unit], torch.bfloat16) for unit in UNITS],
        (None, True, [], torch.bfloat16),
        ("auto", True, [], torch.bfloat16),
        ("cpu", True, [], torch.float32),
        ({"": "cpu"}, True, [], torch.float32),
        ({"backbone": 0, "lm_head": "cpu"}, True, [], torch.bfloat16),
    ],
    ids=str,
)
def test_default_dtype(
    device_map: Any, accelerator: bool, units: list[str], expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bfloat16 on an accelerator or a CPU that multiplies it; float32 on others, where bfloat16 is half as fast."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerator)
    pretend_cpu(monkeypatch, *units)
    options = {} if device_map is None else {"device_map": device_map}
    for stored in ("BF16", "F32"):
        assert backbone_loading.choose_dtype({**options, "dtype": None}, stored) == expected


@pytest.mark.parametrize(("units", "expected"), [([], torch.float32), (UNITS, torch.bfloat16)])
def test_default_dtype_is_what_is_loaded(
    units: Sequence[str], expected: torch.dtype, build_release: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    pretend_cpu(monkeypatch, *units)
    model = AutoModel.from_pretrained(build_release("tiny-llada", "llada-single"), trust_remote_code=True)
    assert {weight.dtype for weight in model.parameters()} == {expected}


@pytest.mark.parametrize("value", ["floaty", torch.int8, "int8", 16, "Tensor"], ids=str)
def test_wrong_dtype(value: Any, build_release: Build, load_release: Load) -> None:
    release = type(load_release("tiny-llada"))
    with pytest.raises(ValueError, match="`dtype` must be a floating-point"):
        release.from_pretrained(build_release("tiny-llada"), torch_dtype=value)


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, "auto", {"": torch.device("cpu")}], ids=str)
def test_device_map(device_map: Any, build_release: Build, load_release: Load) -> None:
    folder = build_release("tiny-llada", "llada-q4p4")
    model = load(folder, device_map=device_map)
    expected = vectors(load_release("tiny-llada", "llada-q4p4"))
    assert all(map(torch.equal, vectors(model), expected))
    assert not any(weight.is_meta for weight in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adapted", [True, False], ids=["adapter", "zero-shot"])
def test_disk_offload(kind: str, adapted: bool, build_release: Build, load_release: Load, tmp_path: Path) -> None:
    adapter = ADAPTERS[kind] if adapted else None
    places: dict[str, str] = {f"backbone.layers.{layer}": "disk" if layer % 2 else "cpu" for layer in range(4)}
    places |= {"backbone.embed_tokens": "cpu", "backbone.norm": "cpu", "backbone.rotary_emb": "cpu", "lm_head": "disk"}
    options = {"device_map": places, "offload_folder": str(tmp_path)}
    model = load(build_release(f"tiny-{kind}", adapter), **options)
    assert any(weight.is_meta for weight in model.parameters())
    assert adapter is None or hasattr(model.backbone.layers[0].self_attn.q_proj, "lora_A")
    expected = vectors(load_release(f"tiny-{kind}", adapter))
    for got, want in zip(vectors(model), expected, strict=True):
        assert torch.allclose(got.float(), want.float(), atol=3e-5)
    with pytest.raises(ValueError, match="offloaded weights cannot be saved"):
        model.save_pretrained(tmp_path / "saved")
    if adapter is not None:
        with pytest.raises(ValueError, match="merge_adapter=True, but the backbone is offloaded"):
            load(build_release(f"tiny-{kind}", adapter), merge_adapter=True, **options)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attn_implementation(implementation: str, build_release: Build, load_release: Load) -> None:
    model = load(build_release("tiny-dream", "dream-q4p4"), attn_implementation=implementation)
    assert model.config._attn_implementation == implementation
    expected = vectors(load_release("tiny-dream", "dream-q4p4"))
    assert all(torch.allclose(a.float(), b.float(), atol=2e-5) for a, b in zip(vectors(model), expected, strict=True))


def test_unsupported_attention(build_release: Build) -> None:
    with pytest.raises(ValueError, match="flex_attention"):  # by transformers at load, or by us at the first text
        load(build_release("tiny-llada"), attn_implementation="flex_attention").encode_texts(TEXTS, True)


def test_hub_arguments_and_report(
    build_release: Build, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    model, report = load(
        build_release("tiny-llada", "llada-single"),
        local_files_only=True,
        cache_dir=tmp_path,
        token="hf_verysecret",
        revision="main",
        low_cpu_mem_usage=True,
        output_loading_info=True,
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.encode_texts(TEXTS, True).repr_hidden.isfinite().all()
    printed = capfd.readouterr()
    assert "hf_verysecret" not in printed.out + printed.err + caplog.text + model.config.to_json_string()


def test_token_is_not_in_errors(build_release: Build, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nobody/nothing could not be had") as failure:
        load(
            build_release("tiny-llada"), base_model_name_or_path="nobody/nothing", token="hf_secret", cache_dir=tmp_path
        )
    assert "hf_secret" not in str(failure.value)


def test_quantization_config_reaches_transformers(build_release: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    config = transformers.QuantoConfig(weights="int8")
    seen: list[Any] = []

    def stop(config: Any, *args: Any, **kwargs: Any) -> None:
        seen.append(config)
        raise RuntimeError("reached the quantiser")

    monkeypatch.setattr(transformers.quantizers.auto.AutoHfQuantizer, "from_config", stop)
    with pytest.raises(RuntimeError, match="reached the quantiser"):
        load(build_release("tiny-llada", "llada-q4p4"), quantization_config=config)
    assert seen[0].weights == "int8"


# ------------------------------------------------------------------------------------------ fields of the config

PROMPT = {"system": "You rank.", "user": 'Text: "{text}".', "assistant": 'It says: "'}


@pytest.mark.parametrize("through", ["AutoModel", "class"])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_query_masks", 4),
        ("num_passage_masks", 16),
        ("num_denoise_steps", 2),
        ("denoise_confidence", "probability"),
        ("max_length", 120),
        ("normalize", False),
        ("sparse_top_k", 5),
        ("query_prompt", PROMPT),
        ("passage_prompt", PROMPT),
        ("backbone_type", "llada"),
        ("adapter_name_or_path", None),
        ("base_model_revision", "main"),
        ("merge_adapter", False),
    ],
)
def test_every_field_can_be_set(field: str, value: Any, through: str, build_release: Build, load_release: Load) -> None:
    cls = AutoModel if through == "AutoModel" else type(load_release("tiny-llada", "llada-single"))
    options = {"trust_remote_code": True} if cls is AutoModel else {}
    folder = build_release("tiny-llada", "llada-single")
    model = cls.from_pretrained(folder, torch_dtype=torch.float32, **options, **{field: value})
    assert getattr(model.config, field) == value
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True, **{field: value})
    assert getattr(config, field) == value
    out = model.encode_texts(TEXTS, True)
    assert out.repr_hidden.shape == (3, model.config.num_query_masks, 64)
    assert out.sparse_values.shape == (3, model.config.sparse_top_k)
    norms = out.repr_hidden.norm(dim=-1)
    assert torch.allclose(norms, torch.ones(())) == model.config.normalize


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({"backbone_type": "llada", "num_denoise_steps": 2}, "probability"),
        ({"backbone_type": "llada", "num_denoise_steps": 2, "denoise_confidence": "entropy"}, "entropy"),
        ({"backbone_type": "llada"}, "entropy"),
        ({"backbone_type": "dream", "num_denoise_steps": 2}, "entropy"),
    ],
)
def test_releases_from_before_the_rule_was_a_field_keep_theirs(
    fields: dict[str, Any], rule: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "diffretriever", **fields}))
    assert DiffRetrieverConfig.from_pretrained(tmp_path, num_denoise_steps=2).denoise_confidence == rule
    assert DiffRetrieverConfig.from_pretrained(tmp_path, denoise_confidence="entropy").denoise_confidence == "entropy"


def test_more_masks_than_the_release_has(build_release: Build, load_release: Load) -> None:
    """K can be raised; the prompt stays the release's unless it is set too (None: the paper's for that K)."""
    folder = build_release("tiny-llada", "llada-single")
    kept = load(folder, num_query_masks=4)
    assert kept.tokenizer.decode(kept.texts.layouts[True].suffix).endswith('The word is: "')
    renewed = load(folder, num_query_masks=4, query_prompt=None)
    assert renewed.tokenizer.decode(renewed.texts.layouts[True].suffix).endswith('The words are: "')
    zero_shot = load(build_release("tiny-llada"), num_query_masks=4)
    assert zero_shot.tokenizer.decode(zero_shot.texts.layouts[True].suffix).endswith('The words are: "')


def test_another_base(build_release: Build, load_release: Load, tmp_path: Path) -> None:
    base = copy_backbone("llada", tmp_path / "other-base")
    for path in (str(base), base):
        model = load(build_release("tiny-llada", "llada-q4p4"), base_model_name_or_path=path)
        assert all(map(torch.equal, vectors(model), vectors(load_release("tiny-llada", "llada-q4p4"))))
        json.loads(model.config.to_json_string())


def test_another_adapter_brings_its_settings(build_release: Build, load_release: Load) -> None:
    folder = build_release("tiny-llada", "llada-single")
    adapter = PARITY / "adapters" / "llada-q4p4"
    model = load(folder, adapter_name_or_path=adapter)
    expected = load_release("tiny-llada", "llada-q4p4")
    assert model.config.num_query_masks == model.config.num_passage_masks == 4
    assert model.config.query_prompt == expected.config.query_prompt
    assert all(map(torch.equal, vectors(model), vectors(expected)))
    chosen = load(folder, adapter_name_or_path=str(adapter), num_query_masks=2, passage_prompt=PROMPT)
    assert (chosen.config.num_query_masks, chosen.config.num_passage_masks) == (2, 4)
    assert chosen.config.passage_prompt == PROMPT
    assert chosen.config.query_prompt == expected.config.query_prompt


def test_another_adapter_without_record_keeps_the_releases_settings(build_release: Build, tmp_path: Path) -> None:
    adapter = copy_adapter("llada-q4p4", tmp_path / "bare")
    (adapter / "retriever_config.json").unlink()
    model = load(build_release("tiny-llada", "llada-single"), adapter_name_or_path=adapter)
    assert model.config.num_query_masks == 1


def test_zero_shot_equals_a_release_without_adapter(build_release: Build, load_release: Load) -> None:
    model = load(build_release("tiny-llada", "llada-single"), adapter_name_or_path=None)
    zero = load_release("tiny-llada", max_length=256)
    assert all(map(torch.equal, vectors(model), vectors(zero)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_query_masks": 0}, "`num_query_masks` must be a whole number of at least 1, got 0"),
        ({"num_passage_masks": -4}, "`num_passage_masks` must be a whole number of at least 1, got -4"),
        ({"num_query_masks": "4"}, "`num_query_masks` must be a whole number of at least 1, got '4'"),
        ({"num_query_masks": 1.5}, "`num_query_masks` must be a whole number"),
        ({"num_query_masks": True}, "`num_query_masks` must be a whole number"),
        ({"num_denoise_steps": 0}, "`num_denoise_steps` must be"),
        ({"denoise_confidence": "margin"}, "`denoise_confidence` is 'margin'; only 'entropy', 'probability' are supp"),
        ({"max_length": 20}, "`max_length` is 20, but the query prompt alone takes"),
        ({"normalize": "yes"}, "`normalize` must be true or false, got 'yes'"),
        ({"merge_adapter": 1}, "`merge_adapter` must be true or false or null, got 1"),
        ({"backbone_type": "bert"}, '`backbone_type` must be one of "llada", "dream", "llama", "qwen2", got \'bert\''),
        ({"backbone_type": "dream"}, "is a llada backbone, but the release's `backbone_type` is 'dream'"),
        (
            {"base_model_name_or_path": 5},
            "`base_model_name_or_path` must be a string of 1 to 4096 characters or null, got 5",
        ),
        ({"base_model_name_or_path": "/not/there"}, "/not/there is not there, and '/not/there' is no Hub id"),
        ({"adapter_name_or_path": "./no-such"}, "no-such is not there.*`adapter_name_or_path`"),
        ({"adapter_name_or_path": str(PARITY / "golden")}, r"golden holds no adapter_config\.json"),
        ({"query_prompt": "Query: {text}"}, "`query_prompt` must be null .* or an object with exactly the keys"),
        ({"query_prompt": {**PROMPT, "user": "none"}}, r"`query_prompt.user` must hold the placeholder \{text\}"),
        (
            {"passage_prompt": {**PROMPT, "system": 3}},
            "`passage_prompt.system` must be a string of at most 10000 characters, got 3",
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("through", ["AutoModel", "class"])
def test_wrong_fields(
    changes: dict[str, Any], words: str, through: str, build_release: Build, load_release: Load
) -> None:
    cls = AutoModel if through == "AutoModel" else type(load_release("tiny-llada", "llada-single"))
    options = {"trust_remote_code": True} if cls is AutoModel else {}
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        cls.from_pretrained(build_release("tiny-llada", "llada-single"), **options, **changes)


def test_a_head_of_its_own_is_not_tied(build_release: Build) -> None:
    with pytest.raises(ValueError, match="`tie_word_embeddings` is True; only False is supported"):
        load(build_release("tiny-llada", "llada-single"), tie_word_embeddings=True)


def test_two_threads_load_one_after_the_other(
    build_release: Build, load_release: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Meanwhile transformers changes torch's default dtype, for all threads; the second one would leave it changed."""
    cls, loading, most = type(load_release("tiny-llada", "llada-single")), [], []

    def slow(*_: Any) -> None:
        loading.append(1)
        time.sleep(0.02)
        most.append(len(loading))
        loading.pop()
        raise ValueError("far enough")

    monkeypatch.setattr(sys.modules[cls.__module__], "find_weights", slow)
    with ThreadPoolExecutor(4) as pool:
        loads = [pool.submit(cls.from_pretrained, build_release("tiny-llada", "llada-single")) for _ in range(4)]
    assert [str(load.exception()) for load in loads] == ["far enough"] * 4
    assert most == [1, 1, 1, 1]


def test_a_subfolder_is_refused(build_release: Build, load_release: Load) -> None:
    cls = type(load_release("tiny-llada", "llada-single"))
    with pytest.raises(ValueError, match="`subfolder` is not read: a release lies at the top of its folder"):
        cls.from_pretrained(build_release("tiny-llada", "llada-single"), subfolder="sparse")


def test_config_given_by_the_caller(build_release: Build, load_release: Load) -> None:
    folder = build_release("tiny-llada", "llada-q4p4")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True, num_query_masks=2)
    model = load(folder, config=config, num_passage_masks=3)
    assert (model.config.num_query_masks, model.config.num_passage_masks) == (2, 3)
    assert config.backbone_config is None  # the caller's stays as it was
    assert config.num_passage_masks == 4


def test_config_round_trip(build_release: Build, tmp_path: Path) -> None:
    folder = build_release("tiny-dream", "dream-q4p16")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert (config.num_query_masks, config.num_passage_masks, config.backbone_type) == (4, 16, "dream")
    assert type(config)(**config.to_dict()).to_dict() == config.to_dict()
    model = load(folder)
    fields = json.loads(model.config.to_json_string())
    assert fields["backbone_config"]["rope_theta"] == 1000000.0
    model.config.save_pretrained(tmp_path / "only-config")
    again = type(config).from_pretrained(tmp_path / "only-config")
    assert again.backbone_config.hidden_size == again.hidden_size == 64
    assert again.vocab_size == 2016
    fresh = AutoModel.from_config(model.config, trust_remote_code=True)
    assert fresh.num_parameters() == model.num_parameters()
    assert torch.allclose(fresh.backbone.rotary_emb.inv_freq, frequencies(model), rtol=1e-6)


# ------------------------------------------------------------------------------------------ original formats


@pytest.mark.parametrize("kind", KINDS)
def test_sharded(kind: str, tmp_path: Path, load_release: Load) -> None:
    base = copy_backbone(kind, tmp_path / f"sharded-{kind}")
    shard(base)
    building.build(str(base), tmp_path / f"from-shards-{kind}", str(PARITY / "adapters" / ADAPTERS[kind]))
    model = load(tmp_path / f"from-shards-{kind}")
    assert all(map(torch.equal, vectors(model), vectors(load_release(f"tiny-{kind}", ADAPTERS[kind]))))


def test_llada_config_that_leaves_sizes_to_its_class(tmp_path: Path, load_release: Load) -> None:
    base = copy_backbone(
        "llada",
        tmp_path / "sparse-config",
        **{"embedding_size": REMOVED, "n_kv_heads": None, "mlp_hidden_size": None, "mlp_ratio": 3},
    )
    building.build(str(base), tmp_path / "from-sparse-config", str(PARITY / "adapters" / "llada-q4p4"))
    model = load(tmp_path / "from-sparse-config")
    assert all(map(torch.equal, vectors(model), vectors(load_release("tiny-llada", "llada-q4p4"))))


REMOTE_CODE = "raise SystemExit('the backbone\\'s code was run')\n"


def dream_with_slow_tokenizer_files(folder: Path) -> Path:
    """The real Dream repository's layout: vocab.json, merges.txt, remote tokenizer code, no tokenizer.json."""
    base = copy_backbone("dream", folder)
    rules = json.loads((base / "tokenizer.json").read_text())
    (base / "tokenizer.json").unlink()
    (base / "vocab.json").write_text(json.dumps(rules["model"]["vocab"], ensure_ascii=False), encoding="utf-8")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in rules["model"]["merges"]]
    (base / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    added = {token["content"]: token["id"] for token in rules["added_tokens"]}
    (base / "added_tokens.json").write_text(json.dumps(added))
    edit_json(
        base / "tokenizer_config.json",
        tokenizer_class="DreamTokenizer",
        auto_map={"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
    )
    for name in ("tokenization_dream.py", "modeling_dream.py", "configuration_dream.py"):
        (base / name).write_text(REMOTE_CODE)
    return base


def test_dream_tokenizer_from_vocab_and_merges(tmp_path: Path, load_release: Load) -> None:
    base = dream_with_slow_tokenizer_files(tmp_path / "dream-slow-files")
    building.build(str(base), tmp_path / "dream-slow-release", str(PARITY / "adapters" / "dream-q4p16"))
    built = load(tmp_path / "dream-slow-release")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "dream-slow-release" / name).unlink()
    fallen_back = load(tmp_path / "dream-slow-release")
    expected = load_release("tiny-dream", "dream-q4p16")
    meta = json.loads((PARITY / "golden" / "dream" / "k16_passage" / "meta.json").read_text())
    texts = [*meta["texts"], *TEXTS, "ﬁne Ｆｕｌｌ e\u0301 don't 123456 \n\n\t  x", "日本語 العربية 🙂‍↔️"]
    for model in (built, fallen_back):
        assert all(map(torch.equal, model.tokenize(texts, False), expected.tokenize(texts, False)))
        assert model.content_token_ids(texts) == expected.content_token_ids(texts)
        assert model.texts.mask_id == expected.texts.mask_id
        assert model.texts.pad_id == expected.texts.pad_id


@pytest.mark.parametrize("kind", KINDS)
def test_no_code_of_the_backbone_is_run(kind: str, tmp_path: Path) -> None:
    base = copy_backbone(kind, tmp_path / f"code-{kind}")
    names = json.loads((base / "config.json").read_text())["auto_map"].values()
    for name in {entry.split(".")[0] for entry in names} | {"tokenization_evil"}:
        (base / f"{name}.py").write_text(REMOTE_CODE)
    edit_json(base / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_evil.Evil", None]})
    edit_json(base / "config.json", auto_map={"AutoModel": "modeling_evil.Evil", "AutoConfig": "modeling_evil.Evil"})
    (base / "modeling_evil.py").write_text(REMOTE_CODE)
    release = tmp_path / f"code-release-{kind}"
    building.build(str(base), release)
    load(release)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (release / file).unlink()
    assert load(release).encode_texts(TEXTS, True).repr_hidden.isfinite().all()


def test_adapter_config_among_the_weights_is_refused(tmp_path: Path) -> None:
    """With peft installed, transformers would follow that file to another model."""
    base = copy_backbone("llada", tmp_path / "base-with-adapter")
    building.build(str(base), tmp_path / "release-of-it")
    shutil.copy(PARITY / "adapters" / "llada-single" / "adapter_config.json", base)
    with pytest.raises(ValueError, match="would make transformers load another model"):
        load(tmp_path / "release-of-it")
