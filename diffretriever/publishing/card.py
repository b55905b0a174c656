"""Model cards: one template, filled for a release."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

from ..files.lines import read_object
from ..model.configuration_diffretriever import DIFFUSION_TYPES
from .hub import is_hub_id
from .releases import BACKBONE_FOLDER, BRANCHES, RELEASES

HERE = Path(__file__).resolve().parent
MODES = ("dense", "sparse", "hybrid")  # the columns of figures.yaml
REQUIRED = ("license", "library_name", "pipeline_tag", "language", "tags")
LORA_NUMBERS = ("r", "lora_alpha")  # of adapter_config.json, on the card
PAPER_DATASETS = ["Tevatron/msmarco-passage-aug"]


@dataclass(frozen=True)
class CardFacts:
    """What a card says that config.json does not.

    Args:
        repo_id: the Hub id, or folder name, that the card's code loads.
        known_as: the release's name in the table, where base and adapter are the table's own; None otherwise, and
            then the card has nobody's figures.
        backbone_name: what to call a backbone that is not on the Hub.
        hidden_size: H, the width of the dense vectors.
        prompt_tokens: how many tokens a query's prompt takes.
        lora: the adapter's adapter_config.json; None for the zero-shot model.
        adapter_sha256: of its adapter_model.safetensors.
    """

    repo_id: str
    known_as: str | None
    backbone_name: str
    hidden_size: int
    prompt_tokens: int
    lora: dict[str, Any] | None
    adapter_sha256: str | None


@cache
def paper_figures() -> dict[str, Any]:
    """Return figures.yaml."""
    import yaml

    figures: dict[str, Any] = yaml.safe_load((HERE / "figures.yaml").read_text(encoding="utf-8"))
    return figures


def measured_figures(file: Path, name: str, adapter_sha256: str | None) -> dict[str, Any] | None:
    """Return what was measured of one of our own releases.

    Args:
        file: a JSON object {release: {"adapter_sha256", "source", "hardware", "results", "training"}}; "results" is a
            list of {"dataset", "metric", "mode", "value"}, "training" (optional) an object of what: how.
        name: the release.
        adapter_sha256: of the adapter_model.safetensors that the card is for.

    Returns:
        The release's entry, or None where it has none.

    Raises:
        ValueError: the entry lacks a field, or was measured with another adapter.
    """
    if not file.is_file():
        return None
    entry: dict[str, Any] | None = read_object(file).get(name)
    if entry is None:
        return None
    missing = {"adapter_sha256", "source", "hardware", "results"} - entry.keys()
    if missing:
        raise ValueError(f"{file}: the entry {name} lacks {', '.join(sorted(missing))}.")
    for number, row in enumerate(entry["results"]):
        if lacking := {"dataset", "metric", "mode", "value"} - row.keys():
            raise ValueError(f"{file}: {name}, result {number} lacks {', '.join(sorted(lacking))}.")
    if entry["adapter_sha256"] != adapter_sha256:
        raise ValueError(
            f"{file}: the figures of {name} were measured with another adapter (SHA-256 {entry['adapter_sha256']}, "
            f"this one's is {adapter_sha256}); measure again, or take the entry out."
        )
    return entry


def render_card(config: Any, facts: CardFacts, measured: dict[str, Any] | None = None) -> str:
    """Write a release's card.

    Args:
        config: the release's `DiffRetrieverConfig`.
        facts: what else the card says.
        measured: of `measured_figures`, for our own releases.

    Returns:
        README.md: the metadata as YAML between `---` lines, then Markdown.
    """
    import jinja2

    body = _template(jinja2.StrictUndefined).render(_template_fields(config, facts, measured))
    return f"---\n{_metadata(config, facts, measured)}\n---\n\n{_squeeze(body)}\n"


def example_blocks(repo_id: str, single: bool, adaptive: bool = False) -> list[str]:
    """Return the Python blocks of a card, the only code that a check of it runs.

    Args:
        repo_id: the Hub id or folder name that they load; `check_repo_id` has seen it.
        single: whether K_q = K_p = 1.
        adaptive: whether K_q is chosen for each query.
    """
    import jinja2

    card = _squeeze(_template(jinja2.ChainableUndefined).render(_code_fields(repo_id, single, adaptive)))
    return [source for _, source in code_blocks(card)]


@cache  # a push writes the code of eight kinds of release, and compiling takes longer than all else it does
def _template(undefined: Any) -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        undefined=undefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # Markdown: what others chose goes through `_plain` and `_number`
    )
    return environment.get_template("card.md.jinja")


def _code_fields(repo_id: str, single: bool, adaptive: bool) -> dict[str, Any]:
    """Return all that a card's code depends on, among it how the release is named for each class to load."""
    on_hub = "/" in repo_id
    known = RELEASES.get(repo_id)
    places = {
        branch: f'"{repo_id}", revision="{branch}"' if on_hub else f'f"{{release}}/{branch}"' for branch in BRANCHES
    }
    return {
        "repo_id": repo_id,
        "single": single,
        "adaptive": adaptive,
        "fusion": f"fusion_{'single' if single else 'multi'}_sparse_max",
        "on_hub": on_hub,
        "shipped": known is not None and known.is_local,
        "main": f'"{repo_id}"' if on_hub else "release",
        **{branch.replace("-", "_"): place for branch, place in places.items()},
    }


