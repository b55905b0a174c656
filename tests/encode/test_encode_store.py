"""encode_store: the vectors of encode_texts, in a store; what it refuses, what it finds damaged and mends."""

from __future__ import annotations

import copy
import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_folders import edit_json
from store_helpers import folder_bytes, made_up_texts, other_defaults, silent, write_jsonl
from transformers import AutoModel

from diffretriever.data import corpus as corpus_module
from diffretriever.encode.encode_store import encode_store
from diffretriever.files.claims import Claims
from diffretriever.store.store import Store

CHANGED = [(text_id, "changed" if number == 5 else text) for number, (text_id, text) in enumerate(made_up_texts(11))]
OTHER_TEXTS = [
    (made_up_texts(12), "has more"),
    (made_up_texts(8), "has 8"),
    (made_up_texts(10), "has 10"),
    (made_up_texts(11)[::-1], "differs in texts 1 to 4"),
    (CHANGED, "differs in texts 5 to 8"),
]


def encode(model: Any, corpus: Path, folder: Path, **options: Any) -> Store:
    return encode_store(model, corpus, folder, **{"shard_size": 4, "tell": pytest.fail, **options})


def test_another_default_device_and_dtype_of_torch(tiny: Any, corpus: Path, tmp_path: Path) -> None:
    encode(tiny, corpus, tmp_path / "expected")
    with other_defaults():
        encode(tiny, corpus, tmp_path / "found")
    assert folder_bytes(tmp_path / "found") == folder_bytes(tmp_path / "expected")


@pytest.mark.parametrize("is_query", [False, True])
@pytest.mark.parametrize("content_filter", [True, False])
def test_the_store_holds_what_encode_texts_returns(
    load_release: Callable[..., Any], tmp_path: Path, is_query: bool, content_filter: bool
) -> None:
    model = load_release("tiny-dream", "dream-q4p16")
    texts = [*made_up_texts(9), ("long", "many words " * 200), ("blank", " "), ("special", "<|mask|> and <|im_end|>")]
    corpus = write_jsonl(tmp_path / "a.jsonl", texts)
    store = encode(model, corpus, tmp_path / "s", is_query=is_query, dtype="float32", content_filter=content_filter,
                   sparse_top_k=9)  # fmt: skip
    expected = model.encode_texts([text for _, text in texts], is_query, sparse_top_k=9, content_filter=content_filter)
    dense = torch.cat([shard.dense(0, len(shard)) for shard in store.shards()])
    assert dense.shape == (12, 4 if is_query else 16, expected.repr_hidden.shape[2])
    assert torch.allclose(dense, expected.repr_hidden, atol=2e-6)
    values = torch.cat([shard.sparse_values for shard in store.shards()])
    assert torch.allclose(values, expected.sparse_values, atol=2e-5)
    indices = torch.cat([shard.sparse_indices for shard in store.shards()])
    weights = torch.zeros(2, 12, model.config.vocab_size)
    for row, (where, what) in enumerate(((indices.long(), values), (expected.sparse_indices, expected.sparse_values))):
        weights[row].scatter_add_(1, where, what)
    assert torch.allclose(weights[0], weights[1], atol=2e-5)
    assert (store.ids(), store.text(9)) == ([text_id for text_id, _ in texts], texts[9][1])


@pytest.mark.once
@pytest.mark.parametrize(("trained", "warned"), [(None, False), (0.5, False), (0.46, False), (0.25, True), (0.0, True)])
def test_texts_that_are_cut_more_often_than_in_training_are_said(
    build_release: Callable[..., Path], tmp_path: Path, trained: float | None, warned: bool
) -> None:
    folder = tmp_path / "release"
    shutil.copytree(build_release("tiny-llada", "llada-q4p4"), folder)
    cut = None if trained is None else {"query": 0.0, "passage": trained}
    edit_json(folder / "config.json", cut_in_training=cut, passage_length=50)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, torch_dtype=torch.float32)
    texts = [(str(number), "many words " * (60 if number % 2 else 2)) for number in range(8)]
    said: list[str] = []
    encode(model, write_jsonl(tmp_path / "a.jsonl", texts), tmp_path / "s", tell=said.append)
    assert [f"50% of 8 passages are longer than 50 tokens and are cut; in its training {trained:.0%}" in line
            for line in said] == [True] * warned  # fmt: skip


