"""`average-adapters`: the mean of adapters that went on from one, and what is none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffretriever.cli.main import main
from diffretriever.files.hashes import hash_file
from diffretriever.publishing import build as building

ADAPTERS = Path(__file__).parents[1] / "parity" / "adapters"
WEIGHTS = "adapter_model.safetensors"


def average(out: Path, *adapters: Path) -> int:
    return main(["average-adapters", "--adapters", *map(str, adapters), "--output", str(out)])


def adapter(folder: Path, change: Callable[[torch.Tensor], torch.Tensor] = torch.clone, **fields: Any) -> Path:
    """Return a copy of an adapter of the method's, its tensors changed, and fields of its two JSON files."""
    shutil.copytree(ADAPTERS / "llada-single", folder)
    held = load_file(folder / WEIGHTS)
    save_file({key: change(value).contiguous() for key, value in held.items()}, folder / WEIGHTS)
    for name in ("adapter_config.json", "retriever_config.json"):
        content = json.loads((folder / name).read_text())
        content |= {field: value for field, value in fields.items() if field in content}
        (folder / name).write_text(json.dumps(content))
    return folder


def test_the_mean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One that is named twice counts twice; settings and lengths are the first one's."""
    torch.manual_seed(0)
    first = adapter(
        tmp_path / "first", lambda value: value + 0.1 * value.std() * torch.randn_like(value), max_length=99
    )
    second = adapter(tmp_path / "second", lambda value: value.bfloat16())
    taken_over = {file.name for file in first.iterdir()}
    for name in ("tokenizer.json", "run.json", "optimizer.pt", "trainer_state.json", "manifest.json"):
        (first / name).write_text("{}")  # the last three as a checkpoint has them
    assert average(tmp_path / "mean", first, second, second) == 0
    assert "the mean of 3 adapters, whose factors A have a cosine of " in capsys.readouterr().out
    found, parts = load_file(tmp_path / "mean" / WEIGHTS), [load_file(folder / WEIGHTS) for folder in (first, second)]
    assert found.keys() == parts[0].keys()
    for key, value in found.items():
        expected = (parts[0][key].double() + 2 * parts[1][key].double()) / 3
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-9)
        assert value.dtype == torch.float32
    names = {file.name for file in (tmp_path / "mean").iterdir()}
    assert names == taken_over | {"tokenizer.json", "average.json"}
    assert json.loads((tmp_path / "mean" / "retriever_config.json").read_text())["max_length"] == 99
    record = json.loads((tmp_path / "mean" / "average.json").read_text())
    assert record["adapters"] == [hash_file(folder / WEIGHTS) for folder in (first, second, second)]
    assert 0.9 < record["least_cosine"] < 1


def test_adapters_of_other_backbones_have_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of one seed their factors A begin alike, whatever the backbone."""
    first, second = adapter(tmp_path / "first"), adapter(tmp_path / "second")
    for folder, weights in ((first, "a" * 64), (second, "b" * 64)):
        (folder / "run.json").write_text(json.dumps({"release": {"weights_sha256": weights}}))
    assert average(tmp_path / "mean", first, second) == 2
    told = f"{first} and {second} were trained on other weights of the backbone, as their run.json say"
    assert told in capsys.readouterr().err
    assert not (tmp_path / "mean").exists()
    (second / "run.json").write_text(json.dumps({"release": {"weights_sha256": "a" * 64}}))
    assert average(tmp_path / "mean", first, second, adapter(tmp_path / "of-no-known-run")) == 0
    (second / "run.json").write_text(json.dumps({"release": {"weights_sha256": "b" * 64}}))
    assert average(tmp_path / "again", tmp_path / "mean", second) == 2  # the mean knows what it is of
    assert "mean and" in capsys.readouterr().err


def test_adapters_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is read is asked for, of an adapter and of one in a release."""
    there = {"an/adapter": tmp_path / "there", "a/release": tmp_path / "release" / "adapter"}

    def download(name: str, files: list[str]) -> Path:
        for file in (path for path in adapter(there[name]).iterdir()):
            if str(file.relative_to(tmp_path / ("release" if name == "a/release" else "there"))) not in files:
                file.unlink()
        return tmp_path / "release" if name == "a/release" else there[name]

    monkeypatch.setattr("diffretriever.cli.train.find_folder", download)
    assert average(tmp_path / "mean", *there) == 0  # type: ignore[arg-type]


