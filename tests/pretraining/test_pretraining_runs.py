"""Pretraining end to end on a handful of pairs, interrupted and resumed."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
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
from diffretriever.files.sealed import check_seal, seal
from diffretriever.model.backbone_loading import load_tokenizer
from diffretriever.model.chat_template import render_prompt
from diffretriever.model.configuration_diffretriever import paper_prompt
from diffretriever.pretraining.backbone import new_backbone
from diffretriever.pretraining.corpus import read_corpus
from diffretriever.pretraining.denoising import Denoiser
from diffretriever.pretraining.pretrain import Pretrainer
from diffretriever.pretraining.recipe import PretrainRecipe, read_pretrain_recipe
from diffretriever.pretraining.steps import StageSteps
from diffretriever.training.checkpoints import checkpoints

TEXTS = ["Network printer", "", "File-server mail 42; the KERNEL's window", "a <|mask|> <|mdm_mask|> <|im_end|>?"]
PARITY = Path(__file__).parents[1] / "parity"
WORDS = "file network image sound text package kernel window game music server client mail printer disk".split()
PRETRAIN: dict[str, Any] = {
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
    return read_pretrain_recipe(data["folder"] / f"{kind}.yaml")


@pytest.fixture(scope="module")
def pretrained(kind: str, data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of a pretraining run by the command."""
    out = tmp_path_factory.mktemp("training-pretrained")
    assert command(kind, data, out, "--dev", str(data["bench"])) == 0
    return out


def newest(out: Path) -> Path:
    """Return the state in a run's last checkpoint."""
    return checkpoints(out / "state")[-1] / "state.pt"


def command(kind: str, data: dict[str, Path], out: Path, *more: str) -> int:
    """Run `diffretriever pretrain`."""
    arguments = ["--pairs", data["pairs"], "--texts", data["texts"], "--output", out]
    return main(["pretrain", "--recipe", str(data["folder"] / f"{kind}.yaml"), *map(str, arguments), *more])


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
    folders = PARITY / "backbones" / f"tiny-{kind}", pretrained / "backbone"
    expected, got = (AutoTokenizer.from_pretrained(str(folder)) for folder in folders)
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which?"}]
    for messages in (turns, turns[1:], [*turns, {"role": "assistant", "content": "That."}, *turns[1:]]):
        made = [t.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) for t in (expected, got)]
        assert made[0] == made[1]


