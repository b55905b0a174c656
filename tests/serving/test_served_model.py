"""`diffretriever encode --server` and `search --server`: store and hits of a model in the process, whatever fails."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from served import Handler, PlainEngine, Served, serving
from store_helpers import folder_bytes, made_up_texts, other_defaults, silent, write_jsonl

from diffretriever.cli.main import main
from diffretriever.encode.encode_store import encode_store
from diffretriever.search.qdrant.calls import EngineAwayError, EngineError
from diffretriever.search.searcher import Searcher
from diffretriever.serving.client import TextClient
from diffretriever.serving.served_model import ServedModel
from diffretriever.store.store import Store

pytestmark = pytest.mark.once

# -------------------------------------------------------------------------------------------------------------- faults


def busy(handler: Handler, request: dict[str, Any]) -> None:
    handler.say(503, {"error": {"message": "no room in the queue"}})


def failing(handler: Handler, request: dict[str, Any]) -> None:
    handler.say(500, {})


def broken_off(handler: Handler, request: dict[str, Any]) -> None:
    handler.reset()


def cut(handler: Handler, request: dict[str, Any]) -> None:
    answer = {"data": handler.server.engine(request["data"])}
    handler.say(200, answer, cut=len(json.dumps(answer)) // 2)


def one_less(handler: Handler, request: dict[str, Any]) -> None:
    answer = handler.server.engine(request["data"])
    handler.say(200, {"data": answer | {"vectors": answer["vectors"][1:]}})


def another_model(handler: Handler, request: dict[str, Any]) -> None:
    handler.say(200, {"data": handler.server.engine(request["data"]) | {"model": "0" * 64}})


def with_field(name: str, value: Any) -> Callable[[Handler, dict[str, Any]], None]:
    """A fault: the first text's vectors have another field."""

    def answer(handler: Handler, request: dict[str, Any]) -> None:
        found = handler.server.engine(request["data"])
        found["vectors"][0][name] = value
        handler.say(200, {"data": found})

    return answer


# --------------------------------------------------------------------------------------------------------------- stores


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Eleven passages, an empty one among them: three shards of 4, 4 and 3."""
    return write_jsonl(tmp_path / "passages.jsonl", made_up_texts(11))


def served(server: Served, retry_for: float = 5.0) -> ServedModel:
    return ServedModel(TextClient(server.address, retry_for, pause=0.001))


def encode(model: Any, corpus: Path, folder: Path, **options: Any) -> Store:
    options = {"dtype": "float32", "shard_size": 4, "tokens_per_batch": 256, "tell": silent, **options}
    return encode_store(model, corpus, folder, **options)


def assert_same(found: Store, expected: Store) -> None:
    assert found.ids() == expected.ids()
    for one, other in zip(found.shards(), expected.shards(), strict=True):
        assert torch.allclose(one.repr_hidden, other.repr_hidden, atol=2e-6)
        assert torch.equal(one.sparse_indices, other.sparse_indices)
        assert torch.allclose(one.sparse_values, other.sparse_values, atol=5e-6)


def test_another_default_device_and_dtype_of_torch(server: Served) -> None:
    model, texts = served(server), ["a quiet river", "the light of the sea"]
    expected = model.encode_texts(texts, True)
    answer = model._client.ask(server.asked[-1][1]["data"])
    model._client.ask = lambda data: answer  # type: ignore[method-assign]  # the server is another process
    with other_defaults():
        found = model.encode_texts(texts, True)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor)
        assert found[name].dtype == tensor.dtype


@pytest.mark.parametrize("is_query", [False, True])
def test_a_store_is_that_of_a_model_in_the_process(
    is_query: bool, tiny: Any, server: Served, corpus: Path, tmp_path: Path
) -> None:
    expected = encode(tiny, corpus, tmp_path / "here", is_query=is_query)
    found = encode(served(server), corpus, tmp_path / "served", is_query=is_query)
    assert_same(found, expected)
    assert found.manifest.settings.differences(expected.manifest.settings) == {}
    assert sum(len(request["data"].get("texts", [])) for _, request in server.asked) == 11


def test_a_store_begun_in_the_process_is_finished_by_a_server(
    tiny: Any, server: Served, corpus: Path, tmp_path: Path
) -> None:
    """They are one model: the release and its export."""
    expected = encode(tiny, corpus, tmp_path / "here")
    kept = (tmp_path / "here" / "shard-000000.safetensors").read_bytes()
    (tmp_path / "here" / "shard-000001.safetensors").unlink()
    found = encode(served(server), corpus, tmp_path / "here")
    assert_same(found, expected)
    assert (tmp_path / "here" / "shard-000000.safetensors").read_bytes() == kept
    assert sum(len(request["data"]["texts"]) for _, request in server.asked[1:]) == 4


def test_fewer_sparse_weights_are_the_largest(tiny: Any, server: Served, corpus: Path, tmp_path: Path) -> None:
    expected = encode(tiny, corpus, tmp_path / "here", sparse_top_k=5)
    assert_same(encode(served(server), corpus, tmp_path / "served", sparse_top_k=5), expected)


@pytest.mark.parametrize("fault", [busy, failing, broken_off, cut, one_less])
def test_what_passes_is_waited_for(fault: Any, tiny: Any, server: Served, corpus: Path, tmp_path: Path) -> None:
    """Twice each time, and every text comes out in its place."""
    server.faults = [fault, None, fault, fault, None, None]
    assert_same(encode(served(server), corpus, tmp_path / "served"), encode(tiny, corpus, tmp_path / "here"))
    assert server.faults == []


def test_a_server_that_dies_half_way_loses_nothing(
    tiny: Any, engine: PlainEngine, corpus: Path, tmp_path: Path
) -> None:
    """The shards that are there stay; the same call goes on when it is back, and asks for the rest alone."""
    with serving(engine) as server:
        server.faults = [None, *[broken_off] * 500]
        with pytest.raises(EngineAwayError, match=r"127\.0\.0\.1:\d+: no answer for 0\.05 seconds \(.*Is the server"):
            encode(served(server, retry_for=0.05), corpus, tmp_path / "served", tokens_per_batch=10000)
    shards = {name: content for name, content in folder_bytes(tmp_path / "served").items() if name.startswith("shard")}
    assert list(shards) == ["shard-000000.safetensors"]
    with serving(engine) as server:
        found = encode(served(server), corpus, tmp_path / "served", tokens_per_batch=10000)
        assert sum(len(request["data"].get("texts", [])) for _, request in server.asked) == 7
    assert folder_bytes(tmp_path / "served").items() >= shards.items()
    assert_same(found, encode(tiny, corpus, tmp_path / "here"))


def test_a_server_that_is_started_again_is_found_again(
    tiny: Any, engine: PlainEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It starts while the client waits to ask a second time, as nobody listened the first."""
    with serving(engine) as server:
        model = served(server, retry_for=20)
    again: list[Served] = []
    with contextlib.ExitStack() as running:

        def start(_: float) -> None:
            monkeypatch.undo()
            again.append(running.enter_context(serving(engine, server.server_address[1])))

        monkeypatch.setattr(time, "sleep", start)
        found = model.encode_texts(["the seasons"], True)
    assert len(again[0].asked) == 1
    assert found.repr_hidden is not None
    assert torch.allclose(found.repr_hidden, tiny.encode_texts(["the seasons"], True).repr_hidden, atol=2e-6)


