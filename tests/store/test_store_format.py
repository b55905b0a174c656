"""The store's files: what is written is read back, lazily, and every damage is found."""

from __future__ import annotations

import json
import os
import random
import shutil
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from store_helpers import folder_bytes

from diffretriever.store.manifest import LARGEST, ShardEntry
from diffretriever.store.plan import MAX_SHARDS, SHARD_NAME
from diffretriever.store.shard_file import DamagedShardError, ShardFile, write_shard
from diffretriever.store.store import ShardContents, Store, damaged_shards, write_store


def made_up_shard(ids: list[str], texts: list[str] | None = None, seed: int = 0) -> ShardContents:
    """Return n unit vectors [n, 3, 16] and sparse vectors [n, 5]."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.nn.functional.normalize(torch.randn(len(ids), 3, 16, generator=generator), dim=-1)
    indices = torch.randint(0, 1000, (len(ids), 5), generator=generator)
    return ShardContents(ids, dense, indices, torch.rand(len(ids), 5, generator=generator), texts)


def two_shards() -> list[ShardContents]:
    return [made_up_shard(["a b", "", "日本"], ["x", "", "\n"]), made_up_shard(["d"], ["last"], seed=1)]


@pytest.mark.parametrize(("dtype", "error"), [("float32", 0.0), ("float16", 5e-4), ("bfloat16", 4e-3), ("int8", 4e-3)])
def test_what_is_written_is_read_back(tmp_path: Path, dtype: str, error: float) -> None:
    given_shards = two_shards()
    store = write_store(tmp_path / "store", iter(given_shards), {"dtype": dtype, "model": "m", "side": "query"})
    assert (len(store), store.ids()) == (4, ["a b", "", "日本", "d"])
    assert [store.text(position) for position in range(4)] == ["x", "", "\n", "last"]
    assert [shard.offset for shard in store.shards()] == [0, 3]
    manifest = Store.open(tmp_path / "store", verify=True).manifest
    assert (manifest.model, manifest.side, manifest.num_masks, manifest.hidden_size) == ("m", "query", 3, 16)
    assert (manifest.sparse_top_k, manifest.dtype, manifest.count) == (5, dtype, 4)
    for shard, contents in zip(store.shards(), given_shards, strict=True):
        assert shard.ids == contents.ids
        assert shard.repr_hidden.dtype == getattr(torch, dtype)
        assert shard.dense(0, len(shard)).dtype == torch.float32
        assert (shard.dense(0, len(shard)) - contents.repr_hidden).abs().max() <= error
        assert torch.equal(shard.dense(1, 2), shard.dense(0, len(shard))[1:2])
        assert shard.sparse_indices.dtype == torch.int32
        assert torch.equal(shard.sparse_indices.long(), contents.sparse_indices)
        assert (shard.sparse_values.float() - contents.sparse_values).abs().max() <= min(error, 5e-4)


def test_a_shard_is_a_safetensors_file(tmp_path: Path) -> None:
    contents = two_shards()[0]
    store = write_store(tmp_path / "store", [contents], {"dtype": "float32"})
    tensors = load_file(tmp_path / "store" / "shard-000000.safetensors")  # the format's own reader
    assert torch.equal(tensors["repr_hidden"], contents.repr_hidden)
    assert tensors["ids_bytes"].numpy().tobytes().decode() == "a b日本"
    assert tensors["ids_offsets"].tolist() == [0, 3, 3, 9]
    assert torch.equal(tensors["sparse_indices"], next(store.shards()).sparse_indices)


@settings(max_examples=25)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=8))
def test_ids_and_texts_of_any_characters(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    contents = made_up_shard(texts, texts[::-1])
    store = write_store(tmp_path_factory.mktemp("store") / "s", [contents], {})
    assert store.ids() == texts
    assert [store.text(position) for position in range(len(texts))] == texts[::-1]


def test_int8_zero_and_large_vectors(tmp_path: Path) -> None:
    contents = made_up_shard(["zero", "large"])
    contents.repr_hidden[0], contents.repr_hidden[1] = 0.0, 1e6 * contents.repr_hidden[1]
    dense = next(write_store(tmp_path / "s", [contents], {"dtype": "int8"}).shards()).dense(0, 2)
    assert torch.equal(dense[0], contents.repr_hidden[0])
    assert torch.allclose(dense[1], contents.repr_hidden[1], atol=1e6 / 127 / 2)


def test_nothing_is_read_until_it_is_used(tmp_path: Path) -> None:
    """A shard of 64 MB adds next to nothing to the process's memory, and then what is touched."""
    count = 8192
    contents = ShardContents(
        [str(n) for n in range(count)], torch.ones(count, 4, 512), torch.zeros(count, 5), torch.zeros(count, 5)
    )
    write_store(tmp_path / "s", [contents], {"dtype": "float32"})
    del contents
    before = resident()
    shard = next(Store.open(tmp_path / "s").shards())
    vectors = shard.repr_hidden
    assert resident() - before < 8e6
    assert float(vectors.sum()) == count * 4 * 512
    assert resident() - before > 50e6


