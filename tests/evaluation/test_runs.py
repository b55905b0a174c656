"""Run files: read back exactly, ordered as trec_eval orders them, refused with file and line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffretriever.evaluation.runs import cut, ranking, read_run, without_own_id, write_run


@settings(deadline=None, max_examples=40)
@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=("Z", "C")), min_size=1, max_size=4),
        st.floats(width=32, allow_nan=False, allow_infinity=False),
        max_size=8,
    )
)
def test_a_run_file_reads_back_exactly(tmp_path_factory: pytest.TempPathFactory, scores: dict[str, float]) -> None:
    path = tmp_path_factory.mktemp("runs") / "run.trec"
    write_run(path, {"q": scores, "r": {"p": 1.0}}, "tag")
    found = read_run(path).get("q", {})
    assert {passage: np.float32(score) for passage, score in found.items()} == scores


def test_the_order_is_trec_evals() -> None:
    near = float(np.nextafter(np.float32(1.0), np.float32(2.0)))
    scores = {"a": 1.0, "b": 1.0 + 1e-12, "c": near, "é": 1.0, "z": 1.0}
    assert [passage for passage, _ in ranking(scores)] == ["c", "é", "z", "b", "a"]  # bytes of é > z


def test_a_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="the score of passage 'b' is NaN"):
        ranking({"a": 1.0, "b": float("nan")})


def test_columns_ranks_and_tag(tmp_path: Path) -> None:
    write_run(tmp_path / "run.trec", {"q1": {"a": 0.1, "b": 2.0}}, "mine")
    assert (tmp_path / "run.trec").read_text() == "q1 Q0 b 1 2 mine\nq1 Q0 a 2 0.100000001 mine\n"
    assert list(tmp_path.iterdir()) == [tmp_path / "run.trec"]


@pytest.mark.parametrize("name", ["", "two words", "tab\there"])
def test_an_id_that_the_format_cannot_hold_is_refused_and_leaves_no_file(tmp_path: Path, name: str) -> None:
    for run in ({name: {"a": 1.0}}, {"q": {"a": 1.0, name: 0.5}}):
        with pytest.raises(ValueError, match="cannot stand in a TREC run file"):
            write_run(tmp_path / "run.trec", run, "tag")
    with pytest.raises(ValueError, match="the tag"):
        write_run(tmp_path / "run.trec", {"q": {"a": 1.0}}, name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"q Q0 a 1 0.5 tag\nq Q0 b 2 0.25\n", "run.trec, line 2: 5 columns; a run has six"),
        (b"q Q0 a 1 best tag\n", "run.trec, line 1: the score 'best' is not a number"),
        (b"q Q0 a 1 nan tag\n", "run.trec, line 1: the score 'nan' is not a number"),
        (b"q Q0 a 1 0.5 tag\n\nq Q0 a 2 0.25 tag\n", "run.trec, line 3: passage 'a' stands a second time"),
        (b"q Q0 \xff 1 0.5 tag\n", "run.trec, line 1: not valid UTF-8"),
        (b"\n", "run.trec holds no ranking"),
    ],
)
def test_a_malformed_file_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "run.trec").write_bytes(content)
    with pytest.raises(ValueError, match=r"run\.trec") as error:
        read_run(tmp_path / "run.trec")
    assert words in str(error.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.trec"):
        read_run(tmp_path / "absent.trec")


def test_own_ids_are_dropped_before_the_cut() -> None:
    run = {"7": {"7": 9.0, "8": 2.0, "9": 1.0}, "8": {"7": 1.0}}
    assert cut(without_own_id(run), 1) == {"7": {"8": 2.0}, "8": {"7": 1.0}}
