"""How commands find and load a model: the device, the dtype, and what is no release."""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_folders import PARITY, hub_repository, run_python
from pretend_cpu import UNITS, pretend_cpu
from pretend_gpu import pretended_gpu
from transformers import AutoConfig, AutoModel

from diffretriever.cli.load_model import add_model_options, check_release, load_model, ready_for_questions
from diffretriever.cli.main import main
from diffretriever.model.configuration_diffretriever import DiffRetrieverConfig
from diffretriever.model.modeling_diffretriever import DiffRetriever

BACKBONE, ADAPTER = PARITY / "backbones" / "tiny-dream", PARITY / "adapters" / "dream-q4p4"


@pytest.fixture
def release(build_release: Callable[..., Path]) -> Path:
    return build_release("tiny-dream", "dream-q4p4")


def parsed(*arguments: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_model_options(parser)
    return parser.parse_args([str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("devices", "rank", "asked", "expected"),
    [(0, "1", None, "cpu"), (4, "1", None, "cuda:1"), (4, None, None, "cuda:0"), (2, "3", None, "cuda:1"),
     (4, "1", "cpu", "cpu"), (4, "1", "auto", "auto")],
)  # fmt: skip
def test_each_process_of_a_launcher_has_its_device(
    release: Path, monkeypatch: pytest.MonkeyPatch, devices: int, rank: str | None, asked: str | None, expected: str
) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(AutoModel, "from_pretrained", lambda name, **options: seen.update(options))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: devices > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    load_model(parsed("--model", release, *(["--device", asked] if asked else [])))
    assert seen["device_map"] == expected


@pytest.mark.parametrize(("units", "dtype"), [([], torch.float32), (UNITS, torch.bfloat16)])
def test_a_model_on_the_cpu_has_its_dtype_beside_a_gpu_too(
    release: Path, monkeypatch: pytest.MonkeyPatch, units: Sequence[str], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    pretend_cpu(monkeypatch, *units)
    model = load_model(parsed("--model", release, "--device", "cpu"))
    assert (model.dtype, model.device.type, model.training) == (dtype, "cpu", False)


def test_settings_reach_the_model(release: Path) -> None:
    options = parsed("--model", release, "--model-dtype", "bfloat16")
    model = load_model(options, num_query_masks=3, max_length=None)
    assert (model.dtype, model.config.num_query_masks, model.config.max_length) == (torch.bfloat16, 3, 256)


def test_a_baseline_is_not_compiled() -> None:
    with pytest.raises(ValueError, match="--compile is for DiffRetriever's releases; leave it out for repllama"):
        load_model(parsed("--model", BACKBONE, "--method", "repllama"), compile=True)


def test_questions_are_recorded_where_that_can_be(load_release: Callable[..., Any]) -> None:
    """On a GPU, of a model that is whole there and has layers to record."""
    here = load_release("tiny-dream", "dream-q4p4")
    with pretended_gpu() as gpu:
        there, spread = copy.deepcopy(here), copy.deepcopy(here)
        for model in (there, spread):
            gpu.move(model)
        spread.backbone.norm._hf_hook = object()
        for model in (here, there, spread):
            found = ready_for_questions(model).encode_texts(["light"], True)
            assert gpu.replays == (model is there)
            gpu.replays = 0
            torch.testing.assert_close(
                found.repr_hidden, here.encode_texts(["light"], True).repr_hidden, rtol=0, atol=3e-6
            )
    baseline = torch.nn.Linear(1, 1)
    assert ready_for_questions(baseline) is baseline


# --------------------------------------------------------------------------------------------- whose code runs


def rebuilt(release: Path, to: Path, change: Callable[[str], str]) -> Path:
    """Copy a release that brings another sparse_head.py."""
    shutil.copytree(release, to)
    file = to / "sparse_head.py"
    file.write_text(change(file.read_text()))
    return to


def test_a_release_loads_with_the_installed_code(release: Path, tmp_path: Path) -> None:
    changes: list[Callable[[str], str]] = [str, lambda text: "# a remark\n" + text.replace('"""', '"""Well: ', 1)]
    for number, change in enumerate(changes):
        model = load_model(parsed("--model", rebuilt(release, tmp_path / f"copy-{number}", change)))
        assert type(model) is DiffRetriever
    bare = shutil.copytree(release, tmp_path / "bare", ignore=shutil.ignore_patterns("*.py"))
    assert type(AutoModel.from_pretrained(bare)) is DiffRetriever
    assert type(AutoConfig.from_pretrained(bare)) is DiffRetrieverConfig


@pytest.mark.parametrize(
    "code", ["import pathlib; pathlib.Path({trace!r}).touch()", "(" * 9999, "x = 1\0", "#" * 2**17]
)
def test_other_code_of_a_release_runs_for_none_but_who_trusts_it(release: Path, tmp_path: Path, code: str) -> None:
    trace = tmp_path / "ran"
    other = rebuilt(release, tmp_path / "other-code", lambda text: f"{text}\n{code.format(trace=str(trace))}\n")
    said = (
        r"other-code was built with other code than this: sparse_head\.py would .* or --trust-remote-code for a command"
    )
    for load in (lambda: load_model(parsed("--model", other)), lambda: AutoModel.from_pretrained(other)):
        with pytest.raises(ValueError, match=said):
            load()
    assert not trace.exists()
    if "touch" in code:
        load_model(parsed("--model", other, "--trust-remote-code"))
        assert trace.exists()


def test_a_release_s_own_code_makes_its_vectors(release: Path, tmp_path: Path) -> None:
    """Also where the installed class is registered, which transformers 5 prefers."""
    other = rebuilt(release, tmp_path / "own-code", lambda text: text.replace("log1p", "sqrt"))
    own = load_model(parsed("--model", other, "--trust-remote-code"), max_length=99)
    ours = load_model(parsed("--model", release), max_length=99)
    assert type(own) is not DiffRetriever
    assert own.config.max_length == ours.config.max_length == 99
    one, another = (model.encode_texts(["moon and tides"], is_query=True) for model in (own, ours))
    assert torch.equal(one.repr_hidden, another.repr_hidden)
    assert torch.allclose(one.sparse_values.square().log1p(), another.sparse_values, atol=1e-5)


REGISTER = """
import sys
import diffretriever
from diffretriever.cli.main import build_parser
build_parser()
assert not {"torch", "transformers"} & sys.modules.keys()
from transformers import AutoModel
print(type(AutoModel.from_pretrained(sys.argv[1])).__module__)
"""


@pytest.mark.slow
@pytest.mark.once
def test_the_package_is_imported_without_waiting_for_transformers(release: Path) -> None:
    said = run_python(REGISTER, release, python=sys.executable)
    assert said.split() == ["diffretriever.model.modeling_diffretriever"]


@pytest.mark.parametrize("command", ["encode", "search", "evaluate", "train", "mine-negatives", "select-budget"])
def test_every_command_that_loads_a_model_has_the_option(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    said = capsys.readouterr().out
    assert {"--model", "--trust-remote-code"} <= {word.strip(",[]") for word in said.split()}


# --------------------------------------------------------------------------------------------- what is no release


def test_what_is_no_release_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tiny-dream is a backbone, not a release; build one with `publish\.py build"):
        check_release(str(BACKBONE))
    with pytest.raises(ValueError, match=r"dream-q4p4 is an adapter, not a release; .* --base BACKBONE --adapter"):
        check_release(str(ADAPTER))
    with pytest.raises(ValueError, match=r"is no release, as it holds no config\.json; build one with"):
        check_release(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="has model_type 'bert', not \"diffretriever\""):
        check_release(str(tmp_path))
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(ValueError, match=r"config\.json: not valid JSON"):
        check_release(str(tmp_path))


@pytest.mark.parametrize(
    ("auto_map", "words"),
    [
        (5, "`auto_map` must be an object or null, got 5"),
        ({"AutoModel": ["x"]}, "`auto_map.AutoModel` must be a string"),
    ],
)
def test_an_odd_auto_map_is_named(release: Path, tmp_path: Path, auto_map: Any, words: str) -> None:
    config = json.loads((release / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"auto_map": auto_map}))
    with pytest.raises(ValueError, match=rf"config\.json: {words}"):
        check_release(str(tmp_path))


@pytest.mark.parametrize("name", ["typo", "./typo", "checkpoints/typo", "/no/such/place", "lab/unknown", "a/b/c", ""])
def test_what_is_nowhere_is_no_such_folder(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such folder.*(Hub id|local folder)"):
        check_release(name)


def test_a_release_in_the_hubs_cache(release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    shutil.copytree(release, tmp_path / "copy")
    hub_repository(tmp_path / "hub", "lab/mine", tmp_path / "copy")
    hub_repository(tmp_path / "hub", "lab/backbone", BACKBONE)
    check_release("lab/mine")
    with pytest.raises(ValueError, match="lab/backbone is a backbone, not a release"):
        check_release("lab/backbone")


@pytest.mark.parametrize("device", ["nonsense", "meta", "cuda:99", ""])
@pytest.mark.parametrize("command", ["search --store s question", "evaluate --data d", "publish check r"])
def test_a_device_that_is_not_there_is_said_before_anything_is_loaded(
    command: str, device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([*command.split(), "--device", device])
    assert f"argument --device: no such device on this machine: {device!r}" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["build name --output o", "check r", "push name --org o"])
def test_a_single_device_is_no_spreading(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["publish", *command.split(), "--device", "auto"])
    assert "argument --device: no such device on this machine: 'auto'" in capsys.readouterr().err
