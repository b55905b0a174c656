"""`select-budget --adaptive`: learned on training queries, shown on others, written into a release and no more."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_folders import PARITY, edit_json
from pretend_cpu import pretend_cpu
from training_data import made_up_pairs, write_lines
from transformers import AutoModel

from diffretriever.cli.main import main
from diffretriever.evaluation.small_task import read_small_task
from diffretriever.publishing import adaptive, card, record
from diffretriever.publishing import build as building
from diffretriever.publishing.check import check_release
from diffretriever.training.budget import encode_with

SPLIT = 6  # of the pairs, the first are dev's


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training pairs, and a benchmark whose queries are among them, in capitals."""
    folder, records = tmp_path_factory.mktemp("data"), made_up_pairs(60)
    (folder / "qrels").mkdir()
    write_lines(folder / "pairs.jsonl", records)
    write_lines(folder / "corpus.jsonl", [{"_id": f"p{n}", "text": row["positive"]} for n, row in enumerate(records)])
    queries = [{"_id": f"q{n}", "text": row["query"].upper()} for n, row in enumerate(records[:SPLIT])]
    write_lines(folder / "queries.jsonl", queries)
    judged = "".join(f"q{n}\tp{n}\t1\n" for n in range(SPLIT))
    (folder / "qrels" / "dev.tsv").write_text(f"query-id\tcorpus-id\tscore\n{judged}")
    return folder


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained release with a fingerprint."""
    place = tmp_path_factory.mktemp("releases") / "adaptive-q4p4"
    parts = (str(PARITY / "backbones" / "tiny-llada"), place, str(PARITY / "adapters" / "llada-q4p4"))
    building.build(*parts, recording=building.Recording("always"))
    return place


def command(release: Path, data: Path, out: Path, *more: str) -> list[str]:
    given = ["--pairs", str(data / "pairs.jsonl"), "--data", str(data), "--num-queries", "60", "--budgets", "1", "4"]
    return ["select-budget", "--adaptive", "--model", str(release), *given, "--output", str(out), *more]


@pytest.fixture(scope="module")
def learned(release: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, str]:
    """The release with the table that the command wrote, what it found, and what it printed."""
    place = tmp_path_factory.mktemp("learned")
    copy = shutil.copytree(release, place / "adaptive-learned")
    (copy / ".notes").write_text("not ours")
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        pretend_cpu(patch)
        patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(map(str, words))))
        assert main(command(copy, data, place / "out.json")) == 0
    return copy, json.loads((place / "out.json").read_text()), "\n".join(printed)


def test_what_is_learned_and_shown(learned: tuple[Path, Any, str], release: Path, data: Path) -> None:
    folder, found, printed = learned
    assert found["queries"] == 60 - SPLIT  # dev's are left out, whatever their case
    cells = [(cell["num_query_masks"], cell["num_passage_masks"]) for cell in found["grid"]]
    assert cells == [(1, 4), (4, 4)]
    task = read_small_task(data, "dev")
    options: Any = {"trust_remote_code": True, "torch_dtype": torch.float32}
    for name, model in (
        ("fixed", AutoModel.from_pretrained(release, **options)),
        ("score", AutoModel.from_pretrained(folder, **options)),
    ):
        expected = task.evaluate(model.encode_texts)
        for mode, value in expected.items():
            assert found["dev"]["modes"][mode][name] == pytest.approx(value, abs=1e-9)
            assert f"{value:.4f}" in printed
    assert model.config.query_budget_table == found["table"]
    row = found["dev"]["modes"]["fused"]
    assert row["difference"] == pytest.approx(row["score"] - row["fixed"])
    verdict = "beats" if row["difference"] > 0 and row["p"] < 0.05 else "does not beat"
    assert f"The table {verdict} the fixed budget on dev" in printed


def test_a_release_learns_anew_and_analyze_budget_reads_it(
    learned: tuple[Path, Any, str], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """An earlier table takes no part in what is tried: the same is found; on whichever device it was tried."""
    pretend_cpu(monkeypatch)
    folder = shutil.copytree(learned[0], tmp_path / "adaptive-again")
    out, figures = tmp_path / "out.json", tmp_path / "analysis.json"
    before = AutoModel.from_pretrained(folder, trust_remote_code=True, torch_dtype=torch.float32)
    before.config.query_budget_table = {"length": [], "entropy": [], "num_query_masks": [[2]]}
    queries = read_small_task(data, "dev").benchmark.queries
    assert encode_with(before, queries, True, 3)["repr_hidden"].shape[1] == 3
    assert before.config.budgets(is_query=True) == [2]
    capfd.readouterr()
    assert main(command(folder, data, out, "--device", "auto")) == 0
    assert "Loading weights" not in capfd.readouterr().err
    assert json.loads(out.read_text()) == learned[1]
    assert main(["analyze-budget", "--input", str(out), "--learn", str(out), "--json", str(figures)]) == 0
    assert json.loads(figures.read_text())["num_query_masks"] == 4  # the release's own is the fixed one


def test_nothing_else_of_the_release_changes(learned: tuple[Path, Any, str], release: Path) -> None:
    folder, found, _ = learned
    fields = json.loads((folder / "config.json").read_text())
    assert fields.pop("query_budget_table") == found["table"]
    assert fields == json.loads((release / "config.json").read_text())
    assert (folder / ".notes").read_text() == "not ours"
    before, after = (record.release_files(place) for place in (release, folder))
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name].read_bytes() != after[name].read_bytes()}
    assert changed - {"README.md"} == {"config.json", "release.json"}  # the card speaks of K_q where it now differs
    assert sorted(folder.parent.iterdir()) == [folder, folder.parent / "out.json"]


def test_the_release_is_still_one_to_publish(release: Path, tmp_path: Path) -> None:
    """Its record and the fingerprint of its vectors are those of the table."""
    folder = shutil.copytree(release, tmp_path / "adaptive-checked")
    table = {"length": [8], "entropy": [], "num_query_masks": [[1], [3]]}
    adaptive.write_table(folder, table)
    assert check_release(folder, load=False).problems == []
    text, made = (folder / "README.md").read_text(), record.read_record(folder)
    expected = card.example_blocks(made["repo_id"], single=False, adaptive=True)
    assert [source for _, source in card.code_blocks(text)] == expected
    assert "1 to 3 (query, by its length and entropy) or 4 (passage) `[MASK]` tokens" in text
    assert "| [MASK] tokens | K_q = 1 to 3 for a query, K_p = 4 for a passage |" in text
    assert "| dense vectors | 1 to 3 / 4 x " in text
    shapes = [entry["dense_shape"][0] for entry in record.read_record(folder)["fingerprint"]["texts"]]
    assert shapes[2:] == [4, 4]
    assert set(shapes[:2]) <= {1, 3}
    adaptive.write_table(folder, table | {"length": [2]})
    shapes = [entry["dense_shape"][0] for entry in record.read_record(folder)["fingerprint"]["texts"]]
    assert shapes == [3, 3, 4, 4]


@pytest.mark.slow
@pytest.mark.once
@pytest.mark.usefixtures("forked_check")
def test_the_check_runs_the_card_s_code(learned: tuple[Path, Any, str]) -> None:
    report = check_release(learned[0])
    assert report.problems == []
    assert "its vectors in a fresh process are those of the build" in report.passed


def test_search_and_evaluate_take_the_release(
    learned: tuple[Path, Any, str], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, found, _ = learned
    store = tmp_path / "store"
    given = ["--model", str(folder), "--model-dtype", "float32"]
    assert main(["encode", *given, "--input", str(data), "--output", str(store), "--dtype", "float32", "--quiet"]) == 0
    assert main(["search", *given, "--store", str(store), "--top-k", "1", "axis tilt"]) == 0
    report = tmp_path / "figures.json"
    capsys.readouterr()
    asked = ["--data", str(data), "--split", "dev", "--store", str(store), "--modes", "multi_dense", "--quiet"]
    assert main(["evaluate", *given, *asked, "--metrics", "nDCG@10", "--json", str(report)]) == 0
    assert json.loads(report.read_text())["multi_dense"]["nDCG@10"] == pytest.approx(
        found["dev"]["modes"]["dense"]["score"], abs=1e-4
    )


def test_what_is_refused(release: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    touched = shutil.copytree(release, tmp_path / "adaptive-touched")
    edit_json(touched / "config.json", max_length=140)
    snapshot = tmp_path / "snapshots" / ("0" * 40)
    shutil.copytree(release, snapshot)
    out = tmp_path / "out.json"
    refused = [
        (command(touched, data, out), "is not as it was built: config.json was changed since it was built"),
        (command(snapshot, data, out), "lies in the Hub's cache; copy the release"),
        (command(release, data, out, "--adapter", str(release / "adapter")), "leave --method, --adapter and"),
        (
            ["select-budget", "--adaptive", "--model", str(release), "--output", str(out), "--data", str(data)],
            "give both",
        ),
        (
            ["select-budget", "--model", str(release), "--output", str(out)],
            "--pairs FILES or --data FOLDER, one of them",
        ),
        (command(release, data, out)[:1] + command(release, data, out)[2:], "one of them"),
    ]
    for words, message in refused:
        assert main(words) == 2
        assert message in capsys.readouterr().err


def test_a_failed_write_leaves_the_release_as_it_was(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(release, tmp_path / "adaptive-failing")
    before = {name: file.read_bytes() for name, file in record.release_files(folder).items()}

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    table = {"length": [], "entropy": [], "num_query_masks": [[2]]}
    with monkeypatch.context() as patch:
        patch.setattr(record, "write_record", full)
        with pytest.raises(OSError, match="No space left"):
            adaptive.write_table(folder, table)
    with pytest.raises(ValueError, match="`num_query_masks` must be 1 lists of 1"):
        adaptive.write_table(folder, table | {"num_query_masks": []})
    assert {name: file.read_bytes() for name, file in record.release_files(folder).items()} == before
    assert list(tmp_path.iterdir()) == [folder]
