"""`diffretriever train` of every method: gradients, and adapters that load as the model that was trained."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from causal_backbones import PARITY
from safetensors.torch import load_file
from torch.nn import functional as F
from training_data import batch_of, gradients, made_up_pairs, small_recipe, write_lines
from training_runs import assert_same_weights, write_pairs, write_recipe

from diffretriever.baselines import load_baseline
from diffretriever.cli.main import main
from diffretriever.publishing import build as building
from diffretriever.training.objective import ContrastiveModel
from diffretriever.training.train import prepare_model

Makes = Callable[..., Path]
# Methods by backbone, with the recipe's changes.
DENSE: dict[str, Any] = {"sparse_weight": 0.0}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "promptreps-llama": (
        "promptreps",
        "llama-tied",
        {"num_query_masks": 3, "num_passage_masks": 4, "gradient_checkpointing": True},
    ),
    "promptreps-qwen2": ("promptreps", "qwen2", {"num_query_masks": 2, "num_passage_masks": 2, "bf16": True}),
    "repllama-llama": ("repllama", "llama", DENSE),
    "repllama-qwen2": ("repllama", "qwen2-tied", DENSE | {"gradient_checkpointing": True, "bf16": True}),
    "diffembed-llada": ("diffembed", "tiny-llada", DENSE | {"gradient_checkpointing": True}),
    "diffembed-dream": ("diffembed", "tiny-dream", DENSE | {"append_end_of_text": True}),
}
CROSSED = ("promptreps-llama", "repllama-qwen2")  # each family once, for what differs by the version of transformers
LENGTHS = {"max_length": None, "query_length": 24, "passage_length": 40}
TEXTS = ["river engine", "a silver bridge over the winter river", "lemon"]


@pytest.fixture
def place(backbone: Makes) -> Callable[[str], Path]:
    """Return a function that gives a backbone's folder."""
    return lambda kind: PARITY / "backbones" / kind if kind.startswith("tiny") else backbone(kind)


@pytest.fixture(params=[pytest.param(name, marks=() if name in CROSSED else pytest.mark.once) for name in CASES])
def case(request: pytest.FixtureRequest, place: Callable[[str], Path]) -> tuple[str, Path, dict[str, Any]]:
    """A method, its backbone's folder and the recipe's changes."""
    method, kind, changes = CASES[request.param]
    return method, place(kind), changes


def train(tmp_path: Path, method: str, model: Path, *more: str, **changes: Any) -> int:
    fields = {"method": method, **LENGTHS, "max_steps": 1, "save_steps": 1, "dropout": 0.05, **changes}
    recipe = write_recipe(tmp_path / "recipe.yaml", **fields)
    lines = [line for line in recipe.read_text().splitlines() if not line.endswith(": null")]
    recipe.write_text("\n".join(lines))
    pairs = tmp_path / "pairs.jsonl"
    if not pairs.exists():
        write_pairs(pairs, 8, 1)
    paths = ["--recipe", recipe, "--model", model, "--pairs", pairs, "--output", tmp_path / "out"]
    return main(["train", *map(str, paths), *more])


# ------------------------------------------------------------------------------------------------------ whole runs


