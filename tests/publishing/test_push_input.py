"""What `publish.py push` refuses before it writes anything, and what it says to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
from checkpoint_folders import PARITY
from fake_hub import TOKEN, FakeHub, forget_connections

import publish
from diffretriever.publishing import build as building

Push = Callable[..., tuple[int, str]]
LLADA, SINGLE = str(PARITY / "backbones" / "tiny-llada"), str(PARITY / "adapters" / "llada-single")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--repo-id", "lab/v1.0"],
            "'lab/v1.0' has a dot in its name, which breaks transformers 4.54; use - instead: lab/v1-0",
        ),
        (["--repo-id", "pushed"], "'pushed' must be ORG/NAME, such as my-lab/my-retriever"),
        (["--repo-id", "lab/a b"], "the Hub does not allow 'lab/a b'"),
        (["--repo-id", "lab/a--b"], "the Hub does not allow 'lab/a--b'"),
        (["--repo-id", "lab/-a"], "the Hub does not allow 'lab/-a'"),
        (["--repo-id", "lab/" + "a" * 97], "the Hub does not allow"),
        (["--repo-id", "a/b/c"], "the Hub does not allow 'a/b/c'"),
        (["--repo-id", "lab/ü"], "the Hub does not allow 'lab/ü'"),
        (["--repo-id", "lab/x", "--tag", "v 1"], "--tag: 'v 1' is no name that git allows here"),
        (["--repo-id", "lab/x", "--tag", "a..b"], "--tag: 'a..b' is no name that git allows here"),
        (["--repo-id", "lab/x", "--tag", "main"], "--tag: 'main' is a branch's name; choose another, such as v1.0"),
        (["--repo-id", "lab/x", "--revision", "x.lock"], "--revision: 'x.lock' is no name that git allows here"),
        (["--repo-id", "lab/x", "--revision", "sparse"], "sparse is made from main by push itself"),
        (["--repo-id", "lab/x", "--create-pr", "--tag", "v1"], "it takes neither --revision nor --tag"),
        ([], "give either --repo-id ORG/NAME or --org ORG"),
        (["--repo-id", "lab/x", "--org", "lab"], "give either --repo-id ORG/NAME or --org ORG"),
        (["--repo-id", "lab/x", "--all"], "give releases (names or folders), or --all"),
    ],
)
def test_wrong_arguments(arguments: list[str], words: str, release: Path, hub: FakeHub, push: Push) -> None:
    status, said = push(release, *arguments)
    assert status == 2
    assert words in said
    assert hub.log == []


def test_wrong_targets(
    release: Path, hub: FakeHub, push: Push, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "diffretriever-llada-tiny-single"
    assert "neither a folder nor a release; known: diffretriever-llada-8b-single" in push("nothing", "--org", "lab")[1]
    assert "--repo-id names one place, but several releases are to go" in push(release, name, "--repo-id", "lab/x")[1]
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    assert f"is a release's name and a folder here; write ./{name} for the folder" in push(name, "--org", "lab")[1]
    status, said = push("--all", "--org", "lab", "--from", tmp_path / "none")
    assert status == 2
    assert "diffretriever-llada-8b-single is not there" in said
    assert hub.log == []


def test_no_token(release: Path, hub: FakeHub, push: Push, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    status, said = push(release, "--repo-id", "lab/x")
    assert status == 2
    assert "There is no access token. Make one with the right to write in the Hub's settings" in said
    assert "`hf auth login` or set HF_TOKEN" in said
    assert hub.log == []


@pytest.mark.parametrize(
    ("user", "words"),
    [
        (None, "the Hub does not know the token"),
        ({"name": "someone", "role": "read"}, "The token of someone may only read. Make one with the right to write"),
        ({"name": "someone", "role": "fineGrained"}, "Take one with the right to write to elsewhere"),
    ],
)
def test_a_token_without_rights(
    user: dict[str, str] | None, words: str, release: Path, hub: FakeHub, push: Push
) -> None:
    hub.tokens = {} if user is None else {TOKEN: user}
    status, said = push(release, "--repo-id", "elsewhere/x")
    assert status == 2
    assert words in said
    assert TOKEN not in said
    assert hub.repos == {}


def test_a_private_repository_of_others(release: Path, hub: FakeHub, push: Push) -> None:
    hub.make_repo("elsewhere/x", {"a.txt": b"a"})
    status, said = push(release, "--repo-id", "elsewhere/x", "--update")
    assert status == 2
    assert "the token has no right to write here" in said
    assert hub.repos["elsewhere/x"].contents("main") == {"a.txt": b"a"}


def test_offline(release: Path, hub: FakeHub, push: Push, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    forget_connections()
    status, said = push(release, "--repo-id", "lab/x")
    assert status == 2
    assert "offline mode is enabled" in said
    assert "Trying again" not in said


def test_no_hub_at_all(release: Path, hub: FakeHub, push: Push) -> None:
    hub.close()
    status, said = push(release, "--repo-id", "lab/x")
    assert status == 3
    assert said.count("Trying again") == 4
    assert "no answer from the Hub" in said.splitlines()[-1]
    assert "Run the same command again" in said.splitlines()[-1]


def test_not_all_could_be_checked(hub: FakeHub, push: Push, tmp_path: Path) -> None:
    out = tmp_path / "no-fingerprint"
    building.build(LLADA, out, SINGLE, with_backbone=True)
    status, said = push(out, "--repo-id", "lab/x")
    assert status == 2
    assert "NOT CHECKED: whether it loads and its vectors are right" in said
    assert "; pass --allow-unchecked to push it all the same" in said.splitlines()[-1]
    assert hub.repos == {}
    assert push(out, "--repo-id", "lab/x", "--allow-unchecked")[0] == 0
    assert b'"fingerprint": null' in hub.repos["lab/x"].contents("main")["release.json"]


def test_what_would_not_work_elsewhere(hub: FakeHub, push: Push, tmp_path: Path) -> None:
    building.build(LLADA, tmp_path / "local", SINGLE, link_code=True, recording=building.Recording("always"))
    status, said = push(tmp_path / "local", "--repo-id", "lab/x", "--allow-unchecked")
    assert status == 2
    assert "NOT TO BE PUSHED: its code is linked to a source tree; build it without --link-code" in said
    assert "is a folder of this machine; build it with --with-backbone, or on a Hub id" in said
    assert said.splitlines()[-1].startswith(
        "Nothing was pushed: local is refused: its code is linked to a source tree;"
    )
    assert hub.log == []


def test_with_backbone_wants_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--with-backbone: GSAI-ML/LLaDA-8B-Instruct is no local folder"):
        building.build("GSAI-ML/LLaDA-8B-Instruct", tmp_path / "release", with_backbone=True)


def test_metadata_that_the_hub_refuses(release: Path, hub: FakeHub, push: Push) -> None:
    hub.fail("POST", "/api/validate-yaml", 400, message="license is required")
    status, said = push(release, "--repo-id", "lab/x")
    assert status == 2
    assert "Invalid metadata in README.md" in said
    assert hub.repos["lab/x"].contents("main") == {}


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert publish.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["release", "backbone", "K_q/K_p", "max_length", "adapter"]
    assert [line.split()[0] for line in lines[1:]] == list(building.RELEASES)
    assert lines[4].split()[2:4] == ["4/16", "156"]
