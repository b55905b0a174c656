"""Check a built release: unchanged files, a valid card; in a fresh process, the same vectors and working examples."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files.lines import read_object
from . import card, fingerprint, record
from .hub import is_hub_id
from .releases import BACKBONE_FOLDER, library_versions

PROBE = Path(__file__).with_name("probe.py")
SECRET = re.compile("token|secret|passw|credential|api_?key|access_key", re.IGNORECASE)  # in a variable's name
OPTIONAL = ("sentence_transformers",)  # what a card's code may import that need not be installed


@dataclass
class Report:
    """What a check found.

    Args:
        problems: what is wrong; a release with any is refused.
        unchecked: what could not be checked here, and what to do about it.
        passed: what was checked and is right.
        kept_here: why a release that works here would be refused by push.
    """

    problems: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    passed: list[str] = field(default_factory=list)
    kept_here: list[str] = field(default_factory=list)

    def add(self, problems: list[str], passed: str) -> None:
        """Note the outcome of one check."""
        self.problems += problems
        if not problems:
            self.passed.append(passed)

    def in_words(self, name: str) -> str:
        """Return the verdict on a release of this name and what was found, a line each; the worst comes last."""
        verdict = "right, as far as it was checked" if self.unchecked else "right"
        verdict += " here, but push would refuse it" if self.kept_here else ""
        lines = [f"{name}: {'refused' if self.problems else verdict}"]
        kinds = {"ok": self.passed, "NOT CHECKED": self.unchecked, "NOT TO BE PUSHED": self.kept_here}
        for what, found in (*kinds.items(), ("WRONG", self.problems)):
            lines += [f"  {what}: {sentence}" for sentence in found]
        return "\n".join(lines)

    def refusals(self, allow_unchecked: bool) -> list[str]:
        """Return why push refuses the release: nothing, where it does not."""
        if found := self.problems + self.kept_here:
            return found
        advice = "; pass --allow-unchecked to push it all the same"
        return [] if allow_unchecked else [f"not checked: {one}{advice}" for one in self.unchecked]


def check_release(folder: Path, device: str = "cpu", load: bool = True) -> Report:
    """Check a release folder.

    Args:
        folder: what `publish.py build` made.
        device: where the fresh process puts the model.
        load: False leaves out all that needs the model; the report says so.

    Returns:
        What was found. Nothing is loaded if the files are wrong already.

    Raises:
        FileNotFoundError, ValueError: the folder is no release.
        ImportError: a library is missing, or out of the supported range.
    """
    folder = folder.resolve()
    versions = library_versions()
    made = record.read_record(folder)
    report = Report(kept_here=_kept_here(made))
    changes = record.changes_since(made, folder)
    report.add(changes, f"{len(made['files'])} files are as they were built")
    if any(name.startswith(("config.json is missing", "README.md is missing")) for name in changes):
        return report
    config = read_object(folder / "config.json")
    text = (folder / record.CARD_FILE).read_text(encoding="utf-8")
    report.add(card.metadata_problems(text, config, (folder / "adapter").is_dir()), "the card's metadata is valid")
    report.add(_backbone_problems(folder, made), "the backbone is the one it was built on")
    if made["fingerprint"] is None:
        report.unchecked.append(
            f"whether it loads and its vectors are right: release.json has no fingerprint, as "
            f"{made['fingerprint_absent']}; build it where the weights are, with --fingerprint always"
        )
    elif not load:
        report.unchecked.append("whether it loads and its vectors are right: left out with --no-load")
    elif not report.problems:
        check_loaded(folder, made, config, text, device, report)
        if report.problems and (differing := _other_versions(made["libraries"], versions)):
            report.problems.append(f"versions differ from those of the build, which may be the cause: {differing}")
    return report


def _kept_here(made: dict[str, Any]) -> list[str]:
    """Return what keeps a release that works here from working elsewhere, by its release.json."""
    found = []
    if made["code_sha256"] is None:
        found.append("its code is linked to a source tree; build it without --link-code")
    base = made["backbone"]["name"]
    if not is_hub_id(base) and base != BACKBONE_FOLDER:
        found.append(f"its backbone {base} is a folder of this machine; build it with --with-backbone, or on a Hub id")
    return found


def _backbone_problems(folder: Path, made: dict[str, Any]) -> list[str]:
    """Compare a local backbone's weights with those of the build; one on the Hub is pinned by its commit."""
    wanted = made["backbone"].get("weights_sha256")
    place = folder / str(made["backbone"]["name"])
    if wanted is None:
        return []
    if not place.is_dir():
        return [f"its backbone {place} is not there; put it back, or build the release again"]
    if record.weights_hash(place) == wanted:
        return []
    return [f"the weights in {place} are not those it was built on; build the release again"]


