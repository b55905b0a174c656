"""Every method through the commands: encode, search, evaluate, stores and their identity, mining, budgets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from causal_backbones import PARITY
from store_helpers import folder_bytes
from training_data import made_up_pairs, write_lines

from diffretriever.baselines import METHODS, load_baseline
from diffretriever.cli import load_model
from diffretriever.cli.main import main
from diffretriever.model.scoring import score
from diffretriever.search.searcher import Searcher
from diffretriever.store.compression import compress, open_store

Makes = Callable[..., Path]
RECORDS = made_up_pairs(8, negatives=1)
QUERIES = [record["query"] for record in RECORDS]
PASSAGES = [record["positive"] for record in RECORDS]
# What is run on which backbone, and with how many vectors.
CASES = {
    "promptreps-llama": ("promptreps", "llama", 4),
    "promptreps-qwen2": ("promptreps", "qwen2-tied", 3),
    "repllama-llama": ("repllama", "llama-tied", None),
    "repllama-qwen2": ("repllama", "qwen2", None),
    "diffembed-llada": ("diffembed", "tiny-llada", None),
    "diffembed-dream": ("diffembed", "tiny-dream", None),
    "diffretriever-llada": ("diffretriever", "tiny-llada", 4),
    "diffretriever-dream": ("diffretriever", "tiny-dream", 3),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A benchmark in BEIR's layout."""
    folder = tmp_path_factory.mktemp("data")
    write_lines(folder / "corpus.jsonl", [{"_id": f"p{n}", "text": text} for n, text in enumerate(PASSAGES)])
    write_lines(folder / "queries.jsonl", [{"_id": f"q{n}", "text": text} for n, text in enumerate(QUERIES)])
    write_lines(folder / "pairs.jsonl", RECORDS)
    (folder / "qrels").mkdir()
    rows = "".join(f"q{n}\tp{n}\t1\n" for n in range(len(QUERIES)))
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + rows)
    return folder


@pytest.fixture
def place(backbone: Makes, build_release: Makes) -> Callable[[str, str], Path]:
    """Return a function that gives what --model is for a method on a kind of backbone."""

    def find(method: str, kind: str) -> Path:
        if method == "diffretriever":
            return build_release(kind)
        return PARITY / "backbones" / kind if kind.startswith("tiny") else backbone(kind)

    return find


def model_options(method: str, folder: Path) -> list[str]:
    return ["--model", str(folder), *(["--method", method] if method != "diffretriever" else [])]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, place: Callable[[str, str], Path]) -> tuple[str, list[str], list[str]]:
    """A method, the options of its model, and those of its vectors."""
    method, kind, k = CASES[request.param]
    options = ["--model-dtype", "float32", *model_options(method, place(method, kind))]
    return method, options, [] if k is None else ["--num-passage-masks", str(k)]


def encode(options: list[str], data: Path, out: Path, *more: str) -> int:
    return main(["encode", *options, "--input", str(data), "--output", str(out), "--quiet", *more])


# --------------------------------------------------------------------------------------- encode, search, evaluate


