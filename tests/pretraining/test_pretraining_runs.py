"""Pretraining end to end on a handful of pairs, interrupted and resumed."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from checkpoint_folders import KINDS, LLADA_LAYER, LLADA_OUTER, original_key
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

import publish
from diffretriever.cli.main import main
from diffretriever.pretraining.backbone import mask_states
from diffretriever.pretraining.checkpoint import load_checkpoint
from diffretriever.pretraining.data import encode_texts
from diffretriever.pretraining.denoising import Denoiser
from diffretriever.pretraining.formats import FORMATS
from diffretriever.pretraining.pretrain import Pretrainer, read_corpus
from diffretriever.pretraining.prompts import Prompt, rendered_prompt
from diffretriever.training.recipe import PretrainRecipe, read_recipe

TEXTS = ["Network printer", "", "File-server mail 42; the KERNEL's window", "a <|mask|> <|mdm_mask|> <|im_end|>?"]
PARITY = Path(__file__).parents[1] / "parity"
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
    for kind in KINDS:
        (folder / f"{kind}.yaml").write_text(yaml.safe_dump({**PRETRAIN, "backbone_type": kind}))
    return {"folder": folder, "pairs": folder / "pairs.jsonl", "texts": folder / "texts.jsonl", "bench": bench}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def recipe(kind: str, data: dict[str, Path]) -> PretrainRecipe:
    return read_recipe(data["folder"] / f"{kind}.yaml", PretrainRecipe)


@pytest.fixture(scope="module")
def pretrained(kind: str, data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of a pretraining run by the command."""
    out = tmp_path_factory.mktemp("training-pretrained")
    arguments = ["--pairs", data["pairs"], "--texts", data["texts"], "--out", out, "--dev", data["bench"]]
    assert main(["pretrain", "--recipe", str(data["folder"] / f"{kind}.yaml"), *map(str, arguments)]) == 0
    return out


def test_pretrain_writes_the_format(kind: str, pretrained: Path) -> None:
    reference = PARITY / "backbones" / f"tiny-{kind}"
    for file in ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"):
        expected, got = (json.loads((folder / file).read_text()) for folder in (reference, pretrained / "backbone"))
        assert sorted(got) == sorted(expected)
    assert got == expected
    weights = load_file(str(pretrained / "backbone" / "model.safetensors"))
    layer = {original_key(kind, f"backbone.layers.1.{name}.weight") for name in LLADA_LAYER}
    outer = {original_key(kind, f"{name}.weight") for name in LLADA_OUTER}
    biases = {f"model.layers.1.self_attn.{part}_proj.bias" for part in "qkv"} if kind == "dream" else set()
    assert {name for name in weights if ".0." not in name} == layer | outer | biases
    assert weights[original_key(kind, "lm_head.weight")].shape == (640, 32)
    assert weights[original_key(kind, "backbone.layers.1.mlp.down_proj.weight")].shape == (32, 48)
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    log = [json.loads(line) for line in (pretrained / "log.jsonl").read_text().splitlines()]
    assert "K=4" in log[-1]["evaluation"]


def test_the_chat_template_is_the_reference_checkpoints(kind: str, pretrained: Path) -> None:
    """By its text for Dream; LLaDA's is written in its own way, so by what it makes."""
    folders = PARITY / "backbones" / f"tiny-{kind}", pretrained / "tokenizer"
    expected, got = (AutoTokenizer.from_pretrained(str(folder)) for folder in folders)
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which?"}]
    for messages in (turns, turns[1:], [*turns, {"role": "assistant", "content": "That."}, *turns[1:]]):
        made = [t.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) for t in (expected, got)]
        assert made[0] == made[1]


def test_the_tokenizer_keeps_words_whole_and_gives_the_prompt_back(kind: str, pretrained: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(pretrained / "tokenizer"))
    ids = tokenizer("Network of a network", add_special_tokens=False)["input_ids"]
    assert ids[0] == ids[-1] == tokenizer("network", add_special_tokens=False)["input_ids"][0]
    for is_query in (True, False):
        for masks in (1, 4):
            prompt = Prompt.build(tokenizer, FORMATS[kind].tokenizer, is_query, masks)
            assert (tokenizer.decode(prompt.prefix), tokenizer.decode(prompt.suffix)) == rendered_prompt(
                tokenizer, is_query, masks
            )
            assert len(prompt.prefix) + len(prompt.suffix) < 35
            assert len(prompt.tail) == 3


