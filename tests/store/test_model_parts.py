"""What changes a vector makes another model: a store of the former is neither gone on with nor searched."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_folders import PARITY, edit_json, edit_weights, shard
from store_helpers import folder_bytes, made_up_texts, silent, write_jsonl
from transformers import AutoModel, LlamaConfig, Qwen2Config

from diffretriever.cli.main import main
from diffretriever.encode.encode_store import encode_store
from diffretriever.publishing import build as building
from diffretriever.store.differences import tell_apart
from diffretriever.store.identity import check_searchable, describe_model
from diffretriever.store.model_parts import IDLE_FIELDS, backbone_fields, hash_code
from diffretriever.store.store import Store

PROMPT = {"system": "s", "user": "Read {text}", "assistant": "Words: "}
ADAPTER, BACKBONE = Path("adapter/adapter_config.json"), Path("backbone/config.json")


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release with its backbone, in shards, and its code inside."""
    folder, backbone = tmp_path_factory.mktemp("parts") / "release", PARITY / "backbones" / "tiny-llada"
    building.build(str(backbone), folder, str(PARITY / "adapters" / "llada-q4p4"))
    shutil.copytree(backbone, folder / "backbone")
    shard(folder / "backbone")
    edit_json(folder / "config.json", base_model_name_or_path="backbone")
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("texts") / "corpus.jsonl", made_up_texts(3))


