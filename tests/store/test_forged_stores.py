"""Stores that a stranger made: whatever manifest, plan or shard say, one line names file and field, with status 2."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from diffretriever.cli.main import main
from diffretriever.files.hashes import hash_json
from diffretriever.search import Searcher, compress, open_store
from diffretriever.store.shard_file import DamagedShardError, ShardFile, write_shard
from diffretriever.store.store import ShardContents, entry_of, write_store

COUNT, K, WIDTH, TERMS, VOCABULARY = 128, 2, 8, 3, 50
Edit = Callable[[dict[str, Any]], Any]
SHARD = "shard-000000.safetensors"


def make_store(folder: Path, dtype: str = "float16") -> Path:
    """Write a store of two shards."""
    generator = torch.Generator().manual_seed(0)
    shards = []
    for first in (0, COUNT):
        names = [f"p{first + row}" for row in range(COUNT)]
        vectors = torch.nn.functional.normalize(torch.randn(COUNT, K, WIDTH, generator=generator), dim=-1)
        terms = torch.randint(0, VOCABULARY, (COUNT, TERMS), generator=generator)
        shards.append(
            ShardContents(names, vectors, terms, torch.ones(COUNT, TERMS), [f"Text {name}" for name in names])
        )
    write_store(folder, shards, {"dtype": dtype, "vocab_size": VOCABULARY, "options": {"shard_size": COUNT}})
    return folder


def seal(file: Path, content: dict[str, Any]) -> None:
    """Write a manifest or plan with the hash of itself, as the format has it."""
    own = {name: value for name, value in content.items() if name not in ("format", "sha256")}
    whole = content | ({"sha256": hash_json(own)} if "sha256" in content else {})
    file.write_text(json.dumps(whole))


def edit_manifest(folder: Path, edit: Edit) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    edit(content)
    seal(folder / "manifest.json", content)


def edit_shard(
    folder: Path, tensors: dict[str, torch.Tensor | None] | None = None, metadata: dict[str, Any] | None = None
) -> None:
    """Write the first shard anew, with some other tensors (None: without it), and give the manifest its hash."""
    file = next(open_store(folder).shards()).file
    there = {name: file.tensor(name).clone() for name in file._places} | (tensors or {})
    kept = {name: tensor for name, tensor in there.items() if tensor is not None}
    write_shard(folder / SHARD, kept, file.metadata | (metadata or {}))
    name_anew(folder)


def name_anew(folder: Path) -> None:
    """Give the manifest the size and hash of the first shard as it is."""
    content = (folder / SHARD).read_bytes()
    header = content[8 : 8 + int.from_bytes(content[:8], "little")]
    found = {"size": len(content), "header_sha256": hashlib.sha256(header).hexdigest()}
    edit_manifest(folder, lambda manifest: manifest["shards"][0].update(found))


def said_by(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that must end with status 2 and one line; return it."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert len(lines[0]) < 700
    return lines[0]


def setting(name: str, value: Any) -> Edit:
    return lambda content: content.update({name: value})


def entry(name: str, value: Any, number: int = 0) -> Edit:
    return lambda content: content["shards"][number].update({name: value})


MANIFESTS: list[tuple[Edit, str]] = [
    (setting("shards", []), r"`shards` is \[\]; a store holds at least one text"),
    (setting("shards", 5), r"shards must be a list with at least one entry, got 5"),
    (setting("shards", [5]), r"shards\[0\]: expected keys and values, got int"),
    (entry("file", 5), r"shards\[0\]: file must be of type str, got 5"),
    (
        entry("file", "../s/shard-000000.safetensors"),
        r"shards\[0\]: `file` is '\.\./s/shard.*'; expected the name of a",
    ),
    (entry("file", "/etc/passwd"), r"`file` is '/etc/passwd'"),
    (entry("file", ".."), r"`file` is '\.\.'"),
    (entry("file", "a\0b"), r"`file` is 'a\\x00b'"),
    (entry("file", "a\nb"), r"`file` is 'a\\nb'"),
    (entry("file", "shard-000001.safetensors"), r"`shards` names one file twice"),
    (entry("count", -5), r"shards\[0\]: `count` is -5; expected a whole number of at least 0"),
    (entry("count", 0), r"shards\[0\]: `count` is 0; expected at least one text"),
    (entry("count", 1.5), r"shards\[0\]: count must be of type int, got 1.5"),
    (entry("count", True), r"shards\[0\]: count must be of type int, got True"),
    (entry("count", 10**30), r"shards\[1\]: `first` is 128; expected 1000"),
    (entry("first", 1), r"shards\[0\]: `first` is 1; expected 0"),
    (entry("first", 5, 1), r"shards\[1\]: `first` is 5; expected 128"),
    (entry("size", "big"), r"shards\[0\]: size must be of type int"),
    (entry("header_sha256", "0" * 63), r"shards\[0\]: `header_sha256` is '000"),
    (lambda content: content["shards"][1].pop("size"), r"shards\[1\]: lacks `size`"),
    (setting("options", []), r"options must be keys and values, got \[\]"),
    (setting("prompts", {"query": "Q"}), r"prompts\.query must be keys and values, got 'Q'"),
    (setting("prompts", {"query": {"user": 5}}), r"prompts\.query\.user must be of type str"),
    (setting("library_versions", {"torch": 2}), r"library_versions\.torch must be of type str"),
    (setting("dtype", "float64"), r"dtype 'float64': a store's is one of float16"),
    (setting("dtype", "__class__"), r"dtype '__class__'"),
    (setting("dtype", []), r"dtype must be of type str"),
    (setting("side", "both"), r"`side` is 'both'"),
    (setting("num_masks", 0), r"`num_masks` is 0; expected a whole number of at least 1"),
    (setting("num_masks", None), r"num_masks must be of type int, got None"),
    (
        setting("num_masks", 10**18),
        r"tensor 'repr_hidden' is F16 \[128, 2, 8\]; expected F16 \[128, 1000000000000000000",
    ),
    (setting("hidden_size", 16), r"tensor 'repr_hidden' is F16 \[128, 2, 8\]; expected F16 \[128, 2, 16\]"),
    (setting("sparse_top_k", 4), r"tensor 'sparse_indices' is I32 \[128, 3\]; expected I32 \[128, 4\]"),
    (setting("vocab_size", -1), r"`vocab_size` is -1"),
    (lambda content: content.pop("model"), r"lacks `model`"),
    (setting("model", ["m"]), r"model must be of type str"),
]


@pytest.mark.parametrize(("edit", "words"), MANIFESTS)
def test_a_forged_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str], edit: Edit, words: str) -> None:
    folder = make_store(tmp_path / "s")
    edit_manifest(folder, edit)
    with pytest.raises(ValueError, match=words) as raised:
        open_store(folder)
    assert str(raised.value).startswith(str(folder))
    assert said_by(capsys, "export", "--store", folder, "--output", tmp_path / "o").endswith(str(raised.value))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"format": "diffretriever store 1", "a": ' + "[" * 150 + "]" * 150 + "}", "nested too deeply, more than 100"),
        ('{"count": ' + "9" * 5000 + "}", "a number of more than 4,300 digits"),
        ("[]", "expected a JSON object"),
        ("\xff", "not UTF-8|not valid JSON"),
        ("{}", "the format is None"),
    ],
)
def test_a_manifest_that_is_no_json_of_ours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, words: str
) -> None:
    folder = make_store(tmp_path / "s")
    (folder / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=rf"manifest\.json: .*({words})"):
        open_store(folder)
    for command in (["export", "--output", tmp_path / "o"], ["compress", "--output", tmp_path / "o"],
                    ["index", "--qdrant", tmp_path / "o"]):  # fmt: skip
        assert "manifest.json: " in said_by(capsys, *command, "--store", folder)


def test_no_passages_are_an_error_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = make_store(tmp_path / "s"), tmp_path / "o"
    edit_manifest(folder, setting("shards", []))
    for command in (
        ["search", "--store", folder, "--queries", folder, "--run-file", out],
        ["search", "--store", folder, "--model", "m", "question"],
        ["index", "--store", folder, "--qdrant", out],
        ["compress", "--store", folder, "--output", out],
        ["export", "--store", folder, "--output", out],
    ):
        assert "`shards` is []; a store holds at least one text" in said_by(capsys, *command)
    assert not out.exists()


EMPTY = torch.zeros(COUNT, TERMS)
OFFSETS = torch.arange(COUNT + 1)
SHARDS: list[tuple[dict[str, torch.Tensor | None], str]] = [
    ({"repr_hidden": None}, "has no tensor 'repr_hidden'"),
    ({"more": torch.zeros(1)}, "has an unknown tensor 'more'"),
    ({"repr_scale": torch.ones(COUNT, K)}, "has an unknown tensor 'repr_scale'"),
    ({"texts_bytes": None}, "has no tensor 'texts_bytes'"),
    ({"repr_hidden": torch.zeros(COUNT, K, WIDTH)}, r"'repr_hidden' is F32 \[128, 2, 8\]; expected F16"),
    ({"repr_hidden": torch.zeros(COUNT, K * WIDTH).half()}, r"'repr_hidden' is F16 \[128, 16\]; expected F16 \[128, 2"),
    ({"repr_hidden": torch.zeros(COUNT - 1, K, WIDTH).half()}, r"'repr_hidden' is F16 \[127, 2, 8\]"),
    ({"sparse_indices": EMPTY.long()}, r"'sparse_indices' is I64 \[128, 3\]; expected I32"),
    ({"sparse_values": EMPTY[:, :2].half()}, r"'sparse_values' is F16 \[128, 2\]; expected F16 \[128, 3\]"),
    ({"ids_offsets": OFFSETS[:-1]}, r"'ids_offsets' is I64 \[128\]; expected I64 \[129\]"),
    ({"ids_bytes": torch.zeros(9, 9, dtype=torch.uint8)}, r"'ids_bytes' is U8 \[9, 9\]; expected U8 \[any\]"),
    ({"ids_offsets": OFFSETS * 10**6}, r"`ids` is damaged \(offsets that do not rise from 0 to"),
    ({"ids_offsets": OFFSETS.flip(0)}, r"`ids` is damaged \(offsets"),
    ({"ids_offsets": OFFSETS - 2}, r"`ids` is damaged \(offsets"),
    ({"ids_bytes": torch.full((COUNT,), 255).byte(), "ids_offsets": OFFSETS}, r"`ids` is damaged \('utf-8' codec"),
    ({"texts_offsets": OFFSETS * 10**6}, r"`texts` is damaged \(offsets"),
    ({"sparse_indices": EMPTY.int() + VOCABULARY}, r"`sparse_indices` of 'p0' holds 50; expected numbers from 0 to 49"),
    ({"sparse_indices": EMPTY.int() - 1}, r"`sparse_indices` of 'p0' holds -1"),
    ({"sparse_values": EMPTY.half() + torch.nan}, r"`sparse_values` of 'p0' holds nan; expected numbers from 0"),
    ({"sparse_values": EMPTY.half() + torch.inf}, r"`sparse_values` of 'p0' holds inf"),
    ({"sparse_values": EMPTY.half() - 1}, r"`sparse_values` of 'p0' holds -1.0"),
]  # fmt: skip


def read_all(folder: Path) -> list[object]:
    return [(shard.ids, shard.text(COUNT - 1), shard.sparse) for shard in open_store(folder).shards()]


@pytest.mark.parametrize(("tensors", "words"), SHARDS)
def test_a_forged_shard(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tensors: dict[str, torch.Tensor | None], words: str
) -> None:
    folder = make_store(tmp_path / "s")
    edit_shard(folder, tensors)
    with pytest.raises(ValueError, match=words) as raised:
        read_all(folder)
    assert str(folder / SHARD) in str(raised.value)
    assert SHARD in said_by(capsys, "export", "--store", folder, "--output", tmp_path / "o")


def test_vectors_that_are_not_finite_are_found_when_they_are_compared(tmp_path: Path) -> None:
    folder = make_store(tmp_path / "s")
    edit_shard(folder, {"repr_hidden": torch.full((COUNT, K, WIDTH), torch.nan).half()})
    with pytest.raises(ValueError, match=r"the score of the passage at position 0 is NaN"):
        Searcher(open_store(folder)).search({"repr_hidden": torch.ones(1, 1, WIDTH)}, "multi_dense")


HEADERS: list[tuple[str, Any]] = [
    ("shape", [-COUNT, -K, WIDTH]),
    ("shape", [float(COUNT), K, WIDTH]),
    ("shape", ["128", K, WIDTH]),
    ("shape", [[COUNT], K, WIDTH]),
    ("shape", {"a": 1}),
    ("shape", [1] * 100_000),
    ("dtype", {}),
    ("dtype", "F64"),
    ("data_offsets", [0.0, 4096.0]),
    ("data_offsets", [0]),
    ("data_offsets", [-5, 4091]),
    ("data_offsets", None),
]


@pytest.mark.parametrize(("field", "value"), HEADERS)
def test_a_forged_header(tmp_path: Path, field: str, value: Any) -> None:
    folder = make_store(tmp_path / "s")
    content = (folder / SHARD).read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:length])
    header["repr_hidden"][field] = value
    packed = json.dumps(header).encode()
    (folder / SHARD).write_bytes(len(packed).to_bytes(8, "little") + packed + content[length:])
    name_anew(folder)
    with pytest.raises(ValueError, match=r"shard-000000\.safetensors: (the shard's header is damaged|tensor )"):
        open_store(folder)


@pytest.mark.parametrize("length", [1, 4, 8])
def test_tensors_that_begin_between_their_numbers(tmp_path: Path, length: int) -> None:
    """A header of another length moves all tensors: a number of 8 bytes is read at a multiple of 8."""
    folder = make_store(tmp_path / "s")
    content = (folder / SHARD).read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    packed = content[8:end] + b" " * length
    (folder / SHARD).write_bytes(len(packed).to_bytes(8, "little") + packed + content[end:])
    name_anew(folder)
    if length % 8:
        with pytest.raises(DamagedShardError, match="does not begin at a multiple of 8 bytes"):
            open_store(folder)
    else:
        assert len(read_all(folder)) == 2


@pytest.mark.parametrize("length", [0, 5, 8, 100, 2000, -1])
def test_a_truncated_shard(tmp_path: Path, capsys: pytest.CaptureFixture[str], length: int) -> None:
    folder = make_store(tmp_path / "s")
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:length])
    assert f"{SHARD}: " in said_by(capsys, "export", "--store", folder, "--output", tmp_path / "o")


@pytest.mark.parametrize("metadata", [{"first": "9" * 5000}, {"count": "x"}, {"sha256": None}, {"first": ["0"]}])
def test_a_header_that_says_other_things_than_strings_and_numbers(tmp_path: Path, metadata: dict[str, Any]) -> None:
    folder = make_store(tmp_path / "s")
    (folder / "manifest.json").unlink()
    file = folder / SHARD
    content = file.read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:length])
    header["__metadata__"] |= metadata
    packed = json.dumps(header).encode()
    file.write_bytes(len(packed).to_bytes(8, "little") + packed + content[length:])
    with pytest.raises(DamagedShardError, match="header is damaged"):
        entry_of(ShardFile(file))


def test_a_vocabulary_larger_than_its_numbers(tmp_path: Path) -> None:
    folder = make_store(tmp_path / "s")
    edit_manifest(folder, setting("vocab_size", 10**30))
    assert len(read_all(folder)) == 2


def test_links_out_of_the_folder_are_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_store(tmp_path / "s")
    (folder / SHARD).rename(tmp_path / "elsewhere")
    (folder / SHARD).symlink_to("../elsewhere")
    said = said_by(capsys, "export", "--store", folder, "--output", tmp_path / "o")
    assert f"{SHARD}: leads out of its folder, to {tmp_path / 'elsewhere'}" in said


def test_a_store_behind_a_link_and_in_the_hubs_cache_is_read(tmp_path: Path) -> None:
    folder = make_store(tmp_path / "s")
    (tmp_path / "link").symlink_to("s")
    assert len(open_store(tmp_path / "link")) == 2 * COUNT
    snapshot = tmp_path / "datasets--lab--store" / "snapshots" / "abc"
    (snapshot.parent.parent / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(snapshot.parent.parent / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert len(open_store(snapshot)) == 2 * COUNT


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    folder = make_store(tmp_path / "s")
    (folder / SHARD).unlink()
    os.mkfifo(folder / SHARD)
    with pytest.raises(ValueError, match="the shard is no file"):
        open_store(folder)


PLANS: list[tuple[Edit, str]] = [
    (setting("shard_size", 0), r"`shard_size` is 0; expected a whole number of at least 1"),
    (setting("shard_size", "4"), r"shard_size must be of type int"),
    (setting("survey", {"count": 9, "digests": ["a"]}), r"9 texts, 4 a shard, do not make 1 shards"),
    (setting("survey", {"count": 0, "digests": ["a"]}), r"survey: `count` is 0"),
    (setting("survey", {"count": 4, "digests": "a"}), r"survey: digests must be a list"),
    (setting("survey", 5), r"survey: expected keys and values"),
    (lambda content: content.pop("settings"), r"lacks `settings`"),
]


@pytest.mark.parametrize(("edit", "words"), PLANS)
def test_a_forged_plan(tmp_path: Path, edit: Edit, words: str) -> None:
    folder = make_store(tmp_path / "s")
    content = json.loads((folder / "manifest.json").read_text())
    content.pop("shards")
    settings = {name: value for name, value in content.items() if name not in ("format", "sha256")}
    plan = {"format": content["format"], "settings": settings, "shard_size": 4, "sha256": ""}
    plan |= {"survey": {"count": 4, "digests": ["a"]}}
    (folder / "manifest.json").unlink()
    seal(folder / "plan.json", plan)
    with pytest.raises(ValueError, match="the store is not finished, 1 of 1 shards are there"):
        open_store(folder)
    edit(plan)
    seal(folder / "plan.json", plan)
    with pytest.raises(ValueError, match=rf"plan\.json: {words}"):
        open_store(folder)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("forged")
    compress(open_store(make_store(folder / "s")), folder / "small")
    return folder / "small"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        *MANIFESTS[:5],
        (setting("codebook", 5), "codebook: expected keys and values"),
        (lambda content: content.pop("codebook"), "codebook: expected keys and values, got NoneType"),
        (lambda content: content["codebook"].update(file="../codebook.safetensors"), r"codebook: `file` is '\.\./"),
        (setting("hidden_size", 16), "the codebook has 2 pieces of 4 dimensions; vectors of 16 dimensions are not"),
        (setting("num_masks", 3), r"tensor 'codes' is U8 \[128, 2, 2\]; expected U8 \[128, 3, 2\]"),
        (setting("sparse_top_k", 4), r"tensor 'sparse_indices' is"),
    ],
)
def test_a_forged_compressed_store(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], edit: Edit, words: str
) -> None:
    folder = tmp_path / "s"
    folder.mkdir()
    for file in small.iterdir():
        os.link(file, folder / file.name)
    content = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").unlink()
    edit(content)
    seal(folder / "manifest.json", content)
    with pytest.raises(ValueError, match=words):
        open_store(folder)
    assert str(folder) in said_by(capsys, "export", "--store", folder, "--output", tmp_path / "o")