def _plain(name: str) -> str:
    """Return a folder's name without what Markdown or HTML would act on.

    >>> _plain("tiny](http://x)<script>`")
    'tiny__http://x__script__'
    """
    return re.sub(r"[^\w .,:=/@+~-]", "_", name)


def _number(name: str, value: Any) -> float:
    """Return a number of adapter_config.json, which may hold anything."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"adapter_config.json: `{name}` must be a number, got {value!r:.80}.")
    return value


def _squeeze(text: str) -> str:
    """Drop the empty lines that the template's branches leave behind."""
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _template_fields(config: Any, facts: CardFacts, measured: dict[str, Any] | None) -> dict[str, Any]:
    k_p = config.num_passage_masks
    single = config.num_query_masks == k_p == 1
    base, on_hub = config.base_model_name_or_path, is_hub_id(config.base_model_name_or_path)
    paper = _paper_rows(facts.known_as)
    known = RELEASES.get(facts.known_as or "")
    has_adapter = facts.lora is not None
    return {
        **_code_fields(facts.repo_id, single, config.query_budget_table is not None),
        "name": config.release_name,
        "adapter": has_adapter,
        "lora": None if facts.lora is None else {name: _number(name, facts.lora.get(name)) for name in LORA_NUMBERS},
        "backbone": base,
        "backbone_name": base if on_hub else _plain(facts.backbone_name),
        "backbone_on_hub": on_hub,
        "backbone_inside": base == BACKBONE_FOLDER,
        "backbone_revision": config.base_model_revision,
        "holds": _listed(["code", "tokenizer", *["adapter"] * has_adapter, *["backbone"] * (base == BACKBONE_FOLDER)]),
        "backbone_kind": "diffusion" if config.backbone_type in DIFFUSION_TYPES else "autoregressive",
        "fetched": {name: _plain(value) for name, value in (config.fetched_backbone or {}).items()},
        "mask_token": re.sub(r"[`\s]", "_", config.mask_token or "[MASK]"),
        "demonstration": known is not None and known.is_local and config.fetched_backbone is None,
        "masks_phrase": masks_phrase(config),
        "vectors_phrase": "one dense vector" if single else "several dense vectors",
        "k_q": _query_masks(config),
        "k_p": k_p,
        "steps": config.num_denoise_steps,
        "hidden_size": facts.hidden_size,
        "longest_input": _longest_input(config),
        "prompt_tokens": facts.prompt_tokens,
        "recommended": config.default_mode,
        "fused_words": _fused_words(config.recommended_fusion_weight),
        "dense_words": "`single_dense`" if single else "MaxSim (`multi_dense`)",
        "paper": paper,
        "measured": measured,
        "training": paper_figures()["training"] if paper else (measured or {}).get("training"),
    }


def masks_phrase(config: Any) -> str:
    """Say how many masks a text has."""
    budgets, k_p = config.budgets(is_query=True), config.num_passage_masks
    if budgets[-1] == k_p == 1:
        return "one `[MASK]` token"
    chosen = "" if len(budgets) == 1 else ", by its length and entropy"
    return f"{_query_masks(config)} (query{chosen}) or {k_p} (passage) `[MASK]` tokens"


def _fused_words(weight: float | None) -> str:
    """Say how the fusion modes weigh their sides."""
    if weight is None:
        return "averaged"
    return f"{weight:g} of the one and {1 - weight:g} of the other, unless `fusion_weight` says otherwise"