def test_another_model_half_way_is_refused(server: Served, corpus: Path, tmp_path: Path) -> None:
    server.faults = [None, another_model]
    with pytest.raises(
        EngineError, match="serves another model than when this run began, and its vectors are not kept"
    ):
        encode(served(server), corpus, tmp_path / "served", tokens_per_batch=10000)
    assert [name for name in folder_bytes(tmp_path / "served") if name.startswith("shard")] == [
        "shard-000000.safetensors"
    ]


def test_another_model_does_not_go_on_with_a_store(
    load_release: Callable[..., Any], server: Served, corpus: Path, tmp_path: Path
) -> None:
    other = load_release("tiny-dream", "dream-q4p4")
    encode(other, corpus, tmp_path / "store")
    (tmp_path / "store" / "shard-000001.safetensors").unlink()
    with pytest.raises(ValueError, match="store there was made by model"):
        encode(served(server), corpus, tmp_path / "store")
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dense", "AAAA"),
        ("dense", "AAAAAA=="),
        ("dense", "no base64!"),
        ("dense", None),
        ("sparse", {"indices": [10**6], "values": [1.0]}),
        ("sparse", {"indices": [3, 4], "values": [1.0]}),
        ("sparse", {"indices": [3], "values": [-1.0]}),
        ("sparse", {"indices": [3], "values": [float("inf")]}),
        ("tokens", "many"),
    ],
)
def test_vectors_that_cannot_be_are_refused(name: str, value: Any, server: Served) -> None:
    server.faults = [with_field(name, value)]
    with pytest.raises(EngineError, match="vectors are not those that it announced"):
        served(server).encode_texts(["the seasons"], False)


@pytest.mark.parametrize("weight", [None, 0.7, "most"])
def test_the_fusions_weight_is_the_served_releases(engine: PlainEngine, weight: Any) -> None:
    def recommending(data: dict[str, Any]) -> dict[str, Any]:
        found = engine(data)
        return found | {"description": found["description"] | {"recommended_fusion_weight": weight}}

    with serving(recommending) as server:
        if weight != "most":
            assert served(server).config.recommended_fusion_weight == weight
            return
        with pytest.raises(ValueError, match=r"http://.*: `recommended_fusion_weight` must be a number of at least 0"):
            served(server)


