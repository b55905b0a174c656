"""MTEB 2's description (`ModelMeta`) and loader of each release in each scoring mode.

`single_dense`, `sparse_max` and `multi_dense` go through sentence-transformers, from a release's root and its branches.
The two fusion modes need the scores of all candidates at once, which no single embedding has, so they go through
`FusionSearch`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import AutoModel

from .data.texts import join_title
from .files.install import install_hint
from .publishing.releases import DREAM, LLADA, RELEASES, SMOLLM2
from .search.modes import SPARSE

# What each mode is in sentence-transformers: the release's revision, the wrapper's name in mteb, its similarity there.
EMBEDDING_MODES = {
    "single_dense": ("main", "SentenceTransformerEncoderWrapper", "dense", "cosine"),
    "sparse_max": ("sparse", "SparseEncoderWrapper", "sparse", "dot"),
    "multi_dense": ("multi-vector", "MultiVectorWrapper", "late-interaction", "MaxSim"),
}
FUSION_MODES = ("fusion_single_sparse_max", "fusion_multi_sparse_max")
MODES = (*EMBEDDING_MODES, *FUSION_MODES)
QUERY_BLOCK = 64  # queries scored against the whole corpus at once
CITATION = """@article{wang2026diffretriever,
  title={DiffRetriever: Parallel Representative Tokens for Retrieval with Diffusion Language Models},
  author={Wang, Shuai and Yin, Yu and Zhuang, Shengyao and Koopman, Bevan and Zuccon, Guido},
  journal={arXiv preprint arXiv:2605.07210},
  year={2026}
}"""


@dataclass(frozen=True)
class Backbone:
    """Sizes of a backbone.

    Args:
        num_parameters: weights, embedding and head included.
        vocab_size: V; hidden_size: H.
        training_sets: the adapters' training data that MTEB knows, by its names.
    """

    num_parameters: int
    vocab_size: int
    hidden_size: int
    training_sets: frozenset[str] = frozenset()


BACKBONES = {
    LLADA: Backbone(8_015_581_184, 126_464, 4096, frozenset({"MSMARCO"})),
    DREAM: Backbone(7_615_616_512, 152_064, 3584, frozenset({"MSMARCO"})),
    "checkpoints/llada-tiny": Backbone(6_637_248, 12_288, 192),
    "checkpoints/dream-tiny": Backbone(6_639_552, 12_288, 192),
    f"checkpoints/{SMOLLM2}": Backbone(134_515_008, 49_152, 576),
}


def model_meta(release: str, mode: str, organisation: str, **loader_options: Any) -> Any:
    """Describe one release in one scoring mode; `.load_model()` or `mteb.evaluate` loads it from the Hub.

    Args:
        release: a name in `publish.py list`.
        mode: one of MODES.
        organisation: the Hub's user or organisation that holds the release.
        loader_options: for the model's class, e.g. `cache_folder` (sentence-transformers) or `device`. Since
            sentence-transformers 6, its modes need `trust_remote_code=True`: it runs the release's own code.

    Returns:
        An `mteb.models.ModelMeta`.

    Raises:
        ValueError: unknown release or mode.
        ImportError: mteb is not installed.
    """
    if release not in RELEASES:
        raise ValueError(f"release {release!r} is not known; the releases are {', '.join(RELEASES)}.")
    if mode not in MODES:
        raise ValueError(f"scoring mode {mode!r} is not known; the modes are {', '.join(MODES)}.")
    models = _mteb_models()
    known = RELEASES[release]
    backbone = BACKBONES[known.base]
    fields: dict[str, Any] = {"embed_dim": backbone.hidden_size, "model_type": ["hybrid"]}
    if mode in EMBEDDING_MODES:
        revision, wrapper, kind, similarity = EMBEDDING_MODES[mode]
        loader = _with_our_titles(getattr(models.sentence_transformer_wrapper, wrapper))
        fields |= {"model_type": [kind], "embed_dim": backbone.vocab_size if kind == "sparse" else backbone.hidden_size}
    else:
        revision, loader, similarity = "main", FusionSearch, None
        fields["experiment_kwargs"] = {"mode": mode}  # mteb hands it to the loader and keeps such results apart
    return models.ModelMeta(
        name=f"{organisation}/{release}",
        revision=revision,
        loader=loader,
        loader_kwargs=loader_options,
        similarity_fn_name=similarity,
        n_parameters=backbone.num_parameters,
        n_embedding_parameters=backbone.vocab_size * backbone.hidden_size,
        memory_usage_mb=round(2 * backbone.num_parameters / 2**20),  # bfloat16
        max_tokens=known.max_length,
        adapted_from=None if known.is_local else known.base,
        training_datasets=set(backbone.training_sets),
        languages=["eng-Latn"],
        license="mit",
        open_weights=True,
        public_training_code=None,
        public_training_data="Tevatron/msmarco-passage-aug" if backbone.training_sets else None,
        framework=["Sentence Transformers", "PyTorch"] if mode in EMBEDDING_MODES else ["Transformers", "PyTorch"],
        use_instructions=True,
        release_date=None,
        citation=CITATION,
        **fields,
    )


def model_metas(organisation: str) -> list[Any]:
    """Return the `ModelMeta` of every release in every mode."""
    return [model_meta(release, mode, organisation) for release in RELEASES for mode in MODES]


def _mteb_models() -> Any:
    try:
        from mteb import models
        from mteb.models import sentence_transformer_wrapper  # noqa: F401
    except ImportError as error:
        raise ImportError(f"MTEB is not installed: {install_hint('mteb')}") from error
    return models


def _with_our_titles(wrapper: type) -> type:
    """Return mteb's wrapper, joining titles as releases encode corpora ("T. x"), where mteb puts a blank between."""

    class Wrapper(wrapper):
        """Encodes passages whose title and text are joined anew."""

        def encode(self, inputs: Any, **options: Any) -> Any:
            if {"title", "body"} <= set(inputs.dataset.column_names):  # "body" is the text without its title
                rows = inputs.dataset.map(lambda row: {"text": join_title(row["title"], row["body"])})
                inputs = DataLoader(rows, batch_size=inputs.batch_size, collate_fn=inputs.collate_fn)
            return super().encode(inputs, **options)

    return Wrapper


