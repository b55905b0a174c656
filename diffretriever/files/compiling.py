"""Whether numba can compile here: not every environment has it, and it refuses a numpy that is newer than itself."""

from __future__ import annotations

import warnings
from importlib.util import find_spec


def numba_works() -> bool:
    """Return whether numba is installed and can be imported; where it is and cannot, a warning says why."""
    if find_spec("numba") is None:
        return False
    try:
        import numba  # noqa: F401
    except (ImportError, OSError) as error:  # OSError: llvmlite's library cannot be loaded
        warnings.warn(f"numba is installed and cannot be imported, so nothing is compiled: {error}", stacklevel=2)
        return False
    return True
