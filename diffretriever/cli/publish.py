"""The commands `diffretriever publish build`, `list`, `check` and `push`; `publish.py` at the top is the same."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..progress import no_loading_bars
from ..publishing import hub
from ..publishing.releases import MAIN, RELEASES
from ..search.modes import MODES
from .arguments import RESUMED, add_command, usable_device
from .exit_status import DONE, IN_WORDS, WRONG_INPUT
from .parser import Parser

if TYPE_CHECKING:
    from ..publishing.push import Job, Target

PROGRAM = "publish.py"
WHAT = "build, check and push releases"


def register(commands: Any) -> None:
    """Add the commands to a parser's `add_subparsers` object, one level down."""
    parser = commands.add_parser("publish", help=WHAT, description=f"{WHAT.capitalize()}.", epilog=IN_WORDS)
    add_commands(parser)


def add_commands(parser: argparse.ArgumentParser) -> None:
    """Add the commands to a parser.

    Args:
        parser: of `diffretriever publish`, or of `publish.py`.
    """
    commands = parser.add_subparsers(dest="publish_command", required=True, metavar="COMMAND")
    add_command(commands, "list", "show the table of releases", run_list)
    _add_build(commands)
    command = add_command(commands, "check", "check a built release in a fresh process", run_check)
    command.add_argument("folder", type=Path, help="what `build` made")
    _add_check_options(command)
    _add_push(commands)


def _add_build(commands: Any) -> None:
    command = add_command(commands, "build", "make a release folder", run_build)
    command.add_argument("release", nargs="?", help=f"a known release: {', '.join(RELEASES)}")
    command.add_argument("--base", help="backbone: Hub id or folder of a LLaDA, Dream, Llama or Qwen2")
    command.add_argument("--adapter", help="training output: folder or Hub id; without it, the zero-shot model")
    command.add_argument("--output", type=Path, required=True, help="the folder to make")
    command.add_argument("--name", help="the release's name (default: the folder's)")
    command.add_argument("--repo-id", metavar="ORG/NAME", help="the Hub id in the card's code; push puts in its own")
    command.add_argument("--num-query-masks", type=int, help="K_q, where the adapter does not record it")
    command.add_argument("--num-passage-masks", type=int, help="K_p, where the adapter does not record it")
    command.add_argument(
        "--max-length", type=int, help="tokens of prompt and text, where the adapter does not record it"
    )
    for side in ("query", "passage"):
        told = f"tokens of a {side}'s text alone, instead of --max-length"
        command.add_argument(f"--{side}-length", type=int, help=told)
    command.add_argument("--mask-token", help="an unused special token that serves as [MASK], for a Llama or Qwen2")
    told = "the scoring mode that serves it best, which search takes (default: the dense one)"
    command.add_argument("--recommended-mode", choices=MODES, help=told)
    told = "the dense share that serves it best in the fusion modes, which search takes (default: half)"
    command.add_argument("--recommended-fusion-weight", type=float, metavar="SHARE", help=told)
    told = "of the adapter in the release; bfloat16 halves it (default: as it was trained)"
    command.add_argument("--adapter-dtype", choices=("bfloat16",), help=told)
    command.add_argument("--with-backbone", action="store_true", help="copy a local backbone into the release")
    command.add_argument("--link-code", action="store_true", help="link to this source tree's code, do not copy it")
    command.add_argument("--force", action="store_true", help="replace the folder if it is there")
    command.add_argument(
        "--device", type=usable_device, default="cpu", help="where to encode the fixed texts (default: cpu)"
    )
    _add_fingerprint_options(command)


