"""Compressed stores: their size, their search, and interruptions."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from store_helpers import folder_bytes, other_defaults

from diffretriever.files.durable import temporary_name
from diffretriever.search import MODES, ExactEngine, Searcher, compress, open_store
from diffretriever.store import compression as module
from diffretriever.store.segments import query_vectors
from diffretriever.store.store import Shard, ShardContents, Store, write_store

WIDTH, K, SHARD = 16, 2, 250


def clustered(seed: int, texts: int, k: int) -> torch.Tensor:
    """Return unit vectors near a few directions, as real ones are."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(12, WIDTH, generator=torch.Generator().manual_seed(99))
    chosen = centres[torch.randint(0, 12, (texts, k), generator=generator)]
    return torch.nn.functional.normalize(chosen + 0.4 * torch.randn(texts, k, WIDTH, generator=generator), dim=-1)


def make_store(folder: Path, texts: int = 500, seed: int = 0, size: int = SHARD) -> Store:
    vectors, shards = clustered(seed, texts, K), []
    for start in range(0, texts, size):
        part = vectors[start : start + size]
        names = [f"p{start + row}" for row in range(len(part))]
        terms = torch.arange(start, start + len(part))[:, None] % 7 + 1
        shards.append(ShardContents(names, part, terms, torch.ones(len(part), 1), [f"Text {name}" for name in names]))
    return write_store(folder, shards, {"dtype": "float16"})


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("compression") / "store")


@pytest.fixture(scope="module")
def small(store: Store) -> Store:
    return compress(store, store.folder.parent / "small")


def queries() -> dict[str, torch.Tensor]:
    side = {"repr_hidden": clustered(5, 20, 3), "sparse_indices": torch.arange(20)[:, None] % 7 + 1}
    return side | {"sparse_values": torch.ones(20, 1)}


def test_names_of_files_may_be_no_utf8(tmp_path: Path) -> None:
    """A model's folder is recorded as it is called; a store's own cannot be mapped, which is said."""
    name = os.fsdecode(b"mod\xe9le")
    contents = ShardContents(["a"] * 300, clustered(0, 300, K), torch.ones(300, 1).int(), torch.ones(300, 1))
    store = write_store(tmp_path / "store", [contents], {"model": name})
    for folder in (store.folder, compress(store, tmp_path / "small").folder):
        assert open_store(folder).manifest.model == name
    with pytest.raises(OSError, match=r"cannot be mapped .* Its name is not valid UTF-8: rename the folder"):
        next(iter(write_store(tmp_path / name, [contents], {}).shards())).dense(0, 1)


def test_eight_times_smaller(store: Store, small: Store) -> None:
    for shard, compressed in zip(store.shards(), small.shards(), strict=True):
        codes = compressed.file.tensor("codes")
        assert shard.repr_hidden.nbytes == 8 * codes.nbytes
    assert (small.folder / "codebook.safetensors").stat().st_size < 256 * WIDTH * 4 + 2000


def test_a_store_may_have_a_manifest_larger_than_other_json(
    store: Store, small: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.read_object, "__defaults__", (500,))  # bytes, for 256 MiB
    assert [len(open_store(which.folder)) for which in (store, small)] == [500, 500]


def test_another_default_device_and_dtype_of_torch(store: Store, small: Store, tmp_path: Path) -> None:
    asked, expected = queries(), Searcher(small).search(queries(), "multi_dense", 10)
    names = ["p0", "p1"]
    contents = ShardContents(names, clustered(0, 2, K), torch.ones(2, 1), torch.ones(2, 1), names, torch.ones(2, K))
    with other_defaults():
        again = compress(store, tmp_path / "small")
        found = Searcher(again).search(asked, "multi_dense", 10)
        write_store(tmp_path / "int8", [contents], {"dtype": "int8"})
    write_store(tmp_path / "expected", [contents], {"dtype": "int8"})
    assert torch.equal(found.scores, expected.scores)
    assert folder_bytes(again.folder) == folder_bytes(small.folder)
    assert folder_bytes(tmp_path / "int8") == folder_bytes(tmp_path / "expected")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("asked", [1, 20])
def test_a_search_under_autocast_is_one_without(store: Store, small: Store, mode: str, asked: int) -> None:
    query = {name: tensor[:asked] for name, tensor in queries().items()}
    for which in (store, small):
        expected = Searcher(which).search(query, mode, 10, candidates=30)
        with torch.autocast("cpu", torch.bfloat16):
            found = Searcher(which).search(query, mode, 10, candidates=30)
        assert torch.equal(found.scores, expected.scores)
        assert torch.equal(found.positions, expected.positions)


