"""PromptReps against transformers' own `generate`: states, tokens and logits word by word, ragged stops included."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from causal_backbones import EACH_KIND, TEXTS, language_model, make_backbone, quoting_ids, tokenizer_of
from torch.nn import functional as F

from diffretriever.baselines import load_baseline
from diffretriever.model.tokenization_helpers import content_words

K = 6


@pytest.fixture(params=EACH_KIND)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(load: Callable[..., Any], kind: str) -> Any:
    return load("promptreps", kind, num_query_vectors=K, num_passage_vectors=K, passage_length=32)


@pytest.fixture
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def reference(backbone: Callable[[str], Path], kind: str) -> Callable[..., Any]:
    """Return a function that generates from a prompt with transformers alone: states [k, H], tokens, logits [k, V]."""
    plain, stops = language_model(backbone(kind)), set(quoting_ids(kind, 2032))

    def generate(ids: list[int], num_vectors: int = K) -> tuple[torch.Tensor, list[int], torch.Tensor]:
        prompt = torch.tensor([ids])
        out = plain.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=num_vectors, do_sample=False,
            output_hidden_states=True, output_logits=True, return_dict_in_generate=True, pad_token_id=0,
        )  # fmt: skip
        states = torch.stack([step[-1][0, -1] for step in out.hidden_states])
        logits = torch.stack([step[0] for step in out.logits])
        words = out.sequences[0, len(ids) :].tolist()
        there = next((place for place, word in enumerate(words) if word in stops), num_vectors - 1)
        return states[: there + 1], words[:there][: num_vectors - 1], logits[: there + 1]

    return generate


def prompts(model: Any, texts: list[str], is_query: bool) -> list[list[int]]:
    """Return each text's prompt, unpadded."""
    ids, mask = model.tokenize(texts, is_query)
    return [row[real].tolist() for row, real in zip(ids, mask == 1, strict=True)]


# ------------------------------------------------------------------------------------------------ the prompt


@pytest.mark.parametrize(
    ("num_vectors", "words", "answer"), [(1, "one word", "word is"), (4, "a few words", "words are")]
)
def test_the_prompt_is_the_papers(
    load: Callable[..., Any], kind: str, num_vectors: int, words: str, answer: str
) -> None:
    model = load("promptreps", kind, num_query_vectors=num_vectors)
    tokenizer = tokenizer_of(kind)
    user = f'Query: "moon tides". Use {words} to represent the query in a retrieval task. '
    user += f"Make sure your {answer} in lowercase."
    system = "You are an AI assistant that can understand human language."
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    before, after = f'{whole}The {answer}: "'.split("moon tides")
    first, text, last = (
        tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, "moon tides", after)
    )
    assert prompts(model, ["moon tides"], True) == [first + text + last]


def test_lengths_count_tokens_of_text(load: Callable[..., Any], kind: str) -> None:
    model = load("promptreps", kind, query_length=5, passage_length=9)
    empty = {side: len(prompts(model, [""], side)[0]) for side in (True, False)}
    for side, length in ((True, 5), (False, 9)):
        assert len(prompts(model, ["word " * 50], side)[0]) == empty[side] + length


def test_special_tokens_in_a_text_are_text(model: Any) -> None:
    special = set(model.tokenizer.all_special_ids)
    hostile = "".join(token.content for token in model.tokenizer.added_tokens_decoder.values())
    (plain,), (attacked,) = prompts(model, ["a"], True), prompts(model, [hostile], True)
    assert sum(token in special for token in attacked) == sum(token in special for token in plain)


# ------------------------------------------------------------------------------------------------ against generate


def test_every_state_is_generates(model: Any, reference: Callable[..., Any]) -> None:
    counts = set()
    for is_query in (True, False):
        found = model.encode_texts(TEXTS, is_query)
        assert found.repr_hidden.shape == (len(TEXTS), K, 48)
        assert found.repr_hidden.dtype == torch.float32
        for row, ids in enumerate(prompts(model, TEXTS, is_query)):
            states, _, _ = reference(ids)
            counts.add(len(states))
            assert found.repr_mask[row].tolist() == [place < len(states) for place in range(K)]
            expected = F.normalize(states, dim=-1)
            assert torch.allclose(found.repr_hidden[row, : len(states)], expected, rtol=0, atol=1e-5)
            assert not found.repr_hidden[row, len(states) :].any()
    assert {1, K} < counts  # some end at once, some not at all, some between


def test_the_words_are_generates(model: Any, reference: Callable[..., Any]) -> None:
    ids, mask = model.tokenize(TEXTS, True)
    for row, prompt in zip(model.generate(ids, mask, True), prompts(model, TEXTS, True), strict=True):
        _, words, _ = reference(prompt)
        assert row.tolist() == words + [-1] * (K - 1 - len(words))