def test_each_method_is_encoded_searched_and_evaluated(
    case: tuple[str, list[str], list[str]], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    method, options, budget = case
    of_queries = [word.replace("passage", "query") for word in budget]
    for name, more in (("passages", budget), ("queries", [*of_queries, "--queries"])):
        assert encode(options, data, tmp_path / name, "--dtype", "float32", *more) == 0, capsys.readouterr().err
    k = int(budget[1]) if budget else 1
    passages, queries = open_store(tmp_path / "passages", verify=True), open_store(tmp_path / "queries")
    assert passages.manifest.num_masks == queries.manifest.num_masks == k
    assert passages.manifest.model_parts["method"].lower() == method
    chosen = {} if k == 1 else {"num_query_masks": k, "num_passage_masks": k}
    model = loaded(method, options, **chosen)
    sparse = model.config.sparse_top_k > 0
    out = [model.encode_texts(texts, is_query) for texts, is_query in ((QUERIES, True), (PASSAGES, False))]
    [shard] = passages.shards()
    mask = shard.mask(0, len(shard))
    assert (mask is None) == ("repr_mask" not in out[1])
    for mode in ("single_dense", "multi_dense", *["sparse_max", "fusion_multi_sparse_max"] * sparse):
        found = Searcher(passages).search(queries, mode, len(PASSAGES))
        expected = score(out[0], out[1], mode)
        for row, (places, scores) in enumerate(zip(found.positions, found.scores, strict=True)):
            there = places >= 0
            torch.testing.assert_close(scores[there], expected[row, places[there]], atol=3e-5, rtol=0)
    asked = ["search", *options, *of_queries, "--store", str(tmp_path / "passages"), QUERIES[0], "--json"]
    capsys.readouterr()
    assert main(asked) == 0
    hits = json.loads(capsys.readouterr().out)["hits"]
    best = Searcher(passages).search(queries, "multi_dense", 10)[0]
    assert [hit["id"] for hit in hits] == [hit.id for hit in best]
    sides = ["--num-query-masks", str(k), "--num-passage-masks", str(k)] if budget else []
    evaluated = ["evaluate", *options, *sides, "--data", str(data), "--json", str(tmp_path / "f.json"), "--quiet"]
    assert main([*evaluated, "--store", str(tmp_path / "passages")]) == 0, capsys.readouterr().err
    assert len(json.loads((tmp_path / "f.json").read_text())) == (5 if sparse else 2)  # its modes


def loaded(method: str, options: list[str], **chosen: Any) -> Any:
    """The model of some options, loaded without the commands."""
    folder = options[options.index("--model") + 1]
    if method == "diffretriever":
        from transformers import AutoModel

        return AutoModel.from_pretrained(folder, trust_remote_code=True, torch_dtype=torch.float32, **chosen)
    own = {name.replace("masks", "vectors"): value for name, value in chosen.items()}
    return load_baseline(folder, method, dtype=torch.float32, **own)


def test_texts_with_different_numbers_of_vectors(place: Callable[[str, str], Path], data: Path, tmp_path: Path) -> None:
    options = ["--model-dtype", "float32", *model_options("promptreps", place("promptreps", "llama"))]
    for dtype in ("float32", "int8"):
        assert (
            encode(options, data, tmp_path / dtype, "--num-passage-masks", "4", "--dtype", dtype, "--shard-size", "3")
            == 0
        )
    model = loaded("promptreps", options, num_passage_masks=4)
    out = model.encode_texts(PASSAGES, False)
    counts = out.repr_mask.sum(dim=1)
    assert len(counts.unique()) > 1
    for dtype, close in (("float32", 2e-5), ("int8", 2e-2)):
        store = open_store(tmp_path / dtype)
        masks = torch.cat([shard.mask(0, len(shard)) for shard in store.shards()])  # type: ignore[misc]
        assert torch.equal(masks, out.repr_mask)
        vectors = torch.cat([shard.dense(0, len(shard)) for shard in store.shards()])
        torch.testing.assert_close(vectors[masks], out.repr_hidden[masks], atol=close, rtol=0)
        assert not vectors[~masks].any()
        queries = model.encode_texts(QUERIES, True)
        for memory in (False, True):
            found = Searcher(store, in_memory=memory).search(queries, "multi_dense", len(PASSAGES))
            expected = score(queries, out, "multi_dense").gather(1, found.positions)
            torch.testing.assert_close(found.scores, expected, atol=close, rtol=0)
        sides = Searcher(store).rank_sides(queries, "fusion_multi_sparse_max", 2)  # scores of chosen passages
        for row, (positions, scores) in enumerate(zip(sides.positions, sides.dense, strict=True)):
            torch.testing.assert_close(scores, score(queries, out)[row, positions], atol=close, rtol=0)


@pytest.mark.once
def test_the_same_bytes_after_an_interruption(place: Callable[[str, str], Path], data: Path, tmp_path: Path) -> None:
    options = model_options("promptreps", place("promptreps", "llama"))
    again = ("--num-passage-masks", "3", "--shard-size", "3")
    for name in ("whole", "resumed"):
        assert encode(options, data, tmp_path / name, *again) == 0
    whole = folder_bytes(tmp_path / "whole")
    (tmp_path / "resumed" / "shard-000001.safetensors").unlink()
    assert encode(options, data, tmp_path / "resumed", *again) == 0
    assert folder_bytes(tmp_path / "resumed") == whole


@pytest.mark.once
def test_a_compressed_store_keeps_the_mask(place: Callable[[str, str], Path], tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    texts = [record["positive"] for record in made_up_pairs(160)]
    write_lines(tmp_path / "corpus.jsonl", [{"_id": str(n), "text": text} for n, text in enumerate(texts)])
    options = model_options("promptreps", place("promptreps", "llama"))
    assert (
        encode(options, tmp_path / "corpus.jsonl", tmp_path / "store", "--num-passage-masks", "4", "--dtype", "float32")
        == 0
    )
    store = open_store(tmp_path / "store")
    small = compress(store, tmp_path / "small")
    [shard], [packed] = list(store.shards()), list(small.shards())
    assert torch.equal(packed.mask(0, 160), shard.mask(0, 160))  # type: ignore[arg-type]
    queries = loaded("promptreps", options).encode_texts(QUERIES, True)
    passages = {"repr_hidden": packed.rows(torch.arange(160)), "repr_mask": shard.mask(0, 160)}
    found = Searcher(small).search(queries, "multi_dense", 160)
    torch.testing.assert_close(found.scores, score(queries, passages).gather(1, found.positions), atol=1e-5, rtol=0)


@pytest.mark.once
def test_qdrant_holds_the_vectors_that_exist(
    place: Callable[[str, str], Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("qdrant_edge")
    from diffretriever.search.qdrant.engine import QdrantEngine

    cases: list[tuple[str, str, list[str], list[str]]] = [
        ("promptreps", "llama", ["--num-passage-masks", "4"], ["multi_dense", "single_dense", "sparse_max"]),
        ("repllama", "qwen2", [], ["multi_dense", "single_dense"]),
    ]
    for method, kind, budget, modes in cases:
        options, folder = model_options(method, place(method, kind)), tmp_path / method
        assert encode(options, data, folder, *budget, "--dtype", "float32") == 0
        assert (
            main(["index", "--store", str(folder), "--qdrant", str(tmp_path / "qdrant"), "--collection", method]) == 0
        )
        queries = loaded(method, options).encode_texts(QUERIES, True)
        engine = QdrantEngine(str(tmp_path / "qdrant"), method)
        for mode in modes:
            found, exact = (Searcher(where).search(queries, mode, 8) for where in (engine, open_store(folder)))
            torch.testing.assert_close(found.scores, exact.scores, atol=1e-4, rtol=0)
        engine.close()


# --------------------------------------------------------------------------------------------------- other commands


@pytest.mark.once
def test_negatives_are_mined_and_impacts_exported(
    place: Callable[[str, str], Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = model_options("promptreps", place("promptreps", "llama"))
    given = ["--pairs", str(data / "pairs.jsonl"), "--negatives", "2", "--depth", "4"]
    assert main(["mine-negatives", *options, *given, "--output", str(tmp_path / "mined.jsonl")]) == 0
    assert "8 queries, 16 negatives" in capsys.readouterr().out
    assert encode(options, data, tmp_path / "store", "--num-passage-masks", "2") == 0
    assert main(["export", "--store", str(tmp_path / "store"), *options, "--output", str(tmp_path / "out.jsonl")]) == 0
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == len(PASSAGES)


def test_budgets_are_selected_for_promptreps(place: Callable[[str, str], Path], data: Path, tmp_path: Path) -> None:
    options = model_options("promptreps", place("promptreps", "llama"))
    given = ["--data", str(data), "--budgets", "1", "3", "--output", str(tmp_path / "b.json")]
    assert main(["select-budget", *options, *given]) == 0
    grid = json.loads((tmp_path / "b.json").read_text())["grid"]
    assert [(cell["num_query_masks"], cell["num_passage_masks"]) for cell in grid] == [(1, 1), (1, 3), (3, 1), (3, 3)]


# ------------------------------------------------------------------------------------------------------- refusals


def test_a_store_of_another_method(
    place: Callable[[str, str], Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = model_options("promptreps", place("promptreps", "llama"))
    assert encode(made, data, tmp_path / "store") == 0
    asked = model_options("repllama", place("repllama", "llama"))
    for command in (
        ["search", *asked, "--store", str(tmp_path / "store"), "question"],
        ["encode", *asked, "--input", str(data), "--output", str(tmp_path / "store")],
        ["evaluate", *asked, "--data", str(data), "--store", str(tmp_path / "store")],
    ):
        assert main(command) == 2
        assert "made by method 'PromptReps' (model '" in (said := capsys.readouterr().err.splitlines()[-1])
        assert "not by 'RepLLaMA' ('" in said


def test_budgets_that_one_side_chose(
    place: Callable[[str, str], Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """K may be chosen for each side alone; the paper's prompt of a side follows its K, another prompt does not."""
    options = model_options("promptreps", place("promptreps", "llama"))
    assert encode(options, data, tmp_path / "store", "--num-passage-masks", "4") == 0
    assert encode(options, data, tmp_path / "store", "--num-passage-masks", "3") == 2  # its own side's is the store's
    assert "`num_masks` 4, not 3" in capsys.readouterr().err.splitlines()[-1]
    search = ["search", *options, "--store", str(tmp_path / "store"), "question", "--num-query-masks"]
    assert [main([*search, k]) for k in ("1", "3")] == [0, 0]
    own = {"system": "s", "user": "{text}", "assistant": "a"}
    for number, prompt in enumerate((None, own)):
        folder = tmp_path / f"told{number}"
        folder.mkdir()
        fields = {"method": "promptreps", "base_model_name_or_path": options[1], "passage_prompt": prompt}
        (folder / "baseline.json").write_text(json.dumps(fields))
        asked = ["search", "--model", str(folder), "--store", str(tmp_path / "store"), "question"]
        assert main(asked) == (0 if prompt is None else 2)
    assert "prompts.passage" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (
            "search --store {store} --mode sparse_max q",
            "repllama has no sparse vectors for mode 'sparse_max'; its modes",
        ),
        (
            "evaluate --data {data} --modes multi_dense sparse_max",
            "repllama has no sparse vectors for mode 'sparse_max'",
        ),
        (
            "mine-negatives --pairs {data}/pairs.jsonl --output {out} --mode sparse_max",
            "repllama has no sparse vectors",
        ),
        ("select-budget --data {data} --output {out}", "repllama has no sparse vectors for mode 'sparse_max'"),
        ("encode --input {data} --output {out} --sparse-top-k 8", "sparse_top_k is 8, but RepLLaMA has no sparse vec"),
        (
            "encode --input {data} --output {out} --num-query-masks 4",
            "`num_query_vectors` of repllama can only be 1, got 4",
        ),
        ("encode --input {data} --output {out} --max-length 99", "of repllama, set query_length and passage_length"),
    ],
)
def test_what_a_method_has_not(
    command: str, said: str, place: Callable[[str, str], Path], data: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    options = model_options("repllama", place("repllama", "llama"))
    words = command.format(store=tmp_path / "store", data=data, out=tmp_path / "out").split()
    if command.startswith("search"):
        assert encode(options, data, tmp_path / "store") == 0
    if "--num-query-masks" in words:
        words.append("--queries")
    assert main([words[0], *options, *words[1:]]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_models_of_another_kind(
    place: Callable[[str, str], Path], adapter: Makes, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    causal, diffusion = place("promptreps", "llama"), place("diffembed", "tiny-llada")
    release = place("diffretriever", "tiny-llada")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "baseline.json").write_text(json.dumps({"method": "repllama", "base_model_name_or_path": str(causal)}))
    cases = [
        (["--model", diffusion, "--method", "promptreps"], "is a diffusion backbone, read without the causal mask"),
        (["--model", release, "--method", "repllama"], "is a diffusion backbone, read without the causal mask"),
        (["--model", causal], "Or read it by another method: --method promptreps, repllama, diffembed"),
        (["--model", causal, "--method", "diffretriever"], "is a backbone, not a release; build one with"),
        (["--model", mine, "--method", "promptreps"], "baseline.json is of method 'repllama', not 'promptreps'"),
        (["--model", causal, "--method", "promptreps", "--adapter", mine], "is of method 'repllama', not 'promptreps'"),
        (["--model", release, "--adapter", mine], "causal mask that RepLLaMA could read"),
        (["--model", release, "--method", "diffretriever", "--adapter", mine], "'repllama', not 'diffretriever'"),
        (["--model", diffusion, "--method", "diffembed", "--adapter", PARITY / "adapters" / "llada-q4p4"],
         "is the adapter of a DiffRetriever (retriever_config.json), not of diffembed"),
        (["--model", causal, "--method", "repllama", "--adapter", tmp_path / "typo"], "typo: no such folder"),
    ]  # fmt: skip
    for options, said in cases:
        given = ["encode", *map(str, options), "--input", str(data), "--output", str(tmp_path / "out")]
        assert main(given) == 2
        assert said in capsys.readouterr().err.splitlines()[-1]


def test_an_answer_that_ends_at_once_leaves_one_vector(tmp_path: Path, data: Path) -> None:
    from causal_backbones import make_backbone

    quiet = make_backbone("llama", tmp_path / "quiet", stops=50.0)
    assert encode(model_options("promptreps", quiet), data, tmp_path / "store", "--num-passage-masks", "4") == 0
    [shard] = open_store(tmp_path / "store").shards()
    mask = shard.mask(0, len(shard))
    assert mask is not None
    assert (mask.sum(dim=1) == 1).any()
    assert mask[:, 0].all()


def test_the_commands_know_the_methods() -> None:
    assert load_model.BASELINES == METHODS
