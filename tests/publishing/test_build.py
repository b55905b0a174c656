"""`publish.py build`: what a release folder holds, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_folders import (
    ADAPTERS,
    KINDS,
    PARITY,
    REMOVED,
    ROOT,
    TEXTS,
    copy_adapter,
    copy_backbone,
    edit_json,
    edit_weights,
    hub_repository,
    run_python,
)
from safetensors.torch import load_file
from transformers import AutoModel

import publish
from diffretriever.model import backbone_loading
from diffretriever.model.configuration_diffretriever import DiffRetrieverConfig
from diffretriever.publishing import build as building
from diffretriever.store.identity import hash_weights

LLADA, DREAM = str(PARITY / "backbones" / "tiny-llada"), str(PARITY / "backbones" / "tiny-dream")
SINGLE, MULTI = str(PARITY / "adapters" / "llada-single"), str(PARITY / "adapters" / "llada-q4p4")


SENTENCE_TRANSFORMERS_FILES = (
    "st_diffretriever.py",
    "modules.json",
    "config_sentence_transformers.json",
    "st_diffretriever.json",
)


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def load(folder: Path, **options: Any) -> Any:
    return AutoModel.from_pretrained(folder, trust_remote_code=True, torch_dtype=torch.float32, **options)


@pytest.mark.parametrize(("kind", "adapter"), [("llada", "llada-single"), ("dream", "dream-q4p16"), ("llada", None)])
def test_what_a_release_holds(kind: str, adapter: str | None, tmp_path: Path) -> None:
    out = tmp_path / "my-release"
    source = str(PARITY / "adapters" / adapter) if adapter else None
    config = building.build(str(PARITY / "backbones" / f"tiny-{kind}"), out, source)
    files = {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()}
    kept = {f"adapter/{name}" for name in ("adapter_config.json", "adapter_model.safetensors", "retriever_config.json")}
    required = {
        *building.CODE_FILES,
        *(f"{place}{name}" for place in ("", "sparse/", "multi-vector/") for name in SENTENCE_TRANSFORMERS_FILES),
        "README.md",
        "release.json",
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        *(kept if source else ()),
    }
    optional = {"chat_template.jinja", "special_tokens_map.json"}
    assert required <= files <= required | optional
    fields = read(out / "config.json")
    assert fields["auto_map"] == {
        "AutoConfig": "configuration_diffretriever.DiffRetrieverConfig",
        "AutoModel": "modeling_diffretriever.DiffRetriever",
    }
    assert fields["model_type"] == "diffretriever"
    assert fields["architectures"] == ["DiffRetriever"]
    assert fields["release_name"] == config.release_name == "my-release"
    assert fields["backbone_type"] == kind
    assert fields["base_model_name_or_path"] == str(PARITY / "backbones" / f"tiny-{kind}")
    assert fields["base_model_revision"] is None
    assert fields.get("adapter_name_or_path") == ("adapter" if source else None)
    budgets = {"llada-single": (1, 1, 256), "dream-q4p16": (4, 16, 256), None: (1, 1, 156)}[adapter]
    assert (fields["num_query_masks"], fields["num_passage_masks"], fields["max_length"]) == budgets
    assert (out.stat().st_mode & 0o777) == 0o755 & ~current_umask()
    for name in building.CODE_FILES:
        assert (out / name).read_bytes() == (ROOT / name).read_bytes()


def test_what_is_recommended_stands_in_config_and_card(tmp_path: Path) -> None:
    given = ["build", "--base", LLADA, "--adapter", MULTI, "--fingerprint", "never"]
    given += ["--recommended-mode", "fusion_multi_sparse_max", "--output", str(tmp_path / "advises")]
    assert publish.main([*given, "--recommended-fusion-weight", "0.7"]) == 0
    fields = read(tmp_path / "advises" / "config.json")
    assert (fields["recommended_mode"], fields["recommended_fusion_weight"]) == ("fusion_multi_sparse_max", 0.7)
    assert load(tmp_path / "advises").config.recommended_fusion_weight == 0.7
    told = "normalised per query, 0.7 of the one and 0.3 of the other, unless `fusion_weight` says otherwise |"
    assert told in (tmp_path / "advises" / "README.md").read_text(encoding="utf-8")
    building.build(LLADA, tmp_path / "silent", MULTI)
    assert "recommended_fusion_weight" not in read(tmp_path / "silent" / "config.json")
    assert "normalised per query, averaged |" in (tmp_path / "silent" / "README.md").read_text(encoding="utf-8")


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_every_code_file_is_shipped() -> None:
    """What the entry files import, and nothing that AutoModel has no use for."""
    from transformers.dynamic_module_utils import get_relative_import_files

    entries = [ROOT / "modeling_diffretriever.py", ROOT / "configuration_diffretriever.py"]
    needed = {Path(name).name for entry in entries for name in (entry, *get_relative_import_files(entry))}
    assert needed == set(building.CODE_FILES)


@pytest.mark.parametrize("adapter", ["llada-single", "llada-q4p4", "dream-q4p4", "dream-q4p16"])
def test_prompts_are_recovered_from_the_recorded_ids(adapter: str, tmp_path: Path) -> None:
    backbone = PARITY / "backbones" / f"tiny-{adapter.split('-')[0]}"
    building.build(str(backbone), tmp_path / "release", str(PARITY / "adapters" / adapter))
    fields, recorded = (
        read(tmp_path / "release" / "config.json"),
        read(PARITY / "adapters" / adapter / "retriever_config.json"),
    )
    for side, budget in (("query", "n_gen_q_tokens"), ("passage", "n_gen_p_tokens")):
        words = ("one word", "word is") if recorded[budget] == 1 else ("a few words", "words are")
        assert fields[f"{side}_prompt"] == {
            "system": "You are an AI assistant that can understand human language.",
            "user": f'{side.capitalize()}: "{{text}}". Use {words[0]} to represent the {side} in a retrieval task. '
            f"Make sure your {words[1]} in lowercase.",
            "assistant": f'The {words[1]}: "',
        }


def test_an_unusual_prompt_survives(tmp_path: Path) -> None:
    tokenizer = backbone_loading.load_tokenizer([Path(LLADA)])
    prompt = {"system": "Réponds.", "user": 'A "{text}" | b\n\nc', "assistant": "So:\n"}
    building.build(LLADA, tmp_path / "plain-unusual")
    model = load(tmp_path / "plain-unusual", query_prompt=prompt, passage_prompt=prompt)
    layout = model.texts.layouts[True]
    ids = {
        f"{side}_{part}_ids": getattr(layout, part) for side in ("query", "passage") for part in ("prefix", "suffix")
    }
    adapter = copy_adapter("llada-single", tmp_path / "adapter")
    edit_json(adapter / "retriever_config.json", **ids)
    config = building.build(LLADA, tmp_path / "unusual", str(adapter))
    assert config.query_prompt == config.passage_prompt == prompt
    edit_json(adapter / "retriever_config.json", query_suffix_ids=tokenizer("nothing of the kind")["input_ids"])
    with pytest.raises(
        ValueError, match=r"retriever_config\.json: The prompt ids .* do not follow the tokenizer's chat"
    ):
        building.build(LLADA, tmp_path / "odd", str(adapter))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_query_masks": 4}, r"retriever_config\.json says num_query_masks = 1, but 4 was asked for"),
        ({"num_passage_masks": 2}, r"retriever_config\.json says num_passage_masks = 1, but 2 was"),
        ({"max_length": 156}, r"retriever_config\.json says max_length = 256, but 156 was"),
    ],
)
def test_disagreeing_settings(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        building.build(LLADA, tmp_path / "release", SINGLE, **settings)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("mask_token_id", 7, "mask_token_id is 7, the tokenizer's is 2006; they do not fit"),
        ("n_gen_q_tokens", REMOVED, "lacks 'n_gen_q_tokens'"),
        ("n_gen_q_tokens", 0, "`n_gen_q_tokens` must be a whole number of at least 1, got 0"),
        ("model_type", "dream", "says backbone_type = 'dream', but 'llada' was asked for"),
        ("max_length", 10, "`max_length` is 10, but the query prompt alone takes"),
    ],
)
def test_recorded_settings_that_do_not_fit(field: str, value: Any, words: str, tmp_path: Path) -> None:
    adapter = copy_adapter("llada-single", tmp_path / "adapter")
    edit_json(adapter / "retriever_config.json", **{field: value})
    with pytest.raises(ValueError, match=words):
        building.build(LLADA, tmp_path / "release", str(adapter))
    assert not (tmp_path / "release").exists()


def test_without_a_record_the_budgets_must_be_given(tmp_path: Path) -> None:
    adapter = copy_adapter("llada-q4p4", tmp_path / "adapter")
    (adapter / "retriever_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"pass --max-length, --num-passage-masks, --num-query-masks"):
        building.build(LLADA, tmp_path / "release", str(adapter))
    config = building.build(
        LLADA, tmp_path / "release", str(adapter), num_query_masks=4, num_passage_masks=4, max_length=200
    )
    assert (config.num_query_masks, config.max_length) == (4, 200)
    assert config.query_prompt is not None
    assert config.query_prompt["assistant"] == 'The words are: "'


@pytest.mark.parametrize("record", ["run.json", "average.json"])
def test_an_adapter_of_other_weights_of_the_same_shape(record: str, tmp_path: Path) -> None:
    adapter, other = copy_adapter("llada-single", tmp_path / "adapter"), copy_backbone("llada", tmp_path / "other")
    (adapter / record).write_text(json.dumps({"release": {"weights_sha256": hash_weights(Path(LLADA))}}))
    building.build(LLADA, tmp_path / "release", str(adapter))
    edit_weights(other / "model.safetensors", lambda tensors: next(iter(tensors.values())).add_(1))
    with pytest.raises(ValueError, match=r"adapter was trained on other weights than .*other has"):
        building.build(str(other), tmp_path / "of-another", str(adapter))
    assert not (tmp_path / "of-another").exists()
    (adapter / record).unlink()
    building.build(str(other), tmp_path / "of-another", str(adapter))


@pytest.mark.parametrize(
    ("base", "adapter", "words"),
    [
        (LLADA, str(PARITY / "adapters" / "dream-q4p4"), r"key base_model\.model\.model\.layers\.\d.* no linear layer"),
        (DREAM, SINGLE, r"key base_model\.model\.model\.transformer\..* belongs to no linear layer"),
        (LLADA, LLADA, r"tiny-llada holds no adapter_config\.json; it is no LoRA adapter"),
        (SINGLE, None, r"llada-single/config\.json is not there"),
        ("/no/such/base", None, r"/no/such/base: no such folder"),
        (LLADA, "/no/such/adapter", r"/no/such/adapter: no such folder"),
        ("some-lab/unknown", None, r"some-lab/unknown could not be had from the Hub nor from its cache"),
    ],
)
def test_misfits(base: str, adapter: str | None, words: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, OSError), match=words):
        building.build(base, tmp_path / "release", adapter)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["v1.0", "a b", "", "ü", "a/b"])
def test_names_that_transformers_cannot_take(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if name and "/" not in name:
        assert publish.main(["build", "--base", LLADA, "--output", str(tmp_path / name)]) == 2
        assert f"--name: {name!r} may hold only letters, digits, - and _" in capsys.readouterr().err
    if name:
        arguments = ["build", "--base", LLADA, "--output", str(tmp_path / "fine"), "--name", name]
        assert publish.main(arguments) == 2
        assert "a dot breaks transformers 4.54" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_kept_unless_forced(tmp_path: Path) -> None:
    out = tmp_path / "release"
    building.build(LLADA, out, SINGLE)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"--output: .*release is there already; .* pass --force"):
        building.build(LLADA, out, MULTI)
    assert (out / "notes.txt").exists()
    with pytest.raises(ValueError, match="says num_query_masks"):
        building.build(LLADA, out, MULTI, force=True, num_query_masks=7)
    assert (out / "notes.txt").exists()
    building.build(LLADA, out, MULTI, force=True)
    assert not (out / "notes.txt").exists()
    assert read(out / "config.json")["num_query_masks"] == 4


def test_force_deletes_nothing_but_releases(tmp_path: Path) -> None:
    papers = tmp_path / "papers"
    papers.mkdir()
    (papers / "thesis.txt").write_text("years")
    with pytest.raises(FileExistsError, match="papers is no release folder, so --force does not replace it"):
        building.build(LLADA, papers, force=True)
    assert (papers / "thesis.txt").read_text() == "years"
    building.build(LLADA, tmp_path / "release")
    inside = copy_backbone("llada", tmp_path / "release" / "backbone")
    with pytest.raises(FileExistsError, match=r"holds the backbone .*which --force would delete"):
        building.build(str(inside), tmp_path / "release", force=True)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "release")
    with pytest.raises(FileExistsError, match="link is no release folder"):
        building.build(LLADA, link, force=True)


@pytest.mark.parametrize("exception", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_build_leaves_nothing(
    exception: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise exception("stopped")

    monkeypatch.setattr(building, "write_config", stop)
    with pytest.raises(exception, match="stopped"):
        building.build(LLADA, tmp_path / "release", SINGLE)
    assert list(tmp_path.iterdir()) == []


def test_linked_code(tmp_path: Path) -> None:
    out = tmp_path / f"linked-{tmp_path.name}"
    building.build(LLADA, out, SINGLE, link_code=True)
    assert all((out / name).resolve() == ROOT / name for name in building.CODE_FILES)
    assert load(out).encode_texts(TEXTS, True).repr_hidden.isfinite().all()


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    copy_backbone("llada", tmp_path / "backbone")
    config = building.build("~/backbone", tmp_path / "sub" / "release")
    assert config.base_model_name_or_path == str(tmp_path / "backbone")
    assert config.base_model_revision is None


def test_the_adapters_own_tokenizer_is_shipped(tmp_path: Path) -> None:
    adapter = copy_adapter("llada-single", tmp_path / "adapter")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(Path(LLADA) / name, adapter / name)
    edit_json(adapter / "tokenizer_config.json", model_max_length=77)
    building.build(LLADA, tmp_path / "release", str(adapter))
    assert read(tmp_path / "release" / "tokenizer_config.json")["model_max_length"] == 77


# ------------------------------------------------------------------------------------------ the command line


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["build", "--base", LLADA, "--adapter", MULTI]
    assert publish.main([*command, "--output", "by-command", "--name", "a-name"]) == 0
    assert f"by-command: a-name on {LLADA} (K_q=4, K_p=4, max_length=256)" in capsys.readouterr().out
    assert read(tmp_path / "by-command" / "config.json")["release_name"] == "a-name"
    assert load(tmp_path / "by-command").config.num_query_masks == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["build", "--output", "x"], "give either a known release or --base"),
        (
            ["build", "diffretriever-llada-8b-single", "--base", LLADA, "--output", "x"],
            "give either a known release or",
        ),
        (["build", "no-such-release", "--output", "x"], "is no known release; known: diffretriever-llada-8b-single"),
        (
            ["build", "diffretriever-llada-8b-single", "--adapter", SINGLE, "--output", "x"],
            "--adapter goes with --base",
        ),
    ],
)
def test_wrong_commands(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert publish.main(arguments) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["build", "--base", LLADA], "the following arguments are required: --output"),
        (["publish"], "invalid choice: 'publish'"),
    ],
)
def test_wrong_options(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        publish.main(arguments)
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert publish.main(["build", "--base", LLADA, "--adapter", SINGLE, "--output", out, "--num-query-masks", "4"]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("publish.py: ")
    assert "num_query_masks = 1, but 4 was asked for" in printed.err
    assert printed.err.count("\n") == 1


# ------------------------------------------------------------------------------------------ known releases


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize(
    ("name", "kind", "adapter", "budgets"),
    [
        ("diffretriever-llada-8b-single", "llada", "llada-single", (1, 1)),
        ("diffretriever-llada-8b-multi-q4-p4", "llada", "llada-q4p4", (4, 4)),
        ("diffretriever-dream-7b-single", "dream", "dream-q4p4", (1, 1)),
        ("diffretriever-dream-7b-multi-q4-p16", "dream", "dream-q4p16", (4, 16)),
    ],
)
def test_known_release_from_the_hub(
    name: str,
    kind: str,
    adapter: str,
    budgets: tuple[int, int],
    recorded: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The paper's repositories hold the adapter at their root; without a record, the table has the budgets."""
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    release = building.RELEASES[name]
    source = copy_adapter(adapter, tmp_path / "source")
    if recorded:
        sizes = {"n_gen_q_tokens": budgets[0], "n_gen_p_tokens": budgets[1], "max_length": 156}
        edit_json(source / "retriever_config.json", **sizes)
    else:
        (source / "retriever_config.json").unlink()
    commit = hub_repository(cache, release.base, PARITY / "backbones" / f"tiny-{kind}")
    adapter_commit = hub_repository(cache, release.adapter, source)
    assert publish.main(["build", name, "--output", str(tmp_path / name)]) == 0
    fields = read(tmp_path / name / "config.json")
    assert fields["base_model_name_or_path"] == release.base
    assert fields["base_model_revision"] == commit
    assert (fields["num_query_masks"], fields["num_passage_masks"], fields["max_length"]) == (*budgets, 156)
    assert fields["release_name"] == name
    assert fields["adapter_name_or_path"] == "adapter"
    made = read(tmp_path / name / "release.json")
    assert made["backbone"] == {"name": release.base, "revision": commit, "weights_sha256": None}
    assert made["adapter"] == {"repo_id": release.adapter, "revision": adapter_commit}
    assert len(made["fingerprint"]["texts"]) == 4  # the weights are in the cache
    assert f'from_pretrained("{release.adapter}"' in (tmp_path / name / "README.md").read_text()
    model = load(tmp_path / name, cache_dir=cache)
    assert model.encode_texts(TEXTS, True).repr_hidden.shape[1] == budgets[0]
    if recorded:
        edit_json(source / "retriever_config.json", n_gen_p_tokens=9)
        hub_repository(cache, release.adapter, source)
        assert publish.main(["build", name, "--output", str(tmp_path / "again")]) == 2
        assert "says num_passage_masks = 9" in capsys.readouterr().err


