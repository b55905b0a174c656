"""RepLLaMA against a plain loop over texts with transformers alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from causal_backbones import EACH_KIND, TEXTS, language_model, tokenizer_of
from torch.nn import functional as F

from diffretriever.baselines import load_baseline

PLAIN = [text for text in TEXTS if "<|" not in text]  # a plain tokenizer takes special tokens in a text for such


def by_hand(backbone: Path, tokenizer: Any, texts: list[str], side: str, length: int) -> torch.Tensor:
    """Return [N, H] as the method's code makes them: prefix, cut to length - 1, end-of-text, last state, L2."""
    plain, vectors = language_model(backbone), []
    for text in texts:
        ids = tokenizer(f"{side}: {text}", truncation=True, max_length=length - 1)["input_ids"]
        ids.append(tokenizer.eos_token_id)
        with torch.no_grad():
            states = plain(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1]
        vectors.append(F.normalize(states[0, -1], dim=-1))
    return torch.stack(vectors)


@pytest.mark.parametrize("kind", EACH_KIND)
@pytest.mark.parametrize("is_query", [True, False])
def test_a_plain_loop_gives_the_same(
    load: Callable[..., Any], backbone: Callable[[str], Path], kind: str, is_query: bool
) -> None:
    model = load("repllama", kind, query_length=12, passage_length=20)
    found = model.encode_texts(PLAIN, is_query)
    assert found.keys() == {"repr_hidden"}
    length = 12 if is_query else 20
    expected = by_hand(backbone(kind), tokenizer_of(kind), PLAIN, "query" if is_query else "passage", length)
    assert torch.allclose(found.repr_hidden, expected[:, None], rtol=0, atol=1e-5)


def test_a_begin_of_text_token_of_the_tokenizers_own_counts(tmp_path: Path, backbone: Callable[[str], Path]) -> None:
    folder = shutil.copytree(backbone("llama"), tmp_path / "with-begin")
    rules = json.loads((folder / "tokenizer.json").read_text())
    begin = {"SpecialToken": {"id": "<|startoftext|>", "type_id": 0}}  # as in Llama-3's tokenizer.json
    rules["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [begin, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|startoftext|>": {"id": "<|startoftext|>", "ids": [2000], "tokens": ["<|startoftext|>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(rules))
    model: Any = load_baseline(folder, "repllama", dtype=torch.float32, query_length=12)
    ids, _ = model.tokenize(["word " * 30], True)
    assert ids.shape == (1, 12)
    assert ids[0, 0] == 2000
    expected = by_hand(folder, model.tokenizer, PLAIN, "query", 12)
    assert torch.allclose(model.encode_texts(PLAIN, True).repr_hidden[:, 0], expected, rtol=0, atol=1e-5)


def test_special_tokens_in_a_text_are_text(load: Callable[..., Any]) -> None:
    model = load("repllama", "llama", query_length=64)
    ids, _ = model.tokenize(["<|endoftext|><|eot_id|>"], True)
    assert (ids[0] >= 2000).tolist() == [False] * (ids.shape[1] - 1) + [True]


def test_batched_equals_alone(load: Callable[..., Any]) -> None:
    model = load("repllama", "qwen2")
    together = model.encode_texts(TEXTS, False, tokens_per_batch=10**6)
    alone = model.encode_texts(TEXTS, False, batch_size=1)
    assert torch.allclose(together.repr_hidden, alone.repr_hidden, rtol=0, atol=1e-5)


def test_states_have_a_gradient(load: Callable[..., Any]) -> None:
    model = load("repllama", "llama")
    ids, mask = model.tokenize(TEXTS[:2], True)
    states = model(ids, mask, True).states
    assert states.shape == (2, 1, 48)
    (gradient,) = torch.autograd.grad(states.sum(), model.backbone.model.layers[0].mlp.up_proj.weight)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize(("length", "least"), [(3, r"takes \d tokens; set it to at least \d")])
def test_a_length_without_room(backbone: Callable[[str], Path], length: int, least: str) -> None:
    with pytest.raises(
        ValueError, match=rf"`query_length` is {length}, but what RepLLaMA puts around a query .*{least}"
    ):
        load_baseline(backbone("llama"), "repllama", dtype=torch.float32, query_length=length)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_padding_sees_itself(load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, implementation: str) -> None:
    """A token that sees nothing has no softmax; cuDNN's attention gives NaN for it now and then."""
    model = load("repllama", "llama", attn_implementation=implementation)
    seen: list[torch.Tensor] = []

    def note(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["attention_mask"])

    hook = model.backbone.model.layers[0].register_forward_pre_hook(note, with_kwargs=True)
    ids, mask = model.tokenize(["sun", "light and water make a plant grow"], True)
    model.encode(ids, mask, True)
    hook.remove()
    [taken] = seen
    allowed = (taken if taken.dtype == torch.bool else taken == 0)[:, 0]  # [B, L, L]
    causal, real = torch.ones(allowed.shape[1:]).tril().bool(), mask.bool()
    assert torch.equal(allowed[real], (causal & real[:, None])[real])
    assert torch.equal(allowed[~real].sum(dim=1), torch.ones(int((~real).sum())).long())
