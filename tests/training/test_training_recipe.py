"""Recipes, their errors, the files that ship, and the command line's own errors."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from training_data import small_recipe
from training_runs import arguments, write_pairs, write_recipe

import diffretriever.training
from diffretriever.cli.main import main
from diffretriever.training import trainer
from diffretriever.training.adapter_recipe import AdapterRecipe, read_adapter_recipe
from diffretriever.training.trainer import training_arguments

SHIPPED = Path(diffretriever.training.__file__).parent
CONFIGS = SHIPPED / "configs"


def test_the_papers_recipe() -> None:
    single, multi = (read_adapter_recipe(SHIPPED / "recipes" / f"paper-{name}.yaml") for name in ("single", "multi"))
    assert dataclasses.replace(single, num_query_masks=4, num_passage_masks=4) == multi
    for name, value in {
        "learning_rate": 1e-4, "epochs": 3.0, "global_batch_size": 128, "hard_negatives": 15, "temperature": 0.01,
        "sparse_weight": 1.0, "rank": 16, "alpha": 64, "dropout": 0.05, "seed": 42, "bf16": True,
        "num_query_masks": 1, "num_passage_masks": 1, "method": "diffretriever", "append_end_of_text": False,
        "query_length": 32, "passage_length": 156, "max_length": None, "warmup": 0.06, "weight_decay": 0.01,
    }.items():  # fmt: skip
        assert getattr(single, name) == value, name
        assert getattr(AdapterRecipe(), name) == value, name


@pytest.mark.parametrize(
    ("name", "masks"),
    [
        ("llada-tiny-single", (1, 1)),
        ("llada-tiny-multi-q4-p4", (4, 4)),
        ("llada-tiny-mean", (1, 1)),
        ("dream-tiny-single", (1, 1)),
        ("dream-tiny-multi-q4-p16", (4, 16)),
        ("dream-tiny-mean", (1, 1)),
    ],
)
def test_the_tiny_recipes_differ_in_masks_and_method_only(name: str, masks: tuple[int, int]) -> None:
    recipe = read_adapter_recipe(SHIPPED / "recipes" / f"{name}.yaml")
    assert (recipe.num_query_masks, recipe.num_passage_masks) == masks
    changes: dict[str, Any] = {"num_query_masks": masks[0], "num_passage_masks": masks[1]}
    if name.endswith("-mean"):
        room = 96 if name.startswith("llada") else 98  # what the prompt leaves of max_length
        changes |= {"method": "diffembed", "sparse_weight": 0.0, "append_end_of_text": True}
        changes |= {"max_length": None, "query_length": room, "passage_length": room}
    assert recipe == dataclasses.replace(read_adapter_recipe(SHIPPED / "recipes" / "llada-tiny-single.yaml"), **changes)


@pytest.mark.parametrize(
    ("text", "assignments", "lengths"),
    [
        ("seed: 1", [], {"query_length": 32, "passage_length": 156}),
        ("query_length: 40", [], {"query_length": 40, "passage_length": 156}),
        ("max_length: 120", [], {"max_length": 120}),
        ("query_length: 40", ["max_length=120"], {"max_length": 120}),
        ("max_length: 120", ["passage_length=90"], {"query_length": 32, "passage_length": 90}),
    ],
)
def test_lengths_are_said_in_one_way(
    text: str, assignments: list[str], lengths: dict[str, int], tmp_path: Path
) -> None:
    (tmp_path / "r.yaml").write_text(text)
    recipe = read_adapter_recipe(tmp_path / "r.yaml", assignments)
    assert recipe.lengths() == lengths
    assert recipe.model_settings().items() >= lengths.items()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "max_length: 120\nquery_length: 32",
            r"lengths of the texts .query_length, passage_length. or max_length, not",
        ),
        ("passage_length: 0", r"passage_length must be at least 1, got 0"),
        ("stepz: 3", r"r.yaml: unknown key 'stepz'; expected accumulation_steps, alpha, "),
        ("max_steps: many", r"r.yaml: max_steps must be of type int, got 'many'"),
        ("global_batch_size: 0", r"global_batch_size must be at least 1, got 0"),
        ("temperature: hot", r"temperature must be a number, got 'hot'"),
        ("temperature: -1", r"temperature must be positive, got -1"),
        ("temperature: .nan", r"temperature must be positive, got nan"),
        ("epochs: .inf", r"epochs must be positive, got inf"),
        ("sparse_weight: -0.1", r"sparse_weight must not be negative, got -0.1"),
        ("denoising_weight: -1", r"denoising_weight must not be negative, got -1"),
        ("method: promptreps\ndenoising_weight: 1", r"promptreps reads no masks; leave denoising_weight at 0"),
        ("dropout: 1.5", r"dropout must lie between 0 and 1, got 1.5"),
        ("method: colbert", r"method must be one of diffretriever, promptreps, repllama, diffembed, got 'colbert'"),
        ("query_prompt: {user: q}", r"`query_prompt` must be null .the paper's wording. or an object with exactly"),
        ("forward_texts: -1", r"forward_texts must be at least 0, got -1"),
        ("report_to: email", r"report_to must be one of none, tensorboard, wandb, got 'email'"),
        ("method: diffembed", r"r.yaml: diffembed has no sparse vectors; set sparse_weight to 0"),
        ("method: repllama\nnum_query_masks: 4", r"`num_query_vectors` of repllama can only be 1, got 4"),
        ("method: promptreps\nmax_length: 120", r"of promptreps, set query_length and passage_length"),
        ("method: promptreps\nnum_denoise_steps: 2", r"promptreps denoises nothing; leave num_denoise_steps at 1"),
        ("append_end_of_text: true", r"append_end_of_text belongs to method: diffembed"),
        ("pooling: mean", r"unknown key 'pooling'"),
        ("bf16: 1", r"bf16 must be of type bool, got 1"),
        (
            "global_batch_size: 1\nhard_negatives: 0",
            r"with hard_negatives 0 .*, global_batch_size must be at least 2, got 1",
        ),
        (
            "global_batch_size: 4\naccumulation_steps: 4\nhard_negatives: 0",
            r"a query alone in its micro-batch has no negative .* accumulation_steps 4, .* at least 8, got 4",
        ),
        ("a: [", r"r.yaml: not valid YAML"),
        ("- 1", r"expected keys and values, got list"),
    ],
)
def test_recipe_errors(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ValueError, match=words):
        read_adapter_recipe(tmp_path / "r.yaml")


def test_the_command_line_takes_a_recipes_value_away(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text('query_prompt: {system: "", user: "Q: {text}", assistant: ""}\n')
    assert read_adapter_recipe(tmp_path / "r.yaml").query_prompt is not None
    assert read_adapter_recipe(tmp_path / "r.yaml", ["query_prompt=null"]).query_prompt is None


def test_the_command_line_wins(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("learning_rate: 1e-3\nseed: 1\nrank: 2\n")
    recipe = read_adapter_recipe(tmp_path / "r.yaml", ["learning_rate=2e-4", "bf16=false", "seed=7"], seed=9)
    assert (recipe.learning_rate, recipe.bf16, recipe.seed, recipe.rank) == (2e-4, False, 9, 2)
    for wrong in ("rank", "rank=", "=3"):
        with pytest.raises(ValueError, match="expected key=value, for example --set learning_rate=2e-4"):
            read_adapter_recipe(tmp_path / "r.yaml", [wrong])
    with pytest.raises(ValueError, match="unknown key 'ranc'"):
        read_adapter_recipe(tmp_path / "r.yaml", ["ranc=3"])


def test_steps_and_batches() -> None:
    recipe = AdapterRecipe(global_batch_size=8, epochs=2.5, accumulation_steps=2)
    assert recipe.total_steps([20, 21]) == 13  # five full batches an epoch
    assert dataclasses.replace(recipe, mix_files=False).total_steps([20, 21]) == 10  # of two in each file
    with pytest.raises(ValueError, match=r"a file has .with mix_files = false.*only 7 queries"):
        dataclasses.replace(recipe, mix_files=False).total_steps([41, 7])
    assert dataclasses.replace(recipe, max_steps=3).total_steps([20, 21]) == 3
    assert recipe.process_batch_size(2) == 2
    with pytest.raises(ValueError, match=r"8 does not divide into 3 processes times accumulation_steps 2; .* of 6"):
        recipe.process_batch_size(3)
    with pytest.raises(ValueError, match="global_batch_size is 8, but the data has only 7 queries; lower it, or add"):
        recipe.total_steps([3, 4])


def test_transformers_is_told_the_recipe(tmp_path: Path) -> None:
    recipe = AdapterRecipe(global_batch_size=8, accumulation_steps=2, report_to="tensorboard", warmup=0.25, bf16=False)
    found = training_arguments(recipe, [80], tmp_path, processes=1)
    assert (found.max_steps, found.warmup_steps, found.per_device_train_batch_size) == (30, 8, 4)
    assert (found.learning_rate, found.seed, found.gradient_accumulation_steps) == (1e-4, 42, 2)
    assert found.report_to == ["tensorboard"]
    assert str(getattr(found.lr_scheduler_type, "value", found.lr_scheduler_type)) == "cosine"


@pytest.mark.parametrize("name", ["one-gpu", "one-node", "several-nodes", "one-node-zero2"])
def test_accelerate_reads_its_configs(name: str) -> None:
    config: Any = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    kind = {"one-gpu": "NO", "one-node-zero2": "DEEPSPEED"}.get(name, "MULTI_GPU")
    assert str(getattr(config.distributed_type, "value", config.distributed_type)) == kind
    assert (config.num_machines, config.num_processes) == {"one-gpu": (1, 1), "several-nodes": (2, 16)}.get(
        name, (1, 8)
    )
    assert config.rdzv_backend == "static"  # which alone reads --machine_rank; accelerate's launcher takes it anyway


def test_deepspeed_config_is_zero_2() -> None:
    path = load_config_from_file(str(CONFIGS / "one-node-zero2.yaml")).deepspeed_config["deepspeed_config_file"]
    assert SHIPPED.parents[1] / path == CONFIGS / "zero2.json"
    config = HfDeepSpeedConfig(str(CONFIGS / "zero2.json"))
    assert config.is_zero2()
    assert not config.is_offload()
    assert json.loads((CONFIGS / "zero2.json").read_text())["train_batch_size"] == "auto"


# ------------------------------------------------------------------------------------------------ the command line


@pytest.fixture
def command(build_release: Callable[..., Path], tmp_path: Path) -> Callable[..., list[str]]:
    def make(release: Path | None = None, pairs: Path | None = None, **changes: Any) -> list[str]:
        recipe = write_recipe(tmp_path / "r.yaml", **changes)
        pairs = pairs or write_pairs(tmp_path / "p.jsonl", 12, negatives=0)
        return arguments(recipe, release or build_release("tiny-llada"), pairs, tmp_path / "out")

    return make


def said(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(command) == 2
    return capsys.readouterr().err


def test_errors_come_before_the_model_is_loaded(
    command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere = tmp_path / "no-release"  # nothing but what says that it is one
    nowhere.mkdir()
    (nowhere / "config.json").write_text('{"model_type": "diffretriever"}')
    (tmp_path / "bad.jsonl").write_text('{"query": "q", "positive": "p"}\n{"query": 3}\n')
    assert "unknown key 'speed'" in said([*command(nowhere), "--set", "speed=9"], capsys)
    assert "bad.jsonl, line 2: 'query' must be a text" in said(command(nowhere, tmp_path / "bad.jsonl"), capsys)
    assert "the data has only 12 queries" in said(command(nowhere, global_batch_size=13), capsys)
    assert "set hard_negatives=0" in said(command(nowhere, hard_negatives=2), capsys)
    assert "Mine some with `diffretriever mine-negatives`" in said(command(nowhere, hard_negatives=2), capsys)
    assert "absent.jsonl: no such data file" in said(command(nowhere, tmp_path / "absent.jsonl"), capsys)
    missing = arguments(tmp_path / "absent.yaml", nowhere, tmp_path / "p.jsonl", tmp_path / "out")
    assert "absent.yaml: no such recipe; expected a YAML file" in said(missing, capsys)


def test_a_batch_that_processes_cannot_share(
    command: Callable[..., list[str]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "global_batch_size 4 does not divide into 3 processes" in said(command(), capsys)


def test_several_gpus_for_one_process(
    command: Callable[..., list[str]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    assert "8 GPUs, but one process: start with `accelerate launch -m diffretriever train" in said(command(), capsys)


def test_more_masks_than_tokens(command: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    found = said(command(num_query_masks=64), capsys)
    assert "num_query_masks is 64, but the longest of 12 sampled queries has " in found
    assert "more masks than tokens have nothing to say. Set num_query_masks to " in found


def test_a_release_with_an_adapter_is_refused(
    command: Callable[..., list[str]], build_release: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    found = said(command(build_release("tiny-llada", "llada-single")), capsys)
    assert "holds an adapter already; training starts from a zero-shot release" in found


def test_counts_are_said(command: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [
        {"query": f"river {n}", "positive": f"a river {n}", "negatives": [f"a river {n}", "x"][: n % 3]}
        for n in range(8)
    ]
    records[0]["positive"] = "mountain " * 300
    pairs = tmp_path / "counts.jsonl"
    pairs.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert main(command(pairs=pairs, hard_negatives=1, max_steps=1)) == 0
    found = capsys.readouterr().out
    assert (
        "8 queries, 1 steps of 4; 5 negatives dropped (equal to a positive, or given twice); some have fewer than 1"
        in found
    )
    assert "(6 have none)" in found
    assert "1 of 8 sampled passages are longer than " in found
    assert "0 of 8 sampled queries are longer than " in found


def write_records(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize("processes", ["1", "2"])
def test_queries_that_have_no_negative_left(
    command: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    processes: str,
) -> None:
    """Refused where that is so of all, whatever makes them so."""
    monkeypatch.setenv("WORLD_SIZE", processes)
    same_query = [{"query": "river", "positive": f"a river {n}"} for n in range(8)]
    same_passage = [{"query": f"river {n}", "positive": "a  river" if n % 2 else "a river"} for n in range(8)]
    for records in (same_query, same_passage):
        pairs = write_records(tmp_path / "alone.jsonl", records)
        assert "all of 8 sampled queries have no negative in their batch" in said(command(pairs=pairs), capsys)
    with_negatives = [{"query": "river", "positive": "a river", "negatives": ["a lake"][: n % 2]} for n in range(8)]
    pairs = write_records(tmp_path / "alone.jsonl", with_negatives)
    assert "all of 8" in said(command(pairs=pairs), capsys)  # hard_negatives is 0
    alone = {"global_batch_size": 1, "hard_negatives": 1}
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert main(command(pairs=pairs, max_steps=1, **alone)) == 0
    assert "4 of 8 sampled queries have no negative in their batch" in capsys.readouterr().out


@pytest.mark.parametrize("workers", [0, 1])
def test_data_that_change_during_the_run_stop_it(
    command: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
) -> None:
    """An edit of the same length, after the lines were counted and before they are used."""
    pairs = write_pairs(tmp_path / "edited.jsonl", 12)
    original = trainer.RetrievalTrainer.train

    def edit_and_train(self: Any, *args: Any, **kwargs: Any) -> Any:
        pairs.write_bytes(pairs.read_bytes().replace(b'0"', b'9"'))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(trainer.RetrievalTrainer, "train", edit_and_train)
    found = said(command(pairs=pairs, workers=workers), capsys)
    assert "edited.jsonl, line " in found
    assert "the file was changed since this run began to read it" in found
    assert "Traceback" not in found


def test_recipes_are_whole_yaml() -> None:
    for path in sorted((SHIPPED / "recipes").glob("*.yaml")):
        assert isinstance(yaml.safe_load(path.read_text()), dict), path
    assert small_recipe().hard_negatives == 0
