"""The loss against plain loops and finite differences, on both backbones."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from training_data import batch_of, contrastive_model, gradients, made_up_pairs, small_recipe

from diffretriever.model.sparse_head import logits_at
from diffretriever.training.batches import padded_ids
from diffretriever.training.candidates import known_positives
from diffretriever.training.denoising import passages_denoising_loss
from diffretriever.training.objective import Side, contrastive_loss, sparse_scores, word_columns


def cross_entropy(scores: list[float], target: int) -> float:
    top = max(scores)
    return top + math.log(sum(math.exp(score - top) for score in scores)) - scores[target]


def loop_dense(query: torch.Tensor, passage: torch.Tensor) -> list[list[float]]:
    return [
        [
            sum(max(float(F.cosine_similarity(q, p, dim=0)) for p in there) for q in here) / len(here)
            for there in passage
        ]
        for here in query
    ]


def loop_sparse(query: Side, passage: Side, head: torch.Tensor) -> list[list[float]]:
    scores = []
    for states, words in zip(query.states, query.words.tolist(), strict=True):
        row = []
        for there, others in zip(passage.states, passage.words.tolist(), strict=True):
            total = 0.0
            for word in {word for word in words if word >= 0} & set(others):
                weight = [math.log1p(max(0.0, max(float(s @ head[word]) for s in side))) for side in (states, there)]
                total += weight[0] * weight[1]
            row.append(total)
        scores.append(row)
    return scores


def loop_loss(
    query: Side, passage: Side, targets: list[int], excluded: torch.Tensor, head: torch.Tensor, temperature: float,
    weight: float,
) -> float:  # fmt: skip
    dense, sparse, total = loop_dense(query.states, passage.states), loop_sparse(query, passage, head), 0.0
    for number, target in enumerate(targets):
        kept = [place for place in range(len(passage.states)) if not excluded[number, place]]
        total += cross_entropy([dense[number][place] / temperature for place in kept], kept.index(target))
        total += weight * cross_entropy([sparse[number][place] for place in kept], kept.index(target))
    return total / len(targets)


def random_sides(seed: int, k_q: int, k_p: int) -> tuple[Side, Side, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    words = [torch.randperm(20, generator=generator)[: (n * 3) % 7].tolist() for n in range(3 + 7)]
    query = Side(torch.randn(3, k_q, 6, generator=generator), padded_ids(words[:3]))
    passage = Side(torch.randn(7, k_p, 6, generator=generator), padded_ids(words[3:]))
    return query, passage, torch.randn(20, 6, generator=generator)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 5), st.sampled_from([0.01, 0.05, 1.0]))
def test_loss_against_a_loop(seed: int, k_q: int, k_p: int, temperature: float) -> None:
    query, passage, weight = random_sides(seed, k_q, k_p)
    targets = [4, 0, 2]
    excluded = torch.rand(3, 7, generator=torch.Generator().manual_seed(seed)) < 0.2
    excluded[range(3), targets] = False
    found = contrastive_loss(
        query,
        passage,
        torch.tensor(targets),
        excluded,
        partial(logits_at, linear(weight)),
        temperature,
        0.7,
    )
    assert found["loss"].item() == pytest.approx(
        loop_loss(query, passage, targets, excluded, weight, temperature, 0.7), rel=2e-5, abs=2e-4
    )
    right = 0.0
    for number, row in enumerate(loop_dense(query.states, passage.states)):
        kept = [place for place in range(7) if not excluded[number, place]]
        right += max(kept, key=lambda place: row[place]) == targets[number]
    assert float(found["right"]) == pytest.approx(right / 3)


def linear(weight: torch.Tensor) -> torch.nn.Linear:
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight
    return layer


def test_sparse_weight_and_missing_head() -> None:
    query, passage, weight = random_sides(1, 2, 2)
    nothing, targets = torch.zeros(3, 7, dtype=torch.bool), torch.tensor([0, 1, 2])
    head = partial(logits_at, linear(weight))
    losses = [contrastive_loss(query, passage, targets, nothing, head, 0.1, w) for w in (0.0, 2.0)]
    assert losses[0]["loss"].item() == pytest.approx(float(losses[0]["dense"]))
    assert losses[1]["loss"].item() == pytest.approx(float(losses[1]["dense"] + 2 * losses[1]["sparse"]), rel=1e-6)
    dense_only = contrastive_loss(query, passage, targets, nothing, None, 0.1, 1.0)
    assert dense_only["loss"].item() == pytest.approx(float(losses[0]["dense"]))


def test_texts_without_content_words_have_no_sparse_score() -> None:
    query, passage, weight = random_sides(2, 1, 1)
    none = Side(query.states, torch.full((3, 1), -1))
    assert word_columns(none.words).tolist() == [0]
    assert sparse_scores(none, passage, partial(logits_at, linear(weight))).abs().sum() == 0


def test_known_positives_are_no_negatives() -> None:
    queries = torch.tensor([11, 12, 11])
    positives = torch.tensor([[100, 103], [101, -1], [102, -1]])
    passages = torch.tensor([[100, 11], [101, 12], [102, 11], [103, -1], [104, -1], [101, -1]])
    found = known_positives(queries, positives, passages, torch.tensor([0, 1, 2]))
    assert found.nonzero().tolist() == [[0, 2], [0, 3], [1, 5], [2, 0]]


@pytest.fixture(scope="module", params=["tiny-llada", "tiny-dream"])
def release(request: pytest.FixtureRequest, build_release: Callable[..., Path]) -> Path:
    return build_release(request.param)


def test_the_models_loss_against_the_release_alone(release: Path, tmp_path: Path) -> None:
    """The whole path, from texts: vectors from `encode`, scores from loops."""
    recipe = small_recipe(num_query_masks=2, num_passage_masks=3, dropout=0.0, temperature=0.1)
    model = contrastive_model(release, recipe)
    records = made_up_pairs(3, negatives=2)
    batch = batch_of(model, records, tmp_path / "p.jsonl")
    found = model(batch)
    retriever, vocabulary = model.retriever, model.retriever.config.vocab_size
    passages = [r["positive"] for r in records] + [text for r in records for text in r["negatives"]]
    sides = []
    for texts, is_query in (([r["query"] for r in records], True), (passages, False)):
        out = retriever.encode_texts(texts, is_query, sparse_top_k=vocabulary)
        sparse = torch.zeros(len(texts), vocabulary).scatter_add_(1, out["sparse_indices"], out["sparse_values"])
        sides.append((out["repr_hidden"], sparse))
    (query, query_sparse), (passage, passage_sparse) = sides
    dense, sparse = loop_dense(query, passage), query_sparse @ passage_sparse.T
    expected = [cross_entropy([score / 0.1 for score in dense[n]], n) for n in range(3)]
    assert float(found["dense"]) == pytest.approx(sum(expected) / 3, abs=2e-4)
    expected = [cross_entropy(sparse[n].tolist(), n) for n in range(3)]
    assert float(found["sparse"]) == pytest.approx(sum(expected) / 3, abs=2e-4)


def test_gradients_against_finite_differences(release: Path, tmp_path: Path) -> None:
    recipe = small_recipe(num_query_masks=2, num_passage_masks=2, dropout=0.0, temperature=0.5, rank=2)
    model = contrastive_model(release, recipe).double()
    batch = batch_of(model, made_up_pairs(2, negatives=1), tmp_path / "p.jsonl")
    model(batch)["loss"].backward()
    found, generator, step = gradients(model), torch.Generator().manual_seed(0), 2e-4
    # Each matrix of the first layer and of the head by itself, then all layers at once.
    groups = [[name] for name in found if ".layers." not in name or ".layers.0." in name] + [list(found)]
    for names in groups:
        directions = {}
        for name in names:  # a slope well above rounding, with all entries in it
            noise = torch.randn(found[name].shape, generator=generator, dtype=torch.float64)
            directions[name] = found[name] / found[name].norm() + noise / noise.norm()
        values = []
        with torch.no_grad():
            for sign in (1, -2, 1):
                for name in names:
                    model.get_parameter(name).add_(sign * step / len(names) * directions[name])
                values.append(model(batch)["loss"].item())
        slope = (values[0] - values[1]) / (2 * step) * len(names)
        expected = sum(float((found[name] * directions[name]).sum()) for name in names)
        # RMSNorm and the scores round to float32.
        assert slope == pytest.approx(expected, rel=0.02, abs=4e-3 * len(names) ** 0.5), names
        assert expected > 0.01, names


def test_only_the_adapter_learns_and_travels(release: Path) -> None:
    model = contrastive_model(release, small_recipe())
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == set(model.state_dict())
    layers, llada = model.retriever.config.backbone_config.num_hidden_layers, "llada" in str(release)
    assert len(trainable) == 2 * (7 * layers + llada)
    state = model.state_dict()
    with pytest.raises(ValueError, match="is not in both the checkpoint and this run's adapter"):
        model.load_state_dict(dict(list(state.items())[1:]))


# ------------------------------------------------------------------------------------------------ several steps


def two_steps(retriever: Any, text: str, is_query: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Two denoising steps over four masks by hand (paper App. A.1): states [4, H] and logits [4, V], with gradient."""
    ids, mask = retriever.tokenize([text], is_query)
    places = (ids[0] == retriever.texts.mask_id).nonzero().flatten().tolist()
    with torch.no_grad():
        first = retriever.hidden_states(ids, mask)[0]
        probabilities = retriever.lm_head(first).softmax(dim=-1)
        sure = {place: float((probabilities[place] * probabilities[place].log()).sum()) for place in places}
        filled = sorted(places, key=lambda place: -sure[place])[:2]
        first_logits = retriever.lm_head(first)
        for place in filled:
            ids[0, place] = probabilities[place].argmax()
    second = retriever.hidden_states(ids, mask)[0]
    states = [first[place] if place in filled else second[place] for place in places]
    logits = [first_logits[place] if place in filled else retriever.lm_head(second[place]) for place in places]
    return torch.stack(states), torch.stack(logits)


