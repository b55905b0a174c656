"""Pushing through faults: what may pass is tried again, the rest is said; nothing is left half-published."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_hub import NAME, TOKEN, FakeHub, Repo

import publish

Push = Callable[..., tuple[int, str]]
REPO = "lab/pushed"
ROUTES = {
    "whoami": ("GET", "/api/whoami-v2"),
    "create": ("POST", "/api/repos/create"),
    "refs": ("GET", "/refs$"),
    "tree": ("GET", "/tree/"),
    "preupload": ("POST", "/preupload/main"),
    "batch": ("POST", "lfs/objects/batch"),
    "upload": ("PUT", "/lfs-store/"),
    "commit": ("POST", "/commit/main"),
    "branch": ("POST", "/branch/sparse"),
    "branch-commit": ("POST", "/commit/sparse"),
    "tag": ("POST", "/tag/"),
}


def assert_published(hub: FakeHub, release: Path) -> None:
    repo = hub.repos[REPO]
    names = {str(file.relative_to(release)) for file in release.rglob("*") if file.is_file()}
    assert repo.contents("main").keys() == names
    assert len(repo.history("main")) == 2
    for branch in ("sparse", "multi-vector"):
        assert len(repo.history(branch)) == 3
    tags = {"v1.0": "main", "v1.0-sparse": "sparse", "v1.0-multi-vector": "multi-vector"}
    assert repo.tags == {tag: repo.branches[branch] for tag, branch in tags.items()}


FAULTS = [(None, False), (None, True), (429, False), (500, False), (503, True)]
# Every fault at two places or more, every place with three of them.
AT_PLACES = [
    (place, *FAULTS[(number + turn) % len(FAULTS)]) for number, place in enumerate(ROUTES) for turn in (0, 1, 3)
]


@pytest.mark.parametrize(("place", "status", "after"), AT_PLACES)
def test_what_passes_is_tried_again(
    place: str, status: int | None, after: bool, release: Path, hub: FakeHub, push: Push
) -> None:
    """One fault at each place, before the server acts or after it did: every push ends with each thing done once."""
    method, path = ROUTES[place]
    hub.fail(method, path, status, after=after, headers={"Retry-After": "2"} if status == 429 else {})
    status_of_push, said = push(release, "--repo-id", REPO, "--tag", "v1.0")
    assert status_of_push == 0, said
    assert hub.faults[0].times == 0
    assert_published(hub, release)


@pytest.mark.parametrize("status", [None, 500], ids=["dropped", "500"])
@pytest.mark.parametrize("place", ["create", "commit", "branch", "branch-commit", "tag"])
def test_a_push_that_fails_goes_on_when_run_again(
    place: str, status: int | None, release: Path, hub: FakeHub, push: Push
) -> None:
    method, path = ROUTES[place]
    hub.fail(method, path, status, times=100)
    failed, said = push(release, "--repo-id", REPO, "--tag", "v1.0")
    assert failed == 3
    assert "un the same command again" in said.splitlines()[-1]
    for repo in hub.repos.values():  # a tag only on what is whole, and no mixture on main
        assert repo.tags == {} or place == "tag"
        assert len(repo.contents("main")) in (0, len(list(release.rglob("*.*"))))
    hub.faults.clear()
    again, said = push(release, "--repo-id", REPO, "--tag", "v1.0")
    assert again == 0, said
    assert_published(hub, release)


@pytest.mark.parametrize("seed", range(4))
def test_nobody_ever_sees_a_mixture(seed: int, release: Path, hub: FakeHub, push: Push) -> None:
    """Through any faults, main is empty or whole at every moment, and a tag names only what is whole."""
    chosen = random.Random(seed)
    names = {str(file.relative_to(release)) for file in release.rglob("*") if file.is_file()}
    for _ in range(4):
        for place in chosen.sample(list(ROUTES), 4):
            method, path = ROUTES[place]
            hub.fail(
                method, path, chosen.choice([None, 500, 403]), times=chosen.randint(1, 6), after=chosen.random() < 0.5
            )
        push(release, "--repo-id", REPO, "--tag", "v1.0")
        for repo in hub.repos.values():
            assert all(repo.contents(commit).keys() in (set(), names) for commit in repo.history("main"))
            assert all(repo.contents(commit).keys() == names for commit in repo.tags.values())
        hub.faults.clear()
    assert push(release, "--repo-id", REPO, "--tag", "v1.0")[0] == 0
    assert_published(hub, release)


def test_interrupted_by_hand(release: Path, hub: FakeHub, push: Push) -> None:
    hub.before("POST", "/commit/main", lambda: os.kill(os.getpid(), signal.SIGINT))
    status, said = push(release, "--repo-id", REPO, "--tag", "v1.0")
    hub.meanwhile.clear()
    assert status == 3
    assert "What is there is whole; the same command goes on from what is there" in said
    assert hub.repos[REPO].tags == {}
    assert push(release, "--repo-id", REPO, "--tag", "v1.0")[0] == 0
    assert_published(hub, release)


def test_damage_on_the_way_is_found(release: Path, hub: FakeHub, push: Push) -> None:
    hub.corrupt = {"scoring.py", "backbone/model.safetensors"}
    status, said = push(release, "--repo-id", REPO, "--tag", "v1.0")
    assert status == 2
    assert "the Hub does not hold what was sent: scoring.py differs. No tag was set" in said or (
        "does not hold what was sent: backbone/model.safetensors, scoring.py differ. No tag was set" in said
    )
    assert hub.repos[REPO].tags == {}
    assert hub.repos[REPO].branches.keys() == {"main"}
    hub.corrupt = set()
    assert push(release, "--repo-id", REPO, "--tag", "v1.0", "--update")[0] == 0


def test_a_concurrent_change_is_not_overwritten(release: Path, hub: FakeHub, push: Push) -> None:
    repo = hub.make_repo(REPO)
    hub.before("POST", "/commit/main", lambda: they_commit(repo))
    status, said = push(release, "--repo-id", REPO, "--update")
    assert status == 3
    assert "it was changed by someone else in the meantime; nothing was committed" in said
    assert repo.contents("main") == {"theirs.txt": b"theirs"}


def they_commit(repo: Repo) -> None:
    head = repo.branches["main"]
    repo.branches["main"] = repo.commit(repo.commits[head] | {"theirs.txt": (b"theirs", False)}, head)


def test_a_concurrent_change_behind_a_lost_answer(release: Path, hub: FakeHub, push: Push) -> None:
    repo = hub.make_repo(REPO)
    hub.fail("POST", "/commit/main")
    hub.before("POST", "/commit/main", lambda: they_commit(repo))
    status, said = push(release, "--repo-id", REPO)
    assert status == 3
    assert "was changed by someone else in the meantime" in said
    assert repo.contents("main") == {"theirs.txt": b"theirs"}


def test_a_tag_set_by_someone_else_meanwhile(release: Path, hub: FakeHub, push: Push) -> None:
    def they_tag() -> None:
        repo = hub.repos[REPO]
        repo.tags.setdefault("v1.0", repo.history("main")[-1])

    hub.before("POST", "/commit/main", they_tag)
    status, said = push(release, "--repo-id", REPO, "--tag", "v1.0")
    assert status == 2
    assert "the tag v1.0 names other content" in said


@pytest.mark.parametrize(
    ("place", "status", "message", "words"),
    [
        ("create", 403, "no rights", "take one with the right to write to lab"),
        ("commit", 403, "Private repository storage limit reached", "or the quota is used up"),
        ("commit", 402, "The free space is used up", "the storage quota is used up. Free space"),
        ("batch", 403, "quota", "the quota is used up"),
        ("commit", 401, "Invalid credentials", "the Hub does not know the token"),
        ("upload", 413, "too large", "too large for the Hub in one piece"),
    ],
)
def test_what_does_not_pass_is_said_once(
    place: str, status: int, message: str, words: str, release: Path, hub: FakeHub, push: Push
) -> None:
    method, path = ROUTES[place]
    hub.fail(method, path, status, times=100, message=message)
    code, said = push(release, "--repo-id", REPO)
    assert code == 2
    assert words.lower() in said.splitlines()[-1].lower()
    assert message in said.splitlines()[-1]
    assert said.splitlines()[-1].startswith("publish.py: ")
    assert hub.count(method, path) <= (2 if place == "upload" else 1)  # not tried again; two files go up at once


def test_a_pull_request_whose_answer_is_lost(release: Path, hub: FakeHub, push: Push) -> None:
    repo = hub.make_repo(REPO, {"README.md": b"main"})
    hub.fail("POST", "/commit/main", after=True)
    status, said = push(release, "--repo-id", REPO, "--create-pr")
    assert status == 0, said
    assert list(repo.pull_requests) == ["refs/pr/1"]


@pytest.mark.parametrize("place", ["whoami", "create", "commit", "upload", "tag"])
@pytest.mark.parametrize("status", [None, 400, 401, 403, 404, 429, 500])
def test_a_token_never_shows(
    place: str,
    status: int | None,
    release: Path,
    hub: FakeHub,
    push: Push,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Not even when the server sends it back in every error, and everything is logged."""
    caplog.set_level("DEBUG")
    hub.echo = True
    method, path = ROUTES[place]
    hub.fail(method, path, status, times=100, message=f"bad token {TOKEN}")
    code, said = push(release, "--repo-id", REPO, "--tag", "v1.0")
    assert code == (3 if status in (None, 429, 500) else 2)
    assert TOKEN not in said
    assert TOKEN not in caplog.text
    secret = TOKEN.encode()
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or secret not in file.read_bytes(), file
    for repo in hub.repos.values():
        assert all(secret not in content for files in repo.commits.values() for content, _ in files.values())


def test_unknown_errors_do_not_show_the_token_either(
    release: Path, hub: FakeHub, push: Push, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.fail("POST", "/commit/main", 400, message=f"{TOKEN} is wrong")
    assert publish.main(["push", str(release), "--repo-id", REPO]) == 2
    printed = capsys.readouterr()
    assert "[token] is wrong" in printed.err
    assert TOKEN not in printed.out + printed.err
    assert NAME in printed.out
