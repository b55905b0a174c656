"""Push a release: one commit to main, one to each sentence-transformers branch, each verified; tags last.

All refusals come before the first write. Every step first looks whether it is done already, so that the same command
can be run again after any interruption; a commit names its parent, so that nobody else's change is overwritten.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files.lines import read_object
from . import card, record
from .hub import ATTEMPTS, Conflict, FileHash, HubError, Passing, Refs, RemoteFile, Repository, hash_content, pause
from .releases import BRANCHES, MAIN
from .sentence_transformers import sentence_transformers_files


@dataclass(frozen=True)
class Target:
    """Where a release goes.

    Args:
        repo_id: ORG/NAME.
        private: make the repository private; one that is there already must be.
        revision: the branch.
        create_pr: open a pull request instead of committing.
        tag: a tag to set once all is verified; None sets none.
        update: replace what is there.
    """

    repo_id: str
    private: bool = False
    revision: str = MAIN
    create_pr: bool = False
    tag: str | None = None
    update: bool = False

    def check(self) -> None:
        """Raise ValueError for what no repository can have, with what to do instead."""
        from huggingface_hub.utils import HFValidationError, validate_repo_id

        organisation, _, name = self.repo_id.partition("/")
        if not organisation or not name:
            raise ValueError(f"--repo-id: {self.repo_id!r} must be ORG/NAME, such as my-lab/my-retriever.")
        if "." in name:
            raise ValueError(
                f"--repo-id: {self.repo_id!r} has a dot in its name, which breaks transformers 4.54; use - instead: "
                f"{organisation}/{name.replace('.', '-')}."
            )
        if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*/[A-Za-z0-9_-]+", self.repo_id):
            raise ValueError(
                f"--repo-id: the Hub does not allow {self.repo_id!r}: ASCII letters, digits, - and _, and one slash."
            )
        try:
            validate_repo_id(self.repo_id)
        except HFValidationError as error:
            raise ValueError(f"--repo-id: the Hub does not allow {self.repo_id!r}: {error}") from error
        for what, ref in (("--revision", self.revision), ("--tag", self.tag)):
            if ref is not None and not re.fullmatch(r"(?!.*\.\.)[A-Za-z0-9_][A-Za-z0-9._-]*(?<!\.)(?<!\.lock)", ref):
                raise ValueError(f"{what}: {ref!r} is no name that git allows here; use letters, digits, . _ and -.")
        if self.tag in (MAIN, *BRANCHES):
            raise ValueError(f"--tag: {self.tag!r} is a branch's name; choose another, such as v1.0.")
        if self.create_pr and (self.tag is not None or self.revision != MAIN):
            raise ValueError(
                "--create-pr proposes a change of main, so it takes neither --revision nor --tag; when the pull "
                "request is merged, run push again with --tag: it verifies, adds the branches and tags."
            )
        if self.revision in BRANCHES:
            raise ValueError(f"--revision: {self.revision} is made from main by push itself; leave --revision out.")


@dataclass(frozen=True)
class Job:
    """A release to push.

    Args:
        folder: the release, checked.
        made: its release.json.
        target: where it goes.
    """

    folder: Path
    made: dict[str, Any]
    target: Target


@dataclass(frozen=True)
class Item:
    """A file to push: where its content is, and its hashes."""

    source: Path | bytes
    hashes: FileHash


Payload = Mapping[str, Item]


@dataclass(frozen=True)
class Step:
    """One branch of a push: what it must hold, and what it holds now.

    Args:
        branch: its name.
        payload: the files it must hold, and no others.
        head: the commit it is at; None where it is not there yet.
        tree: what it holds.
    """

    branch: str
    payload: Payload
    head: str | None
    tree: Mapping[str, RemoteFile]

    def differing(self) -> list[str]:
        """Return the paths to add, change or delete."""
        return differing(self.payload, self.tree)


@dataclass(frozen=True)
class Prepared:
    """A push with all its refusals behind it; nothing is written yet."""

    repository: Repository
    job: Job
    exists: bool
    steps: list[Step]
    pull_request: str | None = None


def differing(payload: Payload, tree: Mapping[str, RemoteFile]) -> list[str]:
    """Return the paths whose content on the Hub is not the payload's: absent, other, or there only."""
    changed = [path for path, item in payload.items() if path not in tree or not tree[path].holds(item.hashes)]
    return sorted([*changed, *(tree.keys() - payload.keys())])


def payloads(job: Job) -> dict[str, Payload]:
    """Return the files of each branch that a push writes, by branch.

    The target's Hub id goes into the card's code, and the card's hash into release.json.
    """
    folder, made, target = job.folder, job.made, job.target
    text = (folder / record.CARD_FILE).read_text(encoding="utf-8")
    readme = card.with_repo_id(text, made["repo_id"], target.repo_id).encode()
    files = {**made["files"], record.CARD_FILE: hash_content(readme).sha256}
    pushed = {**made, "repo_id": target.repo_id, "files": files}
    main = {
        name: _item(file)
        for name, file in record.release_files(folder).items()
        if name not in (record.CARD_FILE, record.RECORD_FILE)
    }
    main[record.CARD_FILE] = _item(readme)
    main[record.RECORD_FILE] = _item(record.record_bytes(pushed))
    found: dict[str, Payload] = {target.revision: main}
    if target.revision == MAIN and not target.create_pr:
        config = read_object(folder / "config.json")
        for branch in BRANCHES:
            small = {name: _item(text.encode()) for name, text in sentence_transformers_files(branch, config).items()}
            changed = {**files, **{name: item.hashes.sha256 for name, item in small.items()}}
            small[record.RECORD_FILE] = _item(record.record_bytes({**pushed, "files": changed}))
            found[branch] = {**main, **small}
    return found


