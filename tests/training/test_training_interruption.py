"""Runs that are stopped, killed, out of disk or out of numbers, and what is left of them."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_folders import PARITY, edit_json, edit_weights
from full_disk import limit_files
from training_runs import arguments, assert_same_weights, fork_train, wait, wait_for, write_pairs, write_recipe

from diffretriever.cli.main import main
from diffretriever.publishing import build as building
from diffretriever.training import checkpoints, trainer
from diffretriever.training.adapter_output import save_adapter

# Six steps an epoch, so that the run crosses one; dropout, negatives and two micro-batches a step are all drawn.
SETTINGS: dict[str, Any] = {
    "max_steps": 8, "save_steps": 3, "hard_negatives": 1, "dropout": 0.2, "accumulation_steps": 2, "warmup": 0.25,
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(build_release: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    recipe = write_recipe(folder / "recipe.yaml", **SETTINGS)
    made = {"recipe": recipe, "release": build_release("tiny-llada"), "pairs": write_pairs(folder / "pairs.jsonl")}
    assert main(arguments(**made, out=folder / "out")) == 0
    return made | {"out": folder / "out"}


def command(whole: dict[str, Path], out: Path) -> list[str]:
    return arguments(whole["recipe"], whole["release"], whole["pairs"], out)


def resume(whole: dict[str, Path], out: Path) -> None:
    """Goes on to the end, and compares with the uninterrupted run bit for bit."""
    assert main(command(whole, out)) == 0
    assert_same_weights(out, whole["out"])
    assert [path.name for path in checkpoints.checkpoints(out / "state")] == ["checkpoint-6", "checkpoint-8"]
    assert not (out / "state" / checkpoints.PARTIAL).exists() or not list(
        (out / "state" / checkpoints.PARTIAL).iterdir()
    )


def test_a_run_repeats_itself(whole: dict[str, Path], tmp_path: Path) -> None:
    assert main(command(whole, tmp_path / "again")) == 0
    assert_same_weights(tmp_path / "again", whole["out"])


@pytest.mark.slow
def test_sigterm_saves_and_stops(whole: dict[str, Path], tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"

    def slow() -> None:
        original = trainer.RetrievalTrainer.training_step

        def step(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            (tmp_path / f"step-{self.state.global_step}").touch()
            return original(self, *args, **kwargs)

        trainer.RetrievalTrainer.training_step = step  # type: ignore[method-assign]

    child = fork_train(command(whole, out), log, slow)
    wait_for(tmp_path / "step-4")
    os.kill(child, signal.SIGTERM)
    assert wait(child) == 128 + signal.SIGTERM
    step = checkpoints.step_of(checkpoints.checkpoints(out / "state")[-1])
    assert 5 <= step < 8
    assert f"stopped by signal 15 after step {step}; the same command goes on from there" in log.read_text()
    assert not (out / "adapter_model.safetensors").exists()
    resume(whole, out)


def test_a_second_sigterm_does_not_kill() -> None:
    before = signal.getsignal(signal.SIGTERM)
    stop = trainer.StopOnSignal()
    with stop.listening():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_handler_that_python_did_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where R, or another program in C, has Python within it."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    monkeypatch.setattr(signal, "getsignal", lambda _: None)
    try:
        with trainer.StopOnSignal().listening():
            pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def die_at(target: Any, name: str, call: int) -> Callable[[], None]:
    """Arranges that the process is killed at the n-th call of a function."""

    def prepare() -> None:
        original, calls = getattr(target, name), 0

        def deadly(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(target, name, deadly)

    return prepare


@pytest.mark.slow
@pytest.mark.parametrize(
    ("accident", "left"),
    [
        (die_at(trainer.RetrievalTrainer, "compute_loss", 2), None),
        (die_at(trainer.RetrievalTrainer, "compute_loss", 10), 3),
        (die_at(trainer, "save_adapter", 2), 3),
        (die_at(torch, "save", 4), 3),  # optimiser, schedule and random numbers of step 3 come first
        (die_at(trainer, "publish_checkpoint", 2), 3),
        (die_at(checkpoints, "seal", 2), 3),
        (die_at(checkpoints, "publish_folder", 2), 3),
        (die_at(os, "replace", 13), 6),
    ],
    ids=[
        "first step",
        "fifth step",
        "saving the adapter",
        "saving the optimiser",
        "a whole checkpoint",
        "its seal",
        "its name",
        "later",
    ],
)
def test_sigkill_leaves_whole_checkpoints(
    whole: dict[str, Path], tmp_path: Path, accident: Callable[[], None], left: int | None
) -> None:
    out = tmp_path / "out"
    assert wait(fork_train(command(whole, out), tmp_path / "log", accident)) == -signal.SIGKILL
    kept = checkpoints.checkpoints(out / "state")
    assert (checkpoints.step_of(kept[-1]) if kept else None) == left
    resume(whole, out)


@pytest.mark.slow
def test_killed_again_and_again(whole: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    for call in (9, 4, 5):
        accident = die_at(trainer.RetrievalTrainer, "compute_loss", call)
        assert wait(fork_train(command(whole, out), tmp_path / "log", accident)) == -signal.SIGKILL
    resume(whole, out)


@pytest.mark.slow
def test_a_full_disk_leaves_the_previous_checkpoint(whole: dict[str, Path], tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"

    def fill() -> None:
        original = trainer.RetrievalTrainer.log

        def limit(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            if self.state.global_step == 5:  # no file may grow beyond 5000 bytes from here on
                limit_files(5000)

        trainer.RetrievalTrainer.log = limit  # type: ignore[method-assign]

    assert wait(fork_train(command(whole, out), log, fill)) == 3
    said = log.read_text()
    assert "the checkpoint could not be saved (" in said
    assert f"the previous one, {out / 'state' / 'checkpoint-3'}, is whole" in said
    assert [path.name for path in checkpoints.checkpoints(out / "state")] == ["checkpoint-3"]
    resume(whole, out)


def test_a_loss_that_is_not_a_number_stops(
    whole: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    more = ["--set", "learning_rate=1e30", "--set", "save_steps=1", "--set", "warmup=0"]
    assert main([*command(whole, out), *more]) == 2
    said = capsys.readouterr().err
    assert "the loss is nan at step 2, on the batch of " in said
    assert f"{whole['pairs']}, line " in said
    assert f"the last good checkpoint is {out / 'state' / 'checkpoint-1'}" in said
    assert [path.name for path in checkpoints.checkpoints(out / "state")] == ["checkpoint-1"]
    assert not (out / "adapter_model.safetensors").exists()


def test_weights_that_are_not_numbers_are_not_saved(whole: dict[str, Path], tmp_path: Path) -> None:
    from training_data import contrastive_model, small_recipe

    model = contrastive_model(whole["release"], small_recipe())
    save_adapter(model.retriever, small_recipe(), tmp_path, "base")
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    next(p for p in model.parameters() if p.requires_grad).data[0, 0] = float("inf")
    with pytest.raises(FloatingPointError, match=r"1 adapter weights hold NaN or infinite values, base_model.model"):
        save_adapter(model.retriever, small_recipe(), tmp_path, "base")
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before


def flip_bit(file: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
    ("harm", "name", "words"),
    [
        (Path.unlink, "optimizer.pt", "lacks optimizer.pt"),
        (Path.unlink, "scheduler.pt", "lacks scheduler.pt"),
        (Path.unlink, "manifest.json", "has no manifest.json: it was not written to its end, or by an earlier version"),
        (flip_bit, "optimizer.pt", "holds optimizer.pt with other content than was written"),
        (flip_bit, "adapter_model.safetensors", "holds adapter_model.safetensors with other content than was written"),
        (flip_bit, "manifest.json", "holds a"),  # damaged or altered: it may still be JSON
        (cut_off, "optimizer.pt", "holds optimizer.pt with "),
        (cut_off, "rng_state.pth", "holds rng_state.pth with "),
        (cut_off, "trainer_state.json", "holds trainer_state.json with "),
        (cut_off, "manifest.json", "holds a damaged file, "),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(
    whole: dict[str, Path], tmp_path: Path, harm: Callable[[Path], None], name: str, words: str
) -> None:
    state = tmp_path / "state"
    said: list[str] = []
    shutil.copytree(whole["out"] / "state", state)
    harm(state / "checkpoint-8" / name)
    found = checkpoints.newest_whole(state, said.append)
    assert found is not None
    assert found[0] == state / "checkpoint-6"
    (line,) = said
    assert line.startswith(f"{state / 'checkpoint-8'} {words}")
    assert line.endswith("; it is passed over")


def test_a_run_goes_on_from_before_a_damaged_checkpoint(
    whole: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole["out"], out)
    flip_bit(out / "state" / "checkpoint-8" / "optimizer.pt")
    resume(whole, out)
    said = capsys.readouterr().out
    assert f"{out / 'state' / 'checkpoint-8'} holds optimizer.pt with other content than was written" in said
    assert "; it is passed over\n" in said
    assert f"going on from {out / 'state' / 'checkpoint-6'}" in said


def test_without_a_whole_checkpoint_the_run_begins_anew(
    whole: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole["out"], out)
    for checkpoint in checkpoints.checkpoints(out / "state"):
        flip_bit(checkpoint / "optimizer.pt")
    assert main([*command(whole, out), "--set", "save_steps=4"]) == 0
    assert "no whole checkpoint is left: the run begins anew" in capsys.readouterr().out
    assert_same_weights(out, whole["out"])
    assert [path.name for path in checkpoints.checkpoints(out / "state")] == ["checkpoint-4", "checkpoint-8"]


def test_save_steps_of_now_count(whole: dict[str, Path], tmp_path: Path) -> None:
    """transformers would go on with the checkpoint's."""
    out = tmp_path / "out"
    shutil.copytree(whole["out"], out)
    shutil.rmtree(out / "state" / "checkpoint-8")
    assert main([*command(whole, out), "--set", "save_steps=1", "--set", "log_steps=1"]) == 0
    assert_same_weights(out, whole["out"])
    assert [path.name for path in checkpoints.checkpoints(out / "state")] == ["checkpoint-7", "checkpoint-8"]


