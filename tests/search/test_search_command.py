"""The commands search, index, compress and export, as a user types them."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

from diffretriever.cli.main import main
from diffretriever.evaluation.runs import read_run
from diffretriever.search import MODES, Searcher, open_store
from diffretriever.store.identity import describe_model
from diffretriever.store.store import ShardContents, write_store

ROOT = Path(__file__).resolve().parents[2]
RELEASE = ROOT / "checkpoints" / "diffretriever-llada-tiny-multi-q4-p4"
TEXTS = {
    "mp3 player": "Plays MP3 and Ogg Vorbis audio files.",
    "httpd": "A fast HTTP daemon that serves web pages.",
    "editor\x1b[31m": "A text editor\x1b[2J for the terminal, with syntax colours.",
    "検索": "日本語の全文検索エンジン。" * 20,
    "empty": "",
}


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModel.from_pretrained(RELEASE, trust_remote_code=True)


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of passages and one of queries."""
    folder = tmp_path_factory.mktemp("commands")
    for name, texts in (("store", TEXTS), ("queries", {"q1": "audio player", "q2": "web server"})):
        query = name == "queries"
        out = model.encode_texts(list(texts.values()), is_query=query)
        contents = ShardContents(list(texts), **out, texts=list(texts.values()))
        settings = describe_model(model, query, "float32", {"sparse_top_k": out["sparse_indices"].shape[1]})
        write_store(folder / name, [contents], settings.__dict__)
    return folder


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


@pytest.mark.parametrize("mode", MODES)
def test_search_prints_what_score_ranks(
    model: Any, folder: Path, capsys: pytest.CaptureFixture[str], mode: str
) -> None:
    arguments = ["--model", RELEASE, "--store", folder / "store", "--mode", mode, "--top-k", 3, "--json", "-"]
    assert run("search", *arguments, "play audio files") == 0
    answer = json.loads(capsys.readouterr().out)
    passages = model.encode_texts(list(TEXTS.values()), is_query=False)
    scores = model.score(model.encode_texts(["play audio files"], is_query=True), passages, mode)[0]
    best = scores.topk(3)
    expected = [(list(TEXTS)[row], score) for row, score in zip(best.indices, best.values.tolist(), strict=True)]
    expected = [(name, score) for name, score in expected if mode != "sparse_max" or score > 0]
    assert [hit["id"] for hit in answer["hits"]] == [name for name, _ in expected]
    assert [hit["score"] for hit in answer["hits"]] == pytest.approx([score for _, score in expected], abs=1e-4)
    assert [hit["text"] for hit in answer["hits"]] == [TEXTS[name] for name, _ in expected]


@pytest.mark.once
@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "gbk"])
@pytest.mark.parametrize("as_json", [True, False])
def test_results_are_printed_on_any_console(
    folder: Path, encoding: str, as_json: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr("sys.stdout", printed)
    given = ["--model", RELEASE, "--store", folder / "store", "--top-k", 5]
    assert run("search", *given, *(["--json", "-"] if as_json else []), "naïve 検索 😀") == 0
    printed.flush()
    shown = printed.buffer.getvalue().decode(encoding)
    if as_json:
        answer = json.loads(shown)
        assert answer["query"] == "naïve 検索 😀"
        assert {hit["id"]: hit["text"] for hit in answer["hits"]} == TEXTS
    else:
        assert "mp3 player" in shown


def test_readable_results_fit_the_terminal(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffretriever.cli.display import text_width

    monkeypatch.setenv("COLUMNS", "46")
    assert run("search", "--model", RELEASE, "--store", folder / "store", "text editor") == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("mp3 player", "httpd", "検索", "empty"))
    assert "\x1b" not in printed  # a passage cannot give the terminal orders
    assert "…" in printed
    assert max(text_width(line) for line in printed.splitlines()) <= 46


def test_interactive_keeps_the_model(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("web pages\n\n  play mp3 \n"))
    assert run("search", "--model", RELEASE, "--store", folder / "store", "--interactive", "--json", "-") == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["query"] for answer in answers] == ["web pages", "play mp3"]
    assert len(answers[1]["hits"]) == len(TEXTS)


