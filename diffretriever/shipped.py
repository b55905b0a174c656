"""Where the small releases are that the source tree ships."""

from __future__ import annotations

from pathlib import Path


def shipped_release(name: str) -> str:
    """Return the folder of a small release of this source tree, from wherever Python runs.

    Args:
        name: of the release, such as "diffretriever-llada-tiny-single".

    Raises:
        FileNotFoundError: there is none of this name, or the package was installed without its source tree.
    """
    folder = Path(__file__).resolve().parents[1] / "checkpoints" / name
    if not (folder / "config.json").is_file():
        shipped = ", ".join(sorted(place.name for place in folder.parent.glob("diffretriever-*"))) or "none"
        raise FileNotFoundError(
            f"{folder} is not there; shipped are: {shipped}. A checkout of DiffRetriever has them, installed "
            "with `pip install -e .`."
        )
    return str(folder)
