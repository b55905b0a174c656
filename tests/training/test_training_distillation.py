"""A teacher's rankings in the loss: the formula, the batch that the teacher is asked about, and what is refused."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_encoder import save_encoder
from training_data import WORDS, batch_of, contrastive_model, gradients, made_up_pairs, small_recipe, write_lines
from training_runs import arguments, assert_same_weights, write_recipe

from diffretriever.cli.main import main
from diffretriever.training.distillation import Teacher, distillation_loss
from diffretriever.training.objective import Side, dense_scores


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentence-transformers model of random word vectors, averaged."""
    return save_encoder(tmp_path_factory.mktemp("teacher"), WORDS, seed=1)


def test_the_loss_is_the_divergence_of_the_students_ranking_from_the_teachers() -> None:
    scores, teacher = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).mul(4)
    excluded = torch.zeros(3, 5, dtype=torch.bool)
    excluded[0, 2] = excluded[2, 4] = True
    expected = 0.0
    for row in range(3):
        kept = [column for column in range(5) if not excluded[row, column]]
        student, taught = ([math.exp(float(each[row, column])) for column in kept] for each in (scores, teacher))
        shares = [(s / sum(student), t / sum(taught)) for s, t in zip(student, taught, strict=True)]
        expected += sum(t * (math.log(t) - math.log(s)) for s, t in shares) / 3
    assert float(distillation_loss(scores, teacher, excluded)) == pytest.approx(expected, rel=1e-5)
    assert float(distillation_loss(scores, scores + 7, excluded)) == pytest.approx(0, abs=1e-6)


def test_gradients_pass_by_what_is_left_out() -> None:
    scores, teacher = torch.randn(2, 2, 4, generator=torch.Generator().manual_seed(0))
    scores.requires_grad_()
    excluded = torch.tensor([[False, True, True, True], [False, False, True, False]])
    distillation_loss(scores, teacher, excluded).backward()
    assert scores.grad is not None
    assert torch.isfinite(scores.grad).all()
    assert torch.all(scores.grad[excluded] == 0)
    assert torch.all(scores.grad[1, [0, 1, 3]] != 0)


@pytest.fixture(scope="module", params=["tiny-llada", "tiny-dream"])
def release(request: pytest.FixtureRequest, build_release: Callable[..., Path]) -> Path:
    return build_release(request.param)


def test_the_dense_scores_learn_the_teachers_of_the_batch(release: Path, teacher_folder: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    recipe = small_recipe(teacher=str(teacher_folder), distillation_weight=0.7, dropout=0.0)
    model = contrastive_model(release, recipe).eval()
    records = made_up_pairs(4, negatives=1)
    records[3]["positive"] = records[0]["positive"]  # left out of the other's candidates
    batch = batch_of(model, records, tmp_path / "p.jsonl")
    plain = model(batch)
    model.teacher = Teacher(str(teacher_folder), temperature=0.1)
    found = model(batch)
    found["loss"].backward()
    assert gradients(model)
    query = Side(model.encode(batch["query"], True).states, batch["query_words"])
    passage = Side(model.encode(batch["passage"], False).states, batch["passage_words"])
    reference = SentenceTransformer(str(teacher_folder), device="cpu")
    passages = [record["positive"] for record in records] + [record["negatives"][0] for record in records]
    vectors = [
        reference.encode(texts, normalize_embeddings=True) for texts in ([r["query"] for r in records], passages)
    ]
    teacher = torch.tensor(vectors[0] @ vectors[1].T) / 0.1
    excluded = torch.zeros(4, 8, dtype=torch.bool)
    excluded[0, 3] = excluded[3, 0] = True
    expected = distillation_loss(dense_scores(query, passage) / recipe.temperature, teacher, excluded)
    torch.testing.assert_close(found["distillation"], expected.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["loss"], plain["loss"] + 0.7 * found["distillation"], rtol=1e-5, atol=1e-5)
    assert "distillation" not in plain
    assert all("teacher" not in name for name in model.state_dict())


def test_scores_are_float32_under_autocast(teacher_folder: Path) -> None:
    teacher = Teacher(str(teacher_folder), temperature=0.05)
    texts = [" ".join(WORDS[start : start + 4]) for start in range(0, 24, 4)]
    plain = teacher(texts, texts[:3], torch.device("cpu"))
    with torch.autocast("cpu", torch.bfloat16):
        found = teacher(texts, texts[:3], torch.device("cpu"))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-5)
    assert plain[0, 0] == pytest.approx(20)


@pytest.fixture(scope="module")
def command(build_release: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """Return a function that gives the command line of a run of two steps."""
    folder, release = tmp_path_factory.mktemp("distillation"), build_release("tiny-llada")
    pairs = write_lines(folder / "pairs.jsonl", made_up_pairs(8))
    recipe = write_recipe(folder / "recipe.yaml", max_steps=2, save_steps=2, dropout=0.0, hard_negatives=0)

    def give(out: Path, *settings: Any) -> list[str]:
        more = [word for setting in settings for word in ("--set", setting)]
        return arguments(recipe, release, pairs, out, *more)

    return give


def test_a_run_with_a_teacher_is_resumed_with_that_teacher_alone(
    command: Callable[..., list[str]], teacher_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "teacher"
    save_encoder(folder, WORDS, seed=1)
    assert main(command(tmp_path / "out", f"teacher={folder}")) == 0
    assert main(command(tmp_path / "plain")) == 0
    with pytest.raises(AssertionError):
        assert_same_weights(tmp_path / "out", tmp_path / "plain")
    capsys.readouterr()
    moved = folder.rename(tmp_path / "moved")
    assert main(command(tmp_path / "out", f"teacher={moved}")) == 0
    assert "all 2 steps were done before" in capsys.readouterr().out
    save_encoder(folder, WORDS, seed=2)
    for other in ([f"teacher={folder}"], []):
        assert main(command(tmp_path / "out", *other)) == 2
        assert "this run was started with another teacher: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["teacher=nowhere/at-all"], "teacher: nowhere/at-all is no model that sentence-transformers loads: "),
        (["teacher=x", "teacher_temperature=0"], "teacher_temperature must be positive, got 0"),
        (["distillation_weight=-1"], "distillation_weight must not be negative, got -1"),
    ],
)
def test_teachers_that_cannot_be_are_refused(
    command: Callable[..., list[str]], settings: list[str], told: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(command(tmp_path / "out", *settings)) == 2
    assert told in capsys.readouterr().err


def test_a_missing_package_is_named(
    command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    found = importlib.util.find_spec
    missing = "sentence_transformers"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else found(name))
    assert main(command(tmp_path / "out", "teacher=x")) == 2
    assert (
        "this recipe needs the package sentence-transformers: pip install sentence-transformers"
        in capsys.readouterr().err
    )