def test_a_finished_adapter_is_not_written_over(
    whole: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same run may be done anew; another, or what no run has made, is not replaced."""
    out = tmp_path / "out"
    shutil.copytree(whole["out"], out, ignore=shutil.ignore_patterns("state"))
    before = (out / "adapter_model.safetensors").read_bytes()
    assert main([*command(whole, out), "--set", "temperature=0.5"]) == 2
    told = f"{out / 'run.json'}: this run was started with `temperature` 0.05, not 0.5. Choose another --output"
    assert told in capsys.readouterr().err
    assert main(command(whole, out)) == 0
    assert (out / "adapter_model.safetensors").read_bytes() == before
    shutil.rmtree(out / "state")
    (out / "run.json").unlink()
    assert main(command(whole, out)) == 2
    assert f"{out} holds an adapter that was not trained there; choose another --output" in capsys.readouterr().err
    assert (out / "adapter_model.safetensors").read_bytes() == before


def test_a_renamed_backbone_is_the_same(
    whole: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(PARITY / "backbones" / "tiny-llada", tmp_path / "renamed")
    building.build(str(tmp_path / "renamed"), tmp_path / "zero-shot")
    assert main(arguments(whole["recipe"], tmp_path / "zero-shot", whole["pairs"], whole["out"])) == 0
    assert "all 8 steps were done before" in capsys.readouterr().out


def test_another_recipe_or_other_data_is_no_resumption(
    whole: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command(whole, whole["out"]), "--set", "temperature=0.5"]) == 2
    assert "this run was started with `temperature` 0.05, not 0.5. Choose another --output" in capsys.readouterr().err
    other = tmp_path / "pairs.jsonl"
    other.write_bytes(whole["pairs"].read_bytes().replace(b"river", b"brook"))
    assert main(arguments(whole["recipe"], whole["release"], other, whole["out"])) == 2
    assert "this run was started with other data: other `data[0]`." in capsys.readouterr().err
    moved = tmp_path / "of-another-name.jsonl"
    moved.write_bytes(whole["pairs"].read_bytes())
    free = ["--set", "log_steps=3"]
    assert main([*arguments(whole["recipe"], whole["release"], moved, whole["out"]), *free]) == 0  # all was done before


def other_weights(backbone: Path, release: Path) -> None:
    edit_weights(backbone / "model.safetensors", lambda tensors: next(iter(tensors.values())).mul_(1.5))


def other_rotation(backbone: Path, release: Path) -> None:
    edit_json(backbone / "config.json", rope_theta=1234.0)


def other_template(backbone: Path, release: Path) -> None:
    file = release / "chat_template.jinja"
    file.write_text("{{ 'Read this. ' }}" + file.read_text())


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (other_weights, "other `weights`"),
        (other_rotation, "`backbone.rope.rope_theta` 500000.0, not 1234.0"),
        (other_template, "other `chat_template.query`"),
    ],
)
def test_another_release_in_a_folder_of_the_same_name_is_no_resumption(
    whole: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Path, Path], None],
    field: str,
) -> None:
    backbone, release = tmp_path / "tiny-llada", tmp_path / whole["release"].name
    shutil.copytree(PARITY / "backbones" / "tiny-llada", backbone)
    building.build(str(backbone), release)
    change(backbone, release)
    assert main(arguments(whole["recipe"], release, whole["pairs"], whole["out"])) == 2
    said = capsys.readouterr().err
    assert f"{whole['out'] / 'state' / 'checkpoint-8'}: this run was started with another release: " in said
    assert f"{field}. Choose another --output" in said
    shutil.rmtree(release)
    shutil.copytree(whole["release"], release)  # the same content at another place is the same
    assert main(arguments(whole["recipe"], release, whole["pairs"], whole["out"])) == 0


def test_only_checkpoints_of_ours_are_removed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "checkpoint-1").symlink_to("elsewhere")
    (tmp_path / "checkpoint-9").mkdir()  # of an earlier version, or copied here
    (tmp_path / "checkpoint-9" / "weights").touch()
    for step in (2, 3):
        checkpoints.partial_checkpoint(tmp_path, step).mkdir(parents=True)
        checkpoints.publish_checkpoint(tmp_path, step, keep=1, record={})
    assert [path.name for path in checkpoints.checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-3", "checkpoint-9"]
    (tmp_path / ".partial").rmdir()
    (tmp_path / ".partial").symlink_to("elsewhere")
    with pytest.raises(FileExistsError, match=r"\.partial: is a link"):
        checkpoints.remove_partial(tmp_path)
