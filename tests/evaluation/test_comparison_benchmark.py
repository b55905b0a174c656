"""benchmarks/comparison.py: its queue, and that its commands are ones that diffretriever has."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffretriever.cli.arguments import find_recipe
from diffretriever.cli.main import build_parser
from diffretriever.training.adapter_recipe import read_adapter_recipe

pytestmark = pytest.mark.once


@pytest.fixture
def benchmark(load_benchmark: Callable[[str], Any]) -> Any:
    return load_benchmark("comparison")


def job(benchmark: Any, folder: Path, name: str, code: str, *after: str) -> Any:
    """A command that notes its name in a file, and does what `code` says."""
    noted = f"open({str(folder / 'order')!r}, 'a').write({name + ' '!r})"
    return benchmark.Job(name, ["-c", f"{noted}; {code}"], folder / name, list(after))


def test_what_is_done_is_not_done_again_and_a_failure_stops_what_needs_it(
    benchmark: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def made(name: str) -> str:
        return f"open({str(tmp_path / name)!r}, 'w')"

    def jobs(second: str) -> list[Any]:
        return [
            job(benchmark, tmp_path, "first", made("first")),
            job(benchmark, tmp_path, "second", second, "first"),
            job(benchmark, tmp_path, "third", made("third"), "second"),
            job(benchmark, tmp_path, "other", made("other"), "first"),
        ]

    queue = benchmark.Queue(jobs("raise SystemExit(3)"), tmp_path / "logs", 2, os.environ)
    queue.run()
    assert queue.failed == {"second": 3, "third": benchmark.NOT_BEGUN}
    assert sorted((tmp_path / "order").read_text().split()) == ["first", "other", "second"]
    assert f"second: failed with 3: {tmp_path}/logs/second.log" in capsys.readouterr().out
    again = benchmark.Queue(jobs(made("second")), tmp_path / "logs", 2, os.environ)
    again.run()
    assert again.failed == {}
    assert (tmp_path / "order").read_text().split()[3:] == ["second", "third"]


def test_every_command_is_one_of_ours(benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[Any] = []
    monkeypatch.setattr(benchmark.Queue, "run", lambda queue: planned.extend(queue.jobs))
    words = f"comparison.py --backbone base --pairs a b --data one=x two=y --output {tmp_path} --num-queries 0"
    monkeypatch.setattr(sys, "argv", [*words.split(), "--set", "max_steps=200", "--variant", "longer", "max_steps=300"])
    assert benchmark.main() == 0
    trained = {}
    for one in planned:
        options = build_parser().parse_args(one.command[2:])
        if options.command == "train":
            recipe = read_adapter_recipe(find_recipe(options.recipe, "training"), options.set, method=options.method)
            trained[one.name] = (recipe.method, recipe.num_query_masks, recipe.max_steps)
    assert len(trained) == 6 * 3 + 1
    assert trained["train-diffretriever-longer.42"] == ("diffretriever", 4, 300)
    assert trained["train-promptreps-multi.44"] == ("promptreps", 4, 200)
    assert trained["train-diffembed.43"] == ("diffembed", 1, 200)
    assert len(planned) == 1 + 19 + 2 * (19 + 6)
    names = [one.name for one in planned]
    assert all(names.index(before) < names.index(one.name) for one in planned for before in one.after)