def _item(source: Path | bytes) -> Item:
    return Item(source, hash_content(source))


def dry_run(job: Job) -> str:
    """Return what a push would write, in words: files, sizes, hashes, tags and the card."""
    target, found = job.target, payloads(job)
    main = found[target.revision]
    lines = [f"{target.repo_id}@{target.revision} would hold {len(main)} files:"]
    lines += [f"  {item.hashes.size:>12,} bytes  {item.hashes.sha256}  {path}" for path, item in main.items()]
    for branch, payload in found.items():
        other = [path for path, item in payload.items() if item.hashes != main.get(path, item).hashes]
        if branch != target.revision:
            lines.append(f"{target.repo_id}@{branch} would be the same but for {', '.join(other)}")
    if target.tag is not None:
        lines.append("tags: " + ", ".join(str(tag_of(target, branch)) for branch in found))
    source = main[record.CARD_FILE].source
    assert isinstance(source, bytes)
    return "\n".join([*lines, "", f"{record.CARD_FILE}:", "", source.decode()])


# ------------------------------------------------------------------------------------------------------ the plan


def prepare(job: Job, token: str) -> Prepared:
    """Look at the Hub and refuse what must be refused; nothing is written.

    Args:
        job: what goes where.
        token: with the right to write.

    Raises:
        HubError: no access, or the repository holds other content; the message says what to do.
    """
    target, wanted = job.target, payloads(job)
    repository = Repository(target.repo_id, token)
    repository.check_token()
    private = repository.is_private()
    if private is None:
        if target.create_pr:
            raise HubError(
                f"{target.repo_id} is not there, so there is nothing to propose a change to; leave out --create-pr."
            )
        steps = [Step(branch, payload, None, {}) for branch, payload in wanted.items()]
        return Prepared(repository, job, False, steps)
    if target.private and not private:
        raise HubError(f"{target.repo_id} is public. Make it private in its settings first, or leave out --private.")
    refs = repository.refs()
    steps = []
    for branch, payload in wanted.items():
        head = refs.branches.get(branch)
        steps.append(Step(branch, payload, head, repository.tree(head) if head else {}))
    if not target.create_pr:
        _refuse_other_content(target, steps, refs.branches.get(MAIN))
        _refuse_other_tags(repository, target, refs, steps)
        return Prepared(repository, job, True, steps)
    return Prepared(repository, job, True, steps, _same_pull_request(repository, refs, steps[0]))


def _refuse_other_content(target: Target, steps: list[Step], main_head: str | None) -> None:
    """Refuse to replace what this release did not put there, unless asked to."""
    for step in steps:
        differences = step.differing()
        just_made = step.branch != MAIN and step.head == main_head  # by a run that was interrupted then
        if step.tree and differences and not just_made and not target.update:
            raise HubError(
                f"{target.repo_id}, branch {step.branch}, holds other content already: {_some(differences)}. Pass "
                "--update to replace it in one commit (tags keep the old content), or choose another --repo-id."
            )


def _refuse_other_tags(repository: Repository, target: Target, refs: Refs, steps: list[Step]) -> None:
    for step in steps:
        tag = tag_of(target, step.branch)
        if tag is not None and tag in refs.tags:
            _check_tag(repository, target, tag, refs.tags[tag], step.payload)


def _check_tag(repository: Repository, target: Target, tag: str, commit: str, payload: Payload) -> None:
    if differences := differing(payload, repository.tree(commit)):
        raise HubError(
            f"{target.repo_id}: the tag {tag} names other content (commit {commit[:12]}): {_some(differences)}. Users "
            "rely on it, so it is never moved; choose another --tag."
        )


def tag_of(target: Target, branch: str) -> str | None:
    """Return a branch's tag: main's is the one asked for, `v1.0`; the others' `v1.0-sparse` and so on."""
    if target.tag is None or branch not in BRANCHES:
        return target.tag
    return f"{target.tag}-{branch}"


def _same_pull_request(repository: Repository, refs: Refs, step: Step) -> str | None:
    """Return a pull request that holds the same content already, from an earlier run; the newest are looked at."""
    newest = sorted(refs.pull_requests, key=lambda ref: int(ref.rsplit("/", 1)[1]), reverse=True)[:20]
    for ref in newest:
        if not differing(step.payload, repository.tree(refs.pull_requests[ref])):
            return ref
    return None


def _some(paths: list[str]) -> str:
    return ", ".join(paths[:5]) + (
        f" and {len(paths) - 5} more differ" if len(paths) > 5 else " differ" + "s" * (len(paths) == 1)
    )