def test_ids_texts_and_sparse_vectors_stay(store: Store, small: Store) -> None:
    assert small.ids() == store.ids()
    assert [small.text(row) for row in (0, 251, 499)] == [store.text(row) for row in (0, 251, 499)]
    sparse = [Searcher(which).search(queries(), "sparse_max", 20) for which in (store, small)]
    assert torch.equal(sparse[0].positions, sparse[1].positions)


def test_each_vector_becomes_its_nearest_centroids(store: Store, small: Store) -> None:
    codebook = module.ShardFile(small.folder / "codebook.safetensors").tensor("codebook")  # [pieces, 256, 4]
    shard = next(iter(store.shards())).dense(0, 30)
    pieces = shard.view(30, K, len(codebook), -1)
    distances = (pieces[..., None, :] - codebook).square().sum(dim=-1)  # [30, K, pieces, 256]
    nearest = torch.stack([codebook[piece, distances.argmin(-1)[..., piece]] for piece in range(len(codebook))], dim=2)
    expected = torch.nn.functional.normalize(nearest.flatten(2), dim=-1)
    assert torch.allclose(next(iter(small.shards())).dense(0, 30), expected, atol=1e-6)


@pytest.mark.parametrize("asked", [1, 20])  # as many as are ranked without making the vectors, and more
def test_vectors_that_are_not_normalised_keep_their_lengths(tmp_path: Path, asked: int) -> None:
    vectors = torch.linspace(0.1, 5.0, 500)[:, None, None] * clustered(0, 500, K)
    contents = ShardContents([f"p{row}" for row in range(500)], vectors, torch.ones(500, 1).int(), torch.ones(500, 1))
    store = write_store(tmp_path / "store", [contents], {"dtype": "float32", "options": {"normalize": False}})
    query, small = {"repr_hidden": clustered(5, asked, 3)}, compress(store, tmp_path / "small")
    full, found = (Searcher(which).search(query, "multi_dense", 500) for which in (store, small))
    scores = [torch.zeros(asked, 500).scatter_(1, each.positions, each.scores) for each in (full, found)]
    assert float((scores[0] - scores[1]).abs().max()) < 0.2 * float(scores[0].max())


@pytest.mark.parametrize("mode", MODES)
def test_search_equals_search_over_the_decoded_vectors(small: Store, mode: str) -> None:
    shards = list(small.shards())
    decoded = {"repr_hidden": torch.cat([shard.dense(0, len(shard)) for shard in shards])}
    decoded["sparse_indices"] = torch.cat([shard.sparse_indices for shard in shards])
    decoded["sparse_values"] = torch.cat([shard.sparse_values for shard in shards])
    found = Searcher(small, block_size=64).search(queries(), mode, 10, candidates=30)
    expected = Searcher(decoded, ids=small.ids()).search(queries(), mode, 10, candidates=30)
    assert torch.allclose(found.scores, expected.scores, atol=1e-6)


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("k", [1, 4, 16])
def test_one_query_is_ranked_without_making_the_vectors(
    small: Store, monkeypatch: pytest.MonkeyPatch, k: int, in_memory: bool
) -> None:
    decoded = {"repr_hidden": torch.cat([shard.dense(0, len(shard)) for shard in small.shards()])}
    query = {"repr_hidden": torch.nn.functional.normalize(torch.randn(1, k, decoded["repr_hidden"].shape[2]), dim=-1)}
    expected = Searcher(decoded).search(query, "multi_dense", 500)
    made: list[int] = []
    make = module.Codebook.vectors

    def noted(self: module.Codebook, codes: torch.Tensor) -> torch.Tensor:
        made.append(len(codes))
        return make(self, codes)

    monkeypatch.setattr(module.Codebook, "vectors", noted)
    found = Searcher(small, block_size=64, in_memory=in_memory).search(query, "multi_dense", 500)
    assert set(made) <= {1}  # one is asked for its shape
    assert torch.allclose(found.scores, expected.scores, atol=1e-6)
    engine, wanted = ExactEngine(small), torch.tensor([0, 63, 64, 251, 499])
    at = engine.scores_at(query_vectors(query), "multi_dense", [wanted])[0]
    by_position = torch.empty(500).scatter_(0, found.positions[0], found.scores[0])
    assert torch.equal(at, by_position[wanted])


