"""Fresh Python processes in half the time: forked from one that has imported torch, and nothing that is tested.

What is imported beforehand neither reads the environment nor holds code of a release; transformers and peft do, so each
process imports them itself, as a new interpreter would.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = str(Path(__file__).resolve().parent.parent)
METHODS = multiprocessing.get_all_start_methods()
CONTEXT: Any = multiprocessing.get_context("forkserver" if "forkserver" in METHODS else "spawn")
IMPORTED = (
    "torch._dynamo torch.distributed.tensor torch.distributed.checkpoint torch.distributed.fsdp "
    "scipy.optimize scipy.stats sklearn.metrics pandas pyarrow.dataset"
).split()  # what is not installed is passed over
CONTEXT.set_forkserver_preload(IMPORTED)


def run(
    arguments: Sequence[object],
    *,
    env: Mapping[str, str] | None = None,
    cwd: object = None,
    input: str = "",
    timeout: float = 300,
) -> subprocess.CompletedProcess[str]:
    """Run Python's arguments (-c CODE, -m MODULE or a script, and theirs) as `subprocess.run` with capture_output."""
    words = [str(word) for word in arguments]
    with tempfile.TemporaryDirectory() as scratch:
        streams = [os.path.join(scratch, name) for name in ("stdin", "stdout", "stderr")]
        for file, content in zip(streams, (input, "", ""), strict=True):
            Path(file).write_text(content, encoding="utf-8")
        environment, place = dict(os.environ if env is None else env), str(cwd or os.getcwd())
        child = CONTEXT.Process(target=_main, args=(words, environment, place, streams))
        child.start()
        child.join(timeout)
        if child.exitcode is None:
            child.kill()
            child.join()
            raise subprocess.TimeoutExpired(words, timeout)
        printed = [Path(file).read_text(encoding="utf-8") for file in streams[1:]]
        return subprocess.CompletedProcess(words, child.exitcode, *printed)


def _main(words: list[str], environment: dict[str, str], place: str, streams: list[str]) -> None:
    gc.freeze()  # what was imported beforehand is no garbage: a fifth of the time of the imports that follow
    for number, file in enumerate(streams):
        os.dup2(os.open(file, os.O_WRONLY if number else os.O_RDONLY), number)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(number, "w" if number else "r") for number in range(3))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(place)
    installed = [path for path in sys.path if path == ROOT or path.startswith((sys.prefix, sys.base_prefix))]
    sys.path[:] = [*filter(None, environment.get("PYTHONPATH", "").split(os.pathsep)), *installed]  # no cache of code
    try:
        _run_arguments(words)
    finally:
        sys.stdout.flush()  # what else is said, and the status, is as of any process


def _run_arguments(words: list[str]) -> None:
    match words:
        case ["-c", code, *rest]:
            sys.argv = ["-c", *rest]
            sys.path.insert(0, "")
            module = type(sys)("__main__")
            sys.modules["__main__"] = module
            exec(compile(code, "<string>", "exec"), module.__dict__)
        case ["-m", module_name, *rest]:
            sys.argv = [module_name, *rest]
            sys.path.insert(0, os.getcwd())
            runpy.run_module(module_name, run_name="__main__", alter_sys=True)
        case [script, *rest]:
            sys.argv = [script, *rest]
            sys.path.insert(0, os.path.dirname(os.path.abspath(script)))
            runpy.run_path(script, run_name="__main__")