class FusionSearch:
    """A release in any scoring mode as MTEB's SearchProtocol; the only way to evaluate a fusion mode there.

    It holds the vectors of the whole corpus in memory, and scores QUERY_BLOCK queries against all of them at once.

    Args:
        model: Hub id or folder of a release.
        revision: of the Hub repository.
        mode: one of MODES.
        device: where to encode; None is the GPU where there is one.
        options: for `AutoModel.from_pretrained`.
    """

    def __init__(
        self,
        model: str,
        revision: str | None = None,
        *,
        mode: str,
        device: str | None = None,
        **options: Any,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"scoring mode {mode!r} is not known; the modes are {', '.join(MODES)}.")
        self.mode = mode
        if revision is not None:
            options["revision"] = revision
        self.model = AutoModel.from_pretrained(model, **options)
        self.model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        empty = _mteb_models().ModelMeta.create_empty
        self.mteb_model_meta = empty(overwrites={"name": model, "revision": revision, "loader": type(self)})
        self.passage_ids: list[str] = []
        self.passages: Mapping[str, torch.Tensor] = {}

    def index(self, corpus: Iterable[Mapping[str, Any]], *, encode_kwargs: Mapping[str, Any], **context: Any) -> None:
        """Encode the corpus.

        Args:
            corpus: rows with "id", "text" and perhaps "title", which is put in front as everywhere here.
            encode_kwargs: `batch_size` and `show_progress_bar`.
        """
        rows = list(corpus)
        self.passage_ids = [row["id"] for row in rows]
        self.passages = self._encode([join_title(row.get("title"), row["text"]) for row in rows], False, encode_kwargs)

    def search(
        self,
        queries: Iterable[Mapping[str, Any]],
        *,
        top_k: int,
        encode_kwargs: Mapping[str, Any],
        top_ranked: Mapping[str, Sequence[str]] | None = None,
        **context: Any,
    ) -> dict[str, dict[str, float]]:
        """Rank the corpus, or each query's candidates, for each query.

        Args:
            queries: rows with "id" and "text".
            top_k: passages to return for a query.
            encode_kwargs: as for `index`.
            top_ranked: each query's candidates, by passage id, in a reranking task; else the whole corpus is ranked.

        Returns:
            Query id to passage id to score.

        Raises:
            ValueError: `index` was not called, or a candidate is not in the corpus.
        """
        if not self.passage_ids:
            raise ValueError("search() was called before index(); there is no corpus to search.")
        rows = list(queries)
        query_ids = [row["id"] for row in rows]
        encoded = self._encode([row["text"] for row in rows], True, encode_kwargs)
        if top_ranked is not None:
            places = {passage: place for place, passage in enumerate(self.passage_ids)}
            return {
                query: self._best(encoded, [number], _places(places, query, top_ranked), top_k)[0]
                for number, query in enumerate(query_ids)
            }
        everything = list(range(len(self.passage_ids)))
        found: list[dict[str, float]] = []
        for start in range(0, len(rows), QUERY_BLOCK):
            block = list(range(start, min(start + QUERY_BLOCK, len(rows))))
            found += self._best(encoded, block, everything, top_k)
        return dict(zip(query_ids, found, strict=True))

    def _encode(self, texts: list[str], is_query: bool, options: Mapping[str, Any]) -> Mapping[str, torch.Tensor]:
        return self.model.encode_texts(
            texts,
            is_query,
            batch_size=options.get("batch_size"),
            show_progress_bar=bool(options.get("show_progress_bar", False)),
            compute_sparse=self.mode in SPARSE,
        )

    def _best(
        self, queries: Mapping[str, torch.Tensor], rows: list[int], places: list[int], top_k: int
    ) -> list[dict[str, float]]:
        """Score some queries against some passages; returns each query's best by passage id."""
        scores = self.model.score(_rows(queries, rows), _rows(self.passages, places), self.mode)  # [rows, places]
        best = scores.topk(min(top_k, len(places)), dim=1)
        return [
            {self.passage_ids[places[column]]: score for column, score in zip(columns, values, strict=True)}
            for columns, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]


def _rows(output: Mapping[str, torch.Tensor], rows: list[int]) -> dict[str, torch.Tensor]:
    if rows == list(range(len(output["repr_hidden"]))):
        return dict(output)
    return {name: tensor[rows] for name, tensor in output.items()}


def _places(places: Mapping[str, int], query: str, top_ranked: Mapping[str, Sequence[str]]) -> list[int]:
    candidates = top_ranked.get(query, [])
    unknown = [passage for passage in candidates if passage not in places]
    if unknown or not candidates:
        what = f"passage {unknown[0]!r}, which is not in the corpus" if unknown else "no passage"
        raise ValueError(f"the candidates of query {query!r} hold {what}; give passage ids of the corpus.")
    return [places[passage] for passage in candidates]