@pytest.mark.parametrize("chunk", [0, 2])
@pytest.mark.parametrize("backbone", ["tiny-llada", "tiny-dream"])
def test_what_an_earlier_step_filled_has_no_gradient(
    backbone: str, chunk: int, build_release: Callable[..., Path], tmp_path: Path
) -> None:
    masks = {"num_query_masks": 4, "num_passage_masks": 4, "num_denoise_steps": 2}
    recipe = small_recipe(**masks, dropout=0.0, grad_cache_chunk=chunk)
    model = contrastive_model(build_release(backbone), recipe)
    records = made_up_pairs(3, negatives=1)
    loss = model(batch_of(model, records, tmp_path / "p.jsonl"))["loss"]
    loss.backward()
    found = gradients(model)
    model.zero_grad(set_to_none=True)
    retriever = model.retriever
    texts = [record["query"] for record in records], [record["positive"] for record in records]
    texts[1].extend(record["negatives"][0] for record in records)
    sides = [[two_steps(retriever, text, side == 0) for text in texts[side]] for side in (0, 1)]
    words = [[set(ids) for ids in retriever.content_token_ids(side)] for side in texts]
    expected = torch.zeros(())
    for number, (states, logits) in enumerate(sides[0]):
        dense, sparse = [], []
        for place, (there, others) in enumerate(sides[1]):
            cosine = F.normalize(states, dim=-1) @ F.normalize(there, dim=-1).T
            dense.append(cosine.amax(dim=1).mean() / recipe.temperature)
            shared = sorted(words[0][number] & words[1][place])
            weights = [torch.log1p(F.relu(side[:, shared].amax(dim=0))) for side in (logits, others)]
            sparse.append((weights[0] * weights[1]).sum())
        for scores in (dense, sparse):
            expected = expected - torch.stack(scores).log_softmax(dim=0)[number] / 3
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    expected.backward()
    for name, gradient in gradients(model).items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-3 * scale, msg=name)


