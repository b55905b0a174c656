"""Loading and saving through sentence-transformers: folders, Hub branches, options, processes, and what it refuses."""

from __future__ import annotations

import importlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fresh
import numpy as np
import pytest
import sentence_transformers
import torch
from checkpoint_folders import hub_repository, run_python
from pretend_cpu import UNITS, pretend_cpu
from sentence_transformers_folders import CHECKPOINTS, CLASSES, RELEASES, TEXTS, Folders, add_files, load, make_folder
from transformers import AutoModel

from diffretriever.publishing import build as building
from diffretriever.publishing import card, probe

NEWEST = int(sentence_transformers.__version__.split(".")[0]) >= 6


def numbers(vectors: Any) -> torch.Tensor:
    """Return any kind of vectors as one dense tensor."""
    if isinstance(vectors, torch.Tensor):
        return vectors.to_dense()
    return torch.stack([torch.as_tensor(text) for text in vectors])


def close(a: Any, b: Any, atol: float = 3e-6) -> None:
    torch.testing.assert_close(numbers(a), numbers(b), atol=atol, rtol=1e-5)


# ---------------------------------------------------------------------------------------------- the Hub, offline


@pytest.fixture
def cache(folders: Folders, tmp_path: Path) -> Path:
    """A Hub cache with a release: its root is dense, its branches are sparse and multi-vector."""
    release = make_folder("multi", "dense", tmp_path / "release")
    cache = tmp_path / "home" / "hub"
    for kind, ref in (("dense", "main"), ("sparse", "sparse"), ("multi-vector", "multi-vector")):
        add_files(kind, release)
        hub_repository(cache, "lab/st-release", release, refs=(ref,))
    return cache


def test_branches_on_the_hub(folders: Folders, kind: str, cache: Path) -> None:
    revision = None if kind == "dense" else kind
    model = load(kind, "lab/st-release", revision=revision, cache_folder=str(cache))
    expected = folders.model("multi", kind)
    close(model.encode_query(TEXTS), expected.encode_query(TEXTS))
    close(model.encode_document(TEXTS), expected.encode_document(TEXTS))
    assert model.similarity_fn_name == expected.similarity_fn_name


FRESH = """
import json, sys, torch, sentence_transformers
kept, kinds, texts = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3:]
vectors = {}
for kind, (name, revision) in kinds.items():
    load = getattr(sentence_transformers, name)
    options = {"device": "cpu", "model_kwargs": {"torch_dtype": torch.float32}}
    model = load("lab/st-release", revision=revision, trust_remote_code=True, **options)
    vectors[kind] = model.encode_query(texts) if kind == "sparse" else list(model.encode_query(texts))
torch.save(vectors, kept)
"""


@pytest.mark.slow
def test_branches_in_a_fresh_process(folders: Folders, cache: Path, tmp_path: Path) -> None:
    """As a user does it: HF_HOME set, nothing loaded before, all classes in one process."""
    kinds = {kind: name for kind, name in CLASSES.items() if hasattr(sentence_transformers, name)}
    wanted = {kind: (name, None if kind == "dense" else kind) for kind, name in kinds.items()}
    run_python(FRESH, tmp_path / "kept.pt", json.dumps(wanted), *TEXTS, HF_HOME=tmp_path / "home")
    for kind, vectors in torch.load(tmp_path / "kept.pt", weights_only=False).items():
        close(vectors, folders.model("multi", kind).encode_query(TEXTS))


# ---------------------------------------------------------------------------------------------- the cards


