"""`publish.py push` against a Hub on loopback: what it writes, in how many commits, and that it can be run again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_folders import edit_json
from fake_hub import NAME, FakeHub

from diffretriever.cli import publish as commands
from diffretriever.publishing import build as building

Push = Callable[..., tuple[int, str]]
REPO = "lab/pushed"
SMALL = {"modules.json", "config_sentence_transformers.json", "st_diffretriever.json"}


def local_files(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }


def rebuild_record(folder: Path, **changes: str) -> None:
    """Change files of a release and its release.json with them: another, later build."""
    recorded = json.loads((folder / "release.json").read_text())
    for name, text in changes.items():
        (folder / name).write_text(text)
        recorded["files"][name] = hashlib.sha256(text.encode()).hexdigest()
    (folder / "release.json").write_text(json.dumps(recorded))


def test_a_first_push(release: Path, hub: FakeHub, push: Push) -> None:
    status, said = push(release, "--repo-id", REPO, "--tag", "v1.0")
    assert status == 0, said
    repo, local = hub.repos[REPO], local_files(release)
    main = repo.contents("main")
    assert main.keys() == local.keys()
    changed = {path for path in local if main[path] != local[path]}
    assert changed == {"README.md", "release.json"}  # they hold the Hub id
    assert f'from_pretrained("{REPO}"' in main["README.md"].decode()
    assert f'"{NAME}"' not in main["README.md"].decode()
    recorded = json.loads(main["release.json"])
    assert recorded["repo_id"] == REPO
    for path, content in main.items():
        if path != "release.json":
            assert recorded["files"][path] == hashlib.sha256(content).hexdigest()
    assert len(repo.history("main")) == 2  # the Hub's own first commit, and one
    assert repo.tags["v1.0"] == repo.branches["main"]
    assert not repo.private
    assert f"all {len(local)} verified" in said


def test_weights_go_through_lfs(release: Path, hub: FakeHub, push: Push) -> None:
    assert push(release, "--repo-id", REPO)[0] == 0
    commit = hub.repos[REPO].branches["main"]
    in_lfs = {path for path, (_, large) in hub.repos[REPO].commits[commit].items() if large}
    assert in_lfs == {"adapter/adapter_model.safetensors", "backbone/model.safetensors"}
    assert hub.count("PUT", "lfs-store") == 2
    assert hub.count("POST", "lfs-verify") == 2


def test_the_branches_for_sentence_transformers(release: Path, hub: FakeHub, push: Push) -> None:
    assert push(release, "--repo-id", REPO, "--tag", "v1.0")[0] == 0
    repo = hub.repos[REPO]
    main = repo.contents("main")
    for branch, kind in (("sparse", "SparseEncoder"), ("multi-vector", "MultiVectorEncoder")):
        files = repo.contents(branch)
        assert files.keys() == main.keys()
        assert {path for path in files if files[path] != main[path]} <= SMALL | {"release.json"}
        assert json.loads(files["config_sentence_transformers.json"])["model_type"] == kind
        recorded = json.loads(files["release.json"])["files"]
        assert all(recorded[path] == hashlib.sha256(files[path]).hexdigest() for path in SMALL)
        assert repo.history(branch)[1:] == repo.history("main")  # one commit on top of main
        assert repo.tags[f"v1.0-{branch}"] == repo.branches[branch]
    assert json.loads(main["config_sentence_transformers.json"])["model_type"] == "SentenceTransformer"


def test_again_commits_nothing(release: Path, hub: FakeHub, push: Push) -> None:
    assert push(release, "--repo-id", REPO, "--tag", "v1.0")[0] == 0
    before = dict(hub.repos[REPO].branches)
    hub.log.clear()
    status, said = push(release, "--repo-id", REPO, "--tag", "v1.0")
    assert status == 0
    assert said.count("holds this release already") == 3
    assert hub.repos[REPO].branches == before
    assert [place for method, place in hub.log if method != "GET"] == []


def test_a_later_tag_of_the_same_content(release: Path, hub: FakeHub, push: Push) -> None:
    assert push(release, "--repo-id", REPO)[0] == 0
    assert hub.repos[REPO].tags == {}
    assert push(release, "--repo-id", REPO, "--tag", "v1.0")[0] == 0
    assert hub.repos[REPO].tags["v1.0"] == hub.repos[REPO].branches["main"]


def test_an_update_is_one_commit_and_deletes_what_is_gone(release: Path, hub: FakeHub, push: Push) -> None:
    repo = hub.make_repo(REPO, {"adapter_config.json": b"{}", "old/notes.txt": b"old", "README.md": b"old"})
    status, said = push(release, "--repo-id", REPO)
    assert status == 2
    assert f"{REPO}, branch main, holds other content already: " in said
    assert "Pass --update to replace it in one commit" in said
    assert len(repo.history("main")) == 2
    status, said = push(release, "--repo-id", REPO, "--update")
    assert status == 0, said
    assert repo.contents("main").keys() == local_files(release).keys()
    assert len(repo.history("main")) == 3
    assert ".gitattributes" in repo.commits[repo.branches["main"]]  # the Hub's own, left alone


def test_a_new_version_leaves_the_tag(release: Path, hub: FakeHub, push: Push) -> None:
    assert push(release, "--repo-id", REPO, "--tag", "v1.0")[0] == 0
    repo = hub.repos[REPO]
    tagged = dict(repo.tags)
    rebuild_record(release, **{"scoring.py": (release / "scoring.py").read_text() + "\n# a new version\n"})
    status, said = push(release, "--repo-id", REPO, "--tag", "v1.0", "--update")
    assert status == 2
    assert "the tag v1.0 names other content" in said
    assert "it is never moved; choose another --tag" in said
    assert len(repo.history("main")) == 2  # refused before the first write
    assert push(release, "--repo-id", REPO, "--tag", "v1.1", "--update")[0] == 0
    assert tagged.items() <= repo.tags.items()
    assert repo.tags["v1.1"] == repo.branches["main"]
    assert repo.contents("sparse")["scoring.py"] == (release / "scoring.py").read_bytes()


def test_private(release: Path, hub: FakeHub, push: Push) -> None:
    assert push(release, "--repo-id", REPO, "--private")[0] == 0
    assert hub.repos[REPO].private
    hub.make_repo("lab/public")
    status, said = push(release, "--repo-id", "lab/public", "--private")
    assert status == 2
    assert "lab/public is public. Make it private in its settings first, or leave out --private" in said
    assert hub.repos["lab/public"].contents("main") == {}


def test_another_branch(release: Path, hub: FakeHub, push: Push) -> None:
    repo = hub.make_repo(REPO, {"README.md": b"the main branch"})
    main = repo.branches["main"]
    repo.branches["half-made"] = main  # an earlier run was interrupted here
    for branch in ("candidate", "half-made"):
        status, said = push(release, "--repo-id", REPO, "--revision", branch, "--tag", f"tag-of-{branch}")
        assert status == 0, said
        assert repo.contents(branch).keys() == local_files(release).keys()
        assert repo.history(branch)[1:] == repo.history("main")
        assert repo.tags[f"tag-of-{branch}"] == repo.branches[branch]
    assert repo.branches["main"] == main
    assert "sparse" not in repo.branches
    assert push(release, "--repo-id", "lab/new", "--revision", "candidate")[0] == 0
    assert hub.repos["lab/new"].contents("main") == {}
    assert hub.repos["lab/new"].contents("candidate").keys() == local_files(release).keys()


def test_pull_request(release: Path, hub: FakeHub, push: Push) -> None:
    status, said = push(release, "--repo-id", REPO, "--create-pr")
    assert status == 2
    assert "nothing to propose a change to; leave out --create-pr" in said
    repo = hub.make_repo(REPO, {"README.md": b"the main branch"})
    status, said = push(release, "--repo-id", REPO, "--create-pr")
    assert status == 0, said
    assert "refs/pr/1 proposes this release" in said
    assert repo.contents("main") == {"README.md": b"the main branch"}
    assert repo.contents("refs/pr/1").keys() == local_files(release).keys()
    status, said = push(release, "--repo-id", REPO, "--create-pr")
    assert status == 0
    assert "refs/pr/1 holds this release already" in said
    assert list(repo.pull_requests) == ["refs/pr/1"]
    assert "sparse" not in repo.branches
    repo.branches["main"] = repo.pull_requests["refs/pr/1"]  # merged
    assert "no pull request is needed" in push(release, "--repo-id", REPO, "--create-pr")[1]
    assert push(release, "--repo-id", REPO, "--tag", "v1.0")[0] == 0
    assert {"sparse", "multi-vector"} <= repo.branches.keys()


def test_several_together(release: Path, hub: FakeHub, push: Push, tmp_path: Path) -> None:
    """All are checked and looked up before the first is written."""
    other = tmp_path / "other-release"
    building.build(str(release / "backbone"), other, with_backbone=True, recording=building.Recording("always"))
    hub.make_repo("lab/other-release", {"README.md": b"someone's"})
    status, said = push(release, other, "--org", "lab")
    assert status == 2
    assert "lab/other-release, branch main, holds other content" in said
    assert f"lab/{NAME}" not in hub.repos
    assert push(release, other, "--org", "lab", "--update")[0] == 0
    assert hub.repos[f"lab/{NAME}"].contents("main").keys() == local_files(release).keys()
    assert "adapter/adapter_config.json" not in hub.repos["lab/other-release"].contents("main")


def test_all_of_the_table(
    release: Path, hub: FakeHub, push: Push, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("one-single", "one-multi")
    monkeypatch.setattr(commands, "RELEASES", dict.fromkeys(names))
    for name, masks in zip(names, (1, 4), strict=True):
        place = tmp_path / "built" / name
        settings: dict[str, Any] = {"num_query_masks": masks, "num_passage_masks": masks}
        recording = building.Recording("always")
        building.build(str(release / "backbone"), place, with_backbone=True, recording=recording, **settings)
    status, said = push("--all", "--org", "lab", "--from", tmp_path / "built", "--tag", "v1.0")
    assert status == 0, said
    assert hub.repos.keys() == {f"lab/{name}" for name in names}
    for name in names:
        assert hub.repos[f"lab/{name}"].contents("v1.0").keys() == local_files(tmp_path / "built" / name).keys()


def test_a_dry_run_touches_nothing(release: Path, hub: FakeHub, push: Push, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    before = local_files(release)
    status, said = push(release, "--repo-id", REPO, "--tag", "v1.0", "--dry-run")
    assert status == 0, said
    assert hub.log == []
    assert local_files(release) == before
    weights = before["adapter/adapter_model.safetensors"]
    line = f"{len(weights):,} bytes  {hashlib.sha256(weights).hexdigest()}  adapter/adapter_model.safetensors"
    assert line in said
    assert f'from_pretrained("{REPO}"' in said
    assert "license: mit" in said
    assert f"{REPO}@sparse would be the same but for " in said
    assert "tags: v1.0, v1.0-sparse, v1.0-multi-vector" in said


def test_a_changed_folder_is_refused(release: Path, hub: FakeHub, push: Push) -> None:
    edit_json(release / "config.json", max_length=99)
    for more in ([], ["--dry-run"], ["--allow-unchecked"]):
        status, said = push(release, "--repo-id", REPO, *more)
        assert status == 2
        assert "WRONG: config.json was changed since it was built; build the release again" in said
    assert hub.repos == {}
