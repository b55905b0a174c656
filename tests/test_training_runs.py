"""Pretraining end to end on a handful of pairs, interrupted and resumed."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from diffretriever.cli import main
from diffretriever.training.pretrain import Pretrainer, read_corpus
from diffretriever.training.recipe import PretrainRecipe, read_recipe

PARITY = Path(__file__).parent / "parity"
WORDS = "file network image sound text package kernel window game music server client mail printer disk".split()
PRETRAIN = {
    "shape": {"vocab_size": 640, "d_model": 32, "n_layers": 2, "n_heads": 2, "mlp_hidden_size": 48},
    "bf16": False,
    "save_every": 2,
    "log_every": 1,
    "stages": [
        {"name": "denoise", "steps": 3, "pattern": ["denoise"], "denoise_tokens": 128},
        {"name": "joint", "steps": 4, "batch_size": 4, "pattern": ["pairs", "cloze", "denoise"], "token_drop": 0.1},
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
    with pytest.raises(FloatingPointError, match=r"the loss is nan at stage 0, step 2 \(denoise\)"):
        broken.run()
    assert (tmp_path / "run" / "pretrain.ckpt").read_bytes() == before