@pytest.fixture(scope="module")
def store(release: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    return encode_store(load(release), corpus, tmp_path_factory.mktemp("stores") / "store", tell=silent)


def load(folder: Path, **options: Any) -> Any:
    return AutoModel.from_pretrained(folder, trust_remote_code=True, torch_dtype=torch.float32, **options)


def change_json(file: Path, **fields: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / file, **fields)


def change_text(file: str, change: Callable[[str], str]) -> Callable[[Path], Any]:
    return lambda folder: (folder / file).write_text(change((folder / file).read_text()))


def change_shard(folder: Path) -> None:
    last = sorted((folder / "backbone").glob("*.safetensors"))[-1]
    edit_weights(last, lambda tensors: next(iter(tensors.values())).mul_(1.5))


CHANGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "scale": (change_json(ADAPTER, lora_alpha=256), "`adapter.lora_alpha` 64, not 256."),
    "one-scale": (
        change_json(ADAPTER, alpha_pattern={"q_proj": 1}),
        "`adapter.alpha_pattern` [], not [['q_proj', 1]].",
    ),
    "rslora": (change_json(ADAPTER, use_rslora=True), "`adapter.use_rslora` False, not True."),
    "rotation": (change_json(BACKBONE, rope_theta=1234.0), "`backbone.rope.rope_theta` 500000.0, not 1234.0."),
    "epsilon": (change_json(BACKBONE, rms_norm_eps=0.1), "`backbone.rms_norm_eps` 1e-05, not 0.1."),
    "heads": (
        change_json(BACKBONE, n_heads=2, n_kv_heads=2),
        "`backbone.head_dim` 16, not 32, `backbone.num_attention_heads` 4, not 2",
    ),
    "shard": (change_shard, "other `weights`."),
    "normalizer": (
        lambda folder: edit_json(folder / "tokenizer.json", normalizer={"type": "Lowercase"}),
        "other `tokenizer.normalizer`",
    ),
    "template": (
        change_text("chat_template.jinja", lambda text: "{{ 'Read this. ' }}" + text),
        "other `chat_template.query`, other `chat_template.passage`",
    ),
    "length": (change_json(Path("config.json"), max_length=99), "`max_length` 256, not 99."),
    "prompt": (
        change_json(Path("config.json"), passage_prompt=PROMPT),
        "`prompts.passage.user` 'Passage: \"{text}\". Use a few wor', not 'Read {text}'",
    ),
    "query-prompt": (change_json(Path("config.json"), query_prompt=PROMPT), "not 'Read {text}'"),
    "passage-budget": (change_json(Path("config.json"), num_passage_masks=2), "num_masks"),
    "query-budget": (change_json(Path("config.json"), num_query_masks=2), "`num_masks.query` 4, not 2."),
    "steps": (change_json(Path("config.json"), num_denoise_steps=2), "`options.num_denoise_steps` 1, not 2"),
    "passage-length": (change_json(Path("config.json"), passage_length=9), "`text_tokens.passage` "),
    "query-length": (change_json(Path("config.json"), query_length=9), "`text_tokens.query` "),
    "confidence": (
        change_json(Path("config.json"), num_denoise_steps=2, denoise_confidence="probability"),
        "`config.denoise_confidence` 'entropy', not 'probability'.",
    ),
    "normalize": (change_json(Path("config.json"), normalize=False), "`options.normalize` True, not False."),
    "code": (
        change_text("sparse_head.py", lambda text: text.replace("log1p", "sqrt")),
        "other `code.sparse_head` (it is of diffretriever 0.1.0, this is 0.1.0)",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_model_neither_goes_on_with_a_store_nor_searches_it(
    release: Path, corpus: Path, store: Store, tmp_path: Path, change: str
) -> None:
    other = tmp_path / f"other-{change}"
    shutil.copytree(release, other)
    make, words = CHANGES[change]
    make(other)
    model = load(other)
    with pytest.raises(ValueError, match="the store there was made by model") as encoding:
        encode_store(model, corpus, store.folder, tell=silent)
    with pytest.raises(ValueError, match="its passages were made by model") as searching:
        check_searchable(store.manifest, describe_model(model, True, "float32"), str(store.folder))
    for said in (str(encoding.value), str(searching.value)):
        lead, _, told = said.partition(f" made by model '{release}', not '{other}': ")
        assert lead.startswith(f"{store.folder}: ")
        assert words in told
        assert not re.search("[0-9a-f]{64}", told)
        assert len(told) < 300


@pytest.mark.parametrize("command", ["encode", "search"])
def test_the_commands_end_with_words(
    release: Path, corpus: Path, store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    other = tmp_path / f"other-{command}"
    shutil.copytree(release, other)
    edit_json(other / ADAPTER, lora_alpha=256)
    encode, search = ["--input", corpus, "--output", store.folder, "--quiet"], ["--store", store.folder, "a question"]
    given = [command, *(encode if command == "encode" else search), "--model", other, "--model-dtype", "float32"]
    assert main([str(argument) for argument in given]) == 2
    said = capsys.readouterr().err
    assert f"made by model '{release}', not '{other}': `adapter.lora_alpha` 64, not 256." in said


UNCHANGED: dict[str, Callable[[Path], Any]] = {
    "name": lambda folder: None,
    "comment": change_text("sparse_head.py", lambda text: "# a remark\n" + text),
    "docstring": change_text("sparse_head.py", lambda text: text.replace('"""', '"""Well: ', 1)),
    "unused": change_text("chat_template.jinja", lambda text: "{# a remark #}" + text),
    "training": change_json(Path("config.json"), cut_in_training={"query": 0.1, "passage": 0.2}),
    "library": change_json(ADAPTER, peft_version="0.17.0", lora_dropout=0.0, r=16),
    "card": lambda folder: (folder / "README.md").write_text("another"),
    "stranger": lambda folder: (folder / "backbone" / "other.safetensors").write_bytes(b"x"),
}


@pytest.mark.parametrize("change", UNCHANGED)
def test_what_changes_no_vector_makes_no_other_model(
    release: Path, corpus: Path, store: Store, tmp_path: Path, change: str
) -> None:
    same = tmp_path / f"same-{change}"
    shutil.copytree(release, same)
    UNCHANGED[change](same)
    model = load(same)
    encode_store(model, corpus, store.folder, tell=silent)
    check_searchable(store.manifest, describe_model(model, True, "float32"), "store")


def test_the_model_s_own_name_is_told_once(release: Path, store: Store) -> None:
    shorter = describe_model(load(release, max_length=99), False, "float16")
    said = tell_apart(store.manifest, shorter, store.manifest.differences(shorter))
    assert said.startswith(f"made by model '{release}' as it is no longer: `max_length` 256, not 99")


def test_what_was_chosen_for_a_side_may_differ_from_the_other_s(release: Path, store: Store) -> None:
    chosen = describe_model(load(release, num_query_masks=2, max_length=99), True, "float16")
    check_searchable(store.manifest, chosen, "store")
    check_searchable(store.manifest, describe_model(load(release, query_length=9), True, "float16"), "store")
    with pytest.raises(ValueError, match=r"`options.num_denoise_steps` 1, not 2\. Encode both"):
        check_searchable(store.manifest, describe_model(load(release, num_denoise_steps=2), True, "float16"), "store")


def test_several_steps_by_another_rule_are_another_model(release: Path) -> None:
    models = [load(release, num_denoise_steps=2, denoise_confidence=rule) for rule in ("entropy", "probability")]
    passages = [describe_model(model, False, "float16") for model in models]
    for model, own, other in zip(models, passages, reversed(passages), strict=True):
        queries = describe_model(model, True, "float16")
        check_searchable(own, queries, "store")
        with pytest.raises(ValueError, match="denoise_confidence"):
            check_searchable(other, queries, "store")


def test_a_store_that_records_fewer_parts_is_searched_and_checked(
    release: Path, corpus: Path, store: Store, tmp_path: Path
) -> None:
    """As version 0.1.0 was first written: what both sides record is compared."""
    old = tmp_path / "old"
    shutil.copytree(store.folder, old)
    settings = replace(store.manifest, model_parts={}, options={**store.manifest.options})
    del settings.options["chosen"]
    settings.write(old)
    model = load(release, max_length=99)
    manifest = Store.open(old).manifest
    check_searchable(manifest, describe_model(model, True, "float32"), "store")
    with pytest.raises(ValueError, match="`num_masks` 4, not 2"):
        encode_store(load(release, num_passage_masks=2), corpus, old, tell=silent)
    before = folder_bytes(old)
    shard_file = next(old.glob("shard-*"))
    shard_file.write_bytes(shard_file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"begun by an earlier version of diffretriever.* encode into another folder"):
        encode_store(load(release), corpus, old, tell=silent)
    assert folder_bytes(old).keys() == before.keys()


@pytest.mark.parametrize("config", [LlamaConfig, Qwen2Config])
def test_every_field_of_a_backbone_is_a_part_or_known_to_be_idle(config: Any) -> None:
    fields = config(rope_scaling={"type": "linear", "factor": 2.0}, num_hidden_layers=2).to_dict()
    kept = backbone_fields(config(rope_scaling={"type": "linear", "factor": 2.0}, num_hidden_layers=2))
    assert fields.keys() - kept.keys() <= IDLE_FIELDS
    assert kept["rope"] == {"factor": 2.0, "rope_theta": 10000.0, "rope_type": "linear"}
    assert {"hidden_act", "rms_norm_eps", "num_key_value_heads", "tie_word_embeddings", "model_type"} <= kept.keys()
    assert json.loads(json.dumps(kept)) == kept


def test_code_is_known_by_what_it_does(tmp_path: Path) -> None:
    def of(text: str) -> str:
        (tmp_path / "code.py").write_text(text)
        return hash_code(tmp_path / "code.py")

    first = of(
        '"""Doc."""\ndef f(x):\n    """Doc."""\n    if x < 0:\n        raise ValueError("no")\n    return x + 1\n'
    )
    assert of("# hm\ndef f(x):\n    if x < 0: raise ValueError(f'no {x}')\n    return (x + 1)\n") == first
    assert of("def f(x):\n    if x < 0: raise ValueError\n    return x + 2\n") != first
    assert of("def f(x):\n    if x < 1: raise ValueError\n    return x + 1\n") != first
