"""Llama and Qwen2 checkpoints, trained without [MASK], read bidirectionally at a token that serves as one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from causal_backbones import KINDS, PROJECTIONS, TEXTS, language_model, make_backbone
from checkpoint_folders import edit_json, edit_weights
from training_runs import arguments, write_pairs, write_recipe
from transformers import AutoModel, LlamaConfig, LlamaModel

from diffretriever.cli.main import main
from diffretriever.files.hashes import hash_file
from diffretriever.model.checked_files import read_backbone_config
from diffretriever.publishing import build as building

ROW = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
MASKS = {"llama": "<|reserved_token_0|>", "qwen2": "<|object_ref_start|>"}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def mask_of(kind: str) -> str:
    return MASKS[kind.split("-")[0]]


def build(backbone: Path, out: Path, adapter: Path | None = None, **settings: Any) -> Path:
    settings = {"num_query_masks": 2, "num_passage_masks": 3, "mask_token": mask_of(backbone.name), **settings}
    building.build(str(backbone), out, None if adapter is None else str(adapter), **settings)
    return out


def load(folder: Path, **options: Any) -> Any:
    return AutoModel.from_pretrained(folder, trust_remote_code=True, torch_dtype=torch.float32, **options)


@pytest.fixture(scope="module", params=KINDS)
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    rope = {"rope_scaling": LLAMA3} if request.param == "llama-tied" else {}
    return make_backbone(request.param, tmp_path_factory.mktemp("native") / request.param, **rope)


@pytest.fixture(scope="module")
def adapter(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the projections, with a row for the token that serves as [MASK], as peft saves it."""
    folder = tmp_path_factory.mktemp("native-adapter") / backbone.name
    mask_id = load(build(backbone, folder / "zero")).texts.mask_id
    model = peft.get_peft_model(
        language_model(backbone),
        peft.LoraConfig(r=4, lora_alpha=8, target_modules=PROJECTIONS, trainable_token_indices=[mask_id]),
    )
    torch.manual_seed(2)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name or "trainable_tokens_delta" in name:
                weight.normal_(std=0.2)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def states_and_logits(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A transformers language model without the causal mask: [1, L, H] and [1, L, V] of one text."""
    model.config._attn_implementation = "eager"  # which takes an additive mask as it is
    with torch.no_grad():
        found = model(ids, attention_mask=torch.zeros(1, 1, ids.shape[1], ids.shape[1]), output_hidden_states=True)
    return found.hidden_states[-1], found.logits


def assert_reads_as(ours: Any, theirs: Any) -> None:
    for is_query in (True, False):
        prepared, found = ours.tokenize(TEXTS, is_query), ours.encode_texts(TEXTS, is_query=is_query, sparse_top_k=2032)
        for row, (ids, mask) in enumerate(zip(*prepared, strict=True)):
            ids = ids[mask.bool()][None]
            at_masks = ids[0] == ours.texts.mask_id
            states, logits = states_and_logits(theirs, ids)
            expected = torch.nn.functional.normalize(states[0, at_masks], dim=-1)
            torch.testing.assert_close(found["repr_hidden"][row], expected, rtol=0, atol=2e-5)
            weights = logits[0, at_masks].relu().log1p().amax(dim=0)
            values = found["sparse_values"][row]
            expected = weights[found["sparse_indices"][row]]
            torch.testing.assert_close(values[values > 0], expected[values > 0], rtol=0, atol=1e-4)


def test_the_vectors_are_those_of_transformers_own_model(backbone: Path, tmp_path: Path) -> None:
    ours = load(build(backbone, tmp_path / "release"))
    assert ours.tokenizer.mask_token == mask_of(backbone.name)
    assert_reads_as(ours, language_model(backbone))
    tied = backbone.name.endswith("-tied")
    assert (ours.lm_head.weight.data_ptr() == ours.backbone.embed_tokens.weight.data_ptr()) is tied


@pytest.mark.parametrize("merge", [True, False])
def test_an_adapter_with_a_row_of_its_own(backbone: Path, adapter: Path, merge: bool, tmp_path: Path) -> None:
    ours = load(build(backbone, tmp_path / "release", adapter, max_length=120), merge_adapter=merge)
    theirs: Any = peft.PeftModel.from_pretrained(language_model(backbone), str(adapter))
    assert_reads_as(ours, theirs.merge_and_unload())


@pytest.fixture(scope="module")
def fetched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release beside a backbone as `diffretriever fetch-backbone` writes it."""
    folder = tmp_path_factory.mktemp("fetched")
    backbone = make_backbone("llama-tied", folder / "llama-small")
    sha256 = hash_file(backbone / "model.safetensors")
    record = {"name": "llama-small", "origin": "a-package==1, small.gguf", "weights_sha256": sha256}
    (backbone / "backbone.json").write_text(json.dumps(record))
    build(backbone, folder / "release")
    return folder


def test_a_fetched_backbone_is_the_one_that_was_built_on(fetched: Path, tmp_path: Path) -> None:
    """Absent or another, the error says how to fetch it; a folder that the caller names is taken as it is."""
    shutil.copytree(fetched, tmp_path / "a copy")
    release, backbone = tmp_path / "a copy" / "release", tmp_path / "a copy" / "llama-small"
    first = load(release)
    card = (release / "README.md").read_text()
    assert "The autoregressive language model `llama-small` as a retriever" in card
    assert f"read in both directions, at `{MASKS['llama']}`, an unused token" in card
    assert "those of a-package==1, small.gguf. They are fetched once" in card
    assert "diffretriever fetch-backbone llama-small --output ../llama-small\n" in card
    assert "diffusion-language-model" not in card
    edit_weights(backbone / "model.safetensors", lambda tensors: tensors["model.norm.weight"][:9].mul_(2))
    with pytest.raises(
        ValueError, match=r"other weights than the release's .*fetch-backbone llama-small --output FOLDER,"
    ):
        load(release)
    other = load(release, base_model_name_or_path=str(backbone))
    assert not torch.equal(
        first.encode_texts(TEXTS, True)["repr_hidden"], other.encode_texts(TEXTS, True)["repr_hidden"]
    )
    first.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text()).get("fetched_backbone") is None
    (backbone / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=f"Remove {backbone}, and fetch it: diffretriever fetch-backbone"):
        load(release)
    shutil.rmtree(backbone)
    command = f"Fetch it: diffretriever fetch-backbone llama-small --output '{backbone}'$"
    with pytest.raises(FileNotFoundError, match=command):
        load(release)
    fields = json.loads((release / "config.json").read_text())["fetched_backbone"]
    edit_json(release / "config.json", fetched_backbone=fields | {"origin": "https://huggingface.co/a/b"})
    with pytest.raises(FileNotFoundError, match=command.replace("$", " --from hub$")):
        load(release)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "x; rm -rf ~"}, "must hold a backbone's name and its SHA-256"),
        ({"sha256": "12"}, "must hold a backbone's name and its SHA-256"),
        ({"sha256": 12}, r"`fetched_backbone\.sha256` must be a string"),
        ({"more": "x"}, "must have exactly the keys name, origin, sha256"),
    ],
)
def test_a_record_of_a_fetched_backbone_that_is_none(change: Any, words: str, fetched: Path, tmp_path: Path) -> None:
    shutil.copytree(fetched / "release", tmp_path / "release")
    fields = json.loads((tmp_path / "release" / "config.json").read_text())["fetched_backbone"]
    edit_json(tmp_path / "release" / "config.json", fetched_backbone=fields | change)
    with pytest.raises(ValueError, match=words):
        load(tmp_path / "release")