def test_a_search_in_memory_reads_no_codes_from_the_file(small: Store, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(small.folder, folder)
    asked, expected = queries(), Searcher(small).search(queries(), "multi_dense", 10)
    searchers = [Searcher(open_store(folder), in_memory=in_memory) for in_memory in (True, False)]
    for shard in small.shards():
        path = folder / shard.file.path.name
        with path.open("r+b") as stream:  # zeros in the place of all vectors
            stream.seek(path.read_bytes().index(shard.file.tensor("codes").numpy().tobytes()))
            stream.write(bytes(shard.file.tensor("codes").nbytes))
    assert torch.equal(searchers[0].search(asked, "multi_dense", 10).scores, expected.scores)
    assert not torch.equal(searchers[1].search(asked, "multi_dense", 10).scores, expected.scores)


def test_the_ranking_is_nearly_the_uncompressed_one(store: Store, small: Store) -> None:
    full, found = (Searcher(which).search(queries(), "multi_dense", 10) for which in (store, small))
    shared = sum(len(set(a) & set(b)) for a, b in zip(full.ids, found.ids, strict=True))
    assert shared >= 0.7 * 10 * len(full)
    assert float((full.scores - found.scores).abs().max()) < 0.1


def test_an_interrupted_run_goes_on_to_the_same_bytes(
    store: Store, small: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []
    whole = module.write_shard

    def dies(path: Path, *arguments: Any) -> None:
        if len(written) == 2:  # the codebook and the first of two shards
            raise KeyboardInterrupt
        whole(path, *arguments)
        written.append(path)

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_shard", dies)
        with pytest.raises(KeyboardInterrupt):
            compress(store, tmp_path / "again")
    with pytest.raises(ValueError, match="not finished; run the same `diffretriever compress` command again"):
        open_store(tmp_path / "again")
    temporary_name(tmp_path / "again" / "shard-000001.safetensors").touch()  # as a killed process leaves one
    before = [path.stat().st_mtime_ns for path in written]
    compress(store, tmp_path / "again")
    assert [path.stat().st_mtime_ns for path in written] == before
    names = sorted(file.name for file in small.folder.iterdir())
    assert sorted(file.name for file in (tmp_path / "again").iterdir()) == names
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (small.folder / name).read_bytes()


def test_the_work_grows_with_the_shards_and_no_faster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every walk over a store's shards is counted."""
    walks: list[int] = []
    shards = Store.shards

    def noted(self: Store) -> Iterator[Shard]:
        for shard in shards(self):
            walks[-1] += 1
            yield shard

    for count in (250, 1000):
        store = make_store(tmp_path / f"{count}", count, size=25)
        walks.append(0)
        with monkeypatch.context() as patch:
            patch.setattr(Store, "shards", noted)
            compress(store, tmp_path / f"{count}-small")
    assert walks[1] <= 4 * walks[0]


def test_a_flipped_bit_is_found(store: Store, tmp_path: Path) -> None:
    compress(store, tmp_path / "small")
    file = tmp_path / "small" / "shard-000001.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"shard-000001.safetensors: .*a bit has flipped"):
        open_store(tmp_path / "small", verify=True)
    file.unlink()
    with pytest.raises(ValueError, match=r"shard-000001.safetensors: the shard is missing"):
        open_store(tmp_path / "small")


def test_what_is_refused(store: Store, small: Store, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must divide the 16 dimensions, got 5"):
        compress(store, tmp_path / "five", dimensions_per_byte=5)
    with pytest.raises(ValueError, match="compressed already"):
        compress(small, tmp_path / "twice")
    with pytest.raises(ValueError, match="holds a store already, made from another one"):
        compress(store, small.folder, dimensions_per_byte=8)
    with pytest.raises(ValueError, match=r"has 20 vectors; compression learns 256 centroids"):
        compress(make_store(tmp_path / "few", texts=10), tmp_path / "few-small")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("x")
    with pytest.raises(ValueError, match=r"not empty \(letter.txt\)"):
        compress(store, tmp_path / "other")
    assert len(compress(store, small.folder)) == len(small)  # done already: nothing to do


@pytest.mark.parametrize("seed", [-1, 2**31 - 1, 10**20])
def test_a_seed_that_faiss_cannot_take(store: Store, tmp_path: Path, seed: int) -> None:
    with pytest.raises(ValueError, match="the seed must be a whole number from 0 to 2147483646"):
        compress(store, tmp_path / "small", seed=seed)
    assert not (tmp_path / "small").exists()
