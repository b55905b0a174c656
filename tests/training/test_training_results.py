"""What a run learns and writes: better rankings, the method's layout, an adapter that plain peft reads."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from checkpoint_folders import LLADA_LAYER, original_key
from safetensors.torch import load_file
from torch.nn import functional as F
from training_data import made_up_pairs, small_recipe, write_lines
from training_runs import arguments, weights, write_pairs, write_recipe
from transformers import AutoModel, LlamaForCausalLM, Qwen2ForCausalLM

from diffretriever.cli.main import main
from diffretriever.data.pair_files import PairFiles
from diffretriever.model.backbone_loading import our_name
from diffretriever.model.checked_files import read_backbone_config
from diffretriever.publishing import build as building
from diffretriever.training.adapter_output import retriever_config
from diffretriever.training.budget import training_task

PARITY = Path(__file__).parents[1] / "parity"
REFERENCES = {"llada": "llada-q4p4", "dream": "dream-q4p4"}


@pytest.fixture(scope="module", params=["llada", "dream"])
def trained(
    request: pytest.FixtureRequest, build_release: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Twenty steps on 200 pairs with four masks a side, and the release that is built of them."""
    folder = tmp_path_factory.mktemp("trained")
    changes = {"max_steps": 20, "save_steps": 20, "log_steps": 5, "global_batch_size": 8, "learning_rate": 5e-3}
    recipe = write_recipe(
        folder / "recipe.yaml", **changes, num_query_masks=3, num_passage_masks=4, rank=16, alpha=64, warmup=0.1
    )
    release = build_release(f"tiny-{request.param}")
    pairs = write_pairs(folder / "pairs.jsonl", 200, negatives=0)
    assert main(arguments(recipe, release, pairs, folder / "out", "--base", "org/backbone")) == 0
    built = folder / f"trained-{request.param}"
    building.build(str(PARITY / "backbones" / f"tiny-{request.param}"), built, str(folder / "out"))
    return {"kind": request.param, "pairs": pairs, "out": folder / "out", "zero": release, "built": built}


def test_twenty_steps_raise_the_ndcg_of_their_pairs(trained: dict[str, Any]) -> None:
    task = training_task(PairFiles([trained["pairs"]]), 100, 100, seed=1)
    figures = []
    for folder in (trained["zero"], trained["built"]):
        budget = {"num_query_masks": 3, "num_passage_masks": 4, "max_length": 140}
        model = AutoModel.from_pretrained(folder, trust_remote_code=True, torch_dtype=torch.float32, **budget)
        figures.append(task.evaluate(model.encode_texts))
    before, after = figures
    assert after["dense"] > before["dense"] + 0.03, figures
    assert after["sparse"] > before["sparse"] + 0.2, figures
    assert after["fused"] > before["fused"] + 0.2, figures


