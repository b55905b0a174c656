"""The scoring modes against loops over plain Python numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from diffretriever.model import scoring
from diffretriever.model.configuration_diffretriever import DiffRetrieverConfig
from diffretriever.model.scoring import SCORING_MODES, multi_dense, score, single_dense

pytestmark = pytest.mark.once
Side = dict[str, torch.Tensor]


def make_side(count: int, k: int, terms: int, seed: int, hidden: int = 8, shift: float = 0.0) -> Side:
    """Random vectors, and sparse vectors whose first term is the real token 0 and whose last two slots are unused."""
    random = torch.Generator().manual_seed(seed)
    indices = torch.stack([torch.randperm(20, generator=random)[:terms] for _ in range(count)])
    indices[:, 0] = 0
    for row in indices[:, 1:]:
        row[row == 0] = 20  # each term once
    values = torch.rand(count, terms, generator=random).sort(dim=1, descending=True).values + 0.1
    indices[:, -2:], values[:, -2:] = 0, 0.0
    vectors = F.normalize(torch.randn(count, k, hidden, generator=random) + shift, dim=-1)
    return {"repr_hidden": vectors, "sparse_indices": indices, "sparse_values": values}


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def kept(side: Side, row: int) -> list[list[float]]:
    vectors = side["repr_hidden"][row].float().tolist()
    mask = side["repr_mask"][row].tolist() if "repr_mask" in side else [True] * len(vectors)
    return [vector for vector, exists in zip(vectors, mask, strict=True) if exists]


def one_multi(query: list[list[float]], passage: list[list[float]]) -> float:
    if not query or not passage:
        return -math.inf
    return sum(max(dot(q, p) for p in passage) for q in query) / len(query)


def one_single(query: list[list[float]], passage: list[list[float]]) -> float:
    if not query or not passage:
        return -math.inf
    q, p = ([sum(column) / len(vectors) for column in zip(*vectors, strict=True)] for vectors in (query, passage))
    return dot(q, p) / math.sqrt(dot(q, q) * dot(p, p))


def one_sparse(queries: Side, passages: Side, q: int, p: int) -> float:
    sides = []
    for side, row in ((queries, q), (passages, p)):
        indices, values = side["sparse_indices"][row].tolist(), side["sparse_values"][row].float().tolist()
        sides.append({token: value for token, value in zip(indices, values, strict=True) if value > 0})
    return sum(value * sides[1].get(token, 0.0) for token, value in sides[0].items())


def brute(queries: Side, passages: Side, mode: str) -> list[list[float]]:
    pairs = [[(q, p) for p in range(len(passages["repr_hidden"]))] for q in range(len(queries["repr_hidden"]))]
    if mode == "sparse_max":
        return [[one_sparse(queries, passages, q, p) for q, p in row] for row in pairs]
    if mode in ("single_dense", "multi_dense"):
        one = one_single if mode == "single_dense" else one_multi
        return [[one(kept(queries, q), kept(passages, p)) for q, p in row] for row in pairs]
    dense = brute(queries, passages, "single_dense" if mode == "fusion_single_sparse_max" else "multi_dense")
    sparse = brute(queries, passages, "sparse_max")
    return [
        [(d + s) / 2 for d, s in zip(min_max(dense[q]), min_max(sparse[q]), strict=True)] for q in range(len(pairs))
    ]


def min_max(row: list[float]) -> list[float]:
    finite = [value for value in row if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
    return [(value - low) / (high - low) if math.isfinite(value) and high > low else 0.0 for value in row]


@pytest.mark.parametrize("mode", SCORING_MODES)
@pytest.mark.parametrize(("k_q", "k_p"), [(1, 1), (4, 4), (4, 16), (3, 1)])
def test_modes_against_loops(mode: str, k_q: int, k_p: int) -> None:
    queries, passages = make_side(3, k_q, 6, 0), make_side(7, k_p, 9, 1)
    got = score(queries, passages, mode)
    assert got.dtype == torch.float32
    assert torch.allclose(got, torch.tensor(brute(queries, passages, mode)), atol=2e-6)


@pytest.mark.parametrize("mode", ["single_dense", "multi_dense"])
def test_all_negative_similarities(mode: str) -> None:
    queries, passages = make_side(3, 4, 6, 0, shift=4.0), make_side(5, 2, 6, 1, shift=-4.0)
    passages["repr_mask"] = torch.tensor([[1, 1], [1, 0], [0, 1], [1, 1], [0, 0]])
    got = score(queries, passages, mode)
    assert (got < 0).all()  # a missing vector that scored 0 would win here
    assert got[:, 4].tolist() == [-math.inf] * 3
    assert torch.allclose(got, torch.tensor(brute(queries, passages, mode)), atol=2e-6)


@pytest.mark.parametrize("mode", SCORING_MODES)
def test_missing_vectors(mode: str) -> None:
    queries, passages = make_side(4, 3, 6, 2), make_side(6, 5, 6, 3)
    random = torch.Generator().manual_seed(4)
    queries["repr_mask"] = torch.rand(4, 3, generator=random) > 0.4
    passages["repr_mask"] = torch.rand(6, 5, generator=random) > 0.4
    queries["repr_mask"][1], passages["repr_mask"][2] = False, False
    queries["repr_hidden"][~queries["repr_mask"]] = torch.nan  # whatever lies in a missing slot is not looked at
    passages["repr_hidden"][~passages["repr_mask"]] = torch.inf
    assert torch.allclose(score(queries, passages, mode), torch.tensor(brute(queries, passages, mode)), atol=2e-6)


@pytest.mark.parametrize("mode", SCORING_MODES)
@pytest.mark.parametrize("elements", [1, 100, 1000])
def test_blocks_change_nothing(mode: str, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    queries, passages = make_side(3, 4, 6, 0), make_side(23, 2, 6, 1)
    passages["repr_mask"] = torch.arange(46).view(23, 2) % 5 != 0
    whole = score(queries, passages, mode)
    monkeypatch.setattr(scoring, "BLOCK_ELEMENTS", elements)
    assert torch.allclose(score(queries, passages, mode), whole, atol=1e-6)


@pytest.mark.parametrize("mode", SCORING_MODES)
def test_copies_of_a_passage_tie(mode: str) -> None:
    queries, once = make_side(3, 4, 6, 0, hidden=33), make_side(1, 3, 6, 1, hidden=33)
    copies = {name: values.repeat(50, *[1] * (values.dim() - 1)) for name, values in once.items()}
    got = score(queries, copies, mode)
    assert torch.equal(got, got[:, :1].expand_as(got))


@pytest.mark.parametrize("dense_score", [single_dense, multi_dense])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_are_those_of_finite_differences(dense_score: Callable[..., torch.Tensor], masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    sides = [torch.randn(count, k, 5, generator=generator, dtype=torch.float64) for count, k in ((3, 2), (4, 3))]
    missing = [torch.tensor([[0, 0], [0, 1], [1, 0]]), torch.tensor([[0, 0, 0], [1, 0, 0], [0, 1, 1], [0, 1, 0]])]
    masks = [mask == 0 for mask in missing] if masked else []
    for side in sides:
        side.requires_grad_()
    assert torch.autograd.gradcheck(lambda *given: dense_score(*given, *masks), sides)


@pytest.mark.parametrize("mode", SCORING_MODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_scored_in_float32(mode: str, dtype: torch.dtype) -> None:
    sides = [make_side(3, 4, 6, 0), make_side(5, 2, 6, 1)]
    for side in sides:
        side["repr_hidden"], side["sparse_values"] = side["repr_hidden"].to(dtype), side["sparse_values"].to(dtype)
    got = score(sides[0], sides[1], mode)
    assert got.dtype == torch.float32
    assert torch.allclose(got, torch.tensor(brute(sides[0], sides[1], mode)), atol=2e-6)


@pytest.mark.parametrize("mode", SCORING_MODES)
def test_autocast_rounds_no_scores(mode: str) -> None:
    queries, passages = make_side(3, 2, 6, seed=0), make_side(4, 3, 6, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        found = score(queries, passages, mode)
    assert torch.equal(found, score(queries, passages, mode))


def test_int32_indices() -> None:
    queries, passages = make_side(3, 4, 6, 0), make_side(5, 2, 6, 1)
    expected = score(queries, passages, "sparse_max")
    queries["sparse_indices"] = queries["sparse_indices"].int()
    assert torch.equal(score(queries, passages, "sparse_max"), expected)


def test_unused_slots_never_add_and_token_0_counts() -> None:
    unused = {"sparse_indices": torch.tensor([[5, 0, 0, 0]]), "sparse_values": torch.tensor([[2.0, 0.0, 0.0, 0.0]])}
    real = {"sparse_indices": torch.tensor([[0, 5, 0, 0]]), "sparse_values": torch.tensor([[3.0, 1.0, 0.0, 0.0]])}
    assert score(unused, real, "sparse_max").tolist() == [[2.0]]
    assert score(real, unused, "sparse_max").tolist() == [[2.0]]
    assert score(real, real, "sparse_max").tolist() == [[10.0]]
    assert score(unused, unused, "sparse_max").tolist() == [[4.0]]


@pytest.mark.parametrize("mode", ["fusion_single_sparse_max", "fusion_multi_sparse_max"])
def test_fusion_of_constant_rows(mode: str) -> None:
    queries, passage = make_side(2, 2, 6, 0), make_side(1, 2, 6, 1)
    same = {name: values.repeat(3, *[1] * (values.dim() - 1)) for name, values in passage.items()}
    assert score(queries, same, mode).tolist() == [[0.0] * 3] * 2
    assert score(queries, passage, mode).tolist() == [[0.0]] * 2


@pytest.mark.parametrize(("weight", "mode"), [(1.0, "multi_dense"), (0.0, "sparse_max")])
def test_fusion_weight(weight: float, mode: str) -> None:
    queries, passages = make_side(2, 2, 6, 0), make_side(6, 2, 6, 1)
    fused = score(queries, passages, "fusion_multi_sparse_max", fusion_weight=weight)
    assert torch.equal(fused.argsort(dim=1), score(queries, passages, mode).argsort(dim=1))
    assert fused.amin(dim=1).tolist() == [0.0, 0.0]
    assert fused.amax(dim=1).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("mode", SCORING_MODES)
@pytest.mark.parametrize(("q", "p"), [(2, 0), (0, 2), (0, 0)])
def test_no_queries_or_no_passages(mode: str, q: int, p: int) -> None:
    queries = {name: values[:q] for name, values in make_side(2, 2, 6, 0).items()}
    passages = {name: values[:p] for name, values in make_side(2, 3, 6, 1).items()}
    assert score(queries, passages, mode).shape == (q, p)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.integers(3, 8))
def test_properties(seed: int, q: int, k_q: int, k_p: int, terms: int) -> None:
    queries, passages = make_side(q, k_q, terms, seed), make_side(5, k_p, terms, seed + 1)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    shuffled = {name: values[order] for name, values in passages.items()}
    for mode in SCORING_MODES:
        got = score(queries, passages, mode)
        assert torch.allclose(got, torch.tensor(brute(queries, passages, mode)), atol=3e-6)
        assert torch.allclose(score(queries, shuffled, mode), got[:, order], atol=1e-6)
        if "fusion" in mode:
            assert got.min() >= 0
            assert got.max() <= 1
    assert torch.allclose(score(queries, passages, "sparse_max"), score(passages, queries, "sparse_max").T, atol=1e-6)
    assert (score(queries, passages, "multi_dense").abs() <= 1 + 1e-6).all()
    assert torch.allclose(score(queries, queries, "multi_dense").diagonal(), torch.ones(q), atol=1e-6)


@pytest.mark.parametrize("mode", SCORING_MODES)
def test_model_score_is_score(mode: str, load_release: Callable[..., Any]) -> None:
    model = load_release("tiny-dream", "dream-q4p16")
    queries = model.encode_texts(["a cat", "the sea"], is_query=True)
    passages = model.encode_texts(["cats and dogs", "the sea is blue", ""], is_query=False)
    assert torch.equal(model.score(queries, passages, mode), score(queries, passages, mode))
    assert torch.allclose(model.score(queries, passages, mode), torch.tensor(brute(queries, passages, mode)), atol=2e-6)
    assert torch.equal(model.score(queries, passages), score(queries, passages, "multi_dense"))


@pytest.mark.parametrize("mode", SCORING_MODES)
def test_the_release_recommends_the_fusions_weight(mode: str, load_release: Callable[..., Any]) -> None:
    model = load_release("tiny-llada", "llada-q4p4", recommended_fusion_weight=0.8)
    queries = model.encode_texts(["a cat", "the sea"], is_query=True)
    passages = model.encode_texts(["cats and dogs", "the sea is blue", "a quiet river"], is_query=False)
    half = score(queries, passages, mode)
    assert torch.equal(model.score(queries, passages, mode), score(queries, passages, mode, 0.8))
    assert torch.equal(model.score(queries, passages, mode, 0.5), half)
    assert torch.equal(model.score(queries, passages, mode), half) == ("fusion" not in mode)


@pytest.mark.parametrize("weight", [1.5, -0.1, "0.5", True, float("nan")])
def test_a_weight_that_no_fusion_has_is_not_recommended(weight: Any) -> None:
    with pytest.raises(ValueError, match="config field `recommended_fusion_weight` must be a number of at"):
        DiffRetrieverConfig(recommended_fusion_weight=weight)


def without(side: Side, name: str) -> Side:
    return {key: value for key, value in side.items() if key != name}


GOOD = make_side(2, 3, 6, 0)
BAD_CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown mode": ({"mode": "dense"}, r"scoring mode 'dense' is not known; the modes are single_dense, .*sparse_max"),
    "fusion weight": ({"fusion_weight": 1.5}, "`fusion_weight` must lie between 0 and 1, got 1.5"),
    "dimensions": (
        {"passages": {"repr_hidden": torch.ones(2, 3, 5)}},
        "queries have 8 dimensions, passages 5; they were made by different models",
    ),
    "no vectors": (
        {"queries": {}},
        r"`queries` needs `repr_hidden`, floating numbers of shape \[texts, K, H\]; got None",
    ),
    "rank": (
        {"passages": {"repr_hidden": torch.ones(2, 8)}},
        r"`passages` needs `repr_hidden`, .* got torch.float32 \[2, 8\]",
    ),
    "repr_mask": (
        {"passages": GOOD | {"repr_mask": torch.ones(2, 4)}},
        r"`repr_mask` of `passages` has shape \[2, 4\]; `repr_hidden` asks for \[2, 3\]",
    ),
    "no sparse": (
        {"queries": without(GOOD, "sparse_values"), "mode": "sparse_max"},
        "`queries` has no sparse vectors; encode it with compute_sparse=True",
    ),
    "no sparse for fusion": (
        {"passages": without(GOOD, "sparse_indices"), "mode": "fusion_multi_sparse_max"},
        "`passages` has no sparse vectors",
    ),
    "T": (
        {"queries": GOOD | {"sparse_values": torch.ones(2, 7)}, "mode": "sparse_max"},
        r"`queries`: sparse_indices \[2, 6\] and sparse_values \[2, 7\] must both be \[texts, T\]",
    ),
    "sparse rank": (
        {"queries": GOOD | {"sparse_values": torch.ones(6), "sparse_indices": torch.ones(6)}, "mode": "sparse_max"},
        r"sparse_indices \[6\] and sparse_values \[6\] must both be",
    ),
    "rows": (
        {"passages": GOOD | {"repr_hidden": torch.ones(4, 3, 8)}, "mode": "fusion_multi_sparse_max"},
        "sparse vectors are of 2 queries and 2 passages, the dense ones of 2 and 4",
    ),
    "a tensor": (
        {"queries": torch.ones(2, 3, 8)},
        "`queries` must be what encode or encode_texts returned, got Tensor",
    ),
    "NaN": ({"queries": {"repr_hidden": torch.full((2, 3, 8), torch.nan)}}, "`repr_hidden` .* holds NaN"),
    "sparse NaN": (
        {"queries": GOOD | {"sparse_values": torch.full((2, 6), torch.nan)}, "mode": "sparse_max"},
        "`sparse_values` .* hold NaN",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls(name: str) -> None:
    changed, message = BAD_CALLS[name]
    call: dict[str, Any] = {"queries": GOOD, "passages": GOOD, "mode": "multi_dense", **changed}
    with pytest.raises(ValueError, match=message):
        score(**call)
