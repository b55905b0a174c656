"""Pretraining and adapter training end to end on a handful of pairs, interrupted and resumed."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from diffretriever.cli import main
from diffretriever.training.adapter import AdapterTrainer, add_adapter, prepare_pairs
from diffretriever.training.data import read_pairs
from diffretriever.training.pretrain import Pretrainer, read_corpus
from diffretriever.training.recipe import AdapterRecipe, PretrainRecipe, read_recipe

REPOSITORY = Path(__file__).parents[1]
PARITY = Path(__file__).parent / "parity"
WORDS = "file network image sound text package kernel window game music server client mail printer disk".split()
PRETRAIN = {
    "shape": {"vocab_size": 640, "d_model": 32, "n_layers": 2, "n_heads": 2, "mlp_hidden_size": 48},
    "bf16": False,
    "save_every": 2,
    "log_every": 1,
    "stages": [
        {"name": "warm", "steps": 3, "depth": 1, "batch_size": 4, "pattern": ["pairs", "cloze"]},
        {"name": "joint", "steps": 4, "batch_size": 4, "pattern": ["pairs", "denoise"], "token_drop": 0.1},
    ],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Forty made-up pairs and texts, and a BEIR-style folder."""
    folder, rng = tmp_path_factory.mktemp("training-data"), random.Random(5)
    pairs = [(" ".join(rng.sample(WORDS, 2)), " ".join(rng.choices(WORDS, k=20))) for _ in range(40)]
    lines = [json.dumps({"query": f"{q} {n}", "positive": f"{q}. {p} {n}"}) for n, (q, p) in enumerate(pairs)]
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "texts.jsonl").write_text("\n".join(json.dumps({"text": f"{q}\n{p}"}) for q, p in pairs) + "\n")
    bench = folder / "bench"
    (bench / "qrels").mkdir(parents=True)
    corpus = [json.dumps({"_id": f"p{n}", "text": p}) for n, (_, p) in enumerate(pairs)]
    queries = [json.dumps({"_id": f"q{n}", "text": q}) for n, (q, _) in enumerate(pairs)]
    (bench / "corpus.jsonl").write_text("\n".join(corpus))
    (bench / "queries.jsonl").write_text("\n".join(queries))
    judged = "".join(f"q{n}\tp{n}\t1\n" for n in range(9))
    (bench / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)
    (folder / "pretrain.yaml").write_text(yaml.safe_dump(PRETRAIN))
    return {"folder": folder, "pairs": folder / "pairs.jsonl", "texts": folder / "texts.jsonl", "bench": bench}


@pytest.fixture(scope="module")
def pretrained(data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of a pretraining run by the command."""
    out = tmp_path_factory.mktemp("training-pretrained")
    arguments = ["--pairs", data["pairs"], "--texts", data["texts"], "--out", out, "--dev", data["bench"]]
    assert main(["pretrain", "--recipe", str(data["folder"] / "pretrain.yaml"), *map(str, arguments)]) == 0
    return out


@pytest.fixture(scope="module")
def release(pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A zero-shot release of the pretrained backbone."""
    return build(pretrained / "backbone", tmp_path_factory.mktemp("training-release") / "training-zero")


def build(base: Path, out: Path, *more: str) -> Path:
    command = [sys.executable, str(REPOSITORY / "publish.py"), "build", "--base", str(base), "--out", str(out), *more]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return out


def test_pretrain_writes_the_llada_format(pretrained: Path) -> None:
    reference = json.loads((PARITY / "backbones" / "tiny-llada" / "config.json").read_text())
    config = json.loads((pretrained / "backbone" / "config.json").read_text())
    assert list(config) == list(reference)
    weights = load_file(str(pretrained / "backbone" / "model.safetensors"))
    assert weights["model.transformer.ff_out.weight"].shape == (640, 32)
    assert weights["model.transformer.blocks.1.ff_out.weight"].shape == (32, 48)
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    log = [json.loads(line) for line in (pretrained / "log.jsonl").read_text().splitlines()]
    assert "K=4" in log[-1]["evaluation"]


def test_the_tokenizer_keeps_words_whole_and_gives_the_prompt_back(pretrained: Path) -> None:
    from transformers import AutoTokenizer

    from diffretriever.training.prompts import Prompt, rendered_prompt

    tokenizer = AutoTokenizer.from_pretrained(str(pretrained / "tokenizer"))
    ids = tokenizer("Network of a network", add_special_tokens=False)["input_ids"]
    assert ids[0] == ids[-1] == tokenizer("network", add_special_tokens=False)["input_ids"][0]
    for is_query in (True, False):
        for masks in (1, 4):
            prompt = Prompt.build(tokenizer, is_query, masks)
            assert (tokenizer.decode(prompt.prefix), tokenizer.decode(prompt.suffix)) == rendered_prompt(
                tokenizer, is_query, masks
            )
            assert len(prompt.prefix) + len(prompt.suffix) < 35
            assert len(prompt.tail) == 3


def test_interrupted_pretraining_ends_with_the_same_weights(
    pretrained: Path, data: dict[str, Path], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    recipe = read_recipe(data["folder"] / "pretrain.yaml", PretrainRecipe)
    tokenizer_folder = pretrained / "tokenizer"
    tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_folder))
    for stop in (2, 3, None):  # inside the first stage, inside the second, to the end
        corpus = read_corpus(recipe, [data["pairs"]], [data["texts"]], tokenizer, tmp_path)
        Pretrainer(recipe, corpus, tokenizer_folder, tmp_path / "run").run(stop_after=stop)
    once, again = (load_file(str(p / "backbone" / "model.safetensors")) for p in (pretrained, tmp_path / "run"))
    for name, value in once.items():
        assert torch.equal(value, again[name]), name


