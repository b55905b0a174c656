"""Model cards: what they say of each release, their metadata, and their figures."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkpoint_folders import PARITY
from huggingface_hub import ModelCard

from diffretriever.model.configuration_diffretriever import DiffRetrieverConfig
from diffretriever.publishing import build as building
from diffretriever.publishing import card, check, releases

PAPER = [name for name, release in releases.RELEASES.items() if not release.is_local]
LLADA, SINGLE = str(PARITY / "backbones" / "tiny-llada"), str(PARITY / "adapters" / "llada-single")
DATASETS = ["msmarco-dev", "dl19", "dl20", "nq", "hotpotqa", "scifact", "trec-covid", "fiqa", "arguana", "quora"]


def paper_card(name: str, known_as: str | None) -> tuple[str, dict[str, Any]]:
    release = releases.RELEASES[name]
    config = DiffRetrieverConfig(
        backbone_type="llada",
        base_model_name_or_path=release.base,
        base_model_revision="c0ffee" * 6,
        adapter_name_or_path="adapter",
        num_query_masks=release.num_query_masks,
        num_passage_masks=release.num_passage_masks,
    )
    config.release_name = name
    facts = card.CardFacts(f"lab/{name}", known_as, "unused", 4096, 53, {"r": 16, "lora_alpha": 64}, "0" * 64)
    return card.render_card(config, facts), config.to_dict()


def metadata(text: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return found


def table(text: str, first_cell: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {first_cell} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


# ------------------------------------------------------------------------------------------------ the paper's figures


def test_every_release_of_the_paper_has_every_figure() -> None:
    figures = card.paper_figures()
    assert list(figures["releases"]) == PAPER
    assert list(figures["datasets"]) == DATASETS
    for name, release in figures["releases"].items():
        assert [*release["in_domain"], *release["beir_7"]] == DATASETS
        rows = [*release["in_domain"].values(), *release["beir_7"].values(), release["beir_7_average"]]
        assert all(len(row) == 3 and all(0 < value < 1 for value in row) for row in rows), name
        assert ("LLaDA" if "llada" in name else "Dream") in release["row"]
        assert ("single-rep" if name.endswith("single") else "multi-rep") in release["row"]


@pytest.mark.parametrize("name", PAPER)
def test_the_seven_give_the_printed_average(name: str) -> None:
    """A slip of the pen in any of them would show: the average was copied from its own column."""
    release = card.paper_figures()["releases"][name]
    for mode, average in enumerate(release["beir_7_average"]):
        mean = sum(row[mode] for row in release["beir_7"].values()) / 7
        assert mean == pytest.approx(average, abs=0.0011)


def test_figures_of_the_released_card() -> None:
    """The card of the released checkpoint prints some of them, too."""
    release = card.paper_figures()["releases"]["diffretriever-llada-8b-single"]
    assert release["in_domain"]["msmarco-dev"] == [0.424, 0.347, 0.405]
    assert [row[0] for row in release["beir_7"].values()] == [0.620, 0.640, 0.733, 0.840, 0.453, 0.414, 0.799]
    assert release["beir_7_average"][0] == 0.643


# ---------------------------------------------------------------------------------------------------- the paper's cards


@pytest.mark.parametrize("name", PAPER)
def test_a_card_of_the_paper(name: str) -> None:
    text, config = paper_card(name, name)
    release, figures = releases.RELEASES[name], card.paper_figures()["releases"][name]
    assert card.metadata_problems(text, config, has_adapter=True) == []
    fields = metadata(text)
    assert fields["license"] == "mit"
    assert fields["base_model"] == release.base
    assert fields["base_model_relation"] == "adapter"
    assert fields["library_name"] == "transformers"
    assert fields["pipeline_tag"] == "feature-extraction"
    assert fields["language"] == "en"
    assert fields["datasets"] == ["Tevatron/msmarco-passage-aug"]
    assert {"diffretriever", "retrieval", "sentence-transformers", "arxiv:2605.07210"} <= set(fields["tags"])
    assert ("multi-vector" in fields["tags"]) == ("multi" in name)
    index = fields["model-index"][0]
    assert index["name"] == name
    printed = {**figures["in_domain"], **figures["beir_7"]}
    assert len(index["results"]) == len(printed)
    for result, values in zip(index["results"], printed.values(), strict=True):
        assert [metric["value"] for metric in result["metrics"]] == values
        assert result["source"]["url"] == "https://arxiv.org/abs/2605.07210"
    assert table(text, "MS MARCO dev")[2:] == [f"{value:.3f}" for value in figures["in_domain"]["msmarco-dev"]]
    dense = [*(row[0] for row in figures["beir_7"].values()), figures["beir_7_average"][0]]
    assert table(text, "dense")[1:] == [f"{value:.3f}" for value in dense]
    assert "they were not measured again with this code" in " ".join(text.split())
    assert f"K_q = {release.num_query_masks} for a query, K_p = {release.num_passage_masks} for a passage" in text
    assert table(text, "recommended scoring")[1] == ("`single_dense`" if "single" in name else "`multi_dense`")
    assert "Tevatron/msmarco-passage-aug" in text.split("## Training")[1]
    assert f"`{release.base}`" in text.split("## Licence")[1]
    assert "@article{wang2026diffretriever" in text


def test_somebody_elses_adapter_gets_no_figures() -> None:
    """Not even under a name of the table: the paper's figures are the paper's adapters'."""
    text, config = paper_card("diffretriever-llada-8b-single", None)
    assert "Not measured yet." in text
    assert "model-index" not in metadata(text)
    assert "datasets" not in metadata(text)
    assert "how it was trained is not recorded here" in text
    assert not re.search(r"0\.\d\d\d", text)
    assert card.metadata_problems(text, config, has_adapter=True) == []


