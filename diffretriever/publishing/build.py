"""Build the release folders that `AutoModel.from_pretrained(..., trust_remote_code=True)` loads."""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..backbones.fetch import RECORD_FILE as BACKBONE_RECORD
from ..baselines.configuration import CONFIG_FILE as BASELINE_FILE
from ..files.durable import publish_folder, write_json, write_text
from ..files.hashes import hash_file
from ..files.lines import read_object
from ..files.removal import remove_file
from ..model import backbone_loading as backbones
from ..model import checked_files as files
from ..model import configuration_diffretriever
from ..model.adapter_loading import CONFIG_FILE, RETRIEVER_FILE, WEIGHTS_FILE
from ..model.bidirectional_layers import linear_shapes, parameter_shapes
from ..model.chat_template import render_prompts
from ..model.configuration_diffretriever import AUTO_MAP, DIFFUSION_TYPES, LENGTHS, DiffRetrieverConfig, paper_prompt
from ..model.modeling_diffretriever import ADAPTER_FILES, read_adapter, read_settings
from ..model.tokenization_helpers import RetrievalTokenizer, name_mask_token
from ..store.identity import hash_weights
from ..training.run_record import AVERAGE_FILE, RUN_FILE, trained_weights
from . import card, probe, record
from .hub import find_folder
from .releases import (
    BACKBONE_FOLDER,
    BRANCHES,
    CODE_FILES,
    RELEASES,
    SENTENCE_TRANSFORMERS_FILE,
    check_name,
    check_repo_id,
)
from .sentence_transformers import sentence_transformers_files

SOURCE = Path(configuration_diffretriever.__file__).resolve().parent  # of the code: the tree, or a wheel's folder
FIGURES = SOURCE / "checkpoints" / "figures.json"  # what was measured of our own releases
SETTINGS_FILES = ["*.json", "*.jinja", "merges.txt"]  # of a backbone on the Hub, its weights are not needed to build
# Of a backbone that a release brings along; no other JSON file beside it is copied.
BACKBONE_SETTINGS = """config.json generation_config.json model.safetensors.index.json tokenizer.json
    tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json merges.txt chat_template.jinja""".split()
BUDGETS = ("num_query_masks", "num_passage_masks", "max_length")
SETTINGS = (*BUDGETS, "mask_token")
RECOMMENDED = ("recommended_mode", "recommended_fusion_weight")  # of a release as a whole; no adapter records them


@dataclass(frozen=True)
class Recording:
    """What `build` is to record of the finished release.

    Args:
        when: "auto" encodes the fixed texts if the backbone's weights are here, "always" fetches them, "never" does
            not; without, release.json says why there is no fingerprint.
        dtype: name of the torch dtype to encode in.
        device: where to encode.
        repo_id: the Hub id for the card's code; None is the release's name.
        known_as: the name in the table of releases, if base and adapter are the table's own.
        measured: whether its settings are the table's, too, with which the release's figures were measured.
    """

    when: str = "never"
    dtype: str = "float32"
    device: str = "cpu"
    repo_id: str | None = None
    known_as: str | None = None
    measured: bool = True


