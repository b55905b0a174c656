"""How many CPU threads training takes, and how those of all commands wait for each other."""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping

# Dimensions of a backbone that keep a thread busy: below, the small operations of a layer are over before the threads
# have met
WIDTH = 64


def wait_asleep(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let OpenMP's threads sleep while they wait for each other, if torch, which reads it once, is not there yet.

    They spin by default. Where others use the machine, a thread that is awaited may not be running, and those that
    spin take its place: on two busy cores a training step took six times as long with two threads as with one, and a
    question ten times.
    """
    if "torch" not in sys.modules:
        environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def threads_for(width: int, available: int) -> int:
    """Return how many threads a backbone can use.

    Args:
        width: its hidden size.
        available: threads that torch would take: the cores, or what OMP_NUM_THREADS or a launcher says.

    >>> threads_for(192, 16), threads_for(4096, 16), threads_for(32, 16)
    (3, 16, 1)
    """
    return max(1, min(available, width // WIDTH))


def choose_threads(asked: int | None, width: int) -> None:
    """Set torch's threads, and say on stderr what was chosen.

    Args:
        asked: what --threads says.
        width: the backbone's hidden size.
    """
    import torch

    available = torch.get_num_threads()
    count = asked or threads_for(width, available)
    torch.set_num_threads(count)
    if asked is None and int(os.environ.get("LOCAL_RANK", "0")) == 0:
        why = f"{available} available, hidden size {width}"
        print(f"{count} CPU thread{'s' if count > 1 else ''} ({why}); --threads N takes N", file=sys.stderr)
