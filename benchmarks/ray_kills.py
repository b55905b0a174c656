"""`diffretriever encode --engine ray` with an actor, then the driver killed: the store of one process, to the byte.

python benchmarks/ray_kills.py --model checkpoints/diffretriever-llada-tiny-single --input DATA/debian --scratch DIR
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from diffretriever.cli.parser import Parser  # noqa: E402
from diffretriever.files.hashes import hash_file  # noqa: E402

HERE = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}  # as Ray gives an actor with one CPU


def encode(options: list[str], folder: Path) -> subprocess.Popen[bytes]:
    """Begin `diffretriever encode`."""
    return subprocess.Popen([sys.executable, "-m", "diffretriever", "encode", *options, "--output", folder], env=HERE)


def shards(folder: Path) -> dict[str, int]:
    """Return when each shard of a folder was written."""
    return {file.name: file.stat().st_mtime_ns for file in folder.glob("shard-*")}


def actors_of_ray() -> list[int]:
    """Return the processes of this machine that encode for Ray."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            title = (folder / "cmdline").read_bytes()
        except OSError:  # it has ended
            continue
        if title.startswith(b"ray::MapWorker(Map(ShardEncoder))"):
            found.append(int(folder.name))
    return found


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Wait while a process works."""
    while not condition():
        if process.poll() is not None:
            sys.exit(f"it ended too early, with status {process.returncode}")
        time.sleep(0.05)


def note(begun: float, words: str) -> None:
    """Print a line with the time."""
    print(f"{time.perf_counter() - begun:7.1f} s  {words}", flush=True)


def main() -> None:
    """Encode in one process, then on Ray with kills, and compare."""
    parser = Parser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--input", required=True)
    parser.add_argument("--shard-size", default="500")
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--scratch", type=Path, required=True, help="a folder for two stores")
    parser.add_argument("options", nargs="*", help="more for `encode`, behind --")
    options = parser.parse_args()
    one, several = options.scratch / "one", options.scratch / "ray"
    given = ["--model", options.model, "--input", options.input, "--shard-size", options.shard_size, "--quiet"]
    given += options.options
    begun = time.perf_counter()
    if encode(given, one).wait():
        sys.exit("one process alone failed")
    total = len(shards(one))
    note(begun, f"one process: {total} shards")
    given += ["--engine", "ray", "--actors", str(options.actors)]
    driver = encode(given, several)
    wait_for(lambda: len(shards(several)) >= total // 5 and len(actors_of_ray()) == options.actors, driver)
    victim = actors_of_ray()[0]
    os.kill(victim, signal.SIGKILL)
    note(begun, f"{len(shards(several))} shards; actor {victim} killed")
    wait_for(lambda: len(shards(several)) >= total // 2, driver)
    driver.kill()
    driver.wait()
    while actors_of_ray():  # they end with their driver
        time.sleep(0.1)
    kept = shards(several)
    note(begun, f"{len(kept)} shards; driver {driver.pid} killed")
    status = encode(given, several).wait()
    after = shards(several)
    note(begun, f"the same command again: status {status}, {len(after)} shards, of which {len(kept)} were kept")
    rewritten = [name for name in kept if after[name] != kept[name]]
    names = sorted(file.name for file in one.iterdir())
    same = names == sorted(file.name for file in several.iterdir()) and all(
        hash_file(one / name) == hash_file(several / name) for name in names
    )
    note(
        begun, f"written twice: {len(rewritten)}; the two folders are {'the same to the byte' if same else 'different'}"
    )
    sys.exit(0 if same and not rewritten and not status else 1)


if __name__ == "__main__":
    main()
