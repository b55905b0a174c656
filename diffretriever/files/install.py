"""How an optional dependency is installed: one line for every error that names one."""

from __future__ import annotations


def install_hint(extra: str) -> str:
    """Return the command that installs an extra of this package; no index has the package yet.

    >>> install_hint("retrieval")
    'pip install -e ".[retrieval]"'
    """
    return f'pip install -e ".[{extra}]"'
