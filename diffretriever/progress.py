"""How far long work is: a bar on a terminal, elsewhere (a log file) a line now and then; others' bars kept back."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

SECONDS = 30.0  # between two lines


class Lines(tqdm):
    """A bar that writes whole lines; a short work has one, at its end."""

    disable: bool

    def __init__(self, **settings: Any) -> None:
        form = "{desc}: {n_fmt}/{total_fmt} {unit} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
        super().__init__(mininterval=SECONDS, maxinterval=SECONDS, delay=1e-3, bar_format=form, **settings)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Write a line."""
        del pos
        self.fp.write(f"{str(self) if msg is None else msg}\n")
        return True

    def clear(self, nolock: bool = False) -> None:
        """Leave what is written."""

    def refresh(self, nolock: bool = False, lock_args: Any = None) -> None:
        """Write a line where it is time, not whenever something else was written (`tqdm.write`, which has the lock)."""
        if not nolock:
            super().refresh(nolock, lock_args)

    def close(self) -> None:
        """Write the last line."""
        if not self.disable:
            self.display()
            self.disable = True
            self._decr_instances(self)


def in_notebook() -> bool:
    """Return whether this process is a notebook's, which draws bars that are no terminal's."""
    ipython: Any = sys.modules.get("IPython")
    return hasattr(ipython.get_ipython(), "kernel") if ipython is not None else False


def progress_bar(total: int, unit: str, what: str, show: bool = True, initial: int = 0) -> tqdm:
    """Return a bar on standard error.

    Args:
        total: how much there is to do.
        unit: what is counted.
        what: is done, a verb.
        show: False shows nothing.
        initial: how much was done before.

    Returns:
        To be updated and closed, as tqdm's.
    """
    has_lines = sys.stderr is None or not (sys.stderr.isatty() or in_notebook())
    kind = Lines if has_lines else tqdm
    return kind(total=total, initial=initial, unit=unit, desc=what, disable=not show, dynamic_ncols=True)


@contextlib.contextmanager
def no_loading_bars() -> Iterator[None]:
    """Keep back the bars with which transformers counts the weights that it loads; downloads keep theirs."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    shown, downloads = transformers_logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()
    if downloads:
        enable_progress_bars()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