@pytest.mark.parametrize(("kind", "shift"), [("tiny-llada", 0), ("tiny-dream", 1)])
@torch.no_grad()
def test_a_passage_is_masked_and_restored(
    kind: str, shift: int, load_release: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of four passages: the mean over its masked tokens, whatever t was; padding and the prompt's masks stay."""
    model = load_release(kind)
    ids, mask = model.tokenize(["sun", "light and water make a plant grow", "tides", "the moon is far"], False)
    seen: list[torch.Tensor] = []

    def states(*inputs: torch.Tensor) -> torch.Tensor:
        seen.extend(inputs)
        return hidden_states(*inputs)

    hidden_states = model.hidden_states
    monkeypatch.setattr(model, "hidden_states", states)
    torch.manual_seed(1)
    loss = float(passages_denoising_loss(model, [{"ids": ids, "mask": mask}]))
    masked, shown = seen
    assert len(masked) == 1
    row = next(row for row in range(4) if torch.equal(mask[row], shown[0]) and _differs(ids[row], masked[0], model) > 0)
    changed = (ids[row] != masked[0]).nonzero()[:, 0]
    assert set(masked[0, changed].tolist()) == {model.texts.mask_id}
    assert mask[row, changed].all()
    logits = model.lm_head(hidden_states(masked, shown)[0, changed - shift])
    assert loss == pytest.approx(float(F.cross_entropy(logits, ids[row, changed])), abs=1e-4)


def _differs(text: torch.Tensor, masked: torch.Tensor, model: Any) -> int:
    """How many tokens are masked; 0 where the unmasked ones are not this text's."""
    changed = text != masked
    return int(changed.sum()) if bool((masked[changed] == model.texts.mask_id).all()) else 0
