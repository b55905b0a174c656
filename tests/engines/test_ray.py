"""`diffretriever encode --engine ray`: the store of one process, to the byte, whatever is there when it begins."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from store_helpers import folder_bytes, made_up_texts, write_jsonl

from diffretriever.cli.main import main
from diffretriever.encode.ray_tasks import CorpusParts
from diffretriever.files.claims import Claims

SHARDS = [f"shard-{number:06d}.safetensors" for number in range(6)]
Parts = Callable[[list[int]], CorpusParts]


@pytest.fixture
def parts(tmp_path: Path) -> Parts:
    """Return a function that writes 11 texts into files of so many, to be cut into shards of 4."""

    def write(sizes: list[int]) -> CorpusParts:
        texts, files = iter(made_up_texts(11)), []
        for number, size in enumerate(sizes):
            files.append(
                str(write_jsonl(tmp_path / f"{len(sizes)}-{number}.jsonl", [next(texts) for _ in range(size)]))
            )
        return CorpusParts("corpus", tuple(files), False, tmp_path, 4)

    return write


@pytest.mark.once
@pytest.mark.parametrize(
    "sizes", [[4, 4, 3], [3, 3, 5], [1, 1, 1, 1, 1, 6], [10, 1], [0, 9, 0, 2, 0], [2, 9], [1] * 11, [8, 3]]
)
def test_each_part_reads_its_own_shards_as_one_reading_does(parts: Parts, sizes: list[int]) -> None:
    several, whole = parts(sizes), parts([11])
    counts = [several.count({"file": number})["count"] for number in range(len(sizes))]
    assert counts == sizes
    found = [(row["number"], row["digest"]) for part in several.rows(counts[:-1]) for row in several.survey(part)]
    assert sorted(found) == [(row["number"], row["digest"]) for row in whole.survey(whole.rows([])[0])]
    assert len(found) == 3


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """A small cluster of this machine, with room for one actor."""
    module = pytest.importorskip("ray", reason="Ray has an environment of its own: .ci/engine ray")
    module.init(num_cpus=1, object_store_memory=80 * 2**20, include_dashboard=False, log_to_driver=False)
    yield module
    module.shutdown()


@pytest.fixture
def asked(build_release: Callable[..., Path], tmp_path: Path) -> list[str]:
    """A command over 23 texts in three files of tmp_path/corpus; tmp_path/one has the store that one process made."""
    texts = made_up_texts(23)
    (tmp_path / "corpus").mkdir()
    for number, (first, end) in enumerate([(0, 9), (9, 10), (10, 23)]):
        write_jsonl(tmp_path / "corpus" / f"part{number}.jsonl", texts[first:end])
    release = build_release("tiny-llada", "llada-q4p4")
    given = ["encode", "--model", str(release), "--input", str(tmp_path / "corpus"), "--shard-size", "4", "--quiet"]
    assert main([*given, "--output", str(tmp_path / "one")]) == 0
    return [*given, "--engine", "ray", "--actors", "1", "--output"]


@pytest.mark.slow
@pytest.mark.once
def test_the_store_is_that_of_one_process(ray: Any, asked: list[str], tmp_path: Path) -> None:
    before, whole = signal.getsignal(signal.SIGTERM), folder_bytes(tmp_path / "one")
    assert main([*asked, str(tmp_path / "ray")]) == 0
    assert folder_bytes(tmp_path / "ray") == whole
    assert sorted(name for name in whole if name.startswith("shard")) == SHARDS
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.slow
@pytest.mark.once
def test_what_is_there_is_kept(ray: Any, asked: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "one"
    whole, given = folder_bytes(folder), [*asked, str(folder)]
    capsys.readouterr()  # a damaged shard and a lost one are made again, the others kept
    damaged, lost = folder / SHARDS[1], folder / SHARDS[5]
    damaged.write_bytes(whole[SHARDS[1]][:-1] + bytes([whole[SHARDS[1]][-1] ^ 4]))
    lost.unlink()
    kept = {name: (folder / name).stat().st_mtime_ns for name in (SHARDS[0], SHARDS[2], SHARDS[3], SHARDS[4])}
    assert main(given) == 0
    assert f"{damaged}: the shard's bytes do not match its hash" in capsys.readouterr().err
    assert folder_bytes(folder) == whole
    assert {name: (folder / name).stat().st_mtime_ns for name in kept} == kept

    assert main(given) == 0  # nothing is left to do
    assert "the store was finished before; all bytes match their hashes" in capsys.readouterr().err

    with Claims(folder / "claims") as claims:
        assert claims.take("finish")
        assert main(given) == 2
    assert f"is being written (locked) by process {os.getpid()} on " in capsys.readouterr().err

    write_jsonl(tmp_path / "corpus" / "part1.jsonl", [("other", "text")])
    assert main(given) == 2
    assert "of another corpus: it has 23 texts" in capsys.readouterr().err.splitlines()[-1]
    write_jsonl(tmp_path / "corpus" / "part1.jsonl", made_up_texts(1))
    assert main([*asked, str(tmp_path / "twice")]) == 2
    assert "ids occur twice, counted from 1: 'id 0 é' (texts 1 and 10)" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.once
def test_a_cluster_that_asks_for_a_token(
    ray: Any,
    build_release: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What Ray says of it is that it cannot connect."""

    def refuse(address: str, **_: Any) -> None:
        raise ConnectionError(f"Failed to connect to Ray cluster at {address}")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    given = ["encode", "--model", str(build_release("tiny-llada", "llada-q4p4"))]
    given += ["--input", str(write_jsonl(tmp_path / "a.jsonl", made_up_texts(1))), "--output", str(tmp_path / "s")]
    assert main([*given, "--engine", "ray", "--address", "10.0.0.1:6379"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "Failed to connect to Ray cluster at 10.0.0.1:6379. If it runs, it may ask for a token" in last
    assert "set RAY_AUTH_MODE=token here" in last


@pytest.mark.once
def test_options_of_ray_go_with_ray(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = write_jsonl(tmp_path / "a.jsonl", made_up_texts(1))
    given = ["encode", "--model", "m", "--input", str(corpus), "--output", str(tmp_path / "s"), "--actors", "2"]
    assert main(given) == 2
    assert "--address and --actors go with --engine ray" in capsys.readouterr().err
