"""Compressed stores: product quantisation of the dense vectors, searched like any other store.

Each vector is cut into pieces of a few dimensions, and of each piece only the number of the nearest of 256 learnt
centroids is kept: one byte a piece (Jégou et al. 2011, "Product quantization for nearest neighbor search"). The paper
compresses with the residuals of ColBERTv2 (App. B.3), 2 bits a dimension; 4 dimensions a byte is the same rate. The
query stays uncompressed, and the sparse vectors, ids and texts are copied as they are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F

from ..files.durable import TEMPORARY, remove_temporaries, write_text
from ..files.fields import fill
from ..files.install import install_hint
from ..files.lines import read_object
from ..model.scoring import LEAST_LENGTH, Memory, PreparedQueries, check_width
from ..progress import progress_bar
from .manifest import LARGEST, MANIFEST_FILE, Manifest, ShardEntry
from .segments import Rows, Stored, existing
from .shard_file import DamagedShardError, ShardFile, write_shard
from .store import Shard, Store, check_entry, check_tensors, entry_of, refuse_damaged

FORMAT = "diffretriever compressed store 1"
CODEBOOK_FILE = "codebook.safetensors"
CENTROIDS = 256  # of each piece: a byte tells one
TRAINING_VECTORS, ITERATIONS = 25_600, 15  # of the k-means: a hundred vectors a centroid
ENCODE_ROWS = 4096
SUMMED_CODES, TABLE_COLUMNS = 256 * 1024, 8  # looked up at once; of a table, whole registers


class Codebook:
    """The centroids of a store, which its shards share.

    Args:
        centroids: float32 [pieces, 256, H / pieces].
        normalised: whether the model's vectors are, so that those of the centroids are to be normalised again.
    """

    def __init__(self, centroids: torch.Tensor, normalised: bool) -> None:
        self.centroids, self._normalised = centroids, normalised
        # of each piece, of all centroids in a row
        self._first = torch.arange(len(centroids), dtype=torch.int32, device="cpu") * CENTROIDS
        self._products: WeakKeyDictionary[PreparedQueries, torch.Tensor] = WeakKeyDictionary()

    def vectors(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the vectors that codes, uint8 [n, K, pieces], stand for, float32 [n, K, H]."""
        pieces = F.embedding(codes.int() + self._first, self.centroids.flatten(0, 1))  # [n, K, pieces, H / pieces]
        vectors = pieces.flatten(2)
        if not self._normalised:
            return vectors
        return vectors.div_(torch.linalg.vector_norm(vectors, dim=-1, keepdim=True).clamp_(min=LEAST_LENGTH))

    def similarities(self, codes: torch.Tensor, queries: PreparedQueries, memory: Memory) -> torch.Tensor:
        """Return the dot products of those vectors with a few queries' without making them, float32 [C, N].

        A piece's product with a query is one of 256, which are looked up and added (Jégou et al. 2011, §III.A); so is
        the square of its length.

        Args:
            codes: uint8 [N, pieces].
            queries, memory: as for `Segment.similarities`.
        """
        check_width(queries.width, len(self._first) * self.centroids.shape[2])
        table, columns = self._table(queries), len(queries.matrix)
        out = memory("similarity", (columns, len(codes)))
        step = max(1, SUMMED_CODES // len(self._first))
        for start in range(0, len(codes), step):
            part = codes[start : start + step]
            numbers = memory("codes", tuple(part.shape)).view(torch.int32).copy_(part).add_(self._first)
            sums = F.embedding_bag(numbers, table, mode="sum")
            lengths = sums[:, columns].sqrt_().clamp_(min=LEAST_LENGTH) if self._normalised else sums.new_ones(())
            torch.div(sums[:, :columns].T, lengths, out=out[:, start : start + step])
        return out

    def _table(self, queries: PreparedQueries) -> torch.Tensor:
        """Return the centroids' products with the queries' C vectors and their squares, float32 [pieces·256, > C]."""
        found = self._products.get(queries)
        if found is None:
            pieces, _, dimensions = self.centroids.shape
            matrix = queries.matrix[:, : queries.width].reshape(-1, pieces, dimensions).permute(1, 2, 0)
            squares = self.centroids.square().sum(dim=2, keepdim=True)
            table = torch.cat([self.centroids @ matrix, squares], dim=2).flatten(0, 1)
            found = self._products[queries] = F.pad(table, (0, -table.shape[1] % TABLE_COLUMNS))
        return found


class CompressedShard(Shard):
    """A shard whose vectors are centroid numbers.

    Args:
        file, offset, length, vocab_size: as for `Shard`.
        codebook: of the store.
    """

    def __init__(self, file: ShardFile, offset: int, length: int, vocab_size: int, codebook: Codebook) -> None:
        super().__init__(file, offset, length, vocab_size)
        self._codebook = codebook

    def block(self, start: int, stop: int) -> torch.Tensor:
        """See `Segment.block`."""
        return self._vectors(slice(start, stop))

    def stored(self, rows: Rows) -> Stored:
        """See `Segment.stored`."""
        return self.file.tensor("codes")[rows], None

    def similarities(self, rows: Rows, queries: PreparedQueries, memory: Memory) -> torch.Tensor:
        """See `Segment.similarities`."""
        return self._codebook.similarities(self.file.tensor("codes")[rows].flatten(0, 1), queries, memory)

    def _vectors(self, rows: Rows) -> torch.Tensor:
        return self._codebook.vectors(self.file.tensor("codes")[rows])


def open_store(folder: str | Path, *, verify: bool = False) -> Store:
    """Open a store, compressed or not.

    Args:
        folder: what `diffretriever encode` or `diffretriever compress` wrote.
        verify: also read every byte and compare with the hashes.

    Raises:
        FileNotFoundError: no store there.
        ValueError: the store is unfinished, or a file of it is missing or damaged.
    """
    folder = Path(folder)
    content = _read_manifest(folder)
    if content is None:
        return Store.open(folder, verify=verify)
    file = folder / MANIFEST_FILE
    manifest = Manifest.of_fields(content, file)
    codebook = _open_codebook(folder, fill(ShardEntry, content.get("codebook"), f"{file}: codebook"), manifest)
    pieces, _, _ = codebook.centroids.shape
    shards: list[Shard] = []
    for entry in manifest.shards:
        codes = {"codes": (torch.uint8, (entry.count, manifest.num_masks, pieces))}
        opened = check_tensors(check_entry(folder, entry), manifest, entry.count, codes)
        shards.append(CompressedShard(opened, entry.first, entry.count, manifest.vocab_size, codebook))
    if verify:
        refuse_damaged(folder, manifest.shards)
    return Store(folder, manifest, shards)


def _open_codebook(folder: Path, entry: ShardEntry, manifest: Manifest) -> Codebook:
    """Return the centroids."""
    file = check_entry(folder, entry)
    file.verify()  # small, and every vector depends on it
    file.check({"codebook": (torch.float32, (None, CENTROIDS, None))})
    codebook = file.tensor("codebook").clone()
    pieces, _, dimensions = codebook.shape
    if pieces * dimensions != manifest.hidden_size:
        raise DamagedShardError(
            f"{file.path}: the codebook has {pieces} pieces of {dimensions} dimensions; vectors of "
            f"{manifest.hidden_size} dimensions are not made of them."
        )
    return Codebook(codebook, normalised=manifest.options.get("normalize", True))


def compress(
    store: Store, output: str | Path, dimensions_per_byte: int = 4, seed: int = 0, show_progress_bar: bool = False
) -> Store:
    """Write a compressed copy of a store; called again after an interruption it goes on.

    Args:
        store: what to compress, open.
        output: the new store's folder.
        dimensions_per_byte: 4 is 8 times smaller than float16, 3 is 6 times. It must divide H.
        seed: of the k-means.
        show_progress_bar: draw one, in passages.

    Returns:
        The compressed store, open.

    Raises:
        ImportError: faiss is not installed.
        ValueError: H is no multiple of `dimensions_per_byte`, too few vectors, a store that is compressed already, or
            the folder holds something else.
        OSError: the disk is full; what was written whole is kept.
    """
    output = Path(output)
    width = store.manifest.hidden_size
    if any(isinstance(shard, CompressedShard) for shard in store.shards()):
        raise ValueError(f"{store.folder}: this store is compressed already.")
    if dimensions_per_byte < 1 or width % dimensions_per_byte:
        divisors = [number for number in range(1, 17) if width % number == 0]
        raise ValueError(
            f"dimensions per byte must divide the {width} dimensions, got {dimensions_per_byte}; {divisors} do."
        )
    if not 0 <= seed < 2**31 - 1:
        raise ValueError(f"the seed must be a whole number from 0 to {2**31 - 2}, got {seed}.")
    about = {"source": _identity(store), "dimensions_per_byte": str(dimensions_per_byte), "seed": str(seed)}
    if (output / MANIFEST_FILE).exists():
        return _finished(output, about)
    codebook_file = _codebook(store, output, about)
    remove_temporaries(output)
    quantiser = _quantiser(codebook_file.tensor("codebook"))
    entries = []
    with progress_bar(len(store), "passage", "compress", show_progress_bar) as bar:
        for shard in store.shards():
            path = output / shard.file.path.name
            if not _is_done(path, shard, codebook_file):
                _write_compressed(path, shard, quantiser, codebook_file)
            entries.append(entry_of(ShardFile(path)))
            bar.update(len(shard))
    book = ShardEntry(CODEBOOK_FILE, 0, 0, codebook_file.size, codebook_file.header_sha256, "")
    content = {"format": FORMAT, "compression": about, **asdict(store.manifest.settings), "codebook": asdict(book)}
    content["shards"] = [asdict(entry) for entry in entries]
    write_text(output / MANIFEST_FILE, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return open_store(output)


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return a compressed store's manifest; None where the folder is for `Store.open` to judge."""
    file = folder / MANIFEST_FILE
    if not file.is_file():
        if (folder / CODEBOOK_FILE).is_file():
            raise ValueError(f"{folder}: not finished; run the same `diffretriever compress` command again.")
        return None
    content = read_object(file, LARGEST)
    return content if content.get("format") == FORMAT else None


def _identity(store: Store) -> str:
    """Return one hash over everything in a store."""
    lines = [f"{entry.file} {entry.header_sha256}" for entry in store.manifest.shards]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _finished(output: Path, about: Mapping[str, str]) -> Store:
    content = _read_manifest(output)
    if content is None or content.get("compression") != about:
        raise ValueError(f"{output}: holds a store already, made from another one or with other options.")
    return open_store(output)


def _codebook(store: Store, output: Path, about: Mapping[str, str]) -> ShardFile:
    """Return the codebook, read from an interrupted run or learnt now.

    Raises:
        ValueError: the folder holds something else.
    """
    path = output / CODEBOOK_FILE
    output.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        foreign = sorted(file.name for file in output.iterdir() if not file.name.startswith(TEMPORARY))
        if foreign:
            raise ValueError(
                f"{output}: not empty ({', '.join(foreign[:3])}); give the compressed store its own folder."
            )
        write_shard(path, {"codebook": _learn(store, int(about["dimensions_per_byte"]), int(about["seed"]))}, about)
    file = ShardFile(path)
    file.verify()
    if {name: file.metadata.get(name) for name in about} != dict(about):
        raise ValueError(f"{output}: holds an unfinished compression of another store or with other options.")
    return file


def _learn(store: Store, dimensions_per_byte: int, seed: int) -> torch.Tensor:
    """Learn the centroids by k-means from vectors all over the store; float32 [pieces, 256, dimensions]."""
    stride = max(1, len(store) * store.manifest.num_masks // TRAINING_VECTORS)
    there = [existing(shard, 0, len(shard))[::stride] for shard in store.shards()]
    rows = [shard.rows(torch.arange(0, len(shard), stride, device="cpu")) for shard in store.shards()]  # [n, K, H] each
    sample = torch.cat([vectors[mask] for vectors, mask in zip(rows, there, strict=True)])
    if len(sample) < CENTROIDS:
        raise ValueError(
            f"{store.folder}: has {len(sample)} vectors; compression learns {CENTROIDS} centroids and needs as many."
        )
    quantiser = _new_quantiser(sample.shape[1], dimensions_per_byte)
    quantiser.cp.seed, quantiser.cp.niter = seed + 1, ITERATIONS
    quantiser.cp.min_points_per_centroid = 1  # a small collection is no mistake
    quantiser.train(sample.contiguous().numpy())
    return _centroids(quantiser)


def _new_quantiser(width: int, dimensions_per_byte: int) -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ImportError(f"compression needs faiss: {install_hint('retrieval')}") from error
    return faiss.ProductQuantizer(width, width // dimensions_per_byte, 8)


def _centroids(quantiser: Any) -> torch.Tensor:
    import faiss

    return torch.from_numpy(faiss.vector_to_array(quantiser.centroids)).view(quantiser.M, CENTROIDS, quantiser.dsub)


def _quantiser(codebook: torch.Tensor) -> Any:
    """Return faiss's quantiser with a codebook [pieces, 256, dimensions]."""
    import faiss

    pieces, _, dimensions = codebook.shape
    quantiser = _new_quantiser(pieces * dimensions, dimensions)
    faiss.copy_array_to_vector(codebook.flatten().numpy(), quantiser.centroids)
    return quantiser


def _is_done(path: Path, shard: Shard, codebook: ShardFile) -> bool:
    """Return whether an earlier run wrote this shard; files appear whole or not at all."""
    if not path.exists():
        return False
    try:
        metadata = ShardFile(path).metadata
    except DamagedShardError:
        return False
    return (metadata.get("from"), metadata.get("codebook")) == (shard.file.header_sha256, codebook.header_sha256)


def _write_compressed(path: Path, shard: Shard, quantiser: Any, codebook: ShardFile) -> None:
    codes = []
    for start in range(0, len(shard), ENCODE_ROWS):
        vectors = shard.dense(start, min(start + ENCODE_ROWS, len(shard)))  # [n, K, H]
        found = torch.from_numpy(quantiser.compute_codes(vectors.flatten(0, 1).contiguous().numpy()))
        codes.append(found.view(*vectors.shape[:2], -1))
    names = ["ids_bytes", "ids_offsets", "texts_bytes", "texts_offsets", "sparse_indices", "sparse_values", "repr_mask"]
    tensors = {name: shard.file.tensor(name) for name in names if name in shard.file}
    metadata = {name: shard.file.metadata[name] for name in ("first", "count", "texts_sha256")}
    metadata |= {"from": shard.file.header_sha256, "codebook": codebook.header_sha256}
    write_shard(path, {"codes": torch.cat(codes), **tensors}, metadata)