def resident() -> float:
    """Return this process's resident memory in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmRSS"))) * 1024


def test_a_change_in_memory_never_reaches_the_file(tmp_path: Path) -> None:
    store = write_store(tmp_path / "s", two_shards(), {})
    before = folder_bytes(tmp_path / "s")
    next(store.shards()).repr_hidden.zero_()
    del store
    assert folder_bytes(tmp_path / "s") == before


def test_a_store_without_texts(tmp_path: Path) -> None:
    store = write_store(tmp_path / "s", [made_up_shard(["a"])], {})
    with pytest.raises(ValueError, match="the store holds no texts; it was made with --no-texts"):
        store.text(0)
    with pytest.raises(IndexError, match="position 1; the store has 1 texts"):
        store.text(1)


@pytest.mark.parametrize("place", range(0, 100, 7))
def test_every_flipped_bit_is_found(tmp_path: Path, place: int) -> None:
    write_store(tmp_path / "s", two_shards(), {})
    numbers = random.Random(place)
    for file in sorted((tmp_path / "s").iterdir()):
        content = bytearray(file.read_bytes())
        bit = numbers.randrange(8 * (len(content) * place // 100), 8 * (len(content) * (place + 7) // 100))
        bit = min(bit, 8 * len(content) - 9)  # the manifest's last byte is a line feed that says nothing
        content[bit // 8] ^= 1 << bit % 8
        whole = file.read_bytes()
        file.write_bytes(content)
        with pytest.raises(ValueError, match=file.name):
            Store.open(tmp_path / "s", verify=True)
        file.write_bytes(whole)
    Store.open(tmp_path / "s", verify=True)


def test_a_missing_cut_off_or_exchanged_shard_is_found_without_verify(tmp_path: Path) -> None:
    write_store(tmp_path / "s", two_shards(), {})
    first, second = sorted((tmp_path / "s").glob("shard-*"))
    whole = first.read_bytes()
    first.write_bytes(whole[:-1])
    with pytest.raises(DamagedShardError, match=rf"shard has {len(whole) - 1} bytes; its header says {len(whole)}"):
        Store.open(tmp_path / "s")
    first.write_bytes(second.read_bytes())
    with pytest.raises(DamagedShardError, match=r"not the one that the manifest names .*encode.*, run again, mends"):
        Store.open(tmp_path / "s")
    first.write_bytes(b"")
    with pytest.raises(DamagedShardError, match="header is damaged"):
        Store.open(tmp_path / "s")
    first.unlink()
    with pytest.raises(DamagedShardError, match=r"shard-000000.safetensors: the shard is missing"):
        Store.open(tmp_path / "s")


def test_all_damaged_shards_are_named(tmp_path: Path) -> None:
    store = write_store(tmp_path / "s", [made_up_shard([name], seed=number) for number, name in enumerate("abcde")], {})
    files = [shard.file.path for shard in store.shards()]
    entries = {entry.file: entry for entry in store.manifest.shards}
    assert damaged_shards(store.folder, entries) == {}
    content = bytearray(files[1].read_bytes())
    content[-1] ^= 1
    files[1].write_bytes(content)
    files[3].write_bytes(files[0].read_bytes())
    files[4].unlink()
    found = damaged_shards(store.folder, entries)
    assert list(found) == [files[number].name for number in (1, 3, 4)]
    for error, words in zip(found.values(), ("a bit has flipped", "not the one that", "is missing"), strict=True):
        assert words in str(error)
    without_manifest = damaged_shards(store.folder, dict.fromkeys(entries))
    assert list(without_manifest) == [files[number].name for number in (1, 4)]  # the fourth file is whole in itself


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one processor core")
def test_shards_are_hashed_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = write_store(tmp_path / "s", two_shards(), {})
    both, verify = threading.Barrier(2), ShardFile.verify

    def meet(self: ShardFile) -> None:
        both.wait(timeout=30)  # breaks where one shard waits for the other's end
        verify(self)

    monkeypatch.setattr(ShardFile, "verify", meet)
    assert len(Store.open(store.folder, verify=True)) == 4


@pytest.mark.parametrize("change", [{"shape": [9, 9]}, {"dtype": "I3"}, {"data_offsets": [0, 1]}, {"shape": None}])
def test_a_header_that_does_not_fit_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    file = tmp_path / "a.safetensors"
    write_shard(file, {"a": torch.zeros(2, 2), "b": torch.zeros(3, dtype=torch.int64)}, {})
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["a"] |= change
    packed = json.dumps(header).encode()
    file.write_bytes(len(packed).to_bytes(8, "little") + packed + content[8 + length :])
    with pytest.raises(DamagedShardError, match="header is damaged"):
        ShardFile(file)


def test_a_folder_that_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no store here \(manifest.json is missing\)"):
        Store.open(tmp_path)
    write_store(tmp_path / "s", two_shards(), {})
    with pytest.raises(FileExistsError, match="not empty"):
        write_store(tmp_path / "s", two_shards(), {})
    manifest = tmp_path / "s" / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace("store 1", "store 2"))
    with pytest.raises(ValueError, match="the format is 'diffretriever store 2'; this version reads"):
        Store.open(tmp_path / "s")
    manifest.write_text(text.replace('"model": ""', '"model": "other"'))
    with pytest.raises(ValueError, match="does not match its own hash; it was damaged or edited"):
        Store.open(tmp_path / "s")
    manifest.write_text(text[:-20])
    with pytest.raises(ValueError, match="not valid JSON"):
        Store.open(tmp_path / "s")


def test_a_manifest_names_as_many_shards_as_it_may_be_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = ShardEntry(SHARD_NAME.format(MAX_SHARDS), 10**12, 10**6, 10**10, "0" * 64, "0" * 64)
    one, two = (len(json.dumps({"shards": [asdict(entry)] * count}, indent=1)) for count in (1, 2))
    assert 10**6 <= MAX_SHARDS <= (LARGEST - 2**20) // (two - one)
    write_store(tmp_path / "s", two_shards(), {})
    monkeypatch.setattr("diffretriever.store.manifest.LARGEST", 500)
    with pytest.raises(ValueError, match=r"manifest\.json: larger than 500 bytes, which no such file is\."):
        Store.open(tmp_path / "s")


def test_more_shards_than_the_system_maps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise RuntimeError("unable to mmap 4096 bytes from file: Cannot allocate memory (12)")

    store = write_store(tmp_path / "s", two_shards(), {})
    monkeypatch.setattr(torch, "from_file", refused)
    with pytest.raises(OSError, match=r"shard-000000\.safetensors: .*\(12\)\)\. Linux lets .* vm\.max_map_count"):
        store.ids()


def test_a_shard_that_changes_under_an_open_store(tmp_path: Path) -> None:
    for change in (lambda file: file.unlink(), lambda file: file.write_bytes(file.read_bytes()[:-8])):
        store = write_store(tmp_path / "s", two_shards(), {})
        change(tmp_path / "s" / "shard-000001.safetensors")
        with pytest.raises(OSError, match=r"shard-000001.* after the store was opened: open the store anew\.$"):
            store.ids()
        shutil.rmtree(tmp_path / "s")


def test_contents_that_do_not_go_together(tmp_path: Path) -> None:
    shard = made_up_shard(["a", "b"])
    shard.sparse_values = shard.sparse_values[:1]
    with pytest.raises(ValueError, match="a shard has 2 ids, but sparse_values has 1 rows"):
        write_store(tmp_path / "1", [shard], {})
    for number in map(float, ("nan", "inf", "-inf")):
        shard = made_up_shard(["a", "b"])
        shard.repr_hidden[1, 0, 0] = number
        for dtype in ("float16", "bfloat16", "int8"):
            with pytest.raises(ValueError, match=r"of 'b' is NaN, infinite or too large for torch.b?float"):
                write_store(tmp_path / f"{number}-{dtype}", [shard], {"dtype": dtype})
    shard = made_up_shard(["a"])
    shard.repr_hidden *= 1e6
    with pytest.raises(ValueError, match=r"too large for torch.float16; try --dtype bfloat16"):
        write_store(tmp_path / "2", [shard], {})
    with pytest.raises(ValueError, match="dtype 'float64': a store's is one of float16, bfloat16"):
        write_store(tmp_path / "3", [made_up_shard(["a"])], {"dtype": "float64"})
    with pytest.raises(ValueError, match=r"manifest_fields holds \['colour'\]"):
        write_store(tmp_path / "4", [made_up_shard(["a"])], {"colour": 1})
    with pytest.raises(ValueError, match="no shards were given"):
        write_store(tmp_path / "5", [], {})
