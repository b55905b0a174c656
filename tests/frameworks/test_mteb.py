"""MTEB: a task in BEIR's layout gives the nDCG that AutoModel and score give, in every mode."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_folders import hub_repository
from sentence_transformers_folders import CHECKPOINTS, Folders, add_files, make_folder
from transformers import AutoModel

from diffretriever.data.benchmark import read_benchmark
from diffretriever.encode.encode_store import encode_store
from diffretriever.evaluation.evaluate import Options, evaluate
from diffretriever.evaluation.metrics import means

mteb = pytest.importorskip("mteb", "2")
pytrec_eval = pytest.importorskip("pytrec_eval")
models = pytest.importorskip("diffretriever.mteb_models")

KINDS = {"single_dense": "dense", "sparse_max": "sparse", "multi_dense": "multi-vector"}
TOPICS = """music player songs|web server pages|database tables disk|backup archive encrypted|chess board opponent
mail messages spam|firewall packets kernel|compiler source code|stars planets sky|molecules atoms proteins
spelling words dictionary|video clips timeline|threads processes signals|printer paper drivers|maps roads satellites
photographs layers brushes|keyboard layouts languages|passwords secrets vault|calendar meetings reminders|fonts glyphs
letters""".replace("\n", "|").split("|")
VERBS = ("manages", "shows", "converts", "checks", "draws")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of five passages a topic, some with titles, and graded judgements."""
    folder = tmp_path_factory.mktemp("beir")
    corpus, queries, qrels = [], [], ["query-id\tcorpus-id\tscore"]
    for topic, words in enumerate(TOPICS):
        parts = words.split()
        for number, verb in enumerate(VERBS):
            other = TOPICS[(topic * 7 + number) % len(TOPICS)].split()[0]
            text = f"This program {verb} {parts[number % len(parts)]} and {other}, with {' '.join(parts)} in mind."
            corpus.append({"_id": f"p{topic}-{number}", "title": parts[0] if number % 2 else "", "text": text})
        queries.append({"_id": f"q{topic}", "text": f"{VERBS[topic % 5]} {parts[-1]} {parts[0]}"})
        qrels += [f"q{topic}\tp{topic}-{number}\t{2 if number == topic % 5 else 1}" for number in (topic % 5, 4)]
    (folder / "qrels").mkdir()
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in corpus))
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queries))
    (folder / "qrels" / "test.tsv").write_text("\n".join(dict.fromkeys(qrels)) + "\n")
    return folder