def test_the_layout_is_the_methods_own(trained: dict[str, Any]) -> None:
    reference = PARITY / "adapters" / REFERENCES[trained["kind"]]
    out = trained["out"]
    ours, theirs = weights(out), weights(reference)
    assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in theirs.items()}
    assert {value.dtype for value in ours.values()} == {torch.float32}
    found, expected = (json.loads((f / "retriever_config.json").read_text()) for f in (out, reference))
    assert found.pop("cut_in_training") == {"query": 0.0, "passage": 0.0}  # ours; a release warns by it
    assert list(found) == list(expected)
    differing = {name for name in found if found[name] != expected[name]}
    assert differing == {"max_length", "n_gen_q_tokens", "temperature"}
    assert (found["max_length"], found["n_gen_q_tokens"], found["temperature"]) == (140, 3, 0.05)
    found, expected = (json.loads((f / "adapter_config.json").read_text()) for f in (out, reference))
    assert found["base_model_name_or_path"] == "org/backbone"
    for name in ("peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "bias", "fan_in_fan_out"):
        assert found[name] == expected[name], name
    assert set(found["target_modules"]) == set(expected["target_modules"])
    assert {"tokenizer.json", "tokenizer_config.json", "run.json"} <= {path.name for path in out.iterdir()}


def test_lengths_in_tokens_of_the_text_go_into_the_layout(load_release: Callable[..., Any]) -> None:
    recipe = small_recipe(max_length=None, query_length=9, passage_length=30, num_denoise_steps=2)
    model = load_release("tiny-llada", **recipe.lengths())
    found = retriever_config(model, recipe)
    assert (found["query_length"], found["passage_length"], found["num_denoise_steps"]) == (9, 30, 2)
    around = len(found["passage_prefix_ids"]) + len(found["passage_suffix_ids"])
    assert found["max_length"] == around + 30  # for tools that know one length for all


def test_the_record_names_recipe_and_data(trained: dict[str, Any]) -> None:
    record = json.loads((trained["out"] / "run.json").read_text())
    assert record["recipe"]["global_batch_size"] == 8
    assert record["steps"] == 20
    (data,) = record["data"]
    assert data["queries"] == 200
    assert data["sha256"] == hashlib.sha256(trained["pairs"].read_bytes()).hexdigest()
    assert record["packages"]["peft"] == peft.__version__


def test_the_schedule_is_a_warm_up_and_a_cosine(trained: dict[str, Any]) -> None:
    state = json.loads((trained["out"] / "state" / "checkpoint-20" / "trainer_state.json").read_text())
    for line in state["log_history"]:
        if "loss" in line:
            step = line["step"] - 1
            rate = step / 2 if step < 2 else 0.5 * (1 + math.cos(math.pi * (step - 2) / 18))
            assert line["learning_rate"] == pytest.approx(5e-3 * rate, rel=1e-5, abs=1e-9)
            assert {"dense", "sparse", "right", "tokens_per_second", "grad_norm"} <= line.keys()


def plain_peft(trained: dict[str, Any]) -> tuple[Any, Any]:
    """transformers' own causal model with the adapter attached by peft alone; returns its body and its head."""
    kind, folder = trained["kind"], PARITY / "backbones" / f"tiny-{trained['kind']}"
    _, config = read_backbone_config(folder)
    owner: Any = {"llada": LlamaForCausalLM, "dream": Qwen2ForCausalLM}[kind]
    model = owner._from_config(config, attn_implementation="eager").float().eval()
    stored = {our_name(kind, name): value.float() for name, value in load_file(folder / "model.safetensors").items()}
    model.load_state_dict({name.replace("backbone.", "model.", 1): value for name, value in stored.items()})
    settings = peft.LoraConfig.from_pretrained(str(trained["out"]))
    found = weights(trained["out"])
    if kind == "llada":  # the same matrices under a Llama's names, by a table of the tests' own
        names = {original_key(kind, f"{name}.weight".replace("model.", "backbone.", 1)).removesuffix(".weight"): name
                 for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}  # fmt: skip
        found = {_renamed(key, names): value for key, value in found.items()}
        settings.target_modules = {
            *(module.split(".")[-1] for module in LLADA_LAYER if "layernorm" not in module),
            "lm_head",
        }
    settings.task_type = None
    adapted: Any = peft.get_peft_model(model, settings)
    result: Any = peft.set_peft_model_state_dict(adapted, found)
    assert not result.unexpected_keys
    assert not [name for name in result.missing_keys if "lora_" in name]
    adapted.eval()
    return adapted.base_model.model.model, adapted.base_model.model.lm_head


def _renamed(key: str, names: dict[str, str]) -> str:
    module, _, part = key.removeprefix("base_model.model.").partition(".lora_")
    return f"base_model.model.{names[module]}.lora_{part}"


@torch.no_grad()
def test_plain_peft_on_transformers_own_model_gives_the_releases_vectors(trained: dict[str, Any]) -> None:
    body, head = plain_peft(trained)
    release = AutoModel.from_pretrained(trained["built"], trust_remote_code=True, torch_dtype=torch.float32)
    texts = ["river mountain engine", "the kernel window of a garden", ""]
    for is_query in (True, False):
        ids, mask = release.tokenize(texts, is_query)
        full = torch.zeros(len(ids), 1, ids.shape[1], ids.shape[1])
        full = full.masked_fill(mask[:, None, None, :] == 0, torch.finfo(torch.float32).min)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        states = body(inputs_embeds=body.embed_tokens(ids), attention_mask=full, position_ids=positions)
        hidden = torch.stack([
            row[tokens == release.texts.mask_id]
            for row, tokens in zip(states.last_hidden_state, ids, strict=True)
        ])  # fmt: skip
        size = release.config.vocab_size
        out = release.encode(ids, mask, is_query, compute_sparse=True, content_filter=False, sparse_top_k=size)
        torch.testing.assert_close(out.repr_hidden, F.normalize(hidden, dim=-1), rtol=0, atol=3e-5)
        expected = torch.log1p(F.relu(head(hidden).amax(dim=1)))
        expected[:, release.texts.mask_id] = 0.0
        got = torch.zeros_like(expected).scatter_add_(1, out.sparse_indices, out.sparse_values)
        torch.testing.assert_close(got, expected, rtol=0, atol=3e-4)


def test_accumulated_micro_batches_are_averaged(build_release: Callable[..., Path], tmp_path: Path) -> None:
    """The logged gradient norm of one step of two micro-batches, against the mean of their gradients."""
    from diffretriever.training.batches import Collator, SampledItems
    from diffretriever.training.epochs import EpochSampler
    from diffretriever.training.train import prepare_model

    changes = {"max_steps": 1, "accumulation_steps": 2, "global_batch_size": 6, "dropout": 0.0}
    recipe, pairs = write_recipe(tmp_path / "r.yaml", **changes), write_pairs(tmp_path / "p.jsonl", 6, negatives=0)
    release = build_release("tiny-llada")
    assert main(arguments(recipe, release, pairs, tmp_path / "out")) == 0
    state = json.loads((tmp_path / "out" / "state" / "checkpoint-1" / "trainer_state.json").read_text())
    settings = small_recipe(**changes)
    retriever = AutoModel.from_pretrained(release, trust_remote_code=True, **settings.model_settings())
    model = prepare_model(retriever, settings).train()
    items = SampledItems(PairFiles([pairs]), 0, settings.seed)
    for keys in EpochSampler(items.files.lengths, 6, settings.seed, accumulation=2):
        (model(Collator(model.retriever, settings)([items[key] for key in keys]))["loss"] / 2).backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert state["log_history"][0]["grad_norm"] == pytest.approx(float(norm), rel=1e-4)


@pytest.mark.parametrize("options", [{}, {"bf16": True, "backbone_dtype": "bfloat16"}], ids=["float32", "bfloat16"])
def test_dev_figures_are_logged(build_release: Callable[..., Path], tmp_path: Path, options: dict[str, Any]) -> None:
    records = made_up_pairs(12)
    (tmp_path / "qrels").mkdir()
    write_lines(tmp_path / "corpus.jsonl", [{"_id": f"p{n}", "text": r["positive"]} for n, r in enumerate(records)])
    write_lines(tmp_path / "queries.jsonl", [{"_id": f"q{n}", "text": r["query"]} for n, r in enumerate(records)])
    judged = "".join(f"q{n}\tp{n}\t{int(n > 0)}\n" for n in range(12))  # for q0 nothing is relevant
    (tmp_path / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)
    recipe = write_recipe(tmp_path / "r.yaml", max_steps=2, eval_steps=1, **options)
    pairs, release = write_lines(tmp_path / "p.jsonl", records), build_release("tiny-dream")
    assert main(arguments(recipe, release, pairs, tmp_path / "out", "--dev", str(tmp_path))) == 0
    state = json.loads((tmp_path / "out" / "state" / "checkpoint-2" / "trainer_state.json").read_text())
    figures = [line for line in state["log_history"] if "dev_dense_ndcg@10" in line]
    assert [line["step"] for line in figures] == [1, 2]
    assert all(0 <= line[f"dev_{mode}_ndcg@10"] <= 1 for line in figures for mode in ("dense", "sparse", "fused"))