def test_an_adapter_loads_as_the_model_that_was_trained(
    case: tuple[str, Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    method, backbone, changes = case
    assert train(tmp_path, method, backbone, **changes) == 0, capsys.readouterr().err
    out = tmp_path / "out"
    weights = load_file(str(out / "adapter_model.safetensors"))
    projections = {name.split(".lora_")[0].rpartition(".")[2] for name in weights}
    assert len(projections) == 7  # q, k, v, o, gate, up and down under the backbone's names, and no head
    assert not [name for name in weights if "lm_head" in name or ".transformer.ff_out." in name]
    assert not (out / "retriever_config.json").exists()
    said = json.loads((out / "baseline.json").read_text())
    assert (said["method"], said["query_length"], said["passage_length"]) == (method, 24, 40)
    assert not Path(said["base_model_name_or_path"]).is_absolute()
    assert said["cut_in_training"].keys() == {"query", "passage"}
    trained = load_baseline(out, dtype=torch.float32)
    beside = load_baseline(backbone, method, adapter_name_or_path=out, dtype=torch.float32)
    before = load_baseline(
        backbone,
        **{
            name: value
            for name, value in said.items()
            if name not in ("base_model_name_or_path", "adapter_name_or_path")
        },
        dtype=torch.float32,
    )
    for is_query in (True, False):
        encoded = [model.encode_texts(TEXTS, is_query)["repr_hidden"] for model in (trained, beside, before)]
        assert trained.config.num_masks(is_query) == changes.get(f"num_{'query' if is_query else 'passage'}_masks", 1)
        assert torch.equal(encoded[0], encoded[1])
        assert not torch.allclose(encoded[0][:, 0], encoded[2][:, 0], atol=1e-3)


@pytest.mark.once
@pytest.mark.slow
def test_training_teaches(place: Callable[[str], Path], tmp_path: Path) -> None:
    """After some steps each query finds its passage more often than before, in a dev split's figures."""
    records, data = made_up_pairs(16), tmp_path / "data"
    (data / "qrels").mkdir(parents=True)
    write_lines(data / "corpus.jsonl", [{"_id": f"p{n}", "text": row["positive"]} for n, row in enumerate(records)])
    write_lines(data / "queries.jsonl", [{"_id": f"q{n}", "text": row["query"]} for n, row in enumerate(records)])
    rows = "".join(f"q{n}\tp{n}\t1\n" for n in range(16))
    for split in ("dev", "test"):
        (data / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + rows)
    write_lines(tmp_path / "pairs.jsonl", records)
    changes = {"max_steps": 12, "global_batch_size": 8, "eval_steps": 12, "num_query_masks": 2, "num_passage_masks": 2}
    folder, figures = place("llama"), []
    assert train(tmp_path, "promptreps", folder, "--dev", str(data), learning_rate=5e-3, save_steps=12, **changes) == 0
    for number, options in enumerate((["--num-query-masks", "2", "--num-passage-masks", "2"], [])):
        model = ["--model", str(tmp_path / "out")] if number else ["--model", str(folder), "--method", "promptreps"]
        json_file = tmp_path / f"{number}.json"
        given = ["--data", str(data), "--json", str(json_file), "--quiet", "--metrics", "nDCG@10"]
        given += ["--model-dtype", "float32"]
        assert main(["evaluate", *model, *options, *given]) == 0
        figures.append(json.loads(json_file.read_text())["multi_dense"]["nDCG@10"])
    assert figures[1] > figures[0] + 0.1
    logged = json.loads((next((tmp_path / "out" / "state").glob("checkpoint-*")) / "trainer_state.json").read_text())
    dev = [entry["dev_dense_ndcg@10"] for entry in logged["log_history"] if "dev_dense_ndcg@10" in entry]
    assert dev == [pytest.approx(figures[1], abs=1e-2)]


# ------------------------------------------------------------------------------------------------------- gradients


def contrastive(folder: Path, **changes: Any) -> ContrastiveModel:
    """A baseline with random LoRA matrices, ready to train without dropout."""
    recipe = dataclasses.replace(small_recipe(dropout=0.0), **LENGTHS, **changes)
    k = {"num_query_vectors": recipe.num_query_masks, "num_passage_vectors": recipe.num_passage_masks}
    model = prepare_model(load_baseline(folder, recipe.method, dtype=torch.float32, **k), recipe)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    return model.train()


RAGGED = {"method": "promptreps", "num_query_masks": 3, "num_passage_masks": 4}


def test_the_loss_is_that_of_a_plain_loop(place: Callable[[str], Path], tmp_path: Path) -> None:
    model = contrastive(place("llama"), **RAGGED)
    records = made_up_pairs(4, 1)
    found = model(batch_of(model, records, tmp_path / "pairs.jsonl"))
    retriever = model.retriever
    texts = [[row["query"] for row in records],
             [row["positive"] for row in records] + [row["negatives"][0] for row in records]]  # fmt: skip
    sides = [[(_vectors(retriever, text, is_query), _weights(retriever, text, is_query)) for text in row]
             for row, is_query in zip(texts, (True, False), strict=True)]  # fmt: skip
    counts = {len(vectors) for side in sides for vectors, _ in side}
    assert len(counts) > 1  # some answers end before others
    dense = torch.tensor([[(q @ p.T).amax(dim=1).mean() for p, _ in sides[1]] for q, _ in sides[0]])
    sparse = torch.tensor([[q @ p for _, p in sides[1]] for _, q in sides[0]])
    targets = torch.arange(4)
    assert found["dense"].item() == pytest.approx(F.cross_entropy(dense / 0.05, targets).item(), abs=2e-4)
    assert found["sparse"].item() == pytest.approx(F.cross_entropy(sparse, targets).item(), abs=2e-4)


@torch.no_grad()
def _vectors(retriever: Any, text: str, is_query: bool) -> torch.Tensor:
    """A text's vectors [k, H], by itself."""
    out = retriever.encode(*retriever.tokenize([text], is_query), is_query)
    return out.repr_hidden[0][out.repr_mask[0]]


@torch.no_grad()
def _weights(retriever: Any, text: str, is_query: bool) -> torch.Tensor:
    """A text's sparse vector over the whole vocabulary, [V], by itself."""
    out = retriever.encode(*retriever.tokenize([text], is_query), is_query, compute_sparse=True, sparse_top_k=512)
    return torch.zeros(retriever.config.vocab_size).scatter_add(0, out.sparse_indices[0], out.sparse_values[0])


@pytest.mark.once
@pytest.mark.parametrize("case", ["promptreps-llama", "promptreps-qwen2", "repllama-llama", "diffembed-dream"])
def test_gradients_are_finite_differences(case: str, place: Callable[[str], Path], tmp_path: Path) -> None:
    method, kind, changes = CASES[case]
    model = contrastive(place(kind), method=method, **changes)
    batch = batch_of(model, made_up_pairs(4, 1), tmp_path / "pairs.jsonl")
    model(batch)["loss"].backward()
    found = gradients(model)
    generator = torch.Generator().manual_seed(1)
    names = [name for name in found if ".layers.1." in name and ("down_proj" in name or "k_proj" in name)]
    parameters = dict(model.named_parameters())
    for name in names:
        direction = torch.randn(found[name].shape, generator=generator)
        values = []
        for sign in (1, -1):
            parameters[name].data += sign * 1e-3 * direction
            with torch.no_grad():
                values.append(model(batch)["loss"].item())
            parameters[name].data -= sign * 1e-3 * direction
        expected = (values[0] - values[1]) / 2e-3
        assert (found[name] * direction).sum().item() == pytest.approx(expected, rel=0.03, abs=0.02), name


@pytest.mark.once
def test_gradcache_has_the_same_gradient(place: Callable[[str], Path], tmp_path: Path) -> None:
    records, found = made_up_pairs(4, 1), []
    for chunk in (0, 3):
        model = contrastive(place("qwen2"), grad_cache_chunk=chunk, **RAGGED)
        model(batch_of(model, records, tmp_path / "pairs.jsonl"))["loss"].backward()
        found.append(gradients(model))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, atol=2e-5, rtol=2e-3)


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.once
def test_what_an_adapter_is_not(
    place: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = place("llama"), tmp_path / "out"
    assert train(tmp_path, "promptreps", folder, num_query_masks=2, num_passage_masks=2, max_steps=1) == 0
    (tmp_path / "corpus.jsonl").write_text('{"_id": "1", "text": "a river"}\n')
    encode = ["encode", "--input", str(tmp_path / "corpus.jsonl"), "--output", str(tmp_path / "store"), "--model"]
    for options, said in (
        ([str(out), "--num-passage-masks", "4"], "`num_passage_vectors` is 4, but"),
        ([str(folder), "--adapter", str(out), "--num-passage-masks", "4"], "its adapter was trained with at most 2"),
        ([str(out), "--method", "repllama"], "is of method 'promptreps', not 'repllama'"),
        ([str(folder), "--adapter", str(out), "--method", "diffretriever"], "is of method 'promptreps', not"),
    ):
        assert main([*encode, *options]) == 2
        assert said in capsys.readouterr().err.splitlines()[-1]
    assert main([*encode, str(folder), "--adapter", str(out)]) == 0
    assert main(["search", "--model", str(out), "--store", str(tmp_path / "store"), "river"]) == 0  # the same model
    with pytest.raises(ValueError, match=r"is an adapter of another method \(baseline.json\); it makes no release"):
        building.build(str(PARITY / "backbones" / "tiny-llada"), tmp_path / "built", str(out))
    (again := tmp_path / "again").mkdir()
    assert train(again, "promptreps", out, num_query_masks=2, num_passage_masks=2) == 2
    assert "holds an adapter already" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("method", "kind", "said"),
    [
        (
            "promptreps",
            "tiny-llada",
            "is a diffusion backbone, read without the causal mask that PromptReps could read",
        ),
        ("repllama", "tiny-dream", "is a diffusion backbone, read without the causal mask that RepLLaMA could read"),
        ("diffretriever", "llama", "is a backbone, not a release; build one with"),
    ],
)
def test_backbones_that_a_method_cannot_train_on(
    method: str, kind: str, said: str, place: Callable[[str], Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    changes = DENSE if method == "repllama" else {}
    assert train(tmp_path, method, place(kind), **changes) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.once
def test_a_run_is_resumed_and_another_method_is_refused(
    place: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from diffretriever.training.trainer import RetrievalTrainer

    folder, changes = place("llama"), {"num_query_masks": 2, "num_passage_masks": 2, "max_steps": 2, "save_steps": 1}
    (tmp_path / "whole").mkdir()
    (tmp_path / "broken").mkdir()
    assert train(tmp_path / "whole", "promptreps", folder, **changes) == 0
    step, done = RetrievalTrainer.training_step, list[int]()

    def stop(self: Any, *args: Any, **kwargs: Any) -> Any:
        if len(done) == 1:
            raise ValueError("stopped here")
        done.append(1)
        return step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RetrievalTrainer, "training_step", stop)
        assert train(tmp_path / "broken", "promptreps", folder, **changes) == 2
    assert train(tmp_path / "broken", "promptreps", folder, **changes) == 0
    assert "going on from" in capsys.readouterr().out
    assert_same_weights(tmp_path / "broken" / "out", tmp_path / "whole" / "out")
    assert train(tmp_path / "whole", "repllama", folder, **DENSE, max_steps=2, save_steps=1) == 2
    assert "`method` 'promptreps', not 'repllama'" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.once
def test_training_goes_on_from_an_adapter(
    place: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, first = place("llama"), tmp_path / "first"
    assert train(tmp_path, "repllama", model, **DENSE) == 0
    (tmp_path / "out").rename(first)
    assert train(tmp_path, "promptreps", model, "--adapter", str(first)) == 2
    assert "is of method 'repllama', not 'promptreps'" in capsys.readouterr().err
    assert train(tmp_path, "repllama", model, "--adapter", str(first), **DENSE, learning_rate=1e-12) == 0
    found, expected = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "out", first))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)