def test_an_adapter_in_half_the_bytes(tmp_path: Path) -> None:
    """Its vectors are those of the adapter as it was trained, to bfloat16's rounding."""
    backbone, adapter = str(PARITY / "backbones" / "tiny-llada"), str(PARITY / "adapters" / "llada-q4p4")
    command = ["build", "--base", backbone, "--adapter", adapter, "--fingerprint", "never", "--output"]
    assert publish.main([*command, str(tmp_path / "whole")]) == 0
    assert publish.main([*command, str(tmp_path / "half"), "--adapter-dtype", "bfloat16"]) == 0
    whole, half = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "half"))
    assert {tensor.dtype for tensor in half.values()} == {torch.bfloat16}
    assert all(torch.equal(tensor.bfloat16(), half[name]) for name, tensor in whole.items())
    first, second = (load(tmp_path / name).encode_texts(TEXTS, True)["repr_hidden"] for name in ("whole", "half"))
    assert 0 < (first - second).abs().max() < 0.01


def test_table_of_releases() -> None:
    paper = {
        "diffretriever-llada-8b-single": ("GSAI-ML/LLaDA-8B-Instruct", 1, 1),
        "diffretriever-llada-8b-multi-q4-p4": ("GSAI-ML/LLaDA-8B-Instruct", 4, 4),
        "diffretriever-dream-7b-single": ("Dream-org/Dream-v0-Instruct-7B", 1, 1),
        "diffretriever-dream-7b-multi-q4-p16": ("Dream-org/Dream-v0-Instruct-7B", 4, 16),
    }
    for name, (base, queries, passages) in paper.items():
        release = building.RELEASES[name]
        assert (release.base, release.num_query_masks, release.num_passage_masks) == (base, queries, passages)
        assert release.max_length == 156


