"""`publish.py check`: what it finds in a release folder, and what it says."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_folders import PARITY, ROOT, edit_json, edit_weights

import publish
from diffretriever.publishing import build as building
from diffretriever.publishing import check, fingerprint, probe, releases

SOUND: dict[str, Any] = {
    "format": 1,
    "files": {},
    "libraries": {},
    "release": "r",
    "repo_id": "o/r",
    "backbone": {"name": "b"},
}
TEXT = {"side": "query", "text": "a", "token_ids": [1], "dense_shape": [1, 1], "dense_float16": "AAA=", "sparse": []}
LLADA, SINGLE = str(PARITY / "backbones" / "tiny-llada"), str(PARITY / "adapters" / "llada-single")


def record_again(folder: Path) -> None:
    """Write the files' present hashes into release.json, as if they had been built so."""
    file = folder / "release.json"
    recorded = json.loads(file.read_text())
    for name in recorded["files"]:
        recorded["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    file.write_text(json.dumps(recorded))


def problems(folder: Path) -> str:
    return "\n".join(check.check_release(folder).problems)


# --------------------------------------------------------------------------------------------------- the files


@pytest.mark.usefixtures("quick_check")
def test_a_release_as_it_was_built(release: Path) -> None:
    report = check.check_release(release)
    assert report.problems == report.unchecked == []
    count = sum(file.is_file() for file in release.rglob("*")) - 1  # but for release.json itself
    assert f"{count} files are as they were built" in report.passed


@pytest.mark.usefixtures("quick_check")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: edit_json(f / "config.json", max_length=99), "config.json was changed since it was built"),
        (lambda f: (f / "scoring.py").write_text(""), "scoring.py was changed since it was built"),
        (lambda f: (f / "scoring.py").unlink(), "scoring.py is missing; build the release again"),
        (lambda f: (f / "README.md").unlink(), "README.md is missing; build the release again"),
        (lambda f: (f / "notes.txt").write_text(""), "notes.txt was added since it was built; remove it, or build"),
        (lambda f: (f / "adapter" / "x.bin").write_text(""), "adapter/x.bin was added since it was built"),
        (
            lambda f: edit_weights(
                f / "backbone" / "model.safetensors", lambda t: t["model.transformer.ln_f.weight"].add_(1)
            ),
            "backbone/model.safetensors was changed since it was built",
        ),
    ],
)
def test_a_changed_folder(change: Callable[[Path], Any], words: str, release: Path) -> None:
    change(release)
    assert words in problems(release)