def test_a_saved_folder_stands_alone(backbone: Path, adapter: Path, tmp_path: Path) -> None:
    ours = load(build(backbone, tmp_path / "release", adapter, max_length=120))
    ours.save_pretrained(tmp_path / "saved")
    assert (
        json.loads((tmp_path / "saved" / "config.json").read_text())["backbone_config"]["tie_word_embeddings"] is False
    )
    again = load(tmp_path / "saved")
    assert again.tokenizer.mask_token == mask_of(backbone.name)
    first, second = (model.encode_texts(TEXTS, is_query=True) for model in (ours, again))
    assert all(torch.equal(first[name], second[name]) for name in first)
    again.save_pretrained(tmp_path / "saved")
    ours.save_pretrained(tmp_path / "given", state_dict=ours.state_dict())  # with a tied head under both names
    for folder in ("saved", "given"):
        assert torch.equal(load(tmp_path / folder).lm_head.weight, ours.lm_head.weight)


@pytest.mark.parametrize("backbone", ["llama-tied", "qwen2"], indirect=True)
def test_training_writes_an_adapter_that_peft_reads(backbone: Path, tmp_path: Path) -> None:
    release = build(backbone, tmp_path / "zero", max_length=120)
    recipe = write_recipe(tmp_path / "recipe.yaml", max_steps=2, learning_rate=1e-2, num_query_masks=2, max_length=110)
    command = arguments(recipe, release, write_pairs(tmp_path / "pairs.jsonl"), tmp_path / "out")
    assert main(command) == 0
    written = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    rows = safetensors.torch.load(written)[ROW]
    embedding = language_model(backbone).model.embed_tokens.weight
    assert 0 < float((rows - embedding.detach().mean(dim=0)).abs().max()) < 0.1
    ours = load(release, adapter_name_or_path=tmp_path / "out")
    assert (ours.config.num_query_masks, ours.config.max_length) == (2, 110)
    theirs: Any = peft.PeftModel.from_pretrained(language_model(backbone), str(tmp_path / "out"))
    assert_reads_as(ours, theirs.merge_and_unload())
    (tmp_path / "out" / "adapter_model.safetensors").unlink()
    assert main(command) == 0  # from the last checkpoint, which has the row, too
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == written
    built = tmp_path / "built"
    building.build(str(backbone), built, str(tmp_path / "out"))
    assert json.loads((built / "config.json").read_text())["mask_token"] == mask_of(backbone.name)
    assert torch.equal(load(built).backbone.embed_tokens.weight, ours.backbone.embed_tokens.weight)