def test_the_text_that_a_server_refuses_is_named(server: Served, corpus: Path, tmp_path: Path) -> None:
    engine = server.engine

    def picky(data: Any) -> Any:
        if any("river" in text for text in data.get("texts", [])):
            raise ValueError("a river")
        return engine(data)

    server.engine = picky
    first = next(text_id for text_id, text in made_up_texts(11) if "river" in text)
    with pytest.raises(ValueError, match=f"text '{first}' could not be encoded: http.*: a river"):
        encode(served(server), corpus, tmp_path / "served")


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (401, r"refused the request: 401 no\. Is VLLM_API_KEY set, and right\?"),
        (404, r"refused the request: 404 no\. Is this vLLM, started on a folder of `diffretriever export-vllm`"),
        (
            413,
            r"refused the request: 413 no\. `diffretriever encode` sends less at once with a smaller --tokens-per",
        ),
    ],
)
def test_a_refusal_that_stays_is_told_at_once(status: int, told: str, server: Served) -> None:
    model = served(server)
    server.faults = [lambda handler, request: handler.say(status, {"error": {"message": "no"}})]
    with pytest.raises(EngineError, match=told):
        model.encode_texts(["a"], True)
    assert len(server.asked) == 2


def test_the_key_is_sent_and_not_shown(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret-1")
    model = served(server)
    assert server.asked[0][0]["Authorization"] == "Bearer secret-1"
    server.faults = [lambda handler, request: handler.say(403, {"error": {"message": "secret-1 is old"}})]
    with pytest.raises(EngineError, match=r"403 \[key\] is old"):
        model.encode_texts(["a"], True)


def test_what_is_no_such_server_is_told(engine: PlainEngine) -> None:
    with (
        serving(lambda data: {"vectors": []}) as server,
        pytest.raises(EngineError, match=r"this is no server of an exported release; see docs/vllm\.md"),
    ):
        served(server)
    for address in ("localhost:8000", "ftp://host", "http://user:secret@host", "http://"):
        with pytest.raises(ValueError, match="--server: expected an address such as") as raised:
            TextClient(address)
        assert "secret" not in str(raised.value)


# ------------------------------------------------------------------------------------------------------------ commands


def test_the_commands(tiny: Any, server: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A store and its search by a server alone; the run is that of a store of queries made here."""
    texts = [(f"p{number}", text) for number, (_, text) in enumerate(made_up_texts(11))]
    corpus = write_jsonl(tmp_path / "passages.jsonl", texts)
    queries = write_jsonl(tmp_path / "queries.jsonl", [("q1", "the light of the sea"), ("q2", "a quiet river")])
    encoding = ["encode", "--server", server.address, "--quiet", "--dtype", "float32"]
    assert main([*encoding, "--input", str(corpus), "--output", str(tmp_path / "store")]) == 0
    encode(tiny, queries, tmp_path / "queries", is_query=True)
    searching = ["search", "--store", str(tmp_path / "store"), "--mode", "fusion_multi_sparse_max"]
    for file, more in (("here", ["--queries", tmp_path / "queries"]), ("served", ["--queries", queries])):
        more += ["--server", server.address] if file == "served" else []
        assert main([*searching, "--run-file", str(tmp_path / file), *map(str, more)]) == 0
    lines = [[line.split() for line in (tmp_path / name).read_text().splitlines()] for name in ("here", "served")]
    assert [line[:4] for line in lines[0]] == [line[:4] for line in lines[1]]
    for one, other in zip(*lines, strict=True):
        assert float(one[4]) == pytest.approx(float(other[4]), abs=1e-5)
    capsys.readouterr()
    assert main([*searching[:3], "--server", server.address, "--json", "-", "a quiet river"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["mode"] == "multi_dense"  # which suits the release
    expected = Searcher(Store.open(tmp_path / "store")).search(tiny.encode_texts(["a quiet river"], True), top_k=10)
    assert [hit["id"] for hit in answer["hits"]] == expected.ids[0]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("encode --input {corpus} --output o", "say who encodes: --model RELEASE, or --server URL"),
        ("encode --server {url} --model m --input {corpus} --output o", "leave out --model"),
        ("encode --server {url} --device cpu --max-length 9 --input {corpus} --output o", "--max-length, --device"),
        ("encode --server {url} --compile --input {corpus} --output o", "leave out --compile"),
        ("encode --server {url} --no-content-filter --input {corpus} --output o", "leave out --no-content-filter"),
        ("encode --server {url} --sparse-top-k 999 --input {corpus} --output o", "sparse_top_k is 999, but http"),
        ("encode --server x --input {corpus} --output o", "--server: expected an address"),
    ],
)
def test_options_that_do_not_go_together(
    words: str, told: str, server: Served, corpus: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words.format(url=server.address, corpus=corpus).split()) == 2
    assert told in capsys.readouterr().err


def test_a_server_that_is_away_ends_with_try_again(corpus: Path, tmp_path: Path, capsys: Any) -> None:
    words = ["encode", "--server", "http://127.0.0.1:9", "--retry-for", "0.01", "--input", corpus, "--output", "o"]
    assert main([str(word) for word in words]) == 3
    assert "http://127.0.0.1:9: no answer for 0.01 seconds" in capsys.readouterr().err


def test_passages_of_another_model_are_not_searched(
    load_release: Callable[..., Any], server: Served, corpus: Path, tmp_path: Path, capsys: Any
) -> None:
    encode(load_release("tiny-dream", "dream-q4p4"), corpus, tmp_path / "store")
    assert main(["search", "--store", str(tmp_path / "store"), "--server", server.address, "a river"]) == 2
    assert "passages were made by model" in capsys.readouterr().err