def test_json_goes_to_a_file_or_as_before_to_standard_output(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("search", "--model", RELEASE, "--store", folder / "store", "--top-k", 2)
    assert run(*given, "web pages", "play mp3", "--json", tmp_path / "found.jsonl") == 0
    shown, rows = (
        capsys.readouterr(),
        [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()],
    )
    assert [row["query"] for row in rows] == ["web pages", "play mp3"]
    assert shown.out.startswith(f"web pages\n 1  {rows[0]['hits'][0]['score']:.4f}  ")
    for words in (("--json", "web pages"), ("web pages", "--json")):
        assert run(*given, *words) == 0
        shown = capsys.readouterr()
        assert json.loads(shown.out) == rows[0]
    assert run(*given, "web pages", "--json", tmp_path / "no" / "\0") == 2


def test_a_search_that_fails_leaves_the_answers_of_an_earlier_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = tmp_path / "found.jsonl"
    given = ("search", "--model", RELEASE, "--store", folder / "store", "--json", found)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    found.write_text("an earlier one's\n")
    assert run(*given, "--interactive") == 0  # without a question there is no answer
    assert found.read_text() == ""
    found.write_text("an earlier one's\n")
    monkeypatch.setattr(Searcher, "encode", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(*given, "web pages")
    assert found.read_text() == "an earlier one's\n"


def test_a_wrong_size_or_weight_is_told_before_the_model_is_loaded(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("search", "--model", tmp_path / "none", "--store", folder / "store", "web pages")
    for name in ("--top-k", "--candidates"):
        with pytest.raises(SystemExit, match="2"):
            run(*given, name, 0)
        assert f"argument {name}: expected a whole number of at least 1, got '0'" in capsys.readouterr().err
    assert run(*given, "--fusion-weight", 2) == 2
    assert "`fusion_weight` must lie between 0 and 1, got 2.0." in capsys.readouterr().err


def test_the_release_recommends_the_mode(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It makes no other model: a store of the release that recommends nothing is searched as before."""
    assert run("search", "--model", RELEASE, "--store", folder / "store", "web pages", "--json", "-") == 0
    assert json.loads(capsys.readouterr().out)["mode"] == "fusion_multi_sparse_max"
    other = tmp_path / "advises-otherwise"
    shutil.copytree(RELEASE, other, symlinks=False)
    fields = json.loads((other / "config.json").read_text())
    fields["base_model_name_or_path"] = str(RELEASE.parent / "llada-tiny")
    for mode, taken in (("sparse_max", "sparse_max"), (None, "multi_dense")):
        (other / "config.json").write_text(json.dumps(fields | {"recommended_mode": mode}))
        assert run("search", "--model", other, "--store", folder / "store", "web pages", "--json", "-") == 0
        assert json.loads(capsys.readouterr().out)["mode"] == taken
    (other / "config.json").write_text(json.dumps(fields | {"recommended_mode": "best"}))
    assert run("search", "--model", other, "--store", folder / "store", "web pages") == 2
    assert re.search(r"recommended_mode.*best.*only .single_dense", capsys.readouterr().err)


def test_the_release_recommends_the_fusions_weight(
    model: Any, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the mode, it makes no other model."""
    other = tmp_path / "advises-a-weight"
    shutil.copytree(RELEASE, other, symlinks=False)
    fields = json.loads((other / "config.json").read_text())
    fields |= {"base_model_name_or_path": str(RELEASE.parent / "llada-tiny"), "recommended_fusion_weight": 0.9}
    (other / "config.json").write_text(json.dumps(fields))
    passages, query = open_store(folder / "store"), model.encode_texts(["web pages"], is_query=True)
    mode = "fusion_multi_sparse_max"
    given = ["search", "--store", folder / "store", "--mode", mode]
    scores = {}
    for more, weight in (([], 0.9), (["--fusion-weight", 0.5], 0.5), (["--fusion-weight", 0], 0.0)):
        assert run(*given, "--model", other, "web pages", "--json", "-", *more) == 0
        expected = Searcher(passages).search(query, mode, fusion_weight=weight).scores[0]
        scores[weight] = [hit["score"] for hit in json.loads(capsys.readouterr().out)["hits"]]
        assert scores[weight] == pytest.approx([score for score in expected.tolist() if score > -torch.inf], abs=1e-5)
    assert scores[0.9] != scores[0.5]


def test_another_model_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = ROOT / "checkpoints" / "diffretriever-llada-tiny-single"
    assert run("search", "--model", other, "--store", folder / "store", "x") == 2
    assert re.search(
        r"made by model '.*q4-p4', not '.*single': other `adapter`.*Encode both with one model", capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "m", "x"], "--store FOLDER or --qdrant LOCATION"),
        (["--model", "m", "--store", "s"], "--interactive or --queries"),
        (["--model", "m", "--store", "s", " "], "a question is empty"),
        (["--model", "m", "--store", "s", "x", ""], "a question is empty"),
        (["--store", "s", "x"], "questions need --model"),
        (["--model", "m", "--qdrant", "q", "--in-memory", "x"], "--in-memory is for a store"),
        (
            ["--model", "m", "--store", "s", "--collection", "c", "--timeout", "3", "x"],
            "--collection, --timeout: for a Q",
        ),
        (
            ["--model", "m", "--store", "s", "--mode", "sparse_max", "--fusion-weight", "0", "x"],
            "sparse_max has one side",
        ),
        (
            ["--model", "m", "--store", "s", "--mode", "multi_dense", "--fusion", "exact", "x"],
            "--fusion: for the fusion",
        ),
        (
            ["--model", "m", "--store", "s", "--mode", "multi_dense", "--candidates", "9", "x"],
            "--candidates: for the f",
        ),
        (["--store", "s", "--queries", "q"], "--queries needs --run-file"),
        (["--store", "s", "--queries", "q", "--run-file", "r", "--json", "j"], "--json is for questions"),
    ],
)
def test_options_that_do_not_go_together(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("search", *arguments) == 2
    assert words in capsys.readouterr().err


def test_swapped_sides_are_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    queries, run_file = folder / "queries", tmp_path / "run.trec"
    for options in (
        ["--store", queries, "--queries", queries, "--run-file", run_file],
        ["--store", queries, "--model", RELEASE, "a question"],
    ):
        assert run("search", *options) == 2
        said = capsys.readouterr().err
        assert f"{queries}: these are vectors of queries, where passages belong. Encode queries with" in said
    assert run("search", "--store", folder / "store", "--queries", folder / "store", "--run-file", run_file) == 2
    assert "store: these are vectors of passages, where queries belong" in capsys.readouterr().err
    assert run("index", "--store", queries, "--qdrant", tmp_path / "qdrant", "--collection", "c") == 2
    assert "these are vectors of queries, where passages belong" in capsys.readouterr().err
    assert not run_file.exists()


def test_a_run_file_from_a_store_of_queries(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for side, ids in (("store", ["p 1", "p2", "p3", "p4", "p5"]), ("queries", ["q 1", "q2"])):
        there = open_store(folder / side)
        shard = next(there.shards())
        for name, held in (("spaced", ids), ("plain", [text_id.replace(" ", "") for text_id in ids])):
            named = ShardContents(held, shard.repr_hidden, shard.sparse_indices, shard.sparse_values, ids)
            write_store(tmp_path / name / side, [named], there.manifest.settings.__dict__)
    plain, spaced, file = tmp_path / "plain", tmp_path / "spaced", tmp_path / "run.trec"
    given = ("search", "--store", plain / "store", "--queries", plain / "queries", "--run-file", file, "--top-k", 2)
    assert run(*given) == 0
    results = Searcher(open_store(plain / "store")).search(open_store(plain / "queries"), top_k=2)
    assert {query: set(found) for query, found in read_run(file).items()} == {
        query: set(found) for query, found in results.run().items()
    }
    assert results[0][0].id == results.ids[0][0]
    fused = Searcher(open_store(plain / "store")).search(open_store(plain / "queries"), MODES[4], 2, fusion_weight=0.5)
    assert run(*given, "--fusion-weight", 0.5) == 2  # where no mode is given, too
    assert "--fusion-weight: for the fusion modes, and multi_dense has one side" in capsys.readouterr().err
    assert run(*given, "--mode", MODES[4]) == 0  # half: a store of queries does not hold what the release recommends
    assert read_run(file) == {query: pytest.approx(found, abs=1e-5) for query, found in fused.run().items()}
    file.unlink()
    monkeypatch.setattr(Searcher, "search", lambda *_, **__: pytest.fail("it was searched"))
    assert run(*given, "--model", RELEASE, "--num-query-masks", 2) == 2
    assert "whose queries are encoded; leave out --model, --num-query-masks." in capsys.readouterr().err
    for place, side, told in ((2, "store", "the passage id 'p 1'"), (4, "queries", "the query id 'q 1'")):
        assert run(*given[:place], spaced / side, *given[place + 1 :]) == 2
        assert f"{told} cannot stand in a TREC run file" in capsys.readouterr().err
    assert not file.exists()


def test_the_fusion_is_chosen(model: Any, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--model", RELEASE, "--store", folder / "store", "--mode", MODES[4], "--candidates", 2, "--top-k", 2]
    query = model.encode_texts(["play audio files"], is_query=True)
    expected = Searcher(open_store(folder / "store"), fusion="runs").search(query, MODES[4], 2, candidates=2)
    assert run("search", *given, "--fusion", "runs", "--json", "-", "play audio files") == 0
    hits = json.loads(capsys.readouterr().out)["hits"]
    assert [(hit["id"], hit["score"]) for hit in hits] == [(hit.id, pytest.approx(hit.score)) for hit in expected[0]]


def test_index_then_search_by_engine(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = ["--qdrant", tmp_path / "qdrant", "--collection", "c"]
    assert run("index", "--store", folder / "store", *engine) == 0
    assert "holds 5 passages, 5 of them sent now" in capsys.readouterr().out
    answers = []
    for place in (engine, ["--store", folder / "store"]):
        assert run("search", "--model", RELEASE, *place, "--json", "-", "--mode", MODES[4], "web server") == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert [hit["id"] for hit in answers[0]["hits"]] == [hit["id"] for hit in answers[1]["hits"]]
    assert answers[0]["hits"][0]["text"] == answers[1]["hits"][0]["text"]


def test_a_collection_without_a_name(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("index", "--store", folder / "store", "--qdrant", tmp_path / "qdrant", "--collection", "") == 2
    assert "no collection can be called ''" in capsys.readouterr().err


def test_an_engine_that_is_away_has_its_own_status(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("index", "--store", folder / "store", "--qdrant", "http://127.0.0.1:9", "--timeout", 1) == 3
    assert "diffretriever index: http://127.0.0.1:9: no answer after" in capsys.readouterr().err


def test_export_writes_impacts(model: Any, folder: Path, tmp_path: Path) -> None:
    assert run("export", "--store", folder / "store", "--output", tmp_path / "impacts.jsonl", "--model", RELEASE) == 0
    rows = [json.loads(line) for line in (tmp_path / "impacts.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == list(TEXTS)
    assert [row["contents"] for row in rows] == list(TEXTS.values())
    out = model.encode_texts(list(TEXTS.values()), is_query=False)
    for row, indices, values in zip(rows, out["sparse_indices"], out["sparse_values"], strict=True):
        names = model.tokenizer.convert_ids_to_tokens(indices.tolist())
        pairs = zip(names, values.tolist(), strict=True)
        assert row["vector"] == {name: round(value * 100) for name, value in pairs if round(value * 100)}
    assert all(isinstance(weight, int) for row in rows for weight in row["vector"].values())


def test_export_names_all_ids_of_the_vocabulary_and_none_by_another_tokenizer(
    model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A head may have more rows than the tokenizer has tokens; without a content filter they weigh, too."""
    settings = describe_model(model, False, "float32", {"sparse_top_k": 1}).__dict__
    size = model.config.vocab_size + 3
    contents = ShardContents(["a"], torch.ones(1, 4, 192), torch.tensor([[size - 1]]), torch.ones(1, 1))
    write_store(tmp_path / "store", [contents], settings | {"vocab_size": size})
    given = ["export", "--store", tmp_path / "store", "--output", tmp_path / "out.jsonl", "--model"]
    assert run(*given, RELEASE) == 0
    assert json.loads((tmp_path / "out.jsonl").read_text())["vector"] == {f"<{size - 1}>": 100}
    assert run(*given, RELEASE.with_name("diffretriever-smollm2-135m-multi-q4-p4")) == 2
    assert "--model has another tokenizer than the model that encoded the store" in capsys.readouterr().err


def test_export_without_a_model_names_tokens_by_number(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("export", "--store", folder / "store", "--output", tmp_path / "numbers.jsonl", "--no-texts", "--factor", 10)
    first = json.loads((tmp_path / "numbers.jsonl").read_text().splitlines()[0])
    assert first["contents"] == ""
    assert all(name.isdigit() for name in first["vector"])
    assert run("export", "--store", folder / "store", "--output", tmp_path / "x.jsonl", "--factor", 0) == 2
    assert "factor must be positive" in capsys.readouterr().err
    for factor, words in ((float("inf"), "must be positive and finite"), (1e300, "more than Lucene's 2147483647")):
        assert run("export", "--store", folder / "store", "--output", tmp_path / "x.jsonl", "--factor", factor) == 2
        assert words in capsys.readouterr().err


def test_full_fusion_is_the_models_own_score(model: Any, folder: Path) -> None:
    passages = model.encode_texts(list(TEXTS.values()), is_query=False)
    asked = model.encode_texts(["web", "music files", "検索"], is_query=True)
    for mode in MODES:
        results = Searcher(passages, ids=list(TEXTS)).search(asked, mode, top_k=5)
        scores = model.score(asked, passages, mode)
        for query, hits in enumerate(results):
            assert [hit.score for hit in hits] == pytest.approx(
                [float(scores[query, hit.position]) for hit in hits], rel=1e-6, abs=1e-6
            )
            best = torch.sort(scores[query], descending=True).values[: len(hits)]
            assert [hit.score for hit in hits] == pytest.approx(best.tolist(), rel=1e-6, abs=1e-6)