@pytest.mark.usefixtures("quick_check")
def test_what_is_no_change(release: Path) -> None:
    (release / "__pycache__").mkdir()
    (release / "__pycache__" / "scoring.cpython-311.pyc").write_bytes(b"")
    (release / ".gitattributes").write_text("what the Hub adds")
    assert check.check_release(release).problems == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "holds no release.json, so it is no release of publish.py, or an old one; build it again"),
        ("{", r"release.json: not valid JSON"),
        ("[]", "release.json: expected a JSON object, got list"),
        ("{}", "release.json has format None, this publish.py reads format 1; build it again"),
        ('{"format": 7}', "release.json has format 7"),
        (json.dumps(SOUND | {"fingerprint": {}}), "release.json: fingerprint: lacks `dtype`; build the release again."),
        (json.dumps(SOUND), "release.json: lacks `fingerprint`; build the release again."),
        *(
            (
                json.dumps(SOUND | {"fingerprint": {"dtype": "float32", "texts": texts}}),
                f"release.json: fingerprint: {words}",
            )
            for texts, words in (
                (5, "texts must be a list with at least one entry, got 5"),
                ([{}], "texts[0]: lacks `side`"),
                ([TEXT | {"sparse": [3]}], "texts[0]: `sparse` must be a list of [token id, weight]"),
                ([TEXT | {"dense_shape": [2, 2]}], "texts[0]: `dense_float16` must be base64 of as many numbers as"),
            )
        ),
        (
            '{"format": 1, "files": 5, "backbone": {"name": "b"}, "fingerprint": null, "libraries": {}, '
            '"release": "r", "repo_id": "o/r"}',
            "release.json: files must be keys and values, got 5",
        ),
    ],
)
def test_a_broken_record(content: str | None, words: str, release: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (release / "release.json").unlink()
    if content is not None:
        (release / "release.json").write_text(content)
    assert publish.main(["check", str(release)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("publish.py: ")
    assert words in said


def test_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert publish.main(["check", str(tmp_path / "nothing")]) == 2
    assert "nothing is not there; give a release's name or the folder of a built release" in capsys.readouterr().err


@pytest.mark.usefixtures("quick_check")
def test_a_local_backbone_that_changed(tmp_path: Path) -> None:
    shutil.copytree(LLADA, tmp_path / "backbone-copy")
    building.build(str(tmp_path / "backbone-copy"), tmp_path / "beside", SINGLE, recording=building.Recording("auto"))
    assert check.check_release(tmp_path / "beside").problems == []
    weights = tmp_path / "backbone-copy" / "model.safetensors"
    edit_weights(weights, lambda tensors: tensors["model.transformer.ln_f.weight"].add_(1))
    assert "backbone-copy are not those it was built on; build the release again" in problems(tmp_path / "beside")
    shutil.rmtree(tmp_path / "backbone-copy")
    assert "is not there; put it back, or build the release again" in problems(tmp_path / "beside")


@pytest.mark.usefixtures("quick_check")
def test_linked_code_may_change_but_is_not_pushed(tmp_path: Path) -> None:
    out = tmp_path / "linked"
    building.build(LLADA, out, SINGLE, link_code=True, recording=building.Recording("auto"))
    made = json.loads((out / "release.json").read_text())
    assert made["code_sha256"] is None
    assert not any(name.endswith(".py") for name in made["files"])
    report = check.check_release(out)
    assert report.problems == []
    said = report.kept_here
    assert said[0] == "its code is linked to a source tree; build it without --link-code"
    assert "is a folder of this machine; build it with --with-backbone" in said[1]
    assert "right here, but push would refuse it" in report.in_words("linked").splitlines()[0]
    assert report.in_words("linked").splitlines()[-1] == f"  NOT TO BE PUSHED: {said[1]}"
    assert report.refusals(allow_unchecked=True) == said


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (
            {"transformers": ">=4.0,<4.1"},
            r"transformers \S+ is installed, but releases need >=4\.0,<4\.1: pip",
        ),
        ({"no-such-library": ">=1"}, r'no-such-library is not installed: pip install "no-such-library>=1"'),
    ],
)
def test_a_wrong_library_version(
    wanted: dict[str, str], words: str, release: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(releases, "LIBRARIES", wanted)
    with pytest.raises(ImportError, match=words):
        check.check_release(release)


def test_the_ranges_are_those_of_the_package() -> None:
    stated = (ROOT / "pyproject.toml").read_text()
    for name, wanted in releases.LIBRARIES.items():
        assert f'"{name}{wanted}"' in stated


# --------------------------------------------------------------------------------------------- without the model


def test_without_a_fingerprint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As on a machine that has no weights: the settings of a backbone are enough to build."""
    base = tmp_path / "weightless"
    shutil.copytree(LLADA, base, ignore=shutil.ignore_patterns("*.safetensors"))
    out = tmp_path / "release"
    assert publish.main(["build", "--base", str(base), "--adapter", SINGLE, "--output", str(out)]) == 0
    assert "no vectors recorded: the weights of ../weightless were not on the machine" in capsys.readouterr().out
    made = json.loads((out / "release.json").read_text())
    assert made["fingerprint"] is None
    assert made["backbone"] == {"name": "../weightless", "revision": None, "weights_sha256": None}
    assert publish.main(["check", str(out)]) == 0
    said = capsys.readouterr().out
    assert "right, as far as it was checked" in said
    assert "NOT CHECKED: whether it loads and its vectors are right: release.json has no fingerprint" in said
    assert publish.main(["build", "--base", LLADA, "--output", str(tmp_path / "never"), "--fingerprint", "never"]) == 0
    assert "no vectors recorded: not asked for (--fingerprint never)" in capsys.readouterr().out


def test_no_load(release: Path) -> None:
    report = check.check_release(release, load=False)
    assert report.unchecked == ["whether it loads and its vectors are right: left out with --no-load"]


def test_a_broken_backbone_is_found_at_the_build(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(LLADA, tmp_path / "base")
    edit_weights(
        tmp_path / "base" / "model.safetensors",
        lambda tensors: tensors["model.transformer.ln_f.weight"].fill_(float("nan")),
    )
    assert publish.main(["build", "--base", str(tmp_path / "base"), "--output", str(tmp_path / "release")]) == 2
    assert "model.transformer.ln_f.weight hold NaN or infinite values" in capsys.readouterr().err
    assert not (tmp_path / "release").exists()


# ------------------------------------------------------------------------------------------------ the fingerprint


def test_two_builds_record_the_same(built: Path, tmp_path: Path) -> None:
    again = tmp_path / built.name
    building.build(LLADA, again, SINGLE, with_backbone=True, recording=building.Recording("always"))
    assert (again / "release.json").read_bytes() == (built / "release.json").read_bytes()


def test_what_a_fingerprint_holds(built: Path, load_release: Callable[..., Any]) -> None:
    recorded = json.loads((built / "release.json").read_text())["fingerprint"]
    model = load_release("tiny-llada", "llada-single")
    assert [entry["side"] for entry in recorded["texts"]] == ["query", "query", "passage", "passage"]
    for entry in recorded["texts"]:
        is_query = entry["side"] == "query"
        out = model.encode_texts([entry["text"]], is_query)
        dense = torch.from_numpy(fingerprint.dense_vectors(entry))
        assert torch.allclose(dense, out["repr_hidden"][0], atol=1e-3)
        assert entry["token_ids"] == model.tokenize([entry["text"]], is_query)[0][0].tolist()
        weights = zip(out["sparse_indices"][0].tolist(), out["sparse_values"][0].tolist(), strict=True)
        expected = {token: round(value, 4) for token, value in weights if value > 0}
        assert dict(entry["sparse"]) == pytest.approx(dict(list(expected.items())[: probe.SPARSE_TERMS]), abs=2e-4)


def entry(**changes: Any) -> dict[str, Any]:
    import base64

    import numpy

    dense = numpy.array(changes.pop("dense", [[1.0, 0.0]]), dtype="<f2")
    fields = {"side": "query", "text": "a", "token_ids": [1], "dense_shape": list(dense.shape), "sparse": [[3, 1.0]]}
    return {**fields, "dense_float16": base64.b64encode(dense.tobytes()).decode(), **changes}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, None),
        ({"dense": [[1.0, 0.001]]}, None),
        ({"sparse": [[3, 1.01]]}, None),
        ({"dense": [[1.0, 0.1]]}, "query 0 ('a'): a dense vector has cosine 0.995"),
        ({"dense": [[float("nan"), 0.1]]}, "a dense vector has cosine nan"),
        ({"dense": [[1.0, 0.0], [1.0, 0.0]]}, "dense vectors [K, H] were [1, 2], are [2, 2]"),
        ({"sparse": [[3, 1.2]]}, "the sparse weight of token 3 is off by 0.200; at most 0.02 allowed"),
        ({"sparse": []}, "the sparse weight of token 3 is off by 1.000"),
        ({"sparse": [[3, 1.0], [4, 0.5]]}, "the sparse weight of token 4 is off by 0.500"),
        ({"token_ids": [1, 2]}, "the tokenizer or the prompt gives other token ids than at build time"),
        ({"text": "b"}, "the recorded fingerprint is of other texts"),
    ],
)
def test_what_differs(change: dict[str, Any], words: str | None) -> None:
    recorded, now = {"dtype": "float32", "texts": [entry()]}, {"dtype": "float32", "texts": [entry(**change)]}
    found = fingerprint.compare(recorded, now)
    assert (found == []) if words is None else (len(found) == 1 and words in found[0])


def test_terms_below_the_cut_do_not_count() -> None:
    terms = [[token, 2.0 - token / 100] for token in range(probe.SPARSE_TERMS)]
    recorded = {"dtype": "float32", "texts": [entry(sparse=terms)]}
    more = [*terms, [900, terms[-1][1]], [901, 0.1]]
    assert fingerprint.compare(recorded, {"dtype": "float32", "texts": [entry(sparse=more)]}) == []
    above = [*terms, [900, terms[-1][1] + 0.1]]
    found = fingerprint.compare(recorded, {"dtype": "float32", "texts": [entry(sparse=above)]})
    assert "token 900 is off by 0.100" in found[0]


# -------------------------------------------------------------------------------------------- the fresh process


@pytest.mark.slow
@pytest.mark.usefixtures("forked_check")
def test_wrong_weights_with_right_hashes(release: Path) -> None:
    """The vectors are compared, not only the hashes: an adapter that lost its head's part has other sparse weights."""

    def lose_the_head(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "transformer.ff_out" in name]:
            tensors[name].zero_()

    edit_weights(release / "adapter" / "adapter_model.safetensors", lose_the_head)
    record_again(release)
    edit_json(release / "release.json", libraries={"torch": "1.0", "transformers": "4.1"})
    said = problems(release)
    assert "the sparse weight of token" in said
    assert "a dense vector has cosine" not in said
    assert "versions differ from those of the build, which may be the cause: torch 1.0, now" in said


@pytest.mark.slow
@pytest.mark.usefixtures("forked_check")
def test_code_that_does_not_load(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes wrong is told; the code of a release sees none of this machine's secrets."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "QDRANT_API_KEY"):
        monkeypatch.setenv(name, f"secret-{name}")
    monkeypatch.setenv("HARMLESS", "seen")
    code = "\nimport os\nraise ImportError('it saw ' + os.environ['HARMLESS'] + str([*os.environ.values()]))\n"
    (release / "scoring.py").write_text((release / "scoring.py").read_text() + code)
    record_again(release)
    said = problems(release)
    assert "it does not load in a fresh process: " in said
    assert "it saw seen" in said
    assert "secret-" not in said


def test_a_card_that_loads_nothing(release: Path) -> None:
    text = (release / "README.md").read_text().replace(f'"{release.name}"', '"another/release"')
    (release / "README.md").write_text(text)
    record_again(release)
    assert "this Python block is not what a build writes; nothing of the card was run" in problems(release)


@pytest.mark.parametrize("place", ["## Use with transformers", "## Citation"])
def test_a_strangers_block_is_not_run(release: Path, tmp_path: Path, place: str) -> None:
    proof = tmp_path / "ran"
    block = f"```python\nopen({str(proof)!r}, 'w').close()\n```\n\n"
    card = (release / "README.md").read_text()
    (release / "README.md").write_text(card.replace(place, block + place))
    record_again(release)
    assert "this Python block is not what a build writes; nothing of the card was run" in problems(release)
    assert not proof.exists()


@pytest.mark.parametrize("name", ['x", trust_remote_code=print("ran")) #', "a/b/c", "ü", ""])
def test_a_name_that_would_be_code(release: Path, name: str) -> None:
    edit_json(release / "release.json", repo_id=name)
    with pytest.raises(ValueError, match=r"`repo_id`: .* must be ORG/NAME"):
        check.check_release(release)


def test_blocks_share_names_and_missing_packages_are_told(tmp_path: Path) -> None:
    blocks = ["a = 1", "import no_such_package_at_all", "print(a + 1)"]
    found = list(probe.run_blocks(blocks, ["one", "two", "three"]))
    assert [one["missing"] for one in found] == [None, "no_such_package_at_all", None]
    assert found[2]["printed"] == "2\n"
    report = check.Report()
    check.judge_block({**found[1], "missing": "sentence_transformers"}, report)
    assert "two: the card's code needs another sentence-transformers (No module named" in report.unchecked[0]
    check.judge_block(found[1], report)
    assert "two: the card's code fails: No module named 'no_such_package_at_all'" in report.problems[0]


def test_a_model_is_freed_once_no_block_needs_it() -> None:
    blocks = [
        "from weakref import ref\nclass Model: pass\nmodel, kept = Model(), Model()\nseen = ref(model), ref(kept)",
        "assert seen[0]() is None and seen[1]() is kept",
    ]
    assert [one["error"] for one in probe.run_blocks(blocks, ["one", "two"])] == [None, None]