def build(
    base: str,
    out: Path,
    adapter: str | None = None,
    name: str | None = None,
    link_code: bool = False,
    force: bool = False,
    with_backbone: bool = False,
    adapter_dtype: str | None = None,
    recording: Recording | None = None,
    **settings: Any,
) -> DiffRetrieverConfig:
    """Build a release folder; it appears whole or not at all.

    Args:
        base: the backbone, a Hub id or folder in the own format of LLaDA, Dream, Llama or Qwen2.
        out: the folder to make.
        adapter: a training run's output folder or Hub id; None builds the zero-shot model.
        name: the release's name; None takes the folder's.
        link_code: link to this source tree's code instead of copying it, for releases kept inside the tree.
        force: replace a folder that is there already.
        with_backbone: copy a local backbone into the release, which then loads anywhere.
        adapter_dtype: of the adapter in the release, as torch names it; None leaves it as it was trained.
        recording: what to record in release.json; None records no fingerprint.
        settings: config fields (num_query_masks, num_passage_masks, max_length, query_length, passage_length); with an
            adapter they must agree with what its retriever_config.json recorded. And the names of RECOMMENDED.

    Returns:
        The config that was written.

    Raises:
        FileExistsError, FileNotFoundError, ValueError: with the file, key or argument that is wrong.
    """
    local = Path(base).expanduser().is_dir()
    name = name or out.name
    check_name("--name", name)
    check_name("--output", out.name)
    if out.exists():
        _check_replaceable(out, Path(base).expanduser(), force)
    if with_backbone and not local:
        raise ValueError(f"--with-backbone: {base} is no local folder; a backbone on the Hub is named, not copied.")
    recommended = [settings.pop(name, None) for name in RECOMMENDED]
    parts = _read_parts(base, adapter, settings)
    config, place = parts.config, BACKBONE_FOLDER if with_backbone else _path_from(parts.backbone, out)
    config.base_model_name_or_path = place if local else base
    config.base_model_revision = None if local else parts.backbone.name  # the Hub cache names snapshots by commit
    config.fetched_backbone = _fetched(parts.backbone)
    config.release_name, config.auto_map, config.architectures = name, AUTO_MAP, ["DiffRetriever"]
    config.recommended_mode, config.recommended_fusion_weight = recommended
    config.check()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".build-") as scratch:
        made = Path(scratch) / out.name
        made.mkdir()
        _fill(made, parts, with_backbone, adapter_dtype)
        _describe(made, parts, link_code, recording or Recording())
        if link_code:
            _link_code(made, out)
        publish_folder(made, out)
    return config


def _fetched(backbone: Path) -> dict[str, Any] | None:
    """Return how a backbone is fetched by name, and its hash; None for any other."""
    if not (file := backbone / BACKBONE_RECORD).is_file():
        return None
    found = read_object(file)
    return {"name": found.get("name"), "origin": found.get("origin"), "sha256": found.get("weights_sha256")}


def _check_replaceable(out: Path, base: Path, force: bool) -> None:
    """Refuse to delete what nobody asked to, what is no release, or what holds the backbone."""
    if not force:
        raise FileExistsError(
            f"--output: {out} is there already; choose another folder, or pass --force to replace it."
        )
    config = out / "config.json"
    if out.is_symlink() or not config.is_file() or read_object(config).get("model_type") != "diffretriever":
        raise FileExistsError(
            f"--output: {out} is no release folder, so --force does not replace it; remove it yourself."
        )
    if out.resolve() in (base.resolve(), *base.resolve().parents):
        raise FileExistsError(f"--output: {out} holds the backbone {base}, which --force would delete.")


def _path_from(base_folder: Path, out: Path) -> str:
    """Name a local backbone: relative where it lies beside the release, so that both can move; else absolute."""
    out = out.resolve()
    return f"../{base_folder.name}" if base_folder.parent == out.parent else str(base_folder)


@dataclass(frozen=True)
class _Parts:
    """What a release is made of, checked to fit.

    Args:
        backbone: its folder.
        adapter: its folder; None for the zero-shot model.
        origin: the adapter's {"repo_id", "revision"} on the Hub; None where it is not from there.
        config: the release's.
        tokenizer: the adapter's own, or the backbone's.
    """

    backbone: Path
    adapter: Path | None
    origin: dict[str, str] | None
    config: DiffRetrieverConfig
    tokenizer: Any

    @property
    def has_weights(self) -> bool:
        """Whether the backbone's weights are here; those that are here were audited, and are whole."""
        return any(self.backbone.glob("*.safetensors"))


