"""The whole evaluation of a small release, against model.score and pytrec_eval called directly."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import pytrec_eval
import torch
from small_benchmark import CORPUS, QUERIES, qrels_of, write_benchmark, write_ms_marco
from transformers import AutoModel

from diffretriever.data.benchmark import Benchmark, read_benchmark
from diffretriever.data.corpus import read_corpus
from diffretriever.encode.encode_store import encode_store
from diffretriever.evaluation.evaluate import Options, encoded_corpus, evaluate
from diffretriever.evaluation.hybrid import WEIGHTS, fuse_runs, index_of
from diffretriever.evaluation.metrics import evaluate_run, means, parse_metric
from diffretriever.evaluation.runs import Run, cut, without_own_id
from diffretriever.search.modes import FUSED, MODES
from diffretriever.search.searcher import Searcher
from diffretriever.store.compression import compress
from diffretriever.store.identity import describe_model
from diffretriever.store.store import ShardContents, Store, write_store

ROOT = Path(__file__).resolve().parents[2]
RELEASE = ROOT / "checkpoints" / "diffretriever-llada-tiny-multi-q4-p4"
SMALL = ("nDCG@10", "RR@10", "R@5", "AP")


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModel.from_pretrained(RELEASE, trust_remote_code=True)


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> Benchmark:
    return read_benchmark(write_benchmark(tmp_path_factory.mktemp("data") / "small"), "test")


@pytest.fixture(scope="module")
def store(model: Any, benchmark: Benchmark) -> Iterator[Store]:
    with encoded_corpus(model, benchmark.folder, dtype="float32") as made:
        yield made


def options(**given: Any) -> Options:
    return Options(**{"metrics": SMALL, "depth": 10, **given})


def searched(model: Any, store: Store, asked: Benchmark, mode: str, depth: int, weight: float = 0.5) -> Run:
    """Search the queries by themselves; in BEIR's layout a query's own id is no result."""
    queries = model.encode_texts(list(asked.queries.values()), is_query=True)
    found = Searcher(store).search(queries, mode, depth + 1, candidates=depth + 1, fusion_weight=weight)
    return cut(without_own_id(found.run(list(asked.queries))), depth)


def best_weight(runs: dict[float, Run], asked: Benchmark, metric: str) -> float:
    """Return the weight whose run has the best mean, of equals the one nearest to 0.5."""
    scores = {
        weight: means(evaluate_run(run, asked.qrels, [parse_metric(metric)]))[metric] for weight, run in runs.items()
    }
    best = [weight for weight in WEIGHTS if scores[weight] == max(scores.values())]
    return min(best, key=lambda weight: abs(weight - 0.5))


def test_five_modes_equal_scoring_everything(model: Any, benchmark: Benchmark, store: Store) -> None:
    evaluation, runs = evaluate(model, benchmark, store, options())
    asked = qrels_of("test")
    queries = model.encode_texts([QUERIES[name] for name in asked], is_query=True)
    texts = [f"{title}. {text}" if title else text for title, text in CORPUS.values()]
    passages = model.encode_texts(texts, is_query=False)
    judge = pytrec_eval.RelevanceEvaluator(asked, {"ndcg_cut.10", "recip_rank", "recall.5", "map"})
    figures = evaluation.figures()
    assert list(figures) == list(runs) == list(MODES)
    for mode in MODES:
        scores = model.score(queries, passages, mode=mode).tolist()
        expected = {}
        for query, row in zip(asked, scores, strict=True):
            found = dict(zip(CORPUS, row, strict=True))
            expected[query] = {name: value for name, value in found.items() if name != query}
            if mode == "sparse_max":
                expected[query] = {name: value for name, value in expected[query].items() if value > 0}
            if "fusion" not in mode:  # there a query's own passage takes part in the normalisation
                assert runs[mode][query] == pytest.approx(expected[query], abs=1e-5), (mode, query)
            assert list(runs[mode][query]) == sorted(expected[query], key=lambda name: -expected[query][name])
        values = list(judge.evaluate(expected).values())
        for metric, name in zip(SMALL, ("ndcg_cut_10", "recip_rank", "recall_5", "map"), strict=True):
            assert figures[mode][metric] == pytest.approx(sum(value[name] for value in values) / len(asked)), mode


def test_the_corpus_is_encoded_once_and_only_the_splits_queries(
    model: Any, benchmark: Benchmark, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts: list[tuple[str, bool]] = []
    prepare = type(model.texts).prepare

    def noted(self: Any, given: Any, is_query: bool, *options: Any) -> Any:
        texts.extend((text, is_query) for text in given)
        return prepare(self, given, is_query, *options)

    monkeypatch.setattr(type(model.texts), "prepare", noted)
    with encoded_corpus(model, benchmark.folder) as made:
        evaluate(model, benchmark, made, options())
    assert sorted(text for text, is_query in texts if is_query) == sorted(QUERIES[name] for name in qrels_of("test"))
    assert len([text for text, is_query in texts if not is_query]) == len(CORPUS)


def test_queries_that_are_cut_more_often_than_in_training_are_said(
    model: Any, benchmark: Benchmark, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.config, "query_length", 2)
    monkeypatch.setattr(model.config, "cut_in_training", {"query": 0.5, "passage": 0.0})
    notes = evaluate(model, benchmark, store, options(modes=("multi_dense",)))[0].notes
    assert any("of 4 queries are longer than 2 tokens and are cut; in its training 50% were" in note for note in notes)


def test_a_store_is_kept_reused_and_refused_to_another_model(
    model: Any, benchmark: Benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with encoded_corpus(model, benchmark.folder, tmp_path / "store", dtype="float32") as made:
        first = evaluate(model, benchmark, made, options())[0].figures()
    encoded: list[object] = []
    monkeypatch.setattr(type(model), "encode_prepared", lambda *_, **__: encoded.append(1))
    with encoded_corpus(model, benchmark.folder, tmp_path / "store") as made:
        assert made.manifest.dtype == "float32"
        monkeypatch.undo()
        assert encoded == []
        assert evaluate(model, benchmark, made, options())[0].figures() == first
    with (
        pytest.raises(ValueError, match="dtype"),
        encoded_corpus(model, benchmark.folder, tmp_path / "store", dtype="int8"),
    ):
        pass
    other = AutoModel.from_pretrained(RELEASE, trust_remote_code=True, num_passage_masks=2)
    with (
        pytest.raises(ValueError, match="as it is no longer: `num_masks` 4, not 2"),
        encoded_corpus(other, benchmark.folder, tmp_path / "store"),
    ):
        pass


@pytest.mark.parametrize("name", ["plain", "small"])  # as `import-vectors` and `compress` make one
def test_a_store_that_encode_did_not_make_is_taken_as_it_is(
    model: Any, benchmark: Benchmark, tmp_path: Path, name: str
) -> None:
    ids = [*CORPUS, *(f"filler-{number}" for number in range(90))]
    vectors = torch.nn.functional.normalize(
        torch.randn(100, 4, 192, generator=torch.Generator().manual_seed(0)), dim=-1
    )
    contents = ShardContents(ids, vectors, torch.ones(100, 2, dtype=torch.int32), torch.ones(100, 2))
    settings = describe_model(model, is_query=False, dtype="float16", options={"sparse_top_k": 2})
    plain = write_store(
        tmp_path / "plain", [contents], {field.name: getattr(settings, field.name) for field in fields(settings)}
    )
    compress(plain, tmp_path / "small")
    with encoded_corpus(model, benchmark.folder, tmp_path / name, dtype="float16") as made:
        evaluation, runs = evaluate(model, benchmark, made, options(modes=("multi_dense",), depth=100))
    assert len(runs["multi_dense"]["q-web"]) == len(ids)
    assert evaluation.figures()["multi_dense"]["R@5"] < 1  # the vectors are random
    other = AutoModel.from_pretrained(RELEASE.with_name("diffretriever-llada-tiny-single"), trust_remote_code=True)
    with (
        pytest.raises(ValueError, match=r"not '.*tiny-single': other `adapter`"),
        encoded_corpus(other, benchmark.folder, tmp_path / name),
    ):
        pass
    with (
        pytest.raises(ValueError, match="has dtype float16, not int8; leave --dtype out"),
        encoded_corpus(model, benchmark.folder, tmp_path / name, dtype="int8"),
    ):
        pass


def test_a_temporary_store_goes_away(model: Any, benchmark: Benchmark) -> None:
    with encoded_corpus(model, benchmark.folder) as made:
        folder = made.folder
        assert folder.is_dir()
        assert len(made) == len(CORPUS)
    assert not folder.exists()


def test_a_passage_with_the_querys_id_counts_in_ms_marcos_files_only(
    model: Any, benchmark: Benchmark, store: Store, tmp_path: Path
) -> None:
    marco = read_benchmark(write_ms_marco(tmp_path / "marco"), "dev")
    modes = ("sparse_max",)
    assert "q-own" not in evaluate(model, benchmark, store, options(modes=modes))[1]["sparse_max"]["q-own"]
    with encoded_corpus(model, marco.folder) as made:
        found = evaluate(model, marco, made, options(modes=modes))[1]["sparse_max"]["q-own"]
    assert next(iter(found)) == "q-own"


def test_graded_judgements_of_trec_deep_learning(model: Any, store: Store, tmp_path: Path) -> None:
    graded = read_benchmark(write_ms_marco(tmp_path / "marco"), "dl19")
    evaluation, runs = evaluate(
        model, graded, store, options(modes=("sparse_max",), metrics=("nDCG@10", "MAP", "MRR@10"))
    )
    assert list(evaluation.figures()["sparse_max"]) == ["nDCG@10", "AP(rel=2)", "RR(rel=2)@10"]
    ranks = list(runs["sparse_max"]["q-play"])
    assert evaluation.rows["sparse_max"]["AP(rel=2)"] == {
        "q-play": 1 / (1 + ranks.index("player")), "q-web": 0.0, "q-mail": 0.0, "q-own": 0.0
    }  # fmt: skip
    assert "3 queries have no passage of grade 2 or more: they score 0 in binary metrics." in evaluation.notes


def test_bm25_and_its_fusion(model: Any, benchmark: Benchmark, store: Store) -> None:
    given = options(modes=("multi_dense", "sparse_max"), bm25=True, tune_split="dev", latency=2)
    evaluation, runs = evaluate(model, benchmark, store, given)
    names = list(evaluation.rows)
    assert names[:4] == ["multi_dense", "sparse_max", "bm25", "multi_dense+bm25@0.5"]
    dev = read_benchmark(benchmark.folder, "dev")
    ours = searched(model, store, dev, "multi_dense", 10)
    theirs = index_of(read_corpus(benchmark.folder)).search(dev.queries, 10)
    chosen = best_weight({weight: fuse_runs(ours, theirs, weight, 10) for weight in WEIGHTS}, dev, "nDCG@10")
    assert evaluation.notes[-1] == f"multi_dense with BM25: nDCG@10 on split dev is best at the weight {chosen:g}."
    assert names[4:] == ([] if chosen == 0.5 else [f"multi_dense+bm25@{chosen:g}"])
    fused = fuse_runs(runs["multi_dense"], runs["bm25"], 0.5, 10)
    assert runs["multi_dense+bm25@0.5"] == fused
    assert sorted(evaluation.latency) == ["bm25", "multi_dense", "sparse_max"]
    assert {(found.row, found.mark) for found in evaluation.comparisons} == {(n, "‡") for n in names if n != "bm25"}


def test_the_papers_fusion_knows_the_runs_alone(model: Any, benchmark: Benchmark, store: Store) -> None:
    given = options(modes=("multi_dense", "sparse_max", "fusion_multi_sparse_max"), fusion="runs", fusion_weight=0.3)
    evaluation, runs = evaluate(model, benchmark, store, given)
    expected = fuse_runs(runs["multi_dense"], runs["sparse_max"], 0.3, 10)
    for query in expected.keys() - {"q-own"}:  # there the query's own passage takes part in the normalisation
        assert runs["fusion_multi_sparse_max"][query] == pytest.approx(expected[query], abs=1e-6)
    assert "The fusion modes fuse the two sides' rankings alone, as the paper's tables do." in evaluation.notes
    assert evaluate(model, benchmark, store, options(modes=("multi_dense",), fusion="runs"))[0].notes == benchmark.notes


def test_fusion_weights_are_chosen_on_another_split(model: Any, benchmark: Benchmark, store: Store) -> None:
    given = options(modes=tuple(FUSED), tune_split="dev", fusion_weight=0.25, depth=3, metrics=("nDCG@3",))
    evaluation, runs = evaluate(model, benchmark, store, given)
    dev = read_benchmark(benchmark.folder, "dev")
    names = list(given.modes)
    for mode in given.modes:  # by brute force: a search at every weight
        chosen = best_weight(
            {weight: searched(model, store, dev, mode, 3, weight) for weight in WEIGHTS}, dev, "nDCG@3"
        )
        assert f"{mode}: nDCG@3 on split dev is best at the dense weight {chosen:g}." in evaluation.notes
        name = f"{mode}@{chosen:g}"
        names.append(name)
        assert chosen != 0.25
        assert runs[name] == searched(model, store, benchmark, mode, 3, chosen)
        assert runs[name] != runs[mode]
    assert list(evaluation.rows) == names


def test_a_chosen_weight_that_is_the_given_one_adds_no_row(model: Any, benchmark: Benchmark, store: Store) -> None:
    mode = "fusion_multi_sparse_max"
    first, _ = evaluate(model, benchmark, store, options(modes=(mode,), tune_split="dev", fusion_weight=0.25))
    chosen = float(list(first.rows)[1].partition("@")[2])
    second, _ = evaluate(model, benchmark, store, options(modes=(mode,), tune_split="dev", fusion_weight=chosen))
    assert list(second.rows) == [mode]
    assert second.rows[mode] == first.rows[f"{mode}@{chosen:g}"]


def test_the_fusions_weight_is_the_models_own(
    model: Any, benchmark: Benchmark, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    mode, note = "fusion_multi_sparse_max", "The fusion modes have the dense weight 0.9."
    half, half_runs = evaluate(model, benchmark, store, options(modes=(mode,)))
    monkeypatch.setattr(model.config, "recommended_fusion_weight", 0.9)
    own, own_runs = evaluate(model, benchmark, store, options(modes=(mode,)))
    asked, asked_runs = evaluate(model, benchmark, store, options(modes=(mode,), fusion_weight=0.5))
    assert own_runs[mode] == searched(model, store, benchmark, mode, 10, 0.9) != half_runs[mode]
    assert asked_runs == half_runs
    assert (note in half.notes, note in own.notes, note in asked.notes) == (False, True, False)
    dense, _ = evaluate(model, benchmark, store, options(modes=("multi_dense",)))
    assert note not in dense.notes


def test_one_query_is_not_tested(model: Any, store: Store, tmp_path: Path) -> None:
    folder = write_benchmark(tmp_path / "one")
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq-web\tdaemon\t1\n")
    evaluation, _ = evaluate(model, read_benchmark(folder, "test"), store, options())
    assert evaluation.comparisons == []
    assert evaluation.notes[-1] == "One query: no significance tests."


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"modes": ("colbert",)}, "scoring mode 'colbert' is not known; the modes are single_dense, "),
        ({"modes": ()}, "at least one mode and one metric"),
        ({"metrics": ("nDCG@11",)}, "nDCG@11 needs rankings of 11 passages; the depth is 10"),
        ({"metrics": ("hits",)}, "metric 'hits' is not known"),
        ({"depth": 0}, "the depth must be at least 1"),
        ({"fusion_weight": 1.5}, "`fusion_weight` must lie between 0 and 1, got 1.5"),
        (
            {"fusion_weight": 0.0, "modes": ("multi_dense",)},
            "--fusion-weight is for the fusion modes, and there is none: the modes are multi_dense.",
        ),
        ({"bm25_with": ["multi_dense"]}, "--bm25-with belongs to --bm25; give that as well."),
        (
            {"tune_split": "dev", "modes": ("multi_dense",)},
            "--tune-split chooses weights of fusions, and there is none: the modes are multi_dense. Add a fusion",
        ),
        ({"bm25": True, "bm25_with": ["sparse_max"], "modes": ("multi_dense",)}, "--bm25-with sparse_max"),
    ],
)
def test_wrong_options_are_said(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        options(**given).measures()
    assert words in str(error.value)


def test_a_store_keeps_its_options_and_its_queries_are_encoded_as_it_was(
    model: Any, benchmark: Benchmark, tmp_path: Path
) -> None:
    whole: dict[str, Any] = {"content_filter": False, "sparse_top_k": 30, "keep_texts": False, "dtype": "float32"}
    made = encode_store(model, benchmark.folder, tmp_path / "store", **whole)
    asked = list(benchmark.queries.values())
    sides = [model.encode_texts(asked, is_query=True, content_filter=wanted) for wanted in (True, False)]
    filtered, unfiltered = (Searcher(made).search(side, "sparse_max", 10) for side in sides)
    assert not torch.equal(filtered.scores, unfiltered.scores)
    with encoded_corpus(model, benchmark.folder, tmp_path / "store") as there:
        assert there.manifest == made.manifest
        _, runs = evaluate(model, benchmark, there, options(modes=("sparse_max",), latency=1))
    expected = cut(without_own_id(unfiltered.run(list(benchmark.queries))), 10)
    assert {query: list(found) for query, found in runs["sparse_max"].items()} == {
        query: list(found) for query, found in expected.items()
    }
    for query, scores in expected.items():
        assert runs["sparse_max"][query] == pytest.approx(scores, abs=1e-5)
