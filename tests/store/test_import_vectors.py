"""`diffretriever import-vectors`: Parquet files of vectors from elsewhere become the store that encoding would make."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_folders import PARITY
from store_helpers import made_up_texts, silent, write_jsonl

from diffretriever.cli.main import main
from diffretriever.encode.encode_store import encode_store
from diffretriever.store.segments import existing
from diffretriever.store.store import Store

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

TABLE = {"length": [6], "entropy": [], "num_query_masks": [[2], [4]]}
COUNT = 9


class Made:
    """A release, and what it gives for some texts, as the columns of a Parquet file."""

    def __init__(self, release: Path, model: Any, is_query: bool) -> None:
        self.release, self.model, self.is_query = release, model, is_query
        ids, texts = zip(*made_up_texts(COUNT), strict=True)
        out = model.encode_texts(list(texts), is_query, compute_sparse=True)
        masks = out.repr_mask if "repr_mask" in out else torch.ones(out.repr_hidden.shape[:2], dtype=torch.bool)
        dense = [vectors[mask].tolist() for vectors, mask in zip(out.repr_hidden, masks, strict=True)]
        pairs = list(zip(out.sparse_indices.tolist(), out.sparse_values.tolist(), strict=True))
        kept = [[(i, v) for i, v in zip(*pair, strict=True) if v > 0] for pair in pairs]
        self.columns: dict[str, list[Any]] = {
            "id": list(ids), "text": list(texts), "dense": dense,
            "sparse_indices": [[i for i, _ in row] for row in kept],
            "sparse_values": [[v for _, v in row] for row in kept],
        }  # fmt: skip

    def write(self, file: Path, **changed: Any) -> Path:
        """Write the columns, some of them changed; None leaves one out."""
        columns = {name: value for name, value in (self.columns | changed).items() if value is not None}
        parquet.write_table(pa.table(columns), file, row_group_size=4)
        return file

    def command(self, file: Path, out: Path, *more: str) -> list[str]:
        given = ["--input", file, "--model", self.release, "--output", out, "--dtype", "float32", "--model-dtype"]
        return ["import-vectors", *map(str, given), "float32", "--shard-size", "4", *more]


@pytest.fixture(scope="module")
def made(build_release: Callable[..., Path], load_release: Callable[..., Any]) -> Made:
    release = build_release("tiny-llada", "llada-q4p4")
    return Made(release, load_release("tiny-llada", "llada-q4p4"), False)


def test_the_store_is_the_one_that_encoding_makes(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder := tmp_path / "files").mkdir()
    for number, (start, stop) in enumerate([(0, 5), (5, COUNT)]):
        made.write(folder / f"{number}.parquet", **{name: each[start:stop] for name, each in made.columns.items()})
    assert main(made.command(folder, tmp_path / "imported")) == 0
    told = "9 passages; the first 5 are what the model gives"
    assert capsys.readouterr().out == f"{tmp_path / 'imported'}: {told}\n"
    corpus = write_jsonl(tmp_path / "texts.jsonl", made_up_texts(COUNT))
    encoded = encode_store(made.model, corpus, tmp_path / "encoded", dtype="float32", shard_size=4, tell=silent)
    imported = Store.open(tmp_path / "imported", verify=True)
    assert imported.ids() == encoded.ids()
    assert [len(shard) for shard in imported.shards()] == [4, 4, 1]
    for mine, theirs in zip(imported.shards(), encoded.shards(), strict=True):
        torch.testing.assert_close(mine.dense(0, len(mine)), theirs.dense(0, len(theirs)), rtol=0, atol=3e-6)
        assert [mine.text(row) for row in range(len(mine))] == [theirs.text(row) for row in range(len(theirs))]
    search = ["search", "--model", str(made.release), "--mode", "fusion_multi_sparse_max", "--json", "-", "--store"]
    answers = []
    for store in ("imported", "encoded"):
        assert main([*search, str(tmp_path / store), made_up_texts(2)[1][1]]) == 0
        answers.append([line.split('"score"')[0] for line in capsys.readouterr().out.splitlines()])
    assert answers[0] == answers[1]


def test_queries_may_have_fewer_vectors_where_the_release_chooses(
    load_release: Callable[..., Any], build_release: Callable[..., Path], tmp_path: Path
) -> None:
    release = Path(shutil.copytree(build_release("tiny-llada", "llada-q4p4"), tmp_path / "release"))
    config = json.loads((release / "config.json").read_text())
    changed = {"query_budget_table": TABLE, "base_model_name_or_path": str(PARITY / "backbones" / "tiny-llada")}
    (release / "config.json").write_text(json.dumps(config | changed))
    made = Made(release, load_release("tiny-llada", "llada-q4p4", query_budget_table=TABLE), True)
    assert {len(vectors) for vectors in made.columns["dense"]} == {2, 4}
    assert main(made.command(made.write(tmp_path / "q.parquet"), tmp_path / "store", "--queries")) == 0
    store = Store.open(tmp_path / "store")
    counts = torch.cat([existing(shard, 0, len(shard)) for shard in store.shards()]).sum(dim=1)
    assert counts.tolist() == [len(vectors) for vectors in made.columns["dense"]]


def test_fewer_sparse_weights_are_still_the_models(made: Made, tmp_path: Path) -> None:
    few = {}
    for name in ("sparse_indices", "sparse_values"):
        rows = zip(made.columns["sparse_values"], made.columns[name], strict=True)
        largest = [[value for _, value in sorted(zip(*row, strict=True), reverse=True)[:2]] for row in rows]
        few[name] = largest
    assert main(made.command(made.write(tmp_path / "v.parquet", **few), tmp_path / "store")) == 0


def test_without_texts_nothing_is_compared(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(made.command(made.write(tmp_path / "v.parquet", text=None), tmp_path / "store")) == 0
    assert "not compared with the model (no texts)" in capsys.readouterr().out
    assert next(iter(Store.open(tmp_path / "store").shards())).text(0) is None
    assert main(made.command(made.write(tmp_path / "v.parquet"), tmp_path / "unasked", "--compare", "0")) == 0
    assert "not compared with the model (as asked)" in capsys.readouterr().out


def _changed(values: list[Any], row: int, value: Any) -> list[Any]:
    return [value if number == row else each for number, each in enumerate(values)]


def _refused(made: Made) -> dict[str, tuple[dict[str, Any], str]]:
    """What is wrong with a file, and the words that its user sees."""
    dense, indices, values, ids = (made.columns[name] for name in ("dense", "sparse_indices", "sparse_values", "id"))
    width = len(dense[0][0])
    return {
        "no column": ({"dense": None}, "lacks the column 'dense' (a list of H numbers, or of K such lists)."),
        "no id": ({"id": _changed(ids, 2, None)}, "row 3: `id` is missing."),
        "numbers as ids": ({"id": list(range(COUNT))}, "row 1: `id` is 0; expected a string each."),
        "twice": ({"id": _changed(ids, 7, ids[1])}, "is that of row 2 and of row 8; each must have its own."),
        "K": ({"dense": _changed(dense, 4, dense[4][:3])}, "row 5: `dense` has 3 vectors; this model's passage has 4."),
        "H": ({"dense": _changed(dense, 0, [[1.0] * 3] * 4)}, "row 1: a vector has 3 numbers; this model's have"),
        "length": ({"dense": _changed(dense, 5, [[0.5] * width] * 4)}, "row 6: a vector's length is"),
        "NaN": ({"dense": _changed(dense, 5, [[float("nan")] * width] * 4)}, "row 6: a vector's length is nan"),
        "no vector": ({"dense": _changed(dense, 5, [*dense[5][:3], None])}, "`dense` has a vector that is missing."),
        "no row": (dict.fromkeys(made.columns, pa.array([], pa.string())), "v.parquet: no rows; expected at least"),
        "words": ({"dense": ["no"] * COUNT}, "row 1: `dense` is of type string; expected a list of H numbers"),
        "more": ({"sparse_values": _changed(values, 1, [])}, f"row 2: {len(indices[1])} `sparse_indices`, but 0"),
        "many": (
            {"sparse_indices": _changed(indices, 1, [1] * 600), "sparse_values": _changed(values, 1, [1.0] * 600)},
            "row 2: 600 sparse weights; this model keeps",
        ),
        "token": ({"sparse_indices": _changed(indices, 3, [10**9] * len(indices[3]))}, "row 4: token 10000000"),
        "weight": ({"sparse_values": _changed(values, 3, [-1.0] * len(indices[3]))}, "row 4: token"),
        "another's words": (
            {"sparse_indices": [[7, 9]] * COUNT, "sparse_values": [[0.01, 0.01]] * COUNT},
            "row 1: its sparse weights are not those that this model has for its text (cosine 0.000)",
        ),
        "no weights": (
            {"sparse_indices": _changed(indices, 2, []), "sparse_values": _changed(values, 2, [])},
            "row 3: its sparse weights are not those",
        ),
        "another's": ({"text": made.columns["text"][::-1]}, "row 1: its vectors are not those that this model has for"),
    }  # fmt: skip


def test_what_cannot_be_the_models_is_refused(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffretriever.cli.import_vectors.load_model", lambda *_, **__: made.model)
    for name, (changed, words) in _refused(made).items():
        file = made.write(tmp_path / "v.parquet", **changed)
        assert main(made.command(file, tmp_path / "store")) == 2, name
        said = capsys.readouterr().err
        assert words in said.splitlines()[-1], (name, said)
        assert not (tmp_path / "store").exists(), name
    (tmp_path / "v.parquet").write_bytes(b"PAR1 and no more")
    assert main(made.command(tmp_path / "v.parquet", tmp_path / "store")) == 2
    assert "not a whole Parquet file" in capsys.readouterr().err
    assert main(made.command(tmp_path / "absent.parquet", tmp_path / "store")) == 2
    assert "absent.parquet: no such file." in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["v.parquet"]
    made.write(tmp_path / "v.parquet")
    monkeypatch.setattr("diffretriever.cli.import_vectors.load_model", lambda *_, **__: pytest.fail("loaded"))
    assert main(made.command(tmp_path / "v.parquet", tmp_path)) == 2
    assert "not empty; a store is written into a folder of its own" in capsys.readouterr().err
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    assert main(made.command(tmp_path / "v.parquet", tmp_path / "link")) == 2
    assert "link: is a link; nothing is removed or replaced behind it" in capsys.readouterr().err
    for option in (["--compare", "-1"], ["--shard-size", "0"]):
        with pytest.raises(SystemExit, match="2"):
            main(made.command(tmp_path / "v.parquet", tmp_path / "store", *option))
        assert f"argument {option[0]}: expected a whole number of at least" in capsys.readouterr().err