def test_interrupted_pretraining_ends_with_the_same_weights(
    recipe: PretrainRecipe, pretrained: Path, data: dict[str, Path], tmp_path: Path
) -> None:
    tokenizer_folder = pretrained / "tokenizer"
    tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_folder))
    for stop in (2, 3, None):  # inside the first stage, inside the second, to the end
        corpus = read_corpus(recipe, [data["pairs"]], [data["texts"]], tokenizer, tmp_path)
        Pretrainer(recipe, corpus, tokenizer_folder, tmp_path / "run").run(stop_after=stop)
    once, again = (load_file(str(p / "backbone" / "model.safetensors")) for p in (pretrained, tmp_path / "run"))
    for name, value in once.items():
        assert torch.equal(value, again[name]), name


def test_the_run_measures_the_formats_own_objective(
    kind: str, recipe: PretrainRecipe, pretrained: Path, data: dict[str, Path], tmp_path: Path
) -> None:
    """The logged loss is that of predicting a token from its own state (LLaDA) or from the one before it (Dream)."""
    logged = json.loads((pretrained / "log.jsonl").read_text().splitlines()[-1])["evaluation"]["denoise"]
    tokenizer: Any = AutoTokenizer.from_pretrained(str(pretrained / "tokenizer"))
    corpus = read_corpus(recipe, [data["pairs"]], [data["texts"]], tokenizer, tmp_path)
    model, special = FORMATS[kind].load(pretrained / "backbone"), FORMATS[kind].tokenizer.special_ids(tokenizer)
    state = load_checkpoint(pretrained / "pretrain.ckpt")  # in float32, unlike the backbone
    assert state is not None
    model.load_state_dict(state["model"])
    found = [Denoiser(corpus.texts, special, 128, 2048, 0, n).held_out(model, corpus.held_out) for n in (0, 1)]
    right = {"llada": 0, "dream": 1}[kind]
    assert found[right] == pytest.approx(logged, abs=2e-4)
    assert found[1 - right] != pytest.approx(logged, abs=5e-3)


def test_a_folder_with_another_formats_tokenizer_is_refused(
    kind: str, pretrained: Path, data: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    other, mask = {"llada": ("dream", "<|mask|>"), "dream": ("llada", "<|mdm_mask|>")}[kind]
    arguments = ["--pairs", data["pairs"], "--texts", data["texts"], "--out", pretrained]
    assert main(["pretrain", "--recipe", str(data["folder"] / f"{other}.yaml"), *map(str, arguments)]) == 2
    message = capsys.readouterr().err
    assert f"{pretrained / 'tokenizer'}: the tokenizer has no {mask}" in message
    assert "give another output folder" in message


def test_a_loss_that_is_not_a_number_stops_and_keeps_the_checkpoint(
    recipe: PretrainRecipe, pretrained: Path, data: dict[str, Path], tmp_path: Path
) -> None:
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


@pytest.fixture(scope="module")
def release(kind: str, pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The pretrained backbone as a zero-shot release, K_q = 1 and K_p = 4, loaded as a user loads it."""
    out = tmp_path_factory.mktemp("training-release") / f"pretrained-{kind}-{os.getpid()}"
    settings = ["--num-query-masks", "1", "--num-passage-masks", "4"]
    assert publish.main(["build", "--base", str(pretrained / "backbone"), "--out", str(out), *settings]) == 0
    return AutoModel.from_pretrained(str(out), trust_remote_code=True, torch_dtype=torch.float32)


@pytest.mark.parametrize("is_query", [True, False])
def test_training_makes_the_ids_of_the_release(kind: str, pretrained: Path, release: Any, is_query: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(pretrained / "tokenizer"))
    prompt = Prompt.build(tokenizer, FORMATS[kind].tokenizer, is_query, release.config.num_masks(is_query))
    for text in TEXTS:
        ids, _ = release.tokenize([text], is_query=is_query)
        assert prompt.wrap(encode_texts([text], tokenizer, 100)[0][0], 100) == ids[0].tolist()


@pytest.mark.parametrize("is_query", [True, False])
@torch.no_grad()
def test_the_release_gives_the_states_of_training(kind: str, pretrained: Path, release: Any, is_query: bool) -> None:
    """At the masks, unshifted, in Dream as in LLaDA."""
    trained: Any = FORMATS[kind].load(pretrained / "backbone")
    ids, mask = release.tokenize(TEXTS, is_query=is_query)
    expected = mask_states(trained, ids, mask, release.config.num_masks(is_query))
    at_masks = ids == FORMATS[kind].tokenizer.special_ids(release.tokenizer)["mask"]
    got = release.hidden_states(ids, mask)[at_masks].view_as(expected)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    out = release.encode(ids, mask, is_query=is_query)
    torch.testing.assert_close(out.repr_hidden, F.normalize(expected, dim=-1), atol=1e-5, rtol=0)