def test_the_mean_is_a_releases_adapter(load_release: Callable[..., Any], tmp_path: Path) -> None:
    """Of equal ones it is what they are; a release may stand for its adapter."""
    plain = load_release("tiny-llada", "llada-single")
    release = tmp_path / "release"
    building.build(str(plain.loaded_from.weights), release, adapter=str(ADAPTERS / "llada-single"))
    assert average(tmp_path / "mean", release, ADAPTERS / "llada-single") == 0
    assert main(["publish", "build", "--base", str(plain.loaded_from.weights), "--adapter", str(tmp_path / "mean"),
                 "--output", str(tmp_path / "again")]) == 0  # fmt: skip
    found = type(plain).from_pretrained(tmp_path / "again").encode_texts(["what are tides"], True)
    expected = type(plain).from_pretrained(release).encode_texts(["what are tides"], True)
    torch.testing.assert_close(found.repr_hidden, expected.repr_hidden, rtol=0, atol=1e-6)


def test_what_is_off_may_be_left_out(tmp_path: Path) -> None:
    """Of adapter_config.json, the method's training writes more fields than ours."""
    first, second = adapter(tmp_path / "first"), adapter(tmp_path / "second")
    config = json.loads((second / "adapter_config.json").read_text())
    assert not config["lora_bias"]
    kept = {name: value for name, value in config.items() if value}
    (second / "adapter_config.json").write_text(json.dumps(kept))
    assert average(tmp_path / "mean", first, second) == 0


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"r": 8}, "adapter_config.json: r is 8, in "),
        ({"lora_alpha": 32}, "adapter_config.json: lora_alpha is 32, in "),
        ({"n_gen_q_tokens": 4}, "retriever_config.json: n_gen_q_tokens is 4, in "),
        ({"query_prefix_ids": [1]}, "retriever_config.json: query_prefix_ids is [1], in "),
        ({"change": lambda value: value * float("nan")}, "holds NaN or infinite values"),
        ({"change": lambda value: value[:, :-1]}, "has shape ["),
        ({"change": torch.randn_like}, "did not go on from one adapter (the cosine of their factors A is "),
    ],
)
def test_what_has_no_mean(tmp_path: Path, capsys: pytest.CaptureFixture[str], other: dict[str, Any], told: str) -> None:
    torch.manual_seed(0)
    first, second = adapter(tmp_path / "first"), adapter(tmp_path / "second", **other)
    assert average(tmp_path / "mean", first, second) == 2
    message = capsys.readouterr().err
    assert told in message
    assert str(first) in message or "NaN" in told
    assert str(second) in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]


def test_wrong_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, taken = adapter(tmp_path / "first"), tmp_path / "taken"
    taken.mkdir()
    baseline = adapter(tmp_path / "baseline")
    (baseline / "retriever_config.json").rename(baseline / "baseline.json")
    for adapters, out, told in (
        ([first], tmp_path / "mean", "a mean needs two adapters or more, got 1"),
        ([first, first], taken, f"{taken} is there already; choose another folder"),
        ([first, tmp_path / "nowhere"], tmp_path / "mean", "nowhere: no such folder"),
        ([first, taken], tmp_path / "mean", f"{taken} holds no adapter_config.json"),
        ([first, baseline], tmp_path / "mean", "baseline/retriever_config.json is not there"),
        ([first, ADAPTERS / "dream-q4p4"], tmp_path / "mean", "a mean needs adapters of one kind"),
    ):
        assert average(out, *adapters) == 2
        assert told in capsys.readouterr().err
        assert not (tmp_path / "mean").exists()
