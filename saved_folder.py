"""Folders that a save replaces whole or not at all, and in which it touches nothing that no save wrote."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

CONFIG_FILE = "config.json"
MODEL_TYPE = "diffretriever"
WEIGHTS_FILES = ("model.safetensors", "model.safetensors.index.json")
SENTENCE_TRANSFORMERS_FILES = (
    "config_sentence_transformers.json",
    "modules.json",
    "st_diffretriever.json",
    "st_diffretriever.py",
)
NO_SYNC = (errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)  # of folders, on network drives
FOREIGN_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack")


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Give an empty folder to write a model into; at the end its files take their places in `folder`.

    They do so at once, config.json last, after all of them are on the disk. Weights of an earlier save go; what else
    `folder` holds stays. When anything fails, on the way or in the exchange, all is as it was.

    Args:
        folder: made if it is not there.

    Yields:
        The folder to write into, on the same disk.

    Raises:
        NotADirectoryError: `folder` is a file.
        ValueError: `folder` holds another model, or files of somebody else's that would be overwritten.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"save_pretrained writes a folder, but {folder} is a file.")
    earlier = _earlier_weights(folder)
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with TemporaryDirectory(dir=folder, prefix=".saving-", ignore_cleanup_errors=True) as scratch:
            made = Path(scratch, "new")
            made.mkdir()
            yield made
            _exchange(made, folder, Path(scratch, "old"), earlier)
    except BaseException:
        if is_new and not any(folder.iterdir()):
            folder.rmdir()
        raise


def whole_state(state: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Return the weights that a save writes, each a tensor of its own: a file has no room for a tied head.

    Args:
        state: {name: tensor} of the model, its adapters merged.
        shapes: {name: shape} of `parameter_shapes`.

    Raises:
        ValueError: weights that would not load again; the message names some.
    """
    wanted = {**shapes, "lm_head.weight": shapes["backbone.embed_tokens.weight"]}
    differing = state.keys() ^ wanted.keys()
    differing |= {name for name in state.keys() & wanted.keys() if tuple(state[name].shape) != tuple(wanted[name])}
    if differing:
        raise ValueError(
            f"{', '.join(sorted(differing)[:3])}: {len(differing)} weights are not as the model's config has them, and "
            "would not load again. Leave `state_dict` out where the model has an adapter, or merge into it what was "
            "put around its modules."
        )
    embedding, head = state["backbone.embed_tokens.weight"], state["lm_head.weight"]
    return {**state, "lm_head.weight": head.clone() if head.data_ptr() == embedding.data_ptr() else head}


@contextmanager
def all_of_it(model: Any) -> Iterator[None]:
    """Have transformers save all weights of a model, of which, after its `add_adapter`, it saves the adapter alone."""
    mark = model.__dict__.pop("_hf_peft_config_loaded", None)
    try:
        yield
    finally:
        if mark is not None:
            model._hf_peft_config_loaded = mark


def copy_files(sources: Iterable[Path], target: Path) -> None:
    """Copy files, not links, into a folder."""
    for source in sources:
        shutil.copyfile(source, target / source.name)


def sentence_transformers_files(release: Path, folder: Path) -> list[Path]:
    """Return the files of a release with which what is saved into `folder` loads in sentence-transformers as it does.

    What lies in `folder` already is left out: sentence-transformers may have written it, in a save of its own.
    """
    files = [release / name for name in SENTENCE_TRANSFORMERS_FILES]
    return [file for file in files if file.is_file() and not (folder / file.name).exists()]


def _earlier_weights(folder: Path) -> set[str] | None:
    """Return the weight files of an earlier save; None for a folder in which there was none."""
    config = _read_object(folder / CONFIG_FILE)
    if config is None:
        found = sorted(file.name for file in folder.glob("*") if file.suffix in FOREIGN_SUFFIXES)
        if found:
            raise ValueError(
                f"{folder} holds {found[0]}, but no {CONFIG_FILE} that says whose it is; nothing there is overwritten. "
                "Save into another folder. (After a save that was cut off, its files are in .saving-*.)"
            )
        return None
    if config.get("model_type") != MODEL_TYPE:
        raise ValueError(
            f"{folder} holds another model ({CONFIG_FILE}: model_type {config.get('model_type')!r:.80}), which is not "
            "overwritten. Save into another folder."
        )
    weight_map = (_read_object(folder / WEIGHTS_FILES[1]) or {}).get("weight_map")
    shards = weight_map.values() if isinstance(weight_map, dict) else ()
    return {*WEIGHTS_FILES, *(name for name in shards if isinstance(name, str) and Path(name).name == name)}


def _read_object(file: Path) -> dict[str, Any] | None:
    """Return a JSON file's object, an empty one for what is none, None without a file."""
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _exchange(made: Path, folder: Path, aside: Path, earlier: set[str] | None) -> None:
    """Move an earlier save aside and the new files into their places, or back again."""
    names = sorted(str(file.relative_to(made)) for file in made.rglob("*") if file.is_file())
    names.sort(key=lambda name: name == CONFIG_FILE)
    taken = [name for name in names if (folder / name).exists() or (folder / name).is_symlink()]
    for name in taken:
        if earlier is None or (name.endswith(".safetensors") and name not in earlier):
            raise ValueError(f"{folder / name} was not written by an earlier save, and is not overwritten.")
    for name in names:
        sync(made / name)
    stale = {name for name in earlier or () if (folder / name).exists()} - set(taken)
    moves = [(folder / name, aside / name) for name in (*reversed(taken), *sorted(stale))]  # config.json first
    moves += [(made / name, folder / name) for name in names]
    done: list[tuple[Path, Path]] = []
    try:
        for source, target in moves:
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, target)
            done.append((source, target))
        sync(folder)
    except BaseException:
        for source, target in reversed(done):
            os.replace(target, source)
        raise


def sync(place: Path) -> None:
    """Force a file's content, or a folder's names, to the disk, where the system and the filesystem have that."""
    if os.name != "posix":  # Windows opens no folders, and forces no file that is opened for reading
        return
    handle = os.open(place, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NO_SYNC or not place.is_dir():
            raise
    finally:
        os.close(handle)