def _query_masks(config: Any) -> str:
    """Return K_q, or from where to where it goes."""
    budgets = config.budgets(is_query=True)
    return str(budgets[0]) if len(budgets) == 1 else f"{budgets[0]} to {budgets[-1]}"


def _longest_input(config: Any) -> str:
    """Say how long texts may be."""
    sides = (config.query_length, config.passage_length)
    if None in sides:
        return f"{config.max_length} tokens of prompt and text"
    return f"{sides[0]} tokens of a query's text or {sides[1]} of a passage's"


def _listed(things: list[str]) -> str:
    """Join words as a sentence does.

    >>> _listed(["code", "tokenizer", "adapter"])
    'the code, the tokenizer and the adapter'
    """
    return ", ".join(f"the {thing}" for thing in things[:-1]) + f" and the {things[-1]}"


def _paper_rows(known_as: str | None) -> dict[str, Any] | None:
    """Return the paper's figures of a release, as the template prints them: "0.424"."""
    figures = paper_figures()
    release = figures["releases"].get(known_as)
    if release is None:
        return None

    def rows(part: str) -> list[dict[str, Any]]:
        return [
            {**figures["datasets"][key], "numbers": [f"{value:.3f}" for value in values]}
            for key, values in release[part].items()
        ]

    return {
        "source": figures["source"],
        "row": release["row"],
        "in_domain": rows("in_domain"),
        "beir_7": rows("beir_7"),
        "average": [f"{value:.3f}" for value in release["beir_7_average"]],
    }


# ------------------------------------------------------------------------------------------------------ metadata


def _metadata(config: Any, facts: CardFacts, measured: dict[str, Any] | None) -> str:
    from huggingface_hub import ModelCardData

    on_hub = is_hub_id(config.base_model_name_or_path)
    fields: dict[str, Any] = {
        "language": "en",
        "license": "mit",
        "library_name": "transformers",
        "pipeline_tag": "feature-extraction",
        "tags": _tags(config),
        "base_model": config.base_model_name_or_path if on_hub else None,
        "base_model_relation": "adapter" if on_hub and facts.lora is not None else None,
        "datasets": PAPER_DATASETS if facts.known_as in paper_figures()["releases"] else None,
    }
    results = _eval_results(facts.known_as, measured)
    if results:
        fields |= {"model_name": config.release_name, "eval_results": results}
    data = ModelCardData(**{name: value for name, value in fields.items() if value is not None})
    return data.to_yaml().rstrip()


def _tags(config: Any) -> list[str]:
    multi = max(config.num_query_masks, config.num_passage_masks) > 1
    return [
        "diffretriever",
        *(["diffusion-language-model"] if config.backbone_type in DIFFUSION_TYPES else []),
        "retrieval",
        "dense-retrieval",
        *(["multi-vector", "late-interaction"] if multi else []),
        "sparse-retrieval",
        "sentence-transformers",
        "custom_code",
        "arxiv:2605.07210",
    ]


def _eval_results(known_as: str | None, measured: dict[str, Any] | None) -> list[Any]:
    """Return the model-index: the paper's figures with their source, or our own."""
    from huggingface_hub import EvalResult

    figures = paper_figures()
    release = figures["releases"].get(known_as)
    task: dict[str, Any] = {"task_type": "retrieval", "task_name": "Retrieval"}
    if release is None:
        return [
            EvalResult(
                **task,
                dataset_name=row["dataset"],
                dataset_type=re.sub(r"\W+", "-", row["dataset"].lower()).strip("-"),
                metric_type=re.sub(r"\W+", "_", row["metric"].lower()),
                metric_name=f"{row['metric']} ({row['mode']})",
                metric_value=row["value"],
            )
            for row in (measured or {}).get("results", [])
        ]
    results = []
    for key, values in {**release["in_domain"], **release["beir_7"]}.items():
        dataset = figures["datasets"][key]
        for mode, value in zip(MODES, values, strict=True):
            results.append(
                EvalResult(
                    **task,
                    dataset_name=dataset["name"],
                    dataset_type=dataset["type"],
                    dataset_split=dataset["split"],
                    metric_type=dataset["metric_type"],
                    metric_name=f"{dataset['metric']} ({mode})",
                    metric_value=value,
                    source_name=figures["source"]["name"],
                    source_url=figures["source"]["url"],
                )
            )
    return results


# ------------------------------------------------------------------------------------------------- reading a card