def _read_parts(base: str, adapter: str | None, settings: dict[str, Any]) -> _Parts:
    """Find backbone and adapter, and check that they, tokenizer and settings fit."""
    backbone = find_folder(base, SETTINGS_FILES)
    adapter_folder = None if adapter is None else find_folder(adapter, ADAPTER_FILES)
    if adapter_folder is not None and (adapter_folder / BASELINE_FILE).is_file():
        raise ValueError(
            f"{adapter} is an adapter of another method ({BASELINE_FILE}); it makes no release. The commands take it "
            "as it is: --model BACKBONE --adapter ADAPTER."
        )
    backbone_type, backbone_config = files.read_backbone_config(backbone)
    shapes = parameter_shapes(backbone_type, backbone_config)
    if any(backbone.glob("*.safetensors")):
        backbones.audit_weights(backbone, files.read_headers(backbone), backbone_type, shapes)
    places = [folder for folder in (adapter_folder, backbone) if folder is not None]
    tokenizer = backbones.load_tokenizer(places, backbone_config.vocab_size)
    fields = dict(settings)
    if adapter_folder is not None:
        ours, theirs = (partial(name_in, backbone_type) for name_in in (backbones.our_name, backbones.original_name))
        embedding = None if backbone_type in DIFFUSION_TYPES else shapes["backbone.embed_tokens.weight"]
        read_adapter(adapter_folder, linear_shapes(shapes), ours, theirs, embedding)
        _check_trained_on(adapter_folder, backbone)
        fields = _with_recorded(adapter_folder, tokenizer, settings, backbone_type)
    config = DiffRetrieverConfig(
        backbone_type=backbone_type,
        adapter_name_or_path=None if adapter_folder is None else "adapter",
        **{name: value for name, value in fields.items() if name != "backbone_type"},
    )
    if adapter_folder is not None:  # trained with these words; the zero-shot model's follow its budgets
        config.query_prompt, config.passage_prompt = config.prompt(True), config.prompt(False)
    name_mask_token(tokenizer, config.mask_token, backbone_type in DIFFUSION_TYPES)
    RetrievalTokenizer(tokenizer, config, render_prompts(tokenizer, config))  # refuses what could not be encoded later
    origin = None
    if adapter is not None and adapter_folder is not None and not Path(adapter).expanduser().is_dir():
        origin = {"repo_id": adapter, "revision": adapter_folder.name}
    return _Parts(backbone, adapter_folder, origin, config, tokenizer)


def _check_trained_on(adapter: Path, backbone: Path) -> None:
    """Refuse an adapter whose record says that it was trained on other weights of the same shape."""
    wanted = trained_weights(adapter)
    if wanted is None or not any(backbone.glob("*.safetensors")):
        return
    if (found := hash_weights(backbone)) != wanted:
        raise ValueError(
            f"{adapter} was trained on other weights than {backbone} has (their hash is {found[:12]}, in the adapter's "
            f"record it is {wanted[:12]}); give --base the backbone of its training. If these are the same weights in "
            f"other files, build from a copy of the adapter without its {RUN_FILE} or {AVERAGE_FILE}."
        )


def _with_recorded(
    adapter_folder: Path, tokenizer: Any, settings: dict[str, Any], backbone_type: str
) -> dict[str, Any]:
    """Return the settings that the adapter was trained with, refusing others."""
    file = adapter_folder / RETRIEVER_FILE
    if not file.is_file():
        given = settings.keys() | ({"max_length"} if settings.keys() >= set(LENGTHS) else set())
        if missing := set(BUDGETS) - given:
            flags = ", ".join("--" + name.replace("_", "-") for name in sorted(missing))
            raise FileNotFoundError(f"{file} is not there, so the adapter's budgets are unknown; pass {flags}.")
        return settings
    recorded = read_settings(file, tokenizer)
    for name, value in {**settings, "backbone_type": backbone_type}.items():
        if name in LENGTHS and recorded[name] is None:  # the method's code does not record what it trained with
            recorded[name] = value
        if recorded[name] != value:
            raise ValueError(f"{file} says {name} = {recorded[name]!r}, but {value!r} was asked for.")
    return recorded