def test_the_tokenizer_keeps_words_whole_and_gives_the_prompt_back(pretrained: Path) -> None:
    tokenizer = load_tokenizer([pretrained / "backbone"])

    def tokens(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    ids = tokens("Network of a network")
    assert ids[0] == ids[-1] == tokens("network")[0]
    assert len(tokens('"')) == 1
    for side in ("query", "passage"):
        for masks in (1, 4):
            parts = render_prompt(tokenizer, paper_prompt(side, masks))
            assert tuple(tokenizer.decode(tokens(part)) for part in parts) == parts
            assert sum(len(tokens(part)) for part in parts) < 35


def test_an_interrupted_run_says_so_and_ends_with_the_same_weights(
    kind: str,
    pretrained: Path,
    data: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    log = Pretrainer.log

    def stop_at(place: tuple[int, int], number: int) -> None:
        def logged(self: Pretrainer, **extra: Any) -> None:
            log(self, **extra)
            if (self.stage, self.step) == place and "rate" in extra:
                signal.raise_signal(number)

        monkeypatch.setattr(Pretrainer, "log", logged)

    for place, number in (((0, 1), signal.SIGINT), ((1, 3), signal.SIGTERM)):
        stop_at(place, number)
        assert command(kind, data, tmp_path) == 3
        said = capsys.readouterr()
        assert "interrupted" in said.err
        assert "The same command goes on" in said.err
        last = json.loads(said.out.splitlines()[-1])
        assert (last["stage"], last["step"]) == place
        assert last["note"] == f"interrupted; {newest(tmp_path).parent} is saved"
        assert not (tmp_path / "backbone" / "model.safetensors").exists()
    monkeypatch.setattr(Pretrainer, "log", log)
    assert command(kind, data, tmp_path) == 0
    once, again = (load_file(str(folder / "backbone" / "model.safetensors")) for folder in (pretrained, tmp_path))
    for name, value in once.items():
        assert torch.equal(value, again[name]), name


def test_the_run_measures_the_formats_own_objective(
    kind: str, recipe: PretrainRecipe, pretrained: Path, data: dict[str, Path], tmp_path: Path
) -> None:
    """The logged loss is that of predicting a token from its own state (LLaDA) or from the one before it (Dream)."""
    logged = json.loads((pretrained / "log.jsonl").read_text().splitlines()[-1])["evaluation"]["denoise"]
    model = new_backbone(pretrained / "backbone", seed=9)
    corpus = read_corpus(recipe, [data["pairs"]], [data["texts"]], model.texts, tmp_path)
    model.load_state_dict(torch.load(newest(pretrained), weights_only=True)["model"])  # float32
    found = [
        Denoiser(corpus.texts, model.texts, 128, 2048, 0, shift).held_out(model, corpus.held_out) for shift in (0, 1)
    ]
    right = {"llada": 0, "dream": 1}[kind]
    assert found[right] == pytest.approx(logged, abs=2e-4)
    assert found[1 - right] != pytest.approx(logged, abs=5e-3)


def weights_of(out: Path) -> dict[str, torch.Tensor]:
    return load_file(str(out / "backbone" / "model.safetensors"))


def test_a_damaged_checkpoint_is_passed_over(
    kind: str, pretrained: Path, data: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The newest cut off, then both altered: the run goes on from the one before, then from the start."""
    out = tmp_path / "out"
    shutil.copytree(pretrained, out)
    state = newest(out)
    state.write_bytes(state.read_bytes()[:-100])
    assert command(kind, data, out) == 0
    said = capsys.readouterr().out
    assert f"{out / 'state' / 'checkpoint-7'} holds state.pt with " in said
    assert "resumed at stage 1, step 2" in said
    for checkpoint in checkpoints(out / "state"):
        content = bytearray((checkpoint / "state.pt").read_bytes())
        content[len(content) // 2] ^= 1
        (checkpoint / "state.pt").write_bytes(content)
    assert command(kind, data, out) == 0
    assert "no whole checkpoint is left: the run begins anew" in capsys.readouterr().out
    for name, value in weights_of(pretrained).items():
        assert torch.equal(value, weights_of(out)[name]), name


def other_recipe(folder: Path, kind: str, **changes: Any) -> None:
    (folder / f"{kind}.yaml").write_text(yaml.safe_dump({**PRETRAIN, "backbone_type": kind, **changes}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"backbone_type": None}, "`backbone_type` "),
        ({"shape": {**PRETRAIN["shape"], "n_layers": 3}}, "`shape.n_layers` 2, not 3"),
        (
            {"stages": [PRETRAIN["stages"][0], {**PRETRAIN["stages"][1], "steps": 9}]},
            "`stages[1].steps` 4, not 9",
        ),
        ({"seed": 7}, "`seed` 42, not 7"),
    ],
)
def test_another_recipe_is_refused(
    kind: str,
    pretrained: Path,
    data: dict[str, Path],
    tmp_path: Path,
    changes: dict[str, Any],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = {"llada": "dream", "dream": "llada"}[kind]
    other_recipe(tmp_path, kind, **{key: value or other for key, value in changes.items()})
    before = (pretrained / "run.json").read_bytes()
    assert command(kind, {**data, "folder": tmp_path}, pretrained) == 2
    said = capsys.readouterr().err
    assert f"{pretrained / 'run.json'}: this run was started with {words}" in said
    assert "Choose another --output" in said
    assert (pretrained / "run.json").read_bytes() == before


def test_other_data_another_tokenizer_and_an_earlier_version_are_refused(
    kind: str, pretrained: Path, data: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, pairs = tmp_path / "out", tmp_path / "pairs.jsonl"
    shutil.copytree(pretrained, out)
    pairs.write_bytes(data["pairs"].read_bytes().replace(b"kernel", b"colonel"))
    assert command(kind, {**data, "pairs": pairs}, out) == 2
    assert "run.json: this run was started with other data: other `data[0]`." in capsys.readouterr().err
    (out / "run.json").unlink()
    assert command(kind, {**data, "pairs": pairs}, out) == 2
    assert "checkpoint-7: this run was started with other data: other `data[0]`." in capsys.readouterr().err
    tokenizer = out / "backbone" / "tokenizer.json"
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text())))
    (out / "run.json").unlink()
    assert command(kind, data, out) == 2
    found = capsys.readouterr().err
    assert "this run was started with other files of the backbone: other `backbone.tokenizer.json`" in found
    (out / "pretrain.ckpt").touch()
    assert command(kind, data, out) == 2
    assert "pretrain.ckpt is the checkpoint of an earlier version, from which this one cannot go on" in (
        capsys.readouterr().err
    )


def test_a_checkpoint_that_this_version_cannot_hold_is_told(
    kind: str, pretrained: Path, data: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(pretrained, out)
    checkpoint = newest(out).parent
    state = torch.load(checkpoint / "state.pt", weights_only=True)
    state["model"]["another.name"] = state["model"].popitem()[1]
    torch.save(state, checkpoint / "state.pt")
    seal(checkpoint, check_seal(pretrained / "state" / checkpoint.name))
    assert command(kind, data, out) == 2
    said = capsys.readouterr().err
    assert f"{checkpoint / 'state.pt'} was written by another version of this software or of torch" in said


def test_a_loss_that_is_not_a_number_stops_and_keeps_the_checkpoint(
    recipe: PretrainRecipe, pretrained: Path, data: dict[str, Path], tmp_path: Path
) -> None:
    model = new_backbone(pretrained / "backbone", seed=9)
    corpus = read_corpus(recipe, [data["pairs"]], [data["texts"]], model.texts, tmp_path)
    hot = dataclasses.replace(recipe.stages[0], learning_rate=1e30, steps=9)  # the second step's loss overflows
    trainer = Pretrainer(dataclasses.replace(recipe, stages=[hot], save_every=1), model, corpus, tmp_path, {})
    with pytest.raises(FloatingPointError, match=r"the loss is nan at stage 0, step 1 \(denoise\); lower"):
        trainer.run()
    state = torch.load(newest(tmp_path), weights_only=True)
    assert state["step"] == 1
    for name, value in model.state_dict().items():
        assert torch.equal(value, state["model"][name]), name


@pytest.fixture(scope="module")
def release(kind: str, pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The pretrained backbone as a zero-shot release, K_q = 1 and K_p = 4, loaded as a user loads it."""
    out = tmp_path_factory.mktemp("training-release") / f"pretrained-{kind}-{os.getpid()}"
    settings = ["--num-query-masks", "1", "--num-passage-masks", "4"]
    assert publish.main(["build", "--base", str(pretrained / "backbone"), "--output", str(out), *settings]) == 0
    return AutoModel.from_pretrained(str(out), trust_remote_code=True, torch_dtype=torch.float32)


@pytest.mark.parametrize("is_query", [True, False])
def test_training_makes_the_sequences_of_the_release(
    recipe: PretrainRecipe, pretrained: Path, release: Any, data: dict[str, Path], tmp_path: Path, is_query: bool
) -> None:
    """Prompt, text, masks and tail, and the content words, of all training pairs."""
    model = new_backbone(pretrained / "backbone", seed=9)
    corpus = read_corpus(recipe, [data["pairs"]], [data["texts"]], model.texts, tmp_path)
    steps = StageSteps(model, recipe, 1, corpus)
    pairs = [json.loads(line) for line in data["pairs"].read_text().splitlines()]
    texts = [pair["query" if is_query else "positive"] for pair in pairs]
    ids, words = (
        (corpus.pairs.queries, corpus.pairs.query_words)
        if is_query
        else (corpus.pairs.passages, corpus.pairs.passage_words)
    )
    made, mask = steps.sequences(
        [ids[number] for number in range(len(ids))], is_query, release.config.num_masks(is_query), 96
    )
    expected, expected_mask = release.tokenize(texts, is_query)
    assert torch.equal(made, expected)
    assert torch.equal(mask, expected_mask)
    assert [words[number] for number in range(len(words))] == release.content_token_ids(texts)


@pytest.mark.parametrize("is_query", [True, False])
@torch.no_grad()
def test_the_release_gives_the_states_of_training(pretrained: Path, release: Any, is_query: bool) -> None:
    """At the masks, unshifted, in Dream as in LLaDA; the backbone's bfloat16 is all that lies between."""
    model = new_backbone(pretrained / "backbone", seed=9)
    model.load_state_dict(torch.load(newest(pretrained), weights_only=True)["model"])
    for weight in model.parameters():
        weight.copy_(weight.bfloat16())
    ids, mask = release.tokenize(TEXTS, is_query=is_query)
    at_masks = ids == release.texts.mask_id
    states = model.hidden_states(ids, mask)[at_masks].view(len(TEXTS), release.config.num_masks(is_query), -1)
    out = release.encode(ids, mask, is_query=is_query)
    torch.testing.assert_close(out.repr_hidden, F.normalize(states, dim=-1), atol=1e-5, rtol=0)