def _add_push(commands: Any) -> None:
    what, again = (
        "check a release, push it in one commit, verify it, tag it",
        "What is there is whole; " + RESUMED.lower(),
    )
    command = add_command(commands, "push", what, run_push, again=again)
    command.add_argument("targets", nargs="*", metavar="NAME_OR_DIR", help="a release of the table, or a built folder")
    command.add_argument("--all", action="store_true", help="every release of the table; needs --org")
    command.add_argument("--repo-id", metavar="ORG/NAME", help="where one release goes")
    command.add_argument("--org", help="where several go, each under its own name")
    command.add_argument("--from", type=Path, dest="built", metavar="DIR", help="take names from built folders in DIR")
    command.add_argument("--private", action="store_true", help="make the repository private")
    command.add_argument("--revision", default=MAIN, help="the branch (default: main)")
    command.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    command.add_argument("--tag", help="set once everything is verified, such as v1.0; the branches get v1.0-sparse, …")
    command.add_argument("--update", action="store_true", help="replace other content that is there")
    command.add_argument("--dry-run", action="store_true", help="show files, sizes, hashes and card; touch nothing")
    command.add_argument("--allow-unchecked", action="store_true", help="push although not all could be checked here")
    _add_check_options(command)
    _add_fingerprint_options(command)


def _add_check_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--no-load", action="store_true", help="leave out all that needs the model")
    command.add_argument(
        "--device", type=usable_device, default="cpu", help="where the model runs, such as cuda (default: cpu)"
    )


def _add_fingerprint_options(command: argparse.ArgumentParser) -> None:
    """Add the options that say how `build` records the vectors of the fixed texts."""
    command.add_argument(
        "--fingerprint",
        choices=("auto", "always", "never"),
        default="auto",
        help="record vectors of fixed texts: where the backbone's weights are here, always (fetches them), or never",
    )
    command.add_argument(
        "--fingerprint-dtype", choices=("float32", "bfloat16"), default="float32", help="the model's dtype for that"
    )


def run_build(options: argparse.Namespace) -> int:
    """Run `publish build`."""
    from ..model.configuration_diffretriever import LENGTHS
    from ..publishing.build import RECOMMENDED, SETTINGS, build, build_known
    from ..publishing.record import read_record

    if (options.release is None) == (options.base is None):
        raise ValueError("build: give either a known release or --base.")
    if options.release is not None and options.adapter is not None:
        raise ValueError(f"build: --adapter goes with --base; {options.release} has an adapter of its own.")
    settings = {
        name: value for name in (*SETTINGS, *LENGTHS, *RECOMMENDED) if (value := getattr(options, name)) is not None
    }
    shared = {
        "name": options.name,
        "link_code": options.link_code,
        "force": options.force,
        "with_backbone": options.with_backbone,
        "adapter_dtype": options.adapter_dtype,
        "recording": _recording(options),
    }
    with no_loading_bars():
        if options.release is not None:
            config = build_known(options.release, options.output, **shared, **settings)
        else:
            config = build(options.base, options.output, options.adapter, **shared, **settings)
    budgets = f"K_q={config.num_query_masks}, K_p={config.num_passage_masks}, max_length={config.max_length}"
    budgets += "".join(f", {name}={length}" for name in LENGTHS if (length := getattr(config, name)) is not None)
    print(f"{options.output}: {config.release_name} on {config.base_model_name_or_path} ({budgets})")
    absent = read_record(options.output)["fingerprint_absent"]
    if absent:
        print(f"{options.output}: no vectors recorded: {absent}; check will say what it cannot check")
    return DONE


