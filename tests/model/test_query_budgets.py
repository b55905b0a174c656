"""K_q of each query by a table: each query as under its fixed K_q, whatever else is in the batch."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_folders import PARITY, edit_json
from transformers import AutoModel

TABLE: dict[str, Any] = {"length": [2, 5], "entropy": [2.0], "num_query_masks": [[1, 2], [4, 2], [4, 3]]}
TEXTS = [
    "",
    "A cat.",
    "the the the the",
    "what causes the seasons on earth?",
    "<|mdm_mask|> and <|eot_id|>",
    "copy files between two computers over a network, safely and quickly " * 12,
    "日本語のテキスト",
]
RELEASES = {"llada-q4p4": "tiny-llada", "dream-q4p4": "tiny-dream", "zero-shot": "tiny-llada"}


def load(load_release: Callable[..., Any], name: str, **options: Any) -> Any:
    return load_release(RELEASES[name], None if name == "zero-shot" else name, **options)


def expected_budget(model: Any, text: str) -> int:
    """By the definitions, from the tokenizer's own ids of the text as it is cut."""
    [prepared] = model.texts.prepare([text], True)
    ids = prepared.text_ids
    shares = [ids.count(token) / len(ids) for token in set(ids)]
    entropy = -sum(share * math.log2(share) for share in shares)
    row = 0 if len(ids) <= 2 else 1 if len(ids) <= 5 else 2
    chosen: int = TABLE["num_query_masks"][row][0 if entropy <= 2.0 + 1e-6 else 1]
    return chosen


@pytest.mark.once
@pytest.mark.parametrize("name", RELEASES)
def test_each_query_is_as_alone_under_its_own_k(name: str, load_release: Callable[..., Any]) -> None:
    """The releases with a fixed K_q are loaded by it, their prompts following it where nothing was trained."""
    model = load(load_release, name, query_budget_table=TABLE)
    chosen = [expected_budget(model, text) for text in TEXTS]
    assert len(set(chosen)) >= 3
    out = model.encode_texts(TEXTS, True, batch_size=3)
    once = model.encode(*model.tokenize(TEXTS, True), True, compute_sparse=True)
    assert (out.side, out.repr_mask.dtype) == ("query", torch.bool)
    assert out.repr_hidden.shape[:2] == once.repr_hidden.shape[:2] == (len(TEXTS), 4)
    for row, (text, k) in enumerate(zip(TEXTS, chosen, strict=True)):
        fixed = load(load_release, name, num_query_masks=k).encode_texts([text], True)
        for batch in (out, once):
            assert batch.repr_mask[row].tolist() == [True] * k + [False] * (4 - k)
            assert torch.allclose(batch.repr_hidden[row, :k], fixed.repr_hidden[0], rtol=0, atol=3e-6)
            assert not batch.repr_hidden[row, k:].any()
            assert torch.allclose(batch.sparse_values[row], fixed.sparse_values[0], rtol=0, atol=2e-5)
    passages = model.encode_texts(TEXTS, False)
    assert "repr_mask" not in passages
    plain = load(load_release, name)
    assert torch.equal(passages.repr_hidden, plain.encode_texts(TEXTS, False).repr_hidden)


