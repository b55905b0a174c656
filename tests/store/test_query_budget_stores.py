"""Stores of queries whose K_q a table chooses: written, searched exactly and in Qdrant, and told apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from store_helpers import made_up_texts, silent, write_jsonl

from diffretriever.encode.encode_store import encode_store
from diffretriever.search import Searcher
from diffretriever.store.identity import check_searchable, describe_model
from diffretriever.store.segments import existing
from diffretriever.store.store import Store

TABLE = {"length": [6, 12], "entropy": [], "num_query_masks": [[1], [2], [6]]}
OTHER = {"length": [6, 12], "entropy": [], "num_query_masks": [[1], [3], [6]]}
MODES = ("single_dense", "multi_dense", "sparse_max", "fusion_multi_sparse_max")


@pytest.fixture(scope="module")
def stores(load_release: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Store, Store]:
    """The model with the table, a store of passages that it made without, and one of queries with."""
    place = tmp_path_factory.mktemp("stores")
    corpus = write_jsonl(place / "texts.jsonl", made_up_texts(9))
    options: Any = {"shard_size": 4, "dtype": "float32", "tell": silent}
    plain = load_release("tiny-llada", "llada-q4p4")
    passages = encode_store(plain, corpus, place / "passages", is_query=False, **options)
    model = load_release("tiny-llada", "llada-q4p4", query_budget_table=TABLE)
    return model, passages, encode_store(model, corpus, place / "queries", is_query=True, **options)


def test_the_store_says_which_vectors_exist(stores: tuple[Any, Store, Store]) -> None:
    model, _, queries = stores
    expected = model.encode_texts([text for _, text in made_up_texts(9)], True)
    assert queries.manifest.num_masks == 6
    masks = torch.cat([existing(shard, 0, len(shard)) for shard in queries.shards()])
    assert torch.equal(masks, expected.repr_mask)
    assert {1, 2, 6} == set(masks.sum(dim=1).tolist())
    dense = torch.cat([shard.dense(0, len(shard)) for shard in queries.shards()])
    assert torch.allclose(dense, expected.repr_hidden, rtol=0, atol=3e-6)


@pytest.mark.parametrize("mode", MODES)
def test_a_store_of_passages_made_before_is_searched(stores: tuple[Any, Store, Store], mode: str) -> None:
    """The passages' vectors do not depend on the table; scores are those of each query with the vectors it has."""
    model, passages, queries = stores
    check_searchable(passages.manifest, describe_model(model, True, "float32"), "the store")
    found = Searcher(passages).search(queries, mode, 9)
    texts = [text for _, text in made_up_texts(9)]
    expected = model.score(model.encode_texts(texts, True), model.encode_texts(texts, False), mode)
    for row, hits in enumerate(found):
        for hit in hits:
            assert hit.score == pytest.approx(float(expected[row, passages.ids().index(hit.id)]), abs=1e-5)


def test_qdrant_ranks_as_exact_search(stores: tuple[Any, Store, Store], tmp_path: Path) -> None:
    pytest.importorskip("qdrant_edge")
    from diffretriever.search import QdrantEngine, upload

    _, passages, queries = stores
    upload(passages, str(tmp_path / "qdrant"), "some")
    engine = QdrantEngine(str(tmp_path / "qdrant"), "some")
    for mode in MODES:
        exact, found = (Searcher(where).search(queries, mode, 5) for where in (passages, engine))
        for mine, theirs in zip(exact, found, strict=True):
            assert [hit.score for hit in mine] == pytest.approx([hit.score for hit in theirs], abs=1e-5)
    engine.close()


def test_another_table_makes_other_queries(
    stores: tuple[Any, Store, Store], load_release: Callable[..., Any], tmp_path: Path
) -> None:
    _, passages, queries = stores
    corpus = write_jsonl(tmp_path / "texts.jsonl", made_up_texts(9))
    other = load_release("tiny-llada", "llada-q4p4", query_budget_table=OTHER)
    for model in (other, load_release("tiny-llada", "llada-q4p4", num_query_masks=6)):
        with pytest.raises(ValueError, match="query_budget_table"):
            encode_store(model, corpus, queries.folder, is_query=True, shard_size=4, dtype="float32", tell=silent)
    again = encode_store(other, corpus, passages.folder, is_query=False, shard_size=4, dtype="float32", tell=silent)
    assert again.manifest == passages.manifest
