"""Options that save memory or time must not change what is learned; runs over two processes, and their reports."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import fresh
import pytest
import torch
from training_data import contrastive_model, small_recipe
from training_runs import (
    arguments,
    assert_same_weights,
    fork_two,
    free_port,
    wait,
    wait_for,
    weights,
    write_pairs,
    write_recipe,
)
from transformers import AutoModel

from diffretriever.cli.main import main
from diffretriever.publishing import build as building
from diffretriever.training.batches import Collator
from diffretriever.training.checkpoints import checkpoints, step_of
from diffretriever.training.trainer import RetrievalTrainer

ROOT = Path(__file__).parents[2]
SETTINGS: dict[str, Any] = {"max_steps": 3, "hard_negatives": 2, "dropout": 0.0, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def plain_run(
    build_release: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, Path]]:
    """Return a function that trains a release without any option; equal calls share the run."""

    @cache
    def train(name: str) -> dict[str, Path]:
        folder = tmp_path_factory.mktemp("plain")
        recipe, pairs = write_recipe(folder / "recipe.yaml", **SETTINGS), write_pairs(folder / "pairs.jsonl")
        made = {"recipe": recipe, "release": build_release(name), "pairs": pairs}
        assert main(arguments(**made, out=folder / "out")) == 0
        return made | {"out": folder / "out"}

    return train


@pytest.fixture(params=["tiny-llada", "tiny-dream"])
def plain(request: pytest.FixtureRequest, plain_run: Callable[[str], dict[str, Path]]) -> dict[str, Path]:
    """A run without any option."""
    return plain_run(request.param)


def run(plain: dict[str, Path], out: Path, *settings: str) -> None:
    more = [word for setting in settings for word in ("--set", setting)]
    assert main(arguments(plain["recipe"], plain["release"], plain["pairs"], out, *more)) == 0


def first_step(folder: Path) -> dict[str, float]:
    """What the log says of a run's first step."""
    state = json.loads((folder / "state" / "checkpoint-3" / "trainer_state.json").read_text())
    line: dict[str, float] = state["log_history"][0]
    return line


def distance(found: Path, expected: Path) -> float:
    """How far apart two adapters' products B A are, as a share of the expected ones' size; B alone moved far."""
    ours, theirs = (torch.cat([_products(weights(folder))]) for folder in (found, expected))
    return float((ours - theirs).norm() / theirs.norm())


def _products(matrices: dict[str, torch.Tensor]) -> torch.Tensor:
    names = sorted(name for name in matrices if "lora_A" in name)
    return torch.cat([(matrices[name.replace("lora_A", "lora_B")] @ matrices[name]).flatten() for name in names])