def test_the_manifest_says_what_made_the_store(tiny: Any, corpus: Path, tmp_path: Path) -> None:
    manifest = encode(tiny, corpus, tmp_path / "s", sparse_top_k=7, keep_texts=False).manifest
    config = tiny.config
    assert manifest.model == str(config.name_or_path)
    assert (manifest.side, manifest.num_masks, manifest.max_length) == ("passage", 4, config.max_length)
    assert (manifest.hidden_size, manifest.vocab_size) == (config.hidden_size, config.vocab_size)
    assert (manifest.sparse_top_k, manifest.dtype, manifest.count) == (7, "float16", 11)
    assert manifest.prompts == {"query": config.prompt(True), "passage": config.prompt(False)}
    assert manifest.options == {"normalize": True, "num_denoise_steps": 1, "model_dtype": "float32", "chosen": [],
                                "content_filter": True, "keep_texts": False, "shard_size": 4,
                                "tokens_per_batch": 1024}  # fmt: skip
    assert manifest.library_versions["torch"] == torch.__version__
    assert [shard.count for shard in manifest.shards] == [4, 4, 3]
    assert len(manifest.weights_sha256) == len(str(manifest.adapter_sha256)) == 64


@pytest.mark.once
def test_a_store_made_otherwise_is_refused_with_the_difference(
    load_release: Callable[..., Any], tiny: Any, corpus: Path, tmp_path: Path
) -> None:
    folder = encode(tiny, corpus, tmp_path / "s").folder
    before = folder_bytes(folder)
    bare = load_release("tiny-llada")  # without an adapter
    fewer = load_release("tiny-llada", "llada-q4p4", num_passage_masks=2)
    half = load_release("tiny-llada", "llada-q4p4", torch_dtype=torch.bfloat16)
    prompt = {"system": "s", "user": "{text}", "assistant": "a"}
    prompted = load_release("tiny-llada", "llada-q4p4", passage_prompt=prompt)
    for model, options, said in (
        (bare, {}, "by model '.*q4p4.*', not '.*tiny-llada.*': `adapter` one, not none,"),
        (fewer, {}, "by model '.*' as it is no longer: `num_masks` 4, not 2. Give"),
        (
            prompted,
            {},
            ".* as it is no longer: .*`prompts.passage.user` 'Passage.*', not '{text}', `prompts.passage.assistant`",
        ),
        (half, {}, "with other settings: `options.model_dtype` 'float32', not 'bfloat16'"),
        (tiny, {"dtype": "int8"}, "with other settings: `dtype` 'float16', not 'int8'"),
        (tiny, {"is_query": True}, "with other settings: `side` 'passage', not 'query'. Give"),
        (tiny, {"shard_size": 5}, "with other settings: `options.shard_size` 4, not 5"),
        (tiny, {"sparse_top_k": 3}, "with other settings: `sparse_top_k` 128, not 3"),
        (tiny, {"keep_texts": False}, "with other settings: `options.keep_texts` True, not False"),
    ):
        with pytest.raises(ValueError, match=f"the store there was made {said}") as raised:
            encode(model, corpus, folder, **options)
        assert not re.search("[0-9a-f]{64}", str(raised.value))
    assert folder_bytes(folder) == before


def test_unnamed_sizes_are_those_of_the_store_that_is_there(tiny: Any, corpus: Path, tmp_path: Path) -> None:
    encode(tiny, corpus, tmp_path / "s", shard_size=3, tokens_per_batch=200)
    said: list[str] = []
    store = encode(tiny, corpus, tmp_path / "s", shard_size=None, tell=said.append)
    assert len(store.manifest.shards) == 4
    assert said == [f"{tmp_path / 's'}: the store was finished before; all bytes match their hashes."]


def test_a_store_of_another_corpus_is_refused(tiny: Any, corpus: Path, tmp_path: Path) -> None:
    encode(tiny, corpus, tmp_path / "s")
    before = folder_bytes(tmp_path / "s")
    for texts, difference in OTHER_TEXTS:
        other = write_jsonl(tmp_path / "other.jsonl", texts)
        with pytest.raises(
            ValueError, match=rf"of another corpus: it has 11 texts, .*other.jsonl {difference}\. Encode"
        ):
            encode(tiny, other, tmp_path / "s")
    assert folder_bytes(tmp_path / "s") == before


@pytest.mark.once
@pytest.mark.parametrize("number", [0, 2])
@pytest.mark.parametrize(("texts", "difference"), OTHER_TEXTS)
def test_a_corpus_that_changed_while_the_store_was_made(
    tiny: Any,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    texts: list[tuple[str, str]],
    difference: str,
) -> None:
    """Also where the shard that is left to make, or all that this process would have to read for it, is as before."""
    folder = encode(tiny, corpus, tmp_path / "s").folder
    make_unfinished(tiny, corpus, folder, folder / f"shard-{number:06d}.safetensors", monkeypatch)
    write_jsonl(corpus, texts)
    with pytest.raises(ValueError, match=f"of another corpus: it has 11 texts, .* {difference}"):
        encode(tiny, corpus, folder)
    with pytest.raises(ValueError, match="the store is not finished"):
        Store.open(folder)