def test_own_builds_have_no_figures(tmp_path: Path) -> None:
    building.build(LLADA, tmp_path / "diffretriever-llada-8b-single", SINGLE)
    text = (tmp_path / "diffretriever-llada-8b-single" / "README.md").read_text()
    assert "Not measured yet." in text
    building.build(LLADA, tmp_path / "zero-shot")
    text = (tmp_path / "zero-shot" / "README.md").read_text()
    assert "as a retriever, without training (zero-shot)" in text
    assert "base_model_relation" not in text


@pytest.mark.parametrize("name", PAPER)
def test_a_card_is_plain_markdown(name: str) -> None:
    text, _ = paper_card(name, name)
    assert "{{" not in text
    assert "{%" not in text
    assert "\n\n\n" not in text
    assert text.count("```") % 2 == 0
    assert max(len(line) for line in text.split("```python")[0].splitlines() if not line.startswith("|")) <= 120
    assert ModelCard(text).data.to_dict()["model-index"][0]["name"] == name
    for block_name, source in card.code_blocks(text):
        compile(source, block_name, "exec")


# ---------------------------------------------------------------------------------------------------------- our figures


def figures_file(folder: Path, **changes: Any) -> Path:
    entry = {
        "adapter_sha256": hashlib.sha256((Path(SINGLE) / "adapter_model.safetensors").read_bytes()).hexdigest(),
        "source": "diffretriever evaluate …",
        "hardware": "2 cores",
        "results": [
            {"dataset": "Debian descriptions", "metric": "nDCG@10", "mode": "single_dense", "value": 0.538},
            {"dataset": "Debian descriptions", "metric": "nDCG@10", "mode": "sparse_max", "value": 0.695},
        ],
        "training": {"Data": "27,419 pairs"},
        **changes,
    }
    file = folder / "figures.json"
    file.write_text(json.dumps({"ours": {name: value for name, value in entry.items() if value is not None}}))
    return file


def test_our_measured_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(building.RELEASES, "ours", releases.Release("checkpoints/x", "y", 1, 1, 256))
    monkeypatch.setattr(building, "FIGURES", figures_file(tmp_path))
    building.build(LLADA, tmp_path / "ours", SINGLE, with_backbone=True, recording=building.Recording(known_as="ours"))
    text = (tmp_path / "ours" / "README.md").read_text()
    assert table(text, "Debian descriptions") == ["Debian descriptions", "nDCG@10", "`single_dense`", "0.538"]
    assert "Measured with this code: `diffretriever evaluate …` on 2 cores." in text
    assert "27,419 pairs" in text.split("## Training")[1]
    assert "A small demonstration model" in text
    values = [metric["value"] for result in metadata(text)["model-index"][0]["results"] for metric in result["metrics"]]
    assert values == [0.538, 0.695]
    assert "arXiv:2605.07210" not in json.dumps(metadata(text).get("model-index"))
    assert card.metadata_problems(text, {"base_model_name_or_path": "backbone"}, has_adapter=True) == []