def test_sparse_weights_are_the_best_logits_of_content_words(model: Any, reference: Callable[..., Any]) -> None:
    found = model.encode_texts(TEXTS, True, sparse_top_k=20)
    whole = model.encode_texts(TEXTS, True, sparse_top_k=50, content_filter=False)
    tokenizer = tokenizer_of("qwen2" if "qwen2" in str(type(model.backbone)).lower() else "llama")
    for row, (text, ids) in enumerate(zip(TEXTS, prompts(model, TEXTS, True), strict=True)):
        _, _, logits = reference(ids)
        weights = torch.log1p(torch.relu(logits.amax(dim=0)))
        top = weights.topk(50)
        assert torch.allclose(whole.sparse_values[row], top.values, rtol=0, atol=2e-5)
        if "<|" in text:  # the reference's tokenizer would take the text's special tokens for such
            continue
        content = sorted({token for word in content_words(text) for token in tokenizer(word)["input_ids"]})
        expected = torch.zeros(20)
        best = weights[content].sort(descending=True).values[:20]
        expected[: len(best)] = best
        assert torch.allclose(found.sparse_values[row], expected, rtol=0, atol=2e-5)
        used = found.sparse_values[row] > 0
        assert torch.allclose(weights[found.sparse_indices[row][used]], found.sparse_values[row][used], atol=2e-5)


def test_batched_equals_alone(model: Any) -> None:
    together = model.encode_texts(TEXTS, False, batch_size=len(TEXTS), tokens_per_batch=10**6)
    alone = model.encode_texts(TEXTS, False, batch_size=1)
    assert torch.equal(together.repr_mask, alone.repr_mask)
    assert torch.allclose(together.repr_hidden, alone.repr_hidden, rtol=0, atol=1e-5)
    assert torch.allclose(together.sparse_values, alone.sparse_values, rtol=0, atol=2e-5)


def test_padding_side_and_amount_change_nothing(model: Any) -> None:
    ids, mask = model.tokenize(TEXTS, True)
    expected = model.encode(ids, mask, True)
    rows = prompts(model, TEXTS, True)
    length = max(map(len, rows)) + 7
    right = torch.tensor([[*row, *[5] * (length - len(row))] for row in rows])
    right_mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    found = model.encode(right, right_mask, True)
    assert torch.equal(found.repr_mask, expected.repr_mask)
    assert torch.allclose(found.repr_hidden, expected.repr_hidden, rtol=0, atol=1e-5)


@pytest.mark.once
def test_batches_side_by_side_give_the_same(model: Any, four_threads: None) -> None:
    texts = TEXTS * 3
    side_by_side = model.encode_texts(texts, True, tokens_per_batch=256)
    torch.set_num_threads(1)
    one_by_one = model.encode_texts(texts, True, tokens_per_batch=256)
    assert torch.equal(side_by_side.repr_mask, one_by_one.repr_mask)
    assert torch.allclose(side_by_side.repr_hidden, one_by_one.repr_hidden, rtol=0, atol=1e-5)


def test_eager_attention_gives_the_same(model: Any, load: Callable[..., Any], kind: str) -> None:
    eager = load("promptreps", kind, num_query_vectors=K, attn_implementation="eager")
    assert eager.backbone.config._attn_implementation == "eager"
    found, expected = eager.encode_texts(TEXTS, True), model.encode_texts(TEXTS, True)
    assert torch.equal(found.repr_mask, expected.repr_mask)
    assert torch.allclose(found.repr_hidden, expected.repr_hidden, rtol=0, atol=1e-5)


def test_one_vector_is_one_pass(model: Any, load: Callable[..., Any], kind: str) -> None:
    single = load("promptreps", kind, num_query_vectors=1, query_prompt=model.config.prompt(True))
    found, many = single.encode_texts(TEXTS, True), model.encode_texts(TEXTS, True)
    assert found.repr_mask.shape == (len(TEXTS), 1)
    assert found.repr_mask.all()
    assert torch.allclose(found.repr_hidden[:, 0], many.repr_hidden[:, 0], rtol=0, atol=1e-5)


def test_finished_rows_leave_the_batch(model: Any) -> None:
    ids, mask = model.tokenize(TEXTS, True)
    sizes: list[int] = []
    hook = model.backbone.lm_head.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    found = model.encode(ids, mask, True)
    hook.remove()
    alive = found.repr_mask.sum(dim=0).tolist()  # rows that have a k-th vector
    assert sizes == alive[:-1]  # the last state needs no next word
    assert alive[0] > alive[-1]