# ----------------------------------------------------------------------------------------------------- the writes


def execute(prepared: Prepared) -> list[str]:
    """Write what was prepared.

    Args:
        prepared: of `prepare`.

    Returns:
        What was done, a sentence each.

    Raises:
        HubError: a write failed; what is there is whole, and the same command goes on from there.
    """
    repository, target, name = prepared.repository, prepared.job.target, prepared.job.made["release"]
    if target.create_pr:
        return [_propose(prepared)]
    if not prepared.exists:
        repository.create(target.private)
    done: list[str] = []
    commits: dict[str, str] = {}
    first = prepared.steps[0]
    for step in prepared.steps:
        current = step if step.head else _started(repository, target, step, commits.get(first.branch))
        commits[step.branch], sentence = _bring_up(repository, current, name)
        done.append(f"{target.repo_id}@{step.branch}: {sentence}")
    for step in prepared.steps:
        tag = tag_of(target, step.branch)
        if tag is not None:
            done.append(_set_tag(repository, target, tag, commits[step.branch], step.payload))
    return done


def _started(repository: Repository, target: Target, step: Step, main_commit: str | None) -> Step:
    """Make a step's branch where it is not there: from the verified commit to main, or from main as it is."""
    branches = repository.refs().branches
    if step.branch not in branches and MAIN in branches and step.branch != MAIN:
        repository.create_branch(step.branch, main_commit or branches[MAIN])
        branches = repository.refs().branches
    head = branches.get(step.branch)
    found = Step(step.branch, step.payload, head, repository.tree(head) if head else {})
    if main_commit is None and step.branch == MAIN:
        _refuse_other_content(target, [found], head)  # filled by someone between looking and making it
    return found


def _bring_up(repository: Repository, step: Step, name: str) -> tuple[str, str]:
    """Bring a branch to its payload in one commit, and verify it; returns the commit and a sentence."""
    differences = step.differing()
    if not differences and step.head:
        return step.head, f"holds this release already (commit {step.head[:12]}); nothing to commit"
    operations = _operations(step)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            commit, _ = repository.commit(operations, f"Publish {name}", step.branch, step.head)
            break
        except Passing as error:
            landed = _landed(repository, step)
            if landed is not None:
                commit = landed
                break
            if attempt == ATTEMPTS:
                raise
            pause(attempt, error)
    _verify(repository, step, commit)
    return commit, f"{len(differences)} files in one commit, {commit[:12]}; all {len(step.payload)} verified"


def _operations(step: Step) -> list[Any]:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    operations: list[Any] = []
    for path in step.differing():
        if path in step.payload:
            operations.append(CommitOperationAdd(path, step.payload[path].source))
        else:
            operations.append(CommitOperationDelete(path, is_folder=False))
    return operations


def _landed(repository: Repository, step: Step) -> str | None:
    """Return the commit that an unanswered request made after all; None if the branch is where it was."""
    head = repository.refs().branches.get(step.branch)
    if head is None or head == step.head:
        return None
    if differing(step.payload, repository.tree(head)):
        raise Conflict(
            f"{repository.repo_id}@{step.branch} was changed by someone else in the meantime (now at {head[:12]}). "
            "Look at it, and run again."
        )
    return head


def _verify(repository: Repository, step: Step, commit: str) -> None:
    """Compare every file's hash at the new commit with what was sent."""
    if wrong := differing(step.payload, repository.tree(commit)):
        raise HubError(
            f"{repository.repo_id}@{step.branch}: after the commit {commit[:12]} the Hub does not hold what was sent: "
            f"{_some(wrong)}. No tag was set. Run the same command with --update to send it again."
        )


def _set_tag(repository: Repository, target: Target, tag: str, commit: str, payload: Payload) -> str:
    tags = repository.refs().tags
    if tag not in tags:
        repository.create_tag(tag, commit)
        tags = repository.refs().tags
    if tag not in tags:
        raise HubError(
            f"{target.repo_id}: the Hub does not show the tag {tag} it was asked for. Run the same command again."
        )
    if tags[tag] != commit:  # of an earlier push of the same content, or someone else set it first
        _check_tag(repository, target, tag, tags[tag], payload)
    return f"{target.repo_id}: the tag {tag} names commit {tags[tag][:12]}"


def _propose(prepared: Prepared) -> str:
    """Open a pull request, once."""
    repository, step = prepared.repository, prepared.steps[0]
    if not step.differing():
        return f"{repository.repo_id}@main holds this release already; no pull request is needed"
    message, ref = f"Publish {prepared.job.made['release']}", prepared.pull_request
    if ref is not None:
        return f"{repository.repo_id}: {ref} holds this release already; reopen it if it was closed"
    try:
        _, ref = repository.commit(_operations(step), message, MAIN, step.head, create_pr=True)
    except Passing:
        ref = _same_pull_request(repository, repository.refs(), step)  # the answer may have been lost
        if ref is None:
            raise
    _verify(repository, step, str(ref))
    return (
        f"{repository.repo_id}: {ref} proposes this release; when it is merged, run push again without --create-pr for "
        "the branches sparse and multi-vector"
    )