def _other_versions(then: dict[str, str], now: dict[str, str]) -> str:
    return ", ".join(
        f"{name} {then.get(name, 'unknown')}, now {version}"
        for name, version in now.items()
        if then.get(name) != version
    )


# ------------------------------------------------------------------------------------------------- the fresh process


def check_loaded(
    folder: Path, made: dict[str, Any], config: dict[str, Any], text: str, device: str, report: Report
) -> None:
    """Load the release in a fresh process, compare its vectors, run the card's code."""
    blocks = card.code_blocks(text)
    single = config.get("num_query_masks") == config.get("num_passage_masks") == 1
    adaptive = config.get("query_budget_table") is not None
    if strange := _strange_block(blocks, card.example_blocks(made["repo_id"], single, adaptive)):
        report.problems.append(f"{strange}; nothing of the card was run. Build the release again")
        return
    with tempfile.TemporaryDirectory(prefix="check-") as scratch:
        order = {
            "folder": str(folder),
            "dtype": made["fingerprint"]["dtype"],
            "device": device,
            "blocks": [card.with_folder(source, made["repo_id"], str(folder)) for _, source in blocks],
            "names": [name for name, _ in blocks],
        }
        answers, error = run_fresh(order, Path(scratch))
    if not answers:
        report.problems.append(f"it does not load in a fresh process: {error}")
        return
    report.add(
        fingerprint.compare(made["fingerprint"], answers[0]), "its vectors in a fresh process are those of the build"
    )
    for answer in answers[1:]:
        judge_block(answer, report)
    if error:
        failed = order["names"][min(len(answers) - 1, len(blocks) - 1)]
        report.problems.append(f"{failed}: the card's code fails: {error}")


def _strange_block(blocks: list[tuple[str, str]], ours: list[str]) -> str | None:
    """Say which of a card's Python blocks are not the template's: a stranger's code is never run."""
    strange = [name for name, source in blocks if source not in ours]
    if strange:
        return f"{strange[0]}: this Python block is not what a build writes"
    return None if len(blocks) == len(ours) else f"README.md: {len(blocks)} Python blocks, a build writes {len(ours)}"


def judge_block(answer: dict[str, Any], report: Report) -> None:
    """Add to a report what became of one block of the card: an answer of `probe.run_blocks`."""
    if answer["missing"] is None:
        report.passed.append(f"{answer['name']}: the card's code runs")
    elif answer["missing"] in OPTIONAL:
        package = answer["missing"].replace("_", "-")
        report.unchecked.append(
            f"{answer['name']}: the card's code needs another {package} ({answer['error']}): pip install -U {package}"
        )
    else:
        report.problems.append(f"{answer['name']}: the card's code fails: {answer['error']}")


def run_fresh(order: dict[str, Any], scratch: Path) -> tuple[list[dict[str, Any]], str | None]:
    """Run `probe.py` in a fresh interpreter, away from this source tree and with an empty cache of remote code.

    Args:
        order: {"folder", "dtype", "device", "blocks", "names"}.
        scratch: a folder to work in.

    Returns:
        The answers, a fingerprint and then one for each block that ran to its end, and the error that stopped the
        process or None.
    """
    answers = scratch / "answers.jsonl"
    environment = {name: value for name, value in os.environ.items() if not SECRET.search(name)}
    environment |= {"HF_MODULES_CACHE": str(scratch / "modules"), "PYTHONDONTWRITEBYTECODE": "1"}
    environment["HF_TOKEN_PATH"] = str(
        scratch / "no-token"
    )  # a release's code is somebody's: no secret is in its reach
    done = subprocess.run(
        [sys.executable, "-c", PROBE.read_text(encoding="utf-8")],
        input=json.dumps({**order, "answers": str(answers)}),
        cwd=scratch,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = answers.read_text(encoding="utf-8").splitlines() if answers.is_file() else []
    return [json.loads(line) for line in lines], None if done.returncode == 0 else _cause(done.returncode, done.stderr)


def _cause(status: int, stderr: str) -> str:
    """Return the exception at the end of a traceback, on one line."""
    if status < 0:
        return f"the process was ended by signal {-status}, perhaps for want of memory"
    lines = stderr.strip().splitlines()
    starts = [number for number, line in enumerate(lines) if re.match(r"[A-Za-z_][\w.]*(Error|Exception|Exit)\b", line)]
    words = " ".join(" ".join(lines[starts[-1] :] if starts else lines[-3:]).split())
    return words[:1000] or f"the process ended with status {status}"