def run_list(options: argparse.Namespace) -> int:
    """Run `publish list`."""
    del options
    rows = [("release", "backbone", "K_q/K_p", "max_length", "adapter")]
    rows += [
        (name, one.base, f"{one.num_query_masks}/{one.num_passage_masks}", str(one.max_length), one.adapter)
        for name, one in RELEASES.items()
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return DONE


def run_check(options: argparse.Namespace) -> int:
    """Run `publish check`; what is wrong with a release counts as wrong input."""
    from ..publishing.check import check_release

    report = check_release(options.folder, options.device, load=not options.no_load)
    print(report.in_words(options.folder.resolve().name))
    return WRONG_INPUT if report.problems else DONE


# ------------------------------------------------------------------------------------------------------------ push


def run_push(options: argparse.Namespace) -> int:
    """Run `publish push`: every check and refusal, of every release, before the first write."""
    from ..publishing import push

    _check_arguments(options)
    token = None if options.dry_run else hub.find_token()
    with (
        tempfile.TemporaryDirectory(prefix="push-") as scratch,
        hub.hidden(token) if token else contextlib.nullcontext(),
    ):
        jobs = list(_jobs(options, Path(scratch)))
        refused = {job.folder.name: reasons for job in jobs if (reasons := _refusals(job, options))}
        if options.dry_run:
            for job in jobs:
                print(push.dry_run(job))
        if refused:
            for name, reasons in refused.items():
                print(f"Nothing was pushed: {name} is refused: {'; '.join(reasons)}.")
            return WRONG_INPUT
        if token is None:
            return DONE
        for prepared in [push.prepare(job, token) for job in jobs]:
            print("\n".join(push.execute(prepared)), flush=True)
    return DONE


def _check_arguments(options: argparse.Namespace) -> None:
    if options.all == bool(options.targets):
        raise ValueError("push: give releases (names or folders), or --all.")
    if options.all:
        options.targets = list(RELEASES)
    if (options.repo_id is None) == (options.org is None):
        raise ValueError("push: give either --repo-id ORG/NAME or --org ORG, for the places in ORG of the same names.")
    if options.repo_id is not None and len(options.targets) > 1:
        raise ValueError("push: --repo-id names one place, but several releases are to go; give --org ORG instead.")
    for target in options.targets:
        _target(options, options.repo_id or f"{options.org}/{Path(target).resolve().name}")


def _target(options: argparse.Namespace, repo_id: str) -> Target:
    """Return where a release goes; refuse what no repository can have."""
    from ..publishing.push import Target

    target = Target(repo_id, options.private, options.revision, options.create_pr, options.tag, options.update)
    target.check()
    return target


def _jobs(options: argparse.Namespace, scratch: Path) -> Iterator[Job]:
    """Yield the releases to push; those of the table that are not built are built so that they load anywhere."""
    from ..publishing.build import build_known
    from ..publishing.push import Job
    from ..publishing.record import read_record

    for name in options.targets:
        folder = _find_folder(name, options.built)
        if folder is None:
            folder = scratch / name
            print(f"building {name}", flush=True)
            with no_loading_bars():
                build_known(name, folder, with_backbone=RELEASES[name].is_local, recording=_recording(options))
        made = read_record(folder)
        yield Job(folder.resolve(), made, _target(options, options.repo_id or f"{options.org}/{made['release']}"))


def _recording(options: argparse.Namespace) -> Any:
    from ..publishing.build import Recording

    return Recording(options.fingerprint, options.fingerprint_dtype, options.device, options.repo_id)


def _find_folder(target: str, built: Path | None) -> Path | None:
    """Return a target's folder; None for a name that is to be built."""
    if target not in RELEASES:
        if not Path(target).is_dir():
            raise FileNotFoundError(f"push: {target} is neither a folder nor a release; known: {', '.join(RELEASES)}.")
        return Path(target)
    if built is not None:
        return built / target
    if Path(target).is_dir():
        raise ValueError(f"push: {target} is a release's name and a folder here; write ./{target} for the folder.")
    return None


def _refusals(job: Job, options: argparse.Namespace) -> list[str]:
    from ..publishing.check import check_release

    report = check_release(job.folder, options.device, load=not options.no_load)
    print(report.in_words(job.folder.name), flush=True)
    return report.refusals(options.allow_unchecked)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `publish.py` and return the exit status."""
    from .main import prepare_process, run

    prepare_process()
    parser = Parser(prog=PROGRAM, description="Build, check and push DiffRetriever releases.", epilog=IN_WORDS)
    parser.add_argument("--version", action="version", version=f"{PROGRAM} of diffretriever {__version__}")
    add_commands(parser)
    return run(parser.parse_args(arguments), PROGRAM)