@pytest.mark.parametrize("plain", ["tiny-dream"], indirect=True)
def test_workers_change_nothing(plain: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collate, note = Collator.__call__, tmp_path / "processes"

    def noted(self: Collator, drawn: Any) -> Any:
        with note.open("a") as file:
            file.write(f"{os.getpid()}\n")
        return collate(self, drawn)

    monkeypatch.setattr(Collator, "__call__", noted)
    run(plain, tmp_path / "out", "workers=1")
    assert_same_weights(tmp_path / "out", plain["out"])
    assert str(os.getpid()) not in note.read_text().split()


@pytest.mark.parametrize(
    ("plain", "options"),
    [
        ("tiny-llada", ["grad_cache_chunk=2"]),
        ("tiny-dream", ["gradient_checkpointing=true"]),
        ("tiny-llada", ["gradient_checkpointing=true", "grad_cache_chunk=3"]),
    ],
    indirect=["plain"],
)
def test_saving_memory_changes_rounding_alone(plain: dict[str, Path], tmp_path: Path, options: list[str]) -> None:
    run(plain, tmp_path / "out", *options)
    assert distance(tmp_path / "out", plain["out"]) < 0.01


def test_another_seed_leads_elsewhere(plain: dict[str, Path], tmp_path: Path) -> None:
    """So that what is nearer is no accident."""
    run(plain, tmp_path / "out", "seed=7")
    assert distance(tmp_path / "out", plain["out"]) > 0.1


def test_bfloat16_follows_float32(plain: dict[str, Path], tmp_path: Path) -> None:
    """Loss and gradient norm of the first step, and where three steps lead; Adam's are signs, so small ones flip."""
    run(plain, tmp_path / "out", "bf16=true", "backbone_dtype=bfloat16")
    first, expected = first_step(tmp_path / "out"), first_step(plain["out"])
    for name in ("loss", "dense", "sparse", "grad_norm"):
        assert first[name] == pytest.approx(expected[name], rel=0.03), name  # other batches: 10 to 30 % away
        assert first[name] != expected[name], name
    assert {value.dtype for value in weights(tmp_path / "out").values()} == {torch.float32}
    assert distance(tmp_path / "out", plain["out"]) < 0.4  # of another seed: 1.4


@pytest.mark.parametrize("plain", ["tiny-llada"], indirect=True)
def test_the_recipe_decides_on_bfloat16(
    plain: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the environment, where `accelerate launch` or a run before this one may have left another answer."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    run(plain, tmp_path / "out")
    assert_same_weights(tmp_path / "out", plain["out"])


def test_the_adapter_of_a_bfloat16_backbone_is_float32(plain: dict[str, Path]) -> None:
    from diffretriever.training.train import prepare_model

    recipe = small_recipe(backbone_dtype="bfloat16")
    retriever = AutoModel.from_pretrained(plain["release"], trust_remote_code=True, **recipe.model_settings())
    model = prepare_model(retriever, recipe)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert torch.bfloat16 in {p.dtype for p in model.parameters() if not p.requires_grad}


def test_scores_are_float32_under_autocast(plain: dict[str, Path], tmp_path: Path) -> None:
    """At temperature 0.01 a score of bfloat16 precision is off by up to 0.4; the loss must see none of that."""
    from training_data import batch_of, made_up_pairs

    model = contrastive_model(plain["release"], small_recipe(temperature=0.01, dropout=0.0)).eval()
    batch = batch_of(model, made_up_pairs(6), tmp_path / "p.jsonl")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        states = model.encode(batch["query"], True).states, model.encode(batch["passage"], False).states
        found = float(model(batch)["dense"])
    query, passage = (torch.nn.functional.normalize(side.double()[:, 0], dim=-1) for side in states)
    expected = torch.nn.functional.cross_entropy(query @ passage.T / 0.01, torch.arange(6))
    assert found == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize("plain", ["tiny-llada"], indirect=True)
def test_restoring_masked_passages_is_part_of_the_loss(plain: dict[str, Path], tmp_path: Path) -> None:
    run(plain, tmp_path / "out", "denoising_weight=0.5")
    with_it, without = first_step(tmp_path / "out"), first_step(plain["out"])
    assert with_it["dense"] == without["dense"]
    assert with_it["loss"] == pytest.approx(without["loss"] + 0.5 * with_it["denoising"], abs=1e-3)
    assert with_it["denoising"] > 1
    assert distance(tmp_path / "out", plain["out"]) > 0.01


@pytest.mark.parametrize("plain", ["tiny-dream"], indirect=True)
def test_tensorboard_gets_the_figures(plain: dict[str, Path], tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run(plain, tmp_path / "out", "report_to=tensorboard", "max_steps=2")
    (file,) = (tmp_path / "out").rglob("events.out.tfevents.*")
    board = events.EventAccumulator(str(file))
    board.Reload()
    state = json.loads((tmp_path / "out" / "state" / "checkpoint-2" / "trainer_state.json").read_text())
    lines = [line for line in state["log_history"] if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2]
    for name in ("loss", "dense", "sparse", "right", "grad_norm", "learning_rate", "tokens_per_second", "texts_cut"):
        drawn = {event.step: event.value for event in board.Scalars(f"train/{name}")}
        assert drawn == pytest.approx({line["step"]: line[name] for line in lines}), name


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_a_missing_reporter_is_named(
    plain: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = arguments(plain["recipe"], plain["release"], plain["pairs"], tmp_path / "out")
    assert main([*command, "--set", "report_to=wandb"]) == 2
    assert "this recipe needs the package wandb: pip install wandb" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("plain", ["tiny-llada"], indirect=True)
def test_torchrun_with_two_processes(plain: dict[str, Path], tmp_path: Path) -> None:
    start = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command = arguments(plain["recipe"], plain["release"], plain["pairs"], tmp_path / "out")
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    launch = [*start, "--master-port", str(free_port()), "-m", "diffretriever", *command]
    done = fresh.run(launch, env=os.environ | quiet, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (done.stdout + done.stderr).count("saved the adapter in") == 1
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["processes"] == 2  # one process that has the whole batch would train the same
    assert distance(tmp_path / "out", plain["out"]) < 0.01


@pytest.mark.slow
def test_two_processes_stop_after_the_same_step_and_go_on(build_release: Callable[..., Path], tmp_path: Path) -> None:
    settings = SETTINGS | {"max_steps": 8, "save_steps": 2, "dropout": 0.1, "keep_checkpoints": 9}
    recipe, pairs = write_recipe(tmp_path / "recipe.yaml", **settings), write_pairs(tmp_path / "pairs.jsonl")
    release = build_release("tiny-llada")

    def start(out: str) -> list[int]:
        return fork_two(lambda: main(arguments(recipe, release, pairs, tmp_path / out)), tmp_path / "log")

    def wait_from_the_third_step(patch: pytest.MonkeyPatch) -> None:
        original = RetrievalTrainer.training_step

        def step(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            time.sleep(0.4 if self.state.global_step >= 2 else 0)
            return original(self, *args, **kwargs)

        patch.setattr(RetrievalTrainer, "training_step", step)

    assert [wait(child) for child in start("whole")] == [0, 0], (tmp_path / "log.0").read_text()[-3000:]
    with pytest.MonkeyPatch.context() as patch:
        wait_from_the_third_step(patch)  # so that the signal comes before the last one
        stopped = start("out")
    try:
        wait_for(tmp_path / "out" / "state" / "checkpoint-2", seconds=400)
    finally:
        for child in stopped:  # as a batch system does
            os.kill(child, signal.SIGTERM)
    assert [wait(child) for child in stopped] == [128 + signal.SIGTERM] * 2
    step = step_of(checkpoints(tmp_path / "out" / "state")[-1])
    assert 2 <= step < 8
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert [wait(child) for child in start("out")] == [0, 0], (tmp_path / "log.0").read_text()[-3000:]
    said = (tmp_path / "log.0").read_text() + (tmp_path / "log.1").read_text()
    assert f"going on from {tmp_path / 'out' / 'state' / f'checkpoint-{step}'}" in said
    assert_same_weights(tmp_path / "out", tmp_path / "whole")


def test_a_prompt_that_no_release_could_have_is_refused(
    plain_run: Callable[[str], dict[str, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """This tokenizer puts a blank before words, also behind the text, so that the recorded ids read as other words."""
    plain = plain_run("tiny-llada")
    building.build(str(ROOT / "checkpoints" / "llada-tiny"), tmp_path / "zero-shot", max_length=120)
    given = arguments(plain["recipe"], tmp_path / "zero-shot", plain["pairs"], tmp_path / "out")
    prompt = '{system: "", user: "Question: {text}%s", assistant: "The word is:"}'
    assert main([*given, "--set", f"query_prompt={prompt % ' in one word.'}"]) == 2
    assert "query_prompt: an adapter records its token ids, and this tokenizer reads" in capsys.readouterr().err
    assert not (tmp_path / "out" / "run.json").exists()
    assert main([*given, "--set", f"query_prompt={prompt % ''}", "--set", "max_steps=1"]) == 0
    publish = [
        "publish",
        "build",
        "--base",
        str(ROOT / "checkpoints" / "llada-tiny"),
        "--output",
        str(tmp_path / "made"),
    ]
    assert main([*publish, "--adapter", str(tmp_path / "out"), "--fingerprint", "never"]) == 0