def test_one_forward_pass_whatever_the_padding(
    load_release: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(load_release, "llada-q4p4", query_budget_table=TABLE)
    ids, mask = model.tokenize(TEXTS[:4], True)
    expected = model.encode(ids, mask, True)
    calls, forward = [], type(model).forward

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return forward(*arguments, **options)

    monkeypatch.setattr(type(model), "forward", counted)
    for row in range(0, len(ids), 2):  # padding behind every other row
        shift = int((mask[row] == 0).sum())
        ids[row], mask[row] = ids[row].roll(-shift), mask[row].roll(-shift)
    found = model.encode(ids, mask, True)
    assert calls == [1]
    assert torch.equal(found.repr_mask, expected.repr_mask)
    assert torch.allclose(found.repr_hidden, expected.repr_hidden, rtol=0, atol=3e-6)
    states = model(ids, mask, True).mask_hidden.float()
    normal = torch.nn.functional.normalize(states, dim=-1)
    assert torch.allclose(normal * found.repr_mask[..., None], found.repr_hidden, rtol=0, atol=3e-6)
    with pytest.raises(ValueError, match=r"ids row 0 holds 3 \[MASK\] tokens .*, not 1"):
        load(load_release, "zero-shot", num_query_masks=1)(ids[3:], mask[3:], True)


def test_missing_vectors_are_left_out_of_scores(load_release: Callable[..., Any]) -> None:
    model = load(load_release, "llada-q4p4", query_budget_table=TABLE)
    queries, passages = model.encode_texts(TEXTS, True), model.encode_texts(TEXTS[1:4], False)
    for mode in ("multi_dense", "single_dense"):
        scores = model.score(queries, passages, mode)
        for row, exists in enumerate(queries.repr_mask):
            own = {"repr_hidden": queries.repr_hidden[row : row + 1, : int(exists.sum())]}
            assert torch.allclose(scores[row], model.score(own, passages, mode)[0], atol=1e-6)


def test_ids_of_another_budget_are_refused(load_release: Callable[..., Any]) -> None:
    model = load(load_release, "llada-q4p4", query_budget_table=TABLE)
    [k] = [expected_budget(model, "A cat.")]
    other = load(load_release, "llada-q4p4", num_query_masks=next(k_q for k_q in (1, 2, 3, 4) if k_q != k))
    with pytest.raises(ValueError, match="does not have this model's query prompt around its text"):
        model.encode(*other.tokenize(["A cat."], True), True)
    wide = load(load_release, "llada-q4p4", num_query_masks=7)
    with pytest.raises(ValueError, match=r"holds 7 \[MASK\] tokens .* a query of this model has 1 or 2 or 3 or 4"):
        model.encode(*wide.tokenize(["A cat."], True), True)


def test_what_stands_in_for_the_table(build_release: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "with-a-table"
    shutil.copytree(build_release("tiny-llada", "llada-q4p4"), folder)
    edit_json(folder / "config.json", query_budget_table=TABLE, recommended_fusion_weight=0.8)

    def loaded(**options: Any) -> Any:
        return AutoModel.from_pretrained(folder, trust_remote_code=True, torch_dtype=torch.float32, **options)

    model = loaded()
    assert (model.config.num_masks(True), model.config.budgets(True)) == (4, [1, 2, 3, 4])
    assert (model.config.num_query_masks, model.config.num_masks(False)) == (4, 4)
    assert loaded(num_query_masks=2).encode_texts(TEXTS[:2], True).repr_hidden.shape[1] == 2
    assert loaded(query_budget_table=None).config.budgets(True) == [4]
    other = {"adapter_name_or_path": str(PARITY / "adapters" / "llada-single")}
    single, given = loaded(**other), {"recommended_fusion_weight": 0.3}
    assert single.config.budgets(True) == [1]  # the table was learned with the release's own adapter
    weights = [loaded(**more).config.recommended_fusion_weight for more in ({}, other, other | given)]
    assert weights == [0.8, None, 0.3]  # and so was the weight
    model.save_pretrained(tmp_path / "saved")
    saved = AutoModel.from_pretrained(tmp_path / "saved", trust_remote_code=True, torch_dtype=torch.float32)
    assert saved.config.query_budget_table == TABLE
    expected = model.encode_texts(TEXTS[:3], True)
    assert torch.allclose(saved.encode_texts(TEXTS[:3], True).repr_hidden, expected.repr_hidden, rtol=0, atol=3e-6)
    model.config.query_budget_table = TABLE | {"num_query_masks": [[2, 2], [2, 2], [2, 2]]}
    assert model.encode_texts(TEXTS[:2], True).repr_hidden.shape[1] == 2  # a change counts from the next text on


BAD = [
    ([], "`query_budget_table` must be an object or null, got []"),
    ({}, "must hold exactly length, entropy, num_query_masks; got []"),
    (TABLE | {"more": 1}, "must hold exactly length, entropy, num_query_masks"),
    (TABLE | {"length": 5}, "`length` must be a list of at most 64 rising numbers of at least 0, got 5"),
    (TABLE | {"length": [5, 2]}, "`length` must be a list of at most 64 rising"),
    (TABLE | {"length": [2, 2]}, "`length` must be a list"),
    (TABLE | {"length": [-1, 2]}, "`length` must be a list"),
    (TABLE | {"length": [True, 2]}, "`length` must be a list"),
    (TABLE | {"length": list(range(65))}, "`length` must be a list"),
    (TABLE | {"entropy": [math.nan]}, "`entropy` must be a list"),
    (TABLE | {"entropy": [math.inf]}, "`entropy` must be a list"),
    (TABLE | {"entropy": ["2"]}, "`entropy` must be a list"),
    (TABLE | {"num_query_masks": 4}, "`num_query_masks` must be 3 lists of 2 whole numbers from 1 to 1024"),
    (TABLE | {"num_query_masks": [[1, 2], [4, 2]]}, "`num_query_masks` must be 3 lists of 2"),
    (TABLE | {"num_query_masks": [[1, 2], [4, 2], [4]]}, "`num_query_masks` must be 3 lists of 2"),
    (TABLE | {"num_query_masks": [[1, 2], [4, 2], [4, 0]]}, "`num_query_masks` must be 3 lists of 2"),
    (TABLE | {"num_query_masks": [[1, 2], [4, 2], [4, 1025]]}, "`num_query_masks` must be 3 lists of 2"),
    (TABLE | {"num_query_masks": [[1, 2], [4, 2], [4, 2.0]]}, "`num_query_masks` must be 3 lists of 2"),
    (TABLE | {"num_query_masks": [[1, 2], [4, 2], [4, True]]}, "`num_query_masks` must be 3 lists of 2"),
    (TABLE | {"num_query_masks": [[1, 2], [4, 2], {"4": 2}]}, "`num_query_masks` must be 3 lists of 2"),
]


@pytest.mark.parametrize(("table", "words"), BAD)
def test_what_is_no_table(table: Any, words: str, build_release: Callable[..., Path], tmp_path: Path) -> None:
    from diffretriever.model.configuration_diffretriever import DiffRetrieverConfig

    shutil.copyfile(build_release("tiny-llada") / "config.json", tmp_path / "config.json")
    fields = json.loads((tmp_path / "config.json").read_text())
    if "nan" not in repr(table) and "inf" not in repr(table):  # no JSON
        edit_json(tmp_path / "config.json", query_budget_table=table)
        with pytest.raises(ValueError, match="`query_budget_table`") as error:
            DiffRetrieverConfig.from_pretrained(tmp_path)
        assert words in str(error.value)
    with pytest.raises(ValueError, match="`query_budget_table`") as error:
        DiffRetrieverConfig.from_dict(fields, query_budget_table=table)
    assert words in str(error.value)


def test_a_table_needs_one_pass() -> None:
    from diffretriever.model.configuration_diffretriever import DiffRetrieverConfig

    with pytest.raises(ValueError, match="`query_budget_table` needs one forward pass: `num_denoise_steps` 1"):
        DiffRetrieverConfig(query_budget_table=TABLE, num_denoise_steps=2)