def _fill(made: Path, parts: _Parts, with_backbone: bool, adapter_dtype: str | None) -> None:
    """Write all but the card and release.json."""
    for file in (*CODE_FILES, SENTENCE_TRANSFORMERS_FILE):
        shutil.copyfile(SOURCE / file, made / file)
    backbones.save_tokenizer(parts.tokenizer, made)
    write_config(parts.config, made / "config.json")
    written = read_object(made / "config.json")
    for file, text in sentence_transformers_files("dense", written).items():
        write_text(made / file, text)
    for branch in BRANCHES:
        (made / branch).mkdir()
        shutil.copyfile(SOURCE / SENTENCE_TRANSFORMERS_FILE, made / branch / SENTENCE_TRANSFORMERS_FILE)
        for file, text in sentence_transformers_files(branch, written, inside=True).items():
            write_text(made / branch / file, text)
    if parts.adapter is not None:
        _copy_files(parts.adapter, made / "adapter", [CONFIG_FILE, WEIGHTS_FILE, RETRIEVER_FILE])
        if adapter_dtype is not None:
            _convert(made / "adapter" / WEIGHTS_FILE, getattr(torch, adapter_dtype))
    if with_backbone:
        _copy_files(parts.backbone, made / BACKBONE_FOLDER, _backbone_files(parts.backbone))


def _convert(file: Path, dtype: torch.dtype) -> None:
    """Write an adapter's weights anew in another dtype."""
    weights = {name: tensor.to(dtype) for name, tensor in files.read_tensors(file).items()}
    save_file(weights, file, metadata={"format": "pt"})


def _backbone_files(backbone: Path) -> list[str]:
    """Name what belongs to a backbone: its settings by name and its weights by the index, whatever lies beside them."""
    weights = {file.name for file, _ in files.read_headers(backbone).values()}
    return [*BACKBONE_SETTINGS, *sorted(weights)]


def _copy_files(source: Path, folder: Path, names: list[str]) -> None:
    folder.mkdir()
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _link_code(made: Path, out: Path) -> None:
    """Replace the code by links to the source tree; they start at the place the release is moved to."""
    for file in list(made.rglob("*.py")):
        remove_file(file)
        place = out.resolve() / file.relative_to(made)
        file.symlink_to(os.path.relpath(SOURCE / file.name, place.parent))


def _describe(made: Path, parts: _Parts, linked: bool, recording: Recording) -> None:
    """Write the card and release.json of a release that is otherwise finished."""
    config, name = parts.config, str(parts.config.release_name)
    repo_id = recording.repo_id or name
    check_repo_id("--repo-id", repo_id)
    weights = made / "adapter" / WEIGHTS_FILE
    adapter_sha256 = hash_file(weights) if weights.is_file() else None
    prompt = RetrievalTokenizer(parts.tokenizer, config, render_prompts(parts.tokenizer, config)).layouts[True]
    facts = card.CardFacts(
        repo_id,
        recording.known_as,
        parts.backbone.name,
        files.read_backbone_config(parts.backbone)[1].hidden_size,
        len(prompt.prefix) + len(prompt.suffix),
        read_object(made / "adapter" / CONFIG_FILE) if adapter_sha256 else None,
        adapter_sha256,
    )
    known_as = recording.known_as if recording.measured else None
    measured = card.measured_figures(FIGURES, known_as, adapter_sha256) if known_as else None
    write_text(made / record.CARD_FILE, card.render_card(config, facts, measured))
    origin = {
        "release": name,
        "repo_id": repo_id,
        "backbone": _backbone_record(parts),
        "adapter": parts.origin,
    }
    found, absent = _encode_fixed_texts(made, parts, recording)
    record.write_record(record.make_record(made, origin, found, absent, linked), made)


def _backbone_record(parts: _Parts) -> dict[str, Any]:
    """Name the backbone and pin it: by its commit on the Hub, or by the hash of a local one's weights."""
    local = parts.config.base_model_revision is None
    return {
        "name": parts.config.base_model_name_or_path,
        "revision": parts.config.base_model_revision,
        "weights_sha256": record.weights_hash(parts.backbone) if local and parts.has_weights else None,
    }


def _encode_fixed_texts(made: Path, parts: _Parts, recording: Recording) -> tuple[dict[str, Any] | None, str | None]:
    """Return the release's fingerprint, or None and why there is none."""
    config = parts.config
    if recording.when == "never":
        return None, "not asked for (--fingerprint never)"
    if recording.when == "auto" and not parts.has_weights:
        return None, f"the weights of {config.base_model_name_or_path} were not on the machine that built it"
    options = {} if config.base_model_revision is not None else {"base_model_name_or_path": str(parts.backbone)}
    model = probe.load(str(made), recording.dtype, recording.device, **options)
    return probe.fingerprint(model, recording.dtype), None