@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
def test_both_spellings_of_rope(spelling: str, tmp_path: Path) -> None:
    folder = make_backbone("llama", tmp_path / "llama")
    config = json.loads((folder / "config.json").read_text())
    for name in ("rope_theta", "rope_scaling", "rope_parameters"):
        config.pop(name, None)
    rope = {"rope_parameters": {"rope_theta": 700.0, **LLAMA3}}
    config |= rope if spelling in rope else {"rope_theta": 700.0, "rope_scaling": LLAMA3}
    (folder / "config.json").write_text(json.dumps(config))
    found: Any = read_backbone_config(folder)[1]
    sizes: dict[str, Any] = {
        "hidden_size": 48,
        "num_attention_heads": 4,
        "num_hidden_layers": 1,
        "max_position_embeddings": 512,
        "rope_theta": 700.0,
        "rope_scaling": dict(LLAMA3),
    }
    expected = LlamaModel(LlamaConfig(**sizes)).rotary_emb.inv_freq
    assert torch.equal(LlamaModel(found).rotary_emb.inv_freq, expected)
    plain = 1 / 700.0 ** (torch.arange(0, 12, 2) / 12)
    assert not torch.allclose(expected, plain)


@pytest.mark.once
@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("llama", {"attention_bias": True}, "`attention_bias` is True; only False is supported"),
        ("llama", {"mlp_bias": True}, "`mlp_bias` is True"),
        ("llama", {"hidden_act": "gelu"}, "`hidden_act` is 'gelu'; only 'silu' is supported"),
        ("llama", {"head_dim": 24}, "`head_dim` is 24; only hidden_size / num_attention_heads is read"),
        ("llama", {"rope_parameters": 5}, "`rope_parameters` must be an object or null, got 5"),
        ("llama", {"rope_parameters": {"rope_type": "yarn"}}, "`rope_scaling.rope_type` is 'yarn'; only 'llama3'"),
        ("llama", {"rope_parameters": {**LLAMA3, "factor": 0}}, "`rope_scaling.factor` must be a number of at least 1"),
        ("llama", {"rope_parameters": {**LLAMA3, "beta": 1}}, "`rope_scaling` holds, which is not known here, beta"),
        ("llama", {"rope_parameters": {"rope_type": "llama3"}}, "`rope_scaling` lacks factor"),
        ("llama", {"tie_word_embeddings": "yes"}, "`tie_word_embeddings` must be true or false or null, got 'yes'"),
        ("llama", {"num_hidden_layers": 10**6}, "`num_hidden_layers` must be a whole number of at most 512"),
        ("qwen2", {"use_sliding_window": True}, "`use_sliding_window` is True"),
        ("qwen2", {"rope_parameters": LLAMA3}, "`rope_scaling` of a qwen2 is not read"),
        ("qwen2", {"tie_word_embeddings": False, "model_type": "qwen3"}, "model_type is 'qwen3'; DiffRetriever reads"),
        ("qwen2-tied", {"tie_word_embeddings": False}, r"lacks 1 of \d+ weights: lm_head.weight"),
    ],
)
def test_what_no_plain_llama_or_qwen2_says(kind: str, changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    folder = make_backbone(kind, tmp_path / kind)
    edit_json(folder / "config.json", **changes)
    with pytest.raises(ValueError, match=words):
        build(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.once
@pytest.mark.parametrize(
    ("token", "words"),
    [
        (
            None,
            r"The backbone has no \[MASK\] token; name one as `mask_token`: an unused special token .*, such as <\|",
        ),
        ("the", r"config field `mask_token`: 'the' is no special token; choose an unused"),
        ("<|no_such_token|>", "'<|no_such_token|>' is no special token"),
        ("<|startoftext|>", r"'<\|startoftext\|>' is in use; choose an unused"),
        ("<|endoftext|>", r"'<\|endoftext\|>' is in use"),
        ("<|start_header_id|>", r"The query prompt holds the token that serves as \[MASK\]"),
        ("", "`mask_token` must be a string of 1 to"),
    ],
)
def test_a_token_that_cannot_serve(token: str | None, words: str, tmp_path: Path) -> None:
    folder = make_backbone("llama", tmp_path / "llama")
    edit_json(folder / "tokenizer_config.json", mask_token=None)
    with pytest.raises(ValueError, match=words):
        build(folder, tmp_path / "out", mask_token=token)


def test_a_diffusion_model_keeps_its_own(build_release: Any, adapter: Path, tmp_path: Path) -> None:
    release = build_release("tiny-llada", "llada-single")
    with pytest.raises(ValueError, match=r"`mask_token` is '<role>', but the backbone has a \[MASK\] of its own"):
        load(release, mask_token="<role>")
    edit_json(adapter / "adapter_config.json")
    with pytest.raises(ValueError, match="`trainable_token_indices` is not supported for this backbone"):
        load(release, adapter_name_or_path=adapter)


@pytest.mark.parametrize(
    ("indices", "words"),
    [
        ([5000], "`trainable_token_indices` must list token ids below 2032 of embed_tokens"),
        ([5, 5], "`trainable_token_indices` must list token ids below 2032 of embed_tokens, each once"),
        ({"lm_head": [5]}, "`trainable_token_indices` must list token ids"),
        ({"embed_tokens": [5], "lm_head": [5]}, "`trainable_token_indices` must list token ids"),
        ([5, 6], r"trainable_tokens_delta has shape \[1, 48\], .*`trainable_token_indices` asks for \[2, 48\]"),
        (None, "unexpected key .*trainable_tokens_delta"),
    ],
)
def test_rows_that_do_not_fit(backbone: Path, adapter: Path, indices: Any, words: str, tmp_path: Path) -> None:

    broken = Path(shutil.copytree(adapter, tmp_path / "broken", ignore=shutil.ignore_patterns("zero")))
    edit_json(broken / "adapter_config.json", trainable_token_indices=indices)
    with pytest.raises(ValueError, match=words):
        build(backbone, tmp_path / "out", broken, max_length=120)