# ------------------------------------------------------------------------------------------ the top of the source tree


def test_default_config_is_in_step(tmp_path: Path) -> None:
    building.write_config(building.default_config(), tmp_path / "config.json")
    assert (ROOT / "config.json").read_text() == (tmp_path / "config.json").read_text()
    fields = read(ROOT / "config.json")
    assert fields["base_model_name_or_path"] == "GSAI-ML/LLaDA-8B-Instruct"
    assert (fields["num_query_masks"], fields["num_passage_masks"], fields["max_length"]) == (1, 1, 156)


def test_a_release_of_several_steps_says_by_which_rule(tmp_path: Path) -> None:
    for steps, rule in ((1, None), (2, "entropy")):
        building.write_config(DiffRetrieverConfig(backbone_type="llada", num_denoise_steps=steps), tmp_path / "c.json")
        assert read(tmp_path / "c.json").get("denoise_confidence") == rule


def test_lengths_of_the_texts_are_recorded_or_given(tmp_path: Path) -> None:
    """Those that an adapter's training recorded; where it has none, as the method's code, those of the caller."""
    lengths: dict[str, Any] = {"query_length": 32, "passage_length": 156}
    adapter = tmp_path / "adapter"
    shutil.copytree(SINGLE, adapter)
    given = building.build(LLADA, tmp_path / "given", str(adapter), **lengths)
    edit_json(adapter / "retriever_config.json", **lengths, cut_in_training={"query": 0.0, "passage": 0.3})
    recorded = building.build(LLADA, tmp_path / "recorded", str(adapter))
    for config, name in ((given, "given"), (recorded, "recorded")):
        assert (config.query_length, config.passage_length, config.max_length) == (32, 156, 256)
        assert read(tmp_path / name / "config.json").items() >= lengths.items()
        card = (tmp_path / name / "README.md").read_text()
        assert "| longest input | 32 tokens of a query's text or 156 of a passage's; longer texts are cut |" in card
    assert (given.cut_in_training, recorded.cut_in_training) == (None, {"query": 0.0, "passage": 0.3})
    with pytest.raises(ValueError, match="says query_length = 32, but 40 was asked for"):
        building.build(LLADA, tmp_path / "other", str(adapter), query_length=40)
    (adapter / "retriever_config.json").unlink()
    budgets: dict[str, Any] = {"num_query_masks": 1, "num_passage_masks": 1}
    assert building.build(LLADA, tmp_path / "bare", str(adapter), **budgets, **lengths).passage_length == 156
    with pytest.raises(FileNotFoundError, match=r"so the adapter's budgets are unknown; pass --max-length\."):
        building.build(LLADA, tmp_path / "bare2", str(adapter), **budgets, query_length=32)