def test_a_loss_that_is_not_a_number_stops_and_keeps_the_checkpoint(
    pretrained: Path, data: dict[str, Path], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    recipe = read_recipe(data["folder"] / "pretrain.yaml", PretrainRecipe)
    tokenizer = AutoTokenizer.from_pretrained(str(pretrained / "tokenizer"))
    corpus = read_corpus(recipe, [data["pairs"]], [data["texts"]], tokenizer, tmp_path)
    trainer = Pretrainer(recipe, corpus, pretrained / "tokenizer", tmp_path / "run")
    trainer.run(stop_after=2)
    before = (tmp_path / "run" / "pretrain.ckpt").read_bytes()
    broken = Pretrainer(recipe, corpus, pretrained / "tokenizer", tmp_path / "run")
    resume = broken._resume

    def poisoned() -> Any:
        state = resume()
        with torch.no_grad():
            broken.model.model.norm.weight.fill_(float("nan"))
        return state

    broken._resume = poisoned  # type: ignore[method-assign]
    with pytest.raises(FloatingPointError, match=r"the loss is nan at stage 0, step 2 \(pairs\)"):
        broken.run()
    assert (tmp_path / "run" / "pretrain.ckpt").read_bytes() == before


def adapter_recipe(masks: int) -> AdapterRecipe:
    return AdapterRecipe(
        num_query_masks=masks, num_passage_masks=masks, max_length=64, steps=4, batch_size=4, neighbour_share=0.0,
        learning_rate=1e-2, warmup=0.0, rank=4, alpha=8, bf16=False, save_every=1, log_every=1,
    )  # fmt: skip


def test_train_writes_the_methods_own_format_and_publish_takes_it(
    pretrained: Path, release: Path, data: dict[str, Path], tmp_path: Path
) -> None:
    recipe = tmp_path / "adapter.yaml"
    fields = "num_query_masks num_passage_masks max_length steps batch_size neighbour_share rank alpha bf16".split()
    recipe.write_text(yaml.safe_dump({name: getattr(adapter_recipe(4), name) for name in fields}))
    out = tmp_path / "adapter"
    arguments = ["--model", release, "--pairs", data["pairs"], "--out", out, "--dev", data["bench"]]
    assert main(["train", "--recipe", str(recipe), *map(str, arguments)]) == 0
    reference = PARITY / "adapters" / "llada-q4p4"
    expected = {
        name.replace("blocks.2", "blocks.0").replace("blocks.3", "blocks.1")
        for name in load_file(str(reference / "adapter_model.safetensors"))
    }
    assert load_file(str(out / "adapter_model.safetensors")).keys() == expected
    ours, theirs = (json.loads((f / "retriever_config.json").read_text()) for f in (out, reference))
    assert list(ours) == list(theirs)
    assert ours["k_adapter_options"] == theirs["k_adapter_options"] == [1, 2, 4]
    built = json.loads(
        (build(pretrained / "backbone", tmp_path / "training-built", "--adapter", str(out)) / "config.json").read_text()
    )
    assert (built["num_query_masks"], built["num_passage_masks"], built["max_length"]) == (4, 4, 64)


def trainer(release: Path, data: dict[str, Path], out: Path) -> AdapterTrainer:
    from transformers import AutoModel

    recipe = adapter_recipe(1)
    torch.manual_seed(recipe.seed)
    model = AutoModel.from_pretrained(str(release), trust_remote_code=True, max_length=64)
    add_adapter(model, recipe)
    return AdapterTrainer(model, prepare_pairs(list(read_pairs(data["pairs"])), model, 32), None, recipe, out)


def test_training_moves_the_adapter_alone_and_resumes_to_the_same_weights(
    release: Path, data: dict[str, Path], tmp_path: Path
) -> None:
    whole = trainer(release, data, tmp_path / "whole")
    start = {name: value.clone() for name, value in whole.model.state_dict().items()}
    whole.run()
    for part in (1, 2, None):
        pieces = trainer(release, data, tmp_path / "pieces")
        pieces.run(stop_after=part)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, pieces.model.state_dict()[name]), name
        if "lora_" not in name:
            assert torch.equal(value, start[name]), name
    assert any(not torch.equal(v, start[n]) for n, v in whole.model.state_dict().items() if "lora_B" in n)


def test_the_command_line_reports_a_wrong_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.yaml").write_text("speed: 9")
    paths = ["--pairs", "absent.jsonl", "--out", str(tmp_path / "out")]
    assert main(["train", "--recipe", str(tmp_path / "r.yaml"), "--model", "m", *paths]) == 2
    assert "unknown key 'speed'" in capsys.readouterr().err