def write_config(config: DiffRetrieverConfig, file: Path) -> None:
    """Write a release's config.json: its own fields only, the same on every transformers."""
    fields = config.to_dict()
    own = ("architectures", "auto_map", "model_type", "release_name", *_OWN_FIELDS)
    kept = {name: fields[name] for name in own if fields.get(name) is not None or name == "base_model_revision"}
    if config.num_denoise_steps == 1:
        del kept["denoise_confidence"]  # one step has nothing to choose
    write_json(file, kept)


_OWN_FIELDS = (
    "backbone_type",
    "base_model_name_or_path",
    "base_model_revision",
    "fetched_backbone",
    "adapter_name_or_path",
    "mask_token",
    "num_query_masks",
    "num_passage_masks",
    "query_budget_table",
    "num_denoise_steps",
    "denoise_confidence",
    "max_length",
    *LENGTHS,
    "cut_in_training",
    "normalize",
    "query_prompt",
    "passage_prompt",
    "sparse_top_k",
    *RECOMMENDED,
)


def default_config() -> DiffRetrieverConfig:
    """Return the config of the default release, as the config.json at the top of the source tree has it."""
    name = "diffretriever-llada-8b-single"
    release = RELEASES[name]
    config = DiffRetrieverConfig(
        backbone_type="llada",
        base_model_name_or_path=release.base,
        adapter_name_or_path="adapter",
        num_query_masks=release.num_query_masks,
        num_passage_masks=release.num_passage_masks,
        max_length=release.max_length,
        query_prompt=paper_prompt("query", release.num_query_masks),
        passage_prompt=paper_prompt("passage", release.num_passage_masks),
    )
    config.release_name, config.auto_map, config.architectures = name, AUTO_MAP, ["DiffRetriever"]
    return config


def build_known(release_name: str, out: Path, **options: Any) -> DiffRetrieverConfig:
    """Build a release of the table.

    Args:
        release_name: its name there.
        out: the folder to make.
        options: as for `build`; the settings are checked against what the adapter recorded.

    Returns:
        The config that was written.

    Raises:
        FileNotFoundError: it is made of parts of the source tree, which is not there.
        ValueError: not in the table; or as for `build`.
    """
    if release_name not in RELEASES:
        raise ValueError(f"build: {release_name!r} is no known release; known: {', '.join(RELEASES)}.")
    release = RELEASES[release_name]
    if release.is_local and not (SOURCE / release.adapter).is_dir():
        raise FileNotFoundError(
            f"build: {release_name} is made of {release.base} in DiffRetriever's source tree, which is not installed "
            "with the package; run publish.py in a checkout, or give `publish build` --base and --adapter."
        )
    if release.is_local and not (SOURCE / release.base).is_dir():
        raise FileNotFoundError(
            f"build: the backbone {release.base} is not here yet; fetch it: diffretriever fetch-backbone "
            f"{Path(release.base).name} --output {shlex.quote(str(SOURCE / release.base))}"
        )
    places = [str(SOURCE / place) if release.is_local else place for place in (release.base, release.adapter)]
    settings = {field: value for field in SETTINGS if (value := getattr(release, field)) is not None}
    recording = options.pop("recording", None) or Recording()
    if not release.is_local and recording.repo_id is None:
        recording = replace(recording, repo_id=release.adapter)
    settings |= {name: getattr(release, name) for name in RECOMMENDED}
    chosen = {name: options[name] for name in (*SETTINGS, *LENGTHS, *RECOMMENDED, "adapter_dtype") if name in options}
    as_measured = all(value is None or value == settings.get(name) for name, value in chosen.items())
    recording = replace(recording, known_as=release_name, measured=as_measured)
    options = {**settings, **options, "name": options.get("name") or release_name}
    return build(places[0], out, places[1], recording=recording, **options)