@pytest.mark.parametrize("name", ["diffretriever-llada-tiny-single", "diffretriever-dream-tiny-multi-q4-p16"])
def test_the_cards_code_as_pasted(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a folder that knows nothing of the release, and each print says something: the right passage is first."""
    monkeypatch.chdir(tmp_path)
    blocks = card.code_blocks((CHECKPOINTS / name / "README.md").read_text(encoding="utf-8"))
    answers = list(probe.run_blocks([source for _, source in blocks], [line for line, _ in blocks]))
    assert len(answers) == 4
    told = [answer for answer in answers if answer["missing"] is None]
    assert len(told) == 4 or (not NEWEST and [answer["missing"] for answer in answers].count(None) == 3)
    for answer in told:
        rows = [list(map(float, row.split(","))) for row in re.findall(r"\[([\d., ]+)\]", answer["printed"])]
        assert len(rows) == 2, answer["printed"]
        assert rows[1][1] == max(rows[1]) > 0, "compress files"
        sparse = "SparseEncoder" in dict(blocks)[answer["name"]]
        assert rows[0] == [0, 0, 0] if sparse else rows[0][0] == max(rows[0]) > 0, "audio player"


# ---------------------------------------------------------------------------------------------- AutoModel apart


def test_automodel_never_imports_it(tmp_path: Path) -> None:
    folder = make_folder("single", "dense", tmp_path / f"broken-module-{os.getpid()}")
    (folder / "st_diffretriever.py").write_text("raise RuntimeError('imported')\n")
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert model.encode_texts(TEXTS, True).repr_hidden.shape == (len(TEXTS), 1, 192)
    with pytest.raises(RuntimeError, match="imported"):
        load("dense", folder)


# ---------------------------------------------------------------------------------------------- save and reload


def test_saved_and_reloaded(folders: Folders, kind: str, tmp_path: Path) -> None:
    """Merged weights and all the code: it loads without backbone and adapter, here and through AutoModel."""
    model = folders.model("multi", kind)
    saved = tmp_path / f"saved-{kind}-{os.getpid()}"
    model.save_pretrained(str(saved))
    again = load(kind, saved)
    assert json.loads((saved / "config.json").read_text()).get("base_model_name_or_path") is None
    assert (again.prompts, again.similarity_fn_name) == (model.prompts, model.similarity_fn_name)
    close(again.encode_query(TEXTS), model.encode_query(TEXTS), atol=2e-5)
    close(again.encode_document(TEXTS), model.encode_document(TEXTS), atol=2e-5)
    plain = AutoModel.from_pretrained(saved, trust_remote_code=True, torch_dtype=torch.float32)
    expected = folders.plain("multi").encode_texts(TEXTS, True)
    torch.testing.assert_close(plain.encode_texts(TEXTS, True).repr_hidden, expected.repr_hidden, atol=2e-5, rtol=0)


def test_saved_twice(folders: Folders, tmp_path: Path) -> None:
    once, twice = tmp_path / f"once-{os.getpid()}", tmp_path / f"twice-{os.getpid()}"
    folders.model("single", "dense").save_pretrained(str(once))
    load("dense", once).save_pretrained(str(twice))
    close(load("dense", twice).encode_query(TEXTS), folders.model("single", "dense").encode_query(TEXTS))


# ---------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(("units", "expected"), [([], torch.float32), (UNITS, torch.bfloat16)])
def test_default_dtype(
    folders: Folders, units: Sequence[str], expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AutoModel's own: what suits the CPU."""
    pretend_cpu(monkeypatch, *units)
    folder = str(folders.folder("single", "dense"))
    model = sentence_transformers.SentenceTransformer(folder, trust_remote_code=True, device="cpu")
    assert {weight.dtype for weight in model.parameters()} == {expected}


def test_bfloat16(folders: Folders, kind: str) -> None:
    """One by one, the vectors are AutoModel's to the bit; what shares a batch may change bfloat16's rounding."""
    model = folders.load("single", kind, model_kwargs={"torch_dtype": torch.bfloat16})
    assert model[0].model.dtype == torch.bfloat16
    release = CHECKPOINTS / RELEASES["single"]
    plain = AutoModel.from_pretrained(release, trust_remote_code=True, torch_dtype=torch.bfloat16)
    expected = plain.encode_texts(TEXTS, True, batch_size=1)
    found = numbers(model.encode_query(TEXTS, batch_size=1))
    assert found.dtype == torch.float32
    if kind == "sparse":
        expected_weights = torch.zeros_like(found).scatter_add_(1, expected.sparse_indices, expected.sparse_values)
        assert torch.equal(found, expected_weights)
    else:
        torch.testing.assert_close(found.view_as(expected.repr_hidden), expected.repr_hidden, atol=1e-6, rtol=0)


def test_attention_and_config_fields(folders: Folders) -> None:
    model = folders.load(
        "multi", "dense", model_kwargs={"attn_implementation": "eager"}, config_kwargs={"max_length": 100}
    )
    assert model[0].model.config._attn_implementation == "eager"
    assert model.max_seq_length == 100
    close(model.encode_query(TEXTS[:3]), folders.model("multi", "dense").encode_query(TEXTS[:3]))


def test_moved_between_devices(folders: Folders) -> None:
    model = folders.load("single", "dense")
    expected = model.encode_query(TEXTS)
    assert model.to("cpu").device.type == "cpu"
    assert np.array_equal(model.encode_query(TEXTS, device="cpu"), expected)


@pytest.mark.skipif(not NEWEST, reason="sentence-transformers 5 moves the model itself")
def test_device_map(folders: Folders) -> None:
    model = folders.load("single", "dense", device=None, model_kwargs={"device_map": "cpu"})
    close(model.encode_query(TEXTS), folders.model("single", "dense").encode_query(TEXTS))


def test_dream_backbone(build_release: Any, load_release: Any) -> None:
    """The other backbone, K_q = K_p = 4, in a folder as publish.py builds it."""
    model = load("dense", build_release("tiny-dream", "dream-q4p4"))
    plain = load_release("tiny-dream", "dream-q4p4")
    found = model.similarity(model.encode_query(TEXTS), model.encode_document(TEXTS))
    expected = plain.score(plain.encode_texts(TEXTS, True), plain.encode_texts(TEXTS, False), "single_dense")
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------------------------- several processes


@pytest.mark.slow
@pytest.mark.once
def test_pool_of_processes(folders: Folders, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers get the module by name from transformers' cache of remote code."""
    monkeypatch.setattr("torch.multiprocessing.get_context", lambda _: fresh.CONTEXT)  # not "spawn", which takes longer
    model = folders.load("multi", kind)
    texts = TEXTS * 3
    expected = model.encode_query(texts), model.encode_document(texts)
    pool = model.start_multi_process_pool(["cpu", "cpu"] if kind == "dense" else ["cpu"])  # each imports for seconds
    try:
        close(model.encode_query(texts, pool=pool, chunk_size=4), expected[0])
        close(model.encode_document(texts, pool=pool), expected[1])
    finally:
        model.stop_multi_process_pool(pool)


# ---------------------------------------------------------------------------------------------- refused


def test_sparse_encoder_of_the_dense_root(folders: Folders) -> None:
    """sentence-transformers would put a random autoencoder behind it."""
    with pytest.raises(ValueError, match=r"are not for SparseEncoder; .* with SparseEncoder\(\".*/sparse\", trust"):
        load("sparse", folders.folder("single", "dense"))


def test_a_folder_has_no_revisions(folders: Folders, kind: str) -> None:
    """Said is what does load: the folder inside."""
    release = CHECKPOINTS / RELEASES["multi"]
    if kind != "dense":
        words = rf"with {CLASSES[kind]}\(\"{release}/{kind}\", trust_remote_code=True\)"
        with pytest.raises(ValueError, match=words):
            load(kind, release, revision=kind)
    model = load(kind, release if kind == "dense" else release / kind)
    close(model.encode_query(TEXTS), folders.model("multi", kind).encode_query(TEXTS))


@pytest.mark.parametrize("other", ["sparse", "multi-vector"])
def test_other_files_never_give_dense_vectors(folders: Folders, other: str) -> None:
    """sentence-transformers makes a model of its own of them; it must not encode."""
    with pytest.raises((ValueError, TypeError)):
        load("dense", folders.folder("single", other)).encode(TEXTS)


def test_without_trust(folders: Folders) -> None:
    """sentence-transformers 6 asks; 5 runs a local folder's module, whose model is the installed code's."""
    folder = folders.folder("single", "dense")
    if NEWEST:
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            load("dense", folder, trust_remote_code=False)
    else:
        model = load("dense", folder, trust_remote_code=False)
        assert type(model[0].model).__module__ == "diffretriever.model.modeling_diffretriever"


def test_backend(folders: Folders) -> None:
    with pytest.raises(ValueError, match="runs on backend=\"torch\" only, got backend='onnx'"):
        load("dense", folders.folder("single", "dense"), backend="onnx")


@pytest.mark.filterwarnings("ignore:.*processor_kwargs")
def test_tokenizer_options(folders: Folders) -> None:
    name = "processor_kwargs" if NEWEST else "tokenizer_kwargs"
    words = "so model_max_length, padding_side cannot be set for the tokenizer; set max_seq_length"
    options = {name: {"padding_side": "right", "model_max_length": 9}}
    with pytest.raises(ValueError, match=words):
        load("dense", folders.folder("single", "dense"), **options)


def test_unknown_config_field(folders: Folders) -> None:
    with pytest.raises(ValueError, match="`num_query_masks` must be a whole number of at least 1, got 0"):
        folders.load("single", "dense", config_kwargs={"num_query_masks": 0})


def test_settings_missing_or_wrong(tmp_path: Path) -> None:
    folder = make_folder("single", "dense", tmp_path / f"settings-{os.getpid()}")
    (folder / "st_diffretriever.json").write_text('{"kind": "colbert"}')
    words = r'st_diffretriever\.json: `kind` must be one of "dense", "sparse", "multi-vector", got \'colbert\''
    with pytest.raises(ValueError, match=words):
        load("dense", folder)
    (folder / "st_diffretriever.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no st_diffretriever\.json.*publish\.py"):
        load("dense", folder)


def test_module_not_at_the_top(tmp_path: Path) -> None:
    folder = make_folder("single", "dense", tmp_path / f"deeper-{os.getpid()}")
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["path"] = "0_DiffRetriever"
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match=r"modules\.json: `path` of DiffRetrieverModule must be empty"):
        load("dense", folder)


# ---------------------------------------------------------------------------------------------- the files


def test_files_agree_with_the_module() -> None:
    module = importlib.import_module("st_diffretriever")
    files = importlib.import_module("diffretriever.publishing.sentence_transformers")
    assert files.CLASSES == module.CLASSES
    assert set(files.PROMPTS.values()) == set(module.ROLE_TAGS)
    assert set(files.PROMPTS) == set(module.TASKS)
    name, class_name = files.MODULE.split(".")
    assert getattr(module, class_name).config_file_name in files.sentence_transformers_files(
        "dense", {"model_type": "diffretriever"}
    )
    assert name == module.__name__


def test_files_of_each_kind() -> None:
    files = importlib.import_module("diffretriever.publishing.sentence_transformers")
    config = building.default_config().to_dict()
    made = {kind: files.sentence_transformers_files(kind, config) for kind in files.KINDS}
    assert {frozenset(texts) for texts in made.values()} == {
        frozenset({"modules.json", "config_sentence_transformers.json", "st_diffretriever.json"})
    }
    for kind, texts in made.items():
        assert json.loads(texts["st_diffretriever.json"]) == {"kind": kind}
        assert json.loads(texts["config_sentence_transformers.json"])["model_type"] == CLASSES[kind]
        assert all(text.endswith("}\n") or text.endswith("]\n") for text in texts.values())
    with pytest.raises(ValueError, match="kind 'colbert' is not known; sentence-transformers has dense, sparse, multi"):
        files.sentence_transformers_files("colbert", config)
    with pytest.raises(ValueError, match=r"`model_type` must be \"diffretriever\", got 'llada'; this is no release"):
        files.sentence_transformers_files("dense", {"model_type": "llada"})