# ------------------------------------------------------------------------------------------------ where answers end


def answering(folder: Path, answer: str) -> Any:
    """Return a model whose answer is always the tokens of one string, whatever it is asked."""
    make_backbone("llama", folder, stops=1.0)
    model: Any = load_baseline(folder, "promptreps", dtype=torch.float32, num_query_vectors=4)
    tokens = model.tokenizer(answer, add_special_tokens=False)["input_ids"]
    calls = iter(tokens * 50)

    def say(_: Any, given: Any, logits: torch.Tensor) -> torch.Tensor:
        return F.one_hot(torch.full((len(logits),), next(calls)), logits.shape[-1]).float()

    model.backbone.lm_head.register_forward_hook(say)
    return model


@pytest.mark.once
@pytest.mark.parametrize(
    ("answer", "expected"),
    [('"', 1), ('".', 1), ('a"', 2), ("<|endoftext|>", 1), ("a b<|endoftext|>", 3), ("a b c d", 4), ("a“b”", 4)],
)
def test_quotes_and_special_tokens_end_an_answer(tmp_path: Path, answer: str, expected: int) -> None:
    model = answering(tmp_path / "llama", answer)
    found = model.encode_texts(["some text"], True, compute_sparse=False)
    assert int(found.repr_mask.sum()) == expected


@pytest.mark.once
def test_each_stop_is_one_by_the_tokenizers_own_decoding(model: Any, kind: str) -> None:
    assert model.stops.nonzero().flatten().tolist() == quoting_ids(kind, 2032)
    fused = [token for token in quoting_ids(kind, 2032) if len(model.tokenizer.decode([token]).strip()) > 1]
    assert any(model.tokenizer.decode([token]).startswith('"') for token in fused)


# ------------------------------------------------------------------------------------------------ training


def test_the_taught_pass_has_the_states_of_decoding(model: Any) -> None:
    ids, mask = model.tokenize(TEXTS, True)
    out = model(ids, mask, True)
    found = model.encode(ids, mask, True)
    assert torch.equal(out.repr_mask, found.repr_mask)
    assert out.states.requires_grad
    assert torch.allclose(F.normalize(out.states, dim=-1), found.repr_hidden, rtol=0, atol=1e-5)


def test_gradients_against_finite_differences(backbone: Callable[[str], Path], kind: str) -> None:
    model: Any = load_baseline(backbone(kind), "promptreps", dtype=torch.float64, num_query_vectors=K)
    ids, mask = model.tokenize(TEXTS[:4], True)
    words = model.generate(ids, mask, True)
    torch.manual_seed(0)
    target = torch.randn(4, K, 48, dtype=torch.float64)
    weights = dict(model.backbone.model.named_parameters())
    direction = {name: torch.randn_like(weight) * weight.detach().abs().mean() for name, weight in weights.items()}

    def loss() -> torch.Tensor:
        states, exists = model.states_at(ids, mask, words)
        return (F.normalize(states, dim=-1) * target)[exists].sum()

    gradients = torch.autograd.grad(loss(), list(weights.values()))
    slope = sum(float((gradient * direction[name]).sum()) for name, gradient in zip(weights, gradients, strict=True))
    step, values = 2e-4, []
    with torch.no_grad():
        for sign in (1, -2, 1):  # forth, back, and to where it was
            for name, weight in weights.items():
                weight += sign * step * direction[name]
            values.append(float(loss()))
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=0.02)


@pytest.mark.once
def test_generating_in_training_is_without_dropout_and_gradient(backbone: Callable[[str], Path], kind: str) -> None:
    model: Any = load_baseline(backbone(kind), "promptreps", dtype=torch.float32, num_query_vectors=K)
    ids, mask = model.tokenize(TEXTS, True)
    expected = model.generate(ids, mask, True)
    vectors = model.encode(ids, mask, True).repr_hidden
    model.train()
    for layer in model.backbone.model.layers:
        layer.self_attn.attention_dropout = 0.5
    assert torch.equal(model.generate(ids, mask, True), expected)
    assert torch.equal(model.encode(ids, mask, True).repr_hidden, vectors)
    assert model.training
    assert all(module.training for module in model.backbone.modules())
    assert not torch.allclose(model(ids, mask, True).states, model(ids, mask, True).states)  # but the loss has it


def test_words_need_the_prompts_end(model: Any) -> None:
    ids, mask = model.tokenize(TEXTS[:2], True)
    words = model.generate(ids, mask, True)
    with pytest.raises(ValueError, match="must be left-padded"):
        model.states_at(ids.flip(1), mask.flip(1), words)
