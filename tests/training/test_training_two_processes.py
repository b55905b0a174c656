"""Two CPU processes against one with the whole batch: the same loss and the same gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_encoder import save_encoder
from torch.nn.parallel import DistributedDataParallel
from training_data import WORDS, batch_of, contrastive_model, gradients, made_up_pairs, small_recipe
from training_runs import fork_two, wait

from diffretriever.training.distillation import Teacher
from diffretriever.training.objective import ContrastiveModel

CASES = {
    "plain": ("tiny-llada", 0),
    "grad-cache": ("tiny-llada", 2),
    "dream": ("tiny-dream", 3),
    "two-steps": ("tiny-llada", 2),
    "teacher": ("tiny-dream", 0),
}


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("teacher"), WORDS, seed=1)


def case(
    name: str, build_release: Callable[..., Path], teacher: Path
) -> tuple[str, list[dict[str, Any]], dict[str, Any]]:
    kind, chunk = CASES[name]
    changes: dict[str, Any] = {"num_query_masks": 2, "num_passage_masks": 3, "dropout": 0.0, "grad_cache_chunk": chunk}
    if name == "two-steps":
        changes |= {"num_query_masks": 4, "num_denoise_steps": 2}
    if name == "teacher":
        changes |= {"teacher": str(teacher), "distillation_weight": 3.0}
    records = made_up_pairs(4, negatives=2)
    records[3]["negatives"].append("forest " * 30)  # another number of passages, and a longer text, in one process
    records[0]["positive"] = records[2]["positive"]  # a positive of one process's query among the other's passages
    return str(build_release(kind)), records, changes


def model_of(release: str, changes: dict[str, Any]) -> ContrastiveModel:
    recipe = small_recipe(**changes)
    model = contrastive_model(Path(release), recipe)
    if recipe.teacher is not None:
        model.teacher = Teacher(recipe.teacher, temperature=0.1)
    return model


def train_half(folder: Path, cases: Mapping[str, tuple[str, list[dict[str, Any]], dict[str, Any]]]) -> int:
    """One process of two: its half of the queries, gradients averaged by DistributedDataParallel as Trainer has it."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    for name, (release, records, recipe) in cases.items():
        model = model_of(release, recipe)
        mine = records[: len(records) // 2] if rank == 0 else records[len(records) // 2 :]
        batch = batch_of(model, mine, folder / f"part-{rank}.jsonl")
        wrapped = DistributedDataParallel(model)  # reduces gradients for as long as it lives
        found = wrapped(batch)
        found["loss"].backward()
        save_file(gradients(model) | {"loss": found["loss"].detach()}, str(folder / f"{name}-{rank}.safetensors"))
    torch.distributed.destroy_process_group()
    return 0


@pytest.fixture(scope="module")
def parts(
    build_release: Callable[..., Path], teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What each of two processes computed, for all cases."""
    folder = tmp_path_factory.mktemp("two-processes")
    cases = {name: case(name, build_release, teacher_folder) for name in CASES}
    ended = [wait(child) for child in fork_two(lambda: train_half(folder, cases), folder / "log")]
    assert ended == [0, 0], (folder / "log.0").read_text()[-3000:]
    return {name: [load_file(str(folder / f"{name}-{rank}.safetensors")) for rank in range(2)] for name in CASES}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_processes_give_the_gradient_of_one(
    name: str, parts: dict[str, Any], build_release: Callable[..., Path], teacher_folder: Path, tmp_path: Path
) -> None:
    release, records, changes = case(name, build_release, teacher_folder)
    model = model_of(release, changes)
    found = model(batch_of(model, records, tmp_path / "whole.jsonl"))
    found["loss"].backward()
    assert sum(float(part["loss"]) for part in parts[name]) / 2 == pytest.approx(found["loss"].item(), rel=1e-5)
    expected = gradients(model)
    for part in parts[name]:
        assert part.keys() - {"loss"} == expected.keys()
        for key, gradient in expected.items():
            torch.testing.assert_close(part[key], gradient, rtol=0, atol=3e-4 * float(gradient.abs().max()), msg=key)
    alone = model_of(release, changes)
    alone(batch_of(alone, records[:2], tmp_path / "half.jsonl"))["loss"].backward()
    largest = max(expected, key=lambda key: float(expected[key].abs().max()))
    assert not torch.allclose(gradients(alone)[largest], expected[largest], rtol=0.01)  # the other half matters