def rows(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def our_ndcg(model: Any, data: Path, mode: str) -> float:
    """Evaluate with AutoModel, score and pytrec_eval, and nothing of the examples."""
    corpus, queries = rows(data / "corpus.jsonl"), rows(data / "queries.jsonl")
    texts = [f"{row['title']}. {row['text']}" if row["title"] else row["text"] for row in corpus]
    passages = model.encode_texts(texts, False)
    scores = model.score(model.encode_texts([row["text"] for row in queries], True), passages, mode)
    run = {
        query["_id"]: {passage["_id"]: float(score) for passage, score in zip(corpus, values, strict=True)}
        for query, values in zip(queries, scores, strict=True)
    }
    qrels: dict[str, dict[str, int]] = {}
    for line in (data / "qrels" / "test.tsv").read_text().splitlines()[1:]:
        query, passage, grade = line.split("\t")
        qrels.setdefault(query, {})[passage] = int(grade)
    found = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10"}).evaluate(run)
    return sum(values["ndcg_cut_10"] for values in found.values()) / len(found)


@pytest.mark.parametrize("mode", models.MODES)
def test_same_ndcg(
    folders: Folders, data: Path, example: Callable[[str], Any], run_example: Callable[..., str], mode: str
) -> None:
    module = example("mteb_evaluation")
    folder = folders.folder("multi", KINDS.get(mode, "dense"))
    printed = run_example(module, "--data", str(data), "--model", str(folder), "--mode", mode)
    found = re.search(r"ndcg_at_10=(\d\.\d{4}) recall_at_100=\d\.\d{4} mrr_at_10=\d\.\d{4}\n", printed)
    assert found, printed
    expected = our_ndcg(folders.plain("multi"), data, mode)
    assert 0.1 < expected < 0.999  # else a wrong ranking could go unseen
    assert abs(float(found[1]) - expected) < 2e-4  # MTEB rounds to 5 decimals


@pytest.mark.parametrize("mode", models.MODES)
def test_same_ndcg_as_our_evaluation(
    folders: Folders,
    data: Path,
    tmp_path: Path,
    example: Callable[[str], Any],
    run_example: Callable[..., str],
    mode: str,
) -> None:
    folder = folders.folder("multi", KINDS.get(mode, "dense"))
    printed = run_example(example("mteb_evaluation"), "--data", str(data), "--model", str(folder), "--mode", mode)
    found = re.search(r"ndcg_at_10=(\d\.\d{4})", printed)
    assert found, printed
    model = folders.plain("multi")
    store = encode_store(model, data, tmp_path / "store", dtype="float32")
    evaluation, _ = evaluate(model, read_benchmark(data, "test"), store, Options(modes=[mode]))
    assert abs(float(found[1]) - means(evaluation.rows[mode])["nDCG@10"]) < 2e-4


def test_wrong_side_would_show(folders: Folders, data: Path) -> None:
    """Queries encoded as documents give another nDCG, so the test above sees it."""
    plain = folders.plain("multi")

    class Swapped:
        score = plain.score

        @staticmethod
        def encode_texts(texts: list[str], is_query: bool) -> Any:
            return plain.encode_texts(texts, False)

    assert abs(our_ndcg(Swapped(), data, "single_dense") - our_ndcg(plain, data, "single_dense")) > 1e-3


# ---------------------------------------------------------------------------------------------- ModelMeta


def test_metas_of_every_release_and_mode() -> None:
    metas = models.model_metas("some-lab")
    assert len(metas) == len(models.RELEASES) * 5
    assert len({(meta.name, meta.revision, str(meta.experiment_kwargs)) for meta in metas}) == len(metas)
    by_name = {(meta.name, meta.revision): meta for meta in metas}
    sparse = by_name["some-lab/diffretriever-llada-8b-single", "sparse"]
    assert (sparse.embed_dim, sparse.max_tokens, sparse.model_type) == (126_464, 156, ["sparse"])
    assert sparse.training_datasets == {"MSMARCO"}
    assert sparse.n_active_parameters == 8_015_581_184 - 126_464 * 4096
    multi = by_name["some-lab/diffretriever-dream-7b-multi-q4-p16", "multi-vector"]
    assert (multi.embed_dim, multi.similarity_fn_name, multi.model_type) == (3584, "MaxSim", ["late-interaction"])


@pytest.mark.parametrize("name", ["llada-tiny", "dream-tiny"])
def test_sizes_of_the_small_backbones(name: str) -> None:
    release = CHECKPOINTS / f"diffretriever-{name}-single"
    model = AutoModel.from_pretrained(release, trust_remote_code=True)
    backbone = models.BACKBONES[f"checkpoints/{name}"]
    assert backbone.num_parameters == sum(weight.numel() for weight in model.parameters())
    assert (backbone.vocab_size, backbone.hidden_size) == (model.config.vocab_size, model.config.hidden_size)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hub cache that holds the small release with its branches."""
    place = tmp_path_factory.mktemp("hub")
    release = make_folder("multi", "dense", place / "release")
    for kind, ref in (("dense", "main"), ("sparse", "sparse"), ("multi-vector", "multi-vector")):
        add_files(kind, release)
        hub_repository(place, "some-lab/diffretriever-llada-tiny-multi-q4-p4", release, refs=(ref,))
    return place


@pytest.mark.parametrize("mode", models.MODES)
def test_meta_loads_and_evaluates(
    folders: Folders, data: Path, cache: Path, example: Callable[[str], Any], mode: str
) -> None:
    options = {"device": "cpu", "local_files_only": True}
    if mode in models.EMBEDDING_MODES:
        options |= {"cache_folder": str(cache), "trust_remote_code": True}
    else:
        options["cache_dir"] = str(cache)
    meta = models.model_meta("diffretriever-llada-tiny-multi-q4-p4", mode, "some-lab", **options)
    result = mteb.evaluate(meta, example("mteb_evaluation").beir_task(data), cache=None, show_progress_bar=False)
    found = result[0].scores["test"][0]["ndcg_at_10"]
    assert abs(found - our_ndcg(folders.plain("multi"), data, mode)) < 2e-4


def test_unknown_release_and_mode() -> None:
    with pytest.raises(
        ValueError, match="release 'diffretriever-gpt' is not known; the releases are diffretriever-llada"
    ):
        models.model_meta("diffretriever-gpt", "single_dense", "some-lab")
    with pytest.raises(ValueError, match="scoring mode 'bm25' is not known; the modes are single_dense, sparse_max"):
        models.model_meta("diffretriever-llada-8b-single", "bm25", "some-lab")


# ---------------------------------------------------------------------------------------------- search by itself


CORPUS = [{"id": str(place), "text": text} for place, text in enumerate(TOPICS)]
OPTIONS: dict[str, Any] = {"encode_kwargs": {"batch_size": 4}}


@pytest.fixture(scope="module")
def search(folders: Folders) -> Any:
    found = models.FusionSearch(str(folders.folder("multi", "dense")), mode="fusion_multi_sparse_max", device="cpu")
    found.index(CORPUS, **OPTIONS)
    return found


def test_many_queries_in_blocks(search: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    queries = [{"id": f"q{place}", "text": text} for place, text in enumerate(TOPICS)]
    whole = search.search(queries, top_k=3, **OPTIONS)
    monkeypatch.setattr(models, "QUERY_BLOCK", 3)
    parts = search.search(queries, top_k=3, **OPTIONS)
    assert list(whole) == [query["id"] for query in queries]
    assert {query: list(found) for query, found in whole.items()} == {
        query: list(found) for query, found in parts.items()
    }
    assert all(next(iter(found)) == query[1:] for query, found in whole.items())


def test_candidates_only(search: Any) -> None:
    """A reranking task: the fusion's minimum and maximum are those of the query's candidates."""
    found = search.search([{"id": "q", "text": TOPICS[0]}], top_k=9, top_ranked={"q": ["3", "0", "7"]}, **OPTIONS)
    assert set(found["q"]) == {"0", "3", "7"}
    assert found["q"]["0"] == max(found["q"].values()) == pytest.approx(1.0)


def test_wrong_use(search: Any, folders: Folders) -> None:
    query = [{"id": "q", "text": "chess"}]
    with pytest.raises(ValueError, match="the candidates of query 'q' hold passage 'x', which is not in the corpus"):
        search.search(query, top_k=1, top_ranked={"q": ["x"]}, **OPTIONS)
    with pytest.raises(ValueError, match="the candidates of query 'q' hold no passage"):
        search.search(query, top_k=1, top_ranked={}, **OPTIONS)
    with pytest.raises(ValueError, match="scoring mode 'dense' is not known"):
        models.FusionSearch(str(folders.folder("multi", "dense")), mode="dense")
    empty = models.FusionSearch(str(folders.folder("multi", "dense")), mode="multi_dense")
    with pytest.raises(ValueError, match=r"search\(\) was called before index\(\)"):
        empty.search(query, top_k=1, **OPTIONS)