def metadata_problems(card: str, config: dict[str, Any], has_adapter: bool) -> list[str]:
    """Return what is wrong with a card's metadata, a sentence each; the Hub is not asked.

    Args:
        card: README.md.
        config: the release's config.json.
        has_adapter: whether the release holds an adapter.
    """
    import yaml
    from huggingface_hub import ModelCardData

    block = re.match(r"\ufeff?---[ \t]*\n(.*?)\n---[ \t]*(?:\n|$)", card, re.DOTALL)
    if not block:
        return ["README.md has no metadata: it must start with a YAML block between two lines of ---"]
    try:
        fields = yaml.safe_load(block[1])
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # also no date, a number of thousands of digits
        return [f"README.md: the metadata is not valid YAML: {' '.join(str(error).split())}"]
    if not isinstance(fields, dict):
        return ["README.md: the metadata must be `key: value` lines"]
    required = [*REQUIRED]
    base = config.get("base_model_name_or_path")
    if is_hub_id(base):
        required += ["base_model", *(["base_model_relation"] if has_adapter else [])]
    found = [
        f"README.md: the metadata lacks `{name}`; build the release again" for name in required if not fields.get(name)
    ]
    if fields.get("base_model") and fields["base_model"] != base:
        found.append(
            f"README.md: `base_model` is {_told(fields['base_model'])}, but config.json's backbone is {base!r}"
        )
    if has_adapter and fields.get("base_model_relation", "adapter") != "adapter":
        found.append(
            f"README.md: `base_model_relation` is {_told(fields['base_model_relation'])}, but this is an adapter"
        )
    try:
        ModelCardData(**fields, ignore_metadata_errors=False)
    except (ValueError, KeyError, TypeError) as error:  # how huggingface_hub says that the model-index is malformed
        found.append(f"README.md: the metadata's model-index is malformed ({' '.join(str(error).split())})")
    return found


def _told(value: Any) -> str:
    """Return a field of the metadata for a message; lists may hold each other, and take gigabytes to be written."""
    return repr(value) if isinstance(value, str) else shortened(value)[:200]


def code_blocks(card: str) -> list[tuple[str, str]]:
    """Return a card's Python blocks as (name, source); the name says the line it starts at."""
    found = []
    for match in re.finditer(r"^```python\n(.*?)^```", card, re.DOTALL | re.MULTILINE):
        line = card.count("\n", 0, match.start()) + 2
        found.append((f"README.md line {line}", match[1]))
    return found


def with_repo_id(card: str, old: str, new: str) -> str:
    """Return the card with code that loads another Hub id.

    Args:
        card: README.md, as a build wrote it.
        old: the Hub id or folder name that its code loads.
        new: the one to load.
    """
    for kind in product((True, False), repeat=2):
        for before, after in zip(example_blocks(old, *kind), example_blocks(new, *kind), strict=True):
            card = card.replace(before, after)
    return card


def with_adaptive_budgets(card: str, repo_id: str, before: Any, after: Any) -> str:
    """Return the card of a release that chooses K_q for each query.

    Args:
        card: README.md, as a build wrote it.
        repo_id: the Hub id or folder name that its code loads.
        before: the release's config as it was, perhaps with another table.
        after: its config with the table.
    """
    card = card.replace(masks_phrase(before), masks_phrase(after))
    for words in ("| [MASK] tokens | K_q = {} for a query,", "| dense vectors | {} / "):
        card = card.replace(words.format(_query_masks(before)), words.format(_query_masks(after)))
    single = after.num_query_masks == after.num_passage_masks == 1
    blocks = example_blocks(repo_id, single), example_blocks(repo_id, single, adaptive=True)
    for fixed, adaptive in zip(*blocks, strict=True):
        card = card.replace(fixed, adaptive)
    return card


def with_folder(block: str, repo_id: str, folder: str) -> str:
    """Return a code block that loads a folder of this machine.

    Args:
        block: Python source, of `example_blocks`.
        repo_id: the Hub id or folder name that it loads.
        folder: the release's folder.
    """
    block = re.sub("^from diffretriever import .*\n", "", block, flags=re.MULTILINE)
    block = re.sub("^release = .*", lambda _: f"release = {folder!r}", block, flags=re.MULTILINE)
    for branch in BRANCHES:
        block = block.replace(f'"{repo_id}", revision="{branch}"', repr(f"{folder}/{branch}"))
    return block.replace(f'"{repo_id}"', repr(folder))