@pytest.mark.parametrize(
    "given",
    [{"recommended_fusion_weight": 0.3}, {"query_length": 9, "passage_length": 9}, {"adapter_dtype": "bfloat16"}],
)
def test_other_settings_than_the_measured_have_no_figures(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "diffretriever-llada-tiny-single"
    building.build_known(name, tmp_path / "changed", **given)
    text = (tmp_path / "changed" / "README.md").read_text()
    assert "Measured with this code" not in text
    assert "model-index" not in metadata(text)
    as_it_is = {"num_query_masks": 1, "max_length": 120, "recommended_mode": "fusion_single_sparse_max"}
    building.build_known(name, tmp_path / "same", **as_it_is)
    assert "Measured with this code" in (tmp_path / "same" / "README.md").read_text()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"adapter_sha256": "0" * 64}, "the figures of ours were measured with another adapter .* measure again"),
        ({"hardware": None}, "the entry ours lacks hardware"),
        ({"results": [{"dataset": "x", "value": 1}]}, "ours, result 0 lacks metric, mode"),
    ],
)
def test_figures_that_do_not_fit(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    file = figures_file(tmp_path, **changes)
    sha256 = hashlib.sha256((Path(SINGLE) / "adapter_model.safetensors").read_bytes()).hexdigest()
    with pytest.raises(ValueError, match=words):
        card.measured_figures(file, "ours", sha256)
    assert card.measured_figures(file, "another", sha256) is None
    assert card.measured_figures(tmp_path / "none.json", "ours", sha256) is None
    file.write_text("{")
    with pytest.raises(ValueError, match=r"figures\.json: not valid JSON"):
        card.measured_figures(file, "ours", sha256)


# ------------------------------------------------------------------------------------------------------ bad metadata


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text.split("---\n", 2)[2], "README.md has no metadata: it must start with a YAML block"),
        (lambda text: text.replace("license: mit", "license: [mit"), "the metadata is not valid YAML: "),
        (lambda text: text.replace("license: mit", f"license: {'[' * 5000}"), "the metadata is not valid YAML: "),
        (lambda text: text.replace("license: mit", "license: 2020-99-99"), "the metadata is not valid YAML: "),
        (lambda text: "---\n- a\n- b\n---\n", "the metadata must be `key: value` lines"),
        (lambda text: text.replace("license: mit\n", ""), "the metadata lacks `license`; build the release again"),
        (lambda text: text.replace("pipeline_tag: feature-extraction\n", ""), "lacks `pipeline_tag`"),
        (lambda text: text.replace("base_model_relation: adapter\n", ""), "lacks `base_model_relation`"),
        (
            lambda text: text.replace("base_model: GSAI", "base_model: OTHER"),
            "but config.json's backbone is 'GSAI-ML/LLaDA",
        ),
        (lambda text: text.replace("relation: adapter", "relation: merge"), "is 'merge', but this is an adapter"),
        (lambda text: text.replace("    metrics:\n", "    numbers:\n"), "the metadata's model-index is malformed"),
    ],
)
def test_bad_metadata(change: Any, words: str) -> None:
    text, config = paper_card("diffretriever-llada-8b-single", "diffretriever-llada-8b-single")
    assert change(text) != text
    assert words in "\n".join(card.metadata_problems(change(text), config, has_adapter=True))


@pytest.mark.usefixtures("quick_check")
def test_bad_metadata_is_found_by_check(release: Path) -> None:
    (release / "README.md").write_text((release / "README.md").read_text().replace("license: mit\n", ""))
    assert "README.md: the metadata lacks `license`" in "\n".join(check.check_release(release).problems)


# --------------------------------------------------------------------------------------------------- the code's Hub id


@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize("repo_id", ["lab/x", "x", "diffretriever-llada-tiny-single"])
def test_what_the_code_of_a_card_loads(repo_id: str, single: bool) -> None:
    """On the Hub branches, elsewhere folders; a check puts its own folder in, a push the repository."""
    blocks = card.example_blocks(repo_id, single)
    code = "\n".join(blocks)
    assert ('revision="sparse"' in code) == ("/" in repo_id)
    assert ("shipped_release(" in code) == ("tiny" in repo_id)
    checked = "\n".join(card.with_folder(block, repo_id, "/here") for block in blocks)
    assert "revision" not in checked
    assert "import shipped" not in checked
    assert f'"{repo_id}"' not in checked
    assert ("'/here/sparse'" in checked) or ('f"{release}/sparse"' in checked and "release = '/here'" in checked)
    assert card.with_repo_id(code, repo_id, "lab/other") == "\n".join(card.example_blocks("lab/other", single))


# --------------------------------------------------------------------------------------- what others chose


def test_a_folders_name_is_only_a_name(tmp_path: Path) -> None:
    backbone = Path(shutil.copytree(LLADA, tmp_path / "tiny](javascript:x)<script>`|"))
    building.build(str(backbone), tmp_path / "odd", SINGLE)
    card = (tmp_path / "odd" / "README.md").read_text()
    assert "`tiny__javascript:x__script___`" in card
    assert "<script>" not in card


@pytest.mark.parametrize("value", ["16 |\n\n```python\nprint('ran')\n```", True, None, [16]])
@pytest.mark.parametrize("field", ["lora_alpha", "r"])
def test_an_adapters_numbers_are_numbers(field: str, value: Any) -> None:
    lora = {"r": 16, "lora_alpha": 64, field: value}
    with pytest.raises(ValueError, match=f"adapter_config.json: `{field}` must be a number"):
        card.render_card(building.default_config(), card.CardFacts("lab/x", None, "x", 64, 30, lora, "0" * 64))


def test_blocks_of_a_card_are_the_templates(tmp_path: Path) -> None:
    for single in (True, False):
        config = building.default_config()
        config.num_query_masks = config.num_passage_masks = 1 if single else 4
        text = card.render_card(config, card.CardFacts("lab/x", None, "x", 64, 30, None, None))
        assert [source for _, source in card.code_blocks(text)] == card.example_blocks("lab/x", single)


def test_with_backbone_takes_the_backbone_alone(tmp_path: Path) -> None:
    backbone = Path(shutil.copytree(LLADA, tmp_path / "tiny-llada"))
    for stray in ("client_secret.json", "other.safetensors", "notes.jinja"):
        (backbone / stray).write_text("{}")
    building.build(str(backbone), tmp_path / "whole", SINGLE, with_backbone=True)
    copied = {file.name for file in (tmp_path / "whole" / "backbone").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= copied
    assert not copied & {"client_secret.json", "other.safetensors", "notes.jinja"}