def test_only_who_begins_a_store_reads_the_corpus_beforehand(
    tiny: Any, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One reading to plan and one to encode; who goes on with a store encodes from its first reading."""
    folder = encode(tiny, corpus, tmp_path / "s").folder
    whole = folder_bytes(folder)
    readings: list[int] = []
    original = corpus_module.read_objects

    def counted(path: Any) -> Iterator[Any]:
        readings.append(0)
        for record in original(path):
            readings[-1] += 1
            yield record

    monkeypatch.setattr(corpus_module, "read_objects", counted)
    encode(tiny, corpus, tmp_path / "again")
    assert readings == [11, 11]
    make_unfinished(tiny, corpus, folder, folder / "shard-000001.safetensors", monkeypatch)
    readings.clear()
    encode(tiny, corpus, folder)
    assert readings == [11]
    assert folder_bytes(folder) == whole


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB."),
        RuntimeError("Expected mha_graph.execute(handle, variant_pack) to be true"),
        MemoryError(),
    ],
)
def test_a_batch_too_large_for_the_device_can_be_made_smaller_on_the_way(
    error: Exception, tiny: Any, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = tiny.encode_prepared, []

    def exhausted(prepared: list[Any], *arguments: Any, **options: Any) -> Any:
        calls.append(len(prepared))
        if len(calls) == 2:
            raise error
        return original(prepared, *arguments, **options)

    monkeypatch.setattr(tiny, "encode_prepared", exhausted)
    with pytest.raises(
        ValueError, match=r"a batch of \[4, \d+\] tokens does not fit into memory; give a smaller --tok"
    ):
        encode(tiny, corpus, tmp_path / "s")
    assert [file.name for file in (tmp_path / "s").glob("shard*")] == ["shard-000000.safetensors"]
    store = encode(tiny, corpus, tmp_path / "s", tokens_per_batch=1)
    assert set(calls[2:]) == {1}
    monkeypatch.undo()
    whole = encode(tiny, corpus, tmp_path / "whole")
    for one, other in zip(store.shards(), whole.shards(), strict=True):
        assert torch.allclose(one.dense(0, len(one)), other.dense(0, len(other)), atol=1e-3)


def test_a_folder_with_something_else_in_it_is_refused(tiny: Any, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    with pytest.raises(ValueError, match=r"holds 'chapter.tex' but no store; choose a folder that is empty"):
        encode(tiny, corpus, tmp_path / "thesis")
    with pytest.raises(ValueError, match="is a file; the store needs a folder"):
        encode(tiny, corpus, corpus)


def test_a_claim_alone_is_what_a_killed_run_on_ray_leaves(tiny: Any, corpus: Path, tmp_path: Path) -> None:
    """It claims the folder before it reads the corpus, and writes the plan after that."""
    (tmp_path / "store" / "claims").mkdir(parents=True)
    (tmp_path / "store" / "claims" / "finish").write_text("{}")
    assert len(encode(tiny, corpus, tmp_path / "store")) > 0
    assert not (tmp_path / "store" / "claims").exists()


def test_duplicate_ids_and_an_empty_corpus(tiny: Any, tmp_path: Path) -> None:
    texts = [*made_up_texts(9), ("id 2 é日本日本", "again")]
    with pytest.raises(ValueError, match=r"ids occur twice, counted from 1: 'id 2 é日本日本' \(texts 3 and 10\)"):
        encode(tiny, write_jsonl(tmp_path / "a.jsonl", texts), tmp_path / "s")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"empty.jsonl: no texts; expected at least one"):
        encode(tiny, tmp_path / "empty.jsonl", tmp_path / "s")
    assert list((tmp_path / "s").iterdir()) == []
    for name in ("shard_size", "tokens_per_batch", "sparse_top_k"):
        with pytest.raises(ValueError, match=f"`{name}` must be a whole number of at least 1, got 0"):
            encode(tiny, tmp_path / "a.jsonl", tmp_path / "s", **{name: 0})


def test_more_shards_than_a_manifest_can_name(
    tiny: Any, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffretriever.store.plan.MAX_SHARDS", 2)
    with pytest.raises(ValueError, match=r"11 texts are 3 shards; a store has at most 2\. Give a larger --shard-size"):
        encode(tiny, corpus, tmp_path / "s")


def test_nan_from_the_model_names_the_text(tiny: Any, corpus: Path, tmp_path: Path) -> None:
    model = copy.copy(tiny)
    model._modules = dict(tiny._modules)
    model.backbone = copy.deepcopy(tiny.backbone)
    texts = [("one", "plain"), ("two", "plain too"), ("three", "zebra crossing")]
    ids, _ = tiny.tokenize([text for _, text in texts], is_query=False)
    only_third = set(ids[2].tolist()) - set(ids[:2].flatten().tolist())
    with torch.no_grad():
        model.backbone.embed_tokens.weight[list(only_third)] = float("nan")
    with pytest.raises(
        ValueError, match=r"text 'three' could not be encoded: The vectors of rows \[0\] are not finite"
    ):
        encode(model, write_jsonl(tmp_path / "a.jsonl", texts), tmp_path / "s")
    with pytest.raises(ValueError, match="the store is not finished, 0 of 1 shards are there; nobody is writing it"):
        Store.open(tmp_path / "s")


@pytest.mark.once
@pytest.mark.parametrize("damage", ["missing", "cut", "flipped", "foreign"])
@pytest.mark.parametrize("finished", [True, False])
def test_a_damaged_shard_is_said_and_mended(
    tiny: Any, corpus: Path, tmp_path: Path, damage: str, finished: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = encode(tiny, corpus, tmp_path / "s").folder
    whole = folder_bytes(folder)
    first, second, third = sorted(folder.glob("shard-*"))
    if not finished:
        make_unfinished(tiny, corpus, folder, third, monkeypatch)
    content = bytearray(second.read_bytes())
    if damage == "missing":
        second.unlink()
    elif damage == "cut":
        second.write_bytes(content[:-5])
    elif damage == "flipped":
        content[-100] ^= 4
        second.write_bytes(content)
    else:
        second.write_bytes(first.read_bytes())
    said: list[str] = []
    encode(tiny, corpus, folder, tell=said.append)
    assert folder_bytes(folder) == whole
    if finished or damage != "missing":
        assert "shard-000001.safetensors" in "".join(said)
        assert "encoded again" in "".join(said)


def make_unfinished(model: Any, corpus: Path, folder: Path, shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take one shard away and let the run that would mend it fail."""
    shard.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(model, "encode_prepared", interrupt)
        with pytest.raises(KeyboardInterrupt):
            encode(model, corpus, folder, tell=silent)
    assert not (folder / "manifest.json").exists()


def interrupt(*arguments: Any, **options: Any) -> None:
    raise KeyboardInterrupt


def test_a_full_disk_is_said_and_nothing_is_lost(
    tiny: Any, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = folder_bytes(encode(tiny, corpus, tmp_path / "whole").folder)
    folder = tmp_path / "s"
    room = sum(map(len, whole.values())) // 2
    original = os.write

    def write(handle: int, content: Any) -> int:
        nonlocal room
        room -= len(content)
        if room < 0 and len(content) > 2000:  # claims still find a place
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(handle, content)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        with pytest.raises(
            OSError, match=r"No space left on device; nothing of this file is kept\. Make room"
        ) as caught:
            encode(tiny, corpus, folder)
    assert "shard-00000" in str(caught.value)
    there = folder_bytes(folder)
    assert {name: content for name, content in there.items() if name in whole} == {
        name: whole[name] for name in there if name != "plan.json"
    }
    encode(tiny, corpus, folder)
    assert folder_bytes(folder) == whole


def test_a_store_that_somebody_writes_is_locked(
    tiny: Any, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = encode(tiny, corpus, tmp_path / "s").folder
    make_unfinished(tiny, corpus, folder, folder / "shard-000001.safetensors", monkeypatch)
    said = "the store is not finished, 2 of 3 shards are there; nobody is writing it now. Run the same"
    with pytest.raises(ValueError, match=said):
        Store.open(folder)
    with Claims(folder / "claims") as claims:
        assert claims.take("shard-000001")
        owner = rf"being written \(locked\) by process {os.getpid()} on \S+[;.] "
        with pytest.raises(ValueError, match=owner):
            Store.open(folder)
        with pytest.raises(ValueError, match=f"made with other settings: `dtype`.*{owner}"):
            encode(tiny, corpus, folder, dtype="int8")


def test_files_of_others_beside_the_claims_stay(tiny: Any, corpus: Path, tmp_path: Path) -> None:
    claims = tmp_path / "s" / "claims"
    encode(tiny, corpus, tmp_path / "s")
    claims.mkdir()
    for name in ("notes.txt", "shard-000001.x", "shard-000000", "shard-000001.0"):  # the last is an earlier version's
        (claims / name).write_text("{}")
    (tmp_path / "s" / "shard-000001.safetensors").unlink()
    store = encode(tiny, corpus, tmp_path / "s", tell=silent)
    assert len(store) == 11
    assert sorted(file.name for file in claims.iterdir()) == ["notes.txt", "shard-000001.x"]


def test_a_link_in_place_of_the_claims_is_refused(tiny: Any, corpus: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "shard-000000").touch()
    (tmp_path / "s").mkdir()
    encode(tiny, corpus, tmp_path / "s")
    (tmp_path / "s" / "claims").symlink_to(theirs)
    with pytest.raises(FileExistsError, match="claims: is a link"):
        encode(tiny, corpus, tmp_path / "s")
    assert [file.name for file in theirs.iterdir()] == ["shard-000000"]