def test_recipe_is_that_of_the_released_adapters() -> None:
    recipe, released = read(ROOT / "adapter_config.json"), read(Path(SINGLE) / "adapter_config.json")
    assert (recipe["r"], recipe["lora_alpha"], recipe["lora_dropout"], recipe["bias"]) == (16, 64, 0.05, "none")
    assert set(recipe["target_modules"]) == set(released["target_modules"])
    for name in recipe.keys() - {"target_modules"}:
        assert recipe[name] == released[name], name


IMPORT = """
import importlib.util, socket, sys

def refuse(*args, **kwargs):
    raise AssertionError("a network connection at import")

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("peft", "accelerate"):
            raise ModuleNotFoundError(f"No module named {name!r} (blocked)", name=name)

sys.meta_path.insert(0, Blocker())
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: (
    None if name.split(".")[0] in ("peft", "accelerate") else find_spec(name, package)
)
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
sys.path.insert(0, sys.argv[1])
import publish, types
package = types.ModuleType("flat")
package.__path__ = [sys.argv[1]]
sys.modules["flat"] = package
for name in sys.argv[2].split(","):
    __import__(f"flat.{name}")
assert not {"peft", "accelerate", "sentence_transformers", "nltk"} & set(sys.modules)
"""


@pytest.mark.slow
def test_importing_needs_neither_peft_nor_a_network() -> None:
    flat = ",".join(name.removesuffix(".py") for name in building.CODE_FILES)
    run_python(IMPORT, ROOT, flat, HF_HUB_OFFLINE="0")


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_asks_for_peft(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    building.build(str(PARITY / "backbones" / f"tiny-{kind}"), tmp_path / "zero-shot")  # needs none
    with pytest.raises(ImportError, match="has a LoRA adapter, which needs peft: pip install peft"):
        building.build(
            str(PARITY / "backbones" / f"tiny-{kind}"), tmp_path / "adapted", str(PARITY / "adapters" / ADAPTERS[kind])
        )


def test_weights_of_a_local_backbone_are_audited(tmp_path: Path) -> None:
    base = copy_backbone("dream", tmp_path / "base")
    edit_weights(base / "model.safetensors", lambda t: t.pop("model.layers.2.self_attn.k_proj.bias"))
    with pytest.raises(ValueError, match=r"lacks 1 of 51 weights: model\.layers\.2\.self_attn\.k_proj\.bias"):
        building.build(str(base), tmp_path / "release")
