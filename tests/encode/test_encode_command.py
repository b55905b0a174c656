"""`diffretriever encode` as a user calls it: options, messages, exit status."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from store_helpers import made_up_texts, write_jsonl
from torch import nn

from diffretriever.model.modeling_diffretriever import DiffRetriever
from diffretriever.store.store import Store


@pytest.fixture
def release(build_release: Callable[..., Path]) -> Path:
    return build_release("tiny-llada", "llada-q4p4")


def test_every_option_reaches_the_store(
    release: Path, tmp_path: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    queries = write_jsonl(tmp_path / "queries.jsonl", made_up_texts(5))
    status = command(
        "encode", "--model", release, "--input", tmp_path, "--queries", "--output", tmp_path / "s", "--dtype", "int8",
        "--model-dtype", "bfloat16", "--num-query-masks", 2, "--max-length", 120, "--sparse-top-k", 6,
        "--no-content-filter", "--no-texts", "--shard-size", 2, "--tokens-per-batch", 333,
        "--device", "cpu", "--attn-implementation", "eager",
    )  # fmt: skip
    assert (status, queries.is_file()) == (0, True)
    captured = capsys.readouterr()
    assert captured.out == f"{tmp_path / 's'}: 5 texts in 3 shards\n"
    assert "5/5" in captured.err  # the bar
    assert "tokens/s" in captured.err
    manifest = Store.open(tmp_path / "s").manifest
    assert (manifest.side, manifest.dtype, manifest.num_masks) == ("query", "int8", 2)
    assert (manifest.max_length, manifest.sparse_top_k) == (120, 6)
    expected = {"model_dtype": "bfloat16", "content_filter": False, "keep_texts": False, "shard_size": 2}
    assert expected.items() <= manifest.options.items()
    assert manifest.options["tokens_per_batch"] == 333


def test_compiled_layers_make_the_same_store(
    release: Path, tmp_path: Path, corpus: Path, command: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, **_: compiled.append(type(module).__name__))
    arguments = ("encode", "--model", release, "--input", corpus, "--quiet", "--output")
    assert command(*arguments, tmp_path / "plain") == 0
    assert not compiled
    assert command(*arguments, tmp_path / "compiled", "--compile") == 0
    assert set(compiled) == {"LlamaDecoderLayer"}
    plain, other = (Store.open(tmp_path / name).manifest for name in ("plain", "compiled"))
    assert plain == other


def test_again_says_that_nothing_is_left_to_do(
    release: Path, tmp_path: Path, corpus: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("encode", "--model", release, "--input", corpus, "--output", tmp_path / "s", "--quiet")
    assert (command(*arguments), command(*arguments)) == (0, 0)
    captured = capsys.readouterr()
    assert "the store was finished before; all bytes match their hashes" in captured.err
    assert "passage/s" not in captured.err


def test_a_finished_store_that_cannot_be_written_is_done(
    release: Path, tmp_path: Path, corpus: Path, command: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a read-only mount, where removing what is not there fails, too."""
    arguments = ("encode", "--model", release, "--input", corpus, "--output", tmp_path / "s", "--quiet")
    assert command(*arguments) == 0

    def refuse(path: object, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    for call in ("unlink", "mkdir", "link", "rename", "replace", "rmdir"):
        monkeypatch.setattr(os, call, refuse)
    assert command(*arguments) == 0


def test_a_store_deleted_during_the_run_is_said_in_one_line(
    release: Path,
    tmp_path: Path,
    corpus: Path,
    command: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, encode = tmp_path / "s", DiffRetriever.encode_prepared

    def deleting(*arguments: Any, **options: Any) -> Any:
        shutil.rmtree(folder, ignore_errors=True)
        return encode(*arguments, **options)

    monkeypatch.setattr(DiffRetriever, "encode_prepared", deleting)
    arguments = ("--model", release, "--input", corpus, "--output", folder, "--shard-size", 2, "--quiet")
    assert command("encode", *arguments) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"diffretriever encode: {folder}: the store was deleted while it was being made")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            '{"_id": "1", "text": "a"}\n{"_id": "2"}\n',
            "bad.jsonl, line 2: the text is missing; its field is one of text, contents, passage, body, query.",
        ),
        (
            '{"_id": "1", "text": "a"}\n{"_id": "1", "text": "b"}\n',
            "ids occur twice, counted from 1: '1' (texts 1 and 2)",
        ),
        ("", "bad.jsonl: no texts; expected at least one."),
        (None, "bad.jsonl: no such file or folder; expected a BEIR folder"),
    ],
)
def test_wrong_input_is_said_in_one_line(
    release: Path,
    tmp_path: Path,
    command: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    content: str | None,
    said: str,
) -> None:
    if content is not None:
        (tmp_path / "bad.jsonl").write_text(content)
    arguments = ("--model", release, "--input", tmp_path / "bad.jsonl", "--output", tmp_path / "s", "--quiet")
    assert command("encode", *arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("diffretriever encode: ")
    assert said in lines[-1]


def test_a_model_that_is_not_there(
    tmp_path: Path, corpus: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--input", corpus, "--output", tmp_path / "s", "--quiet")
    assert command("encode", "--model", tmp_path / "nowhere", *arguments) == 2
    assert "nowhere" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_that_may_not_be_written(
    release: Path, tmp_path: Path, corpus: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    arguments = ("--model", release, "--input", corpus, "--output", tmp_path / "closed" / "s")
    assert command("encode", *arguments) == 2
    assert "Permission denied" in capsys.readouterr().err
