"""A model that runs on a server, with as much of a model's interface as encoding and search use."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from ..files.fields import fill
from ..model.batching import DiffRetrieverOutput, encode_in_order, run_side_by_side
from ..model.checked_files import check_fields
from ..model.configuration_diffretriever import RULES
from ..search.qdrant.calls import EngineError
from ..store.manifest import Settings
from .client import TextClient

REQUESTS = 4  # on their way at once, so that the engine always has the next texts
CHARACTERS = 4  # of a token, about
PROMPT = 64  # tokens, about


@dataclass
class ServedText:
    """A text that a server is to encode.

    Args:
        text: the text.
        sequence: as long as the text is thought to be in tokens; when it is encoded, as it is.
        cut: whether the server read less than all of it, once it is encoded.
    """

    text: str
    sequence: range
    cut: bool = False


class ServedModel:
    """Encodes texts on a server; `encode_store` and `Searcher` take it for a model.

    Args:
        client: of the server.

    Attributes:
        config: `hidden_size`, `sparse_top_k`, `default_mode`, `cut_in_training` and `recommended_fusion_weight`, as a
            model's has them.
        device: where its tensors are not: no memory of this machine says how large a batch may be.

    Raises:
        EngineError, EngineAwayError: as `TextClient.ask`.
        ValueError: the server recommends what no model can have.
    """

    def __init__(self, client: TextClient) -> None:
        self._client = client
        answer = client.ask({"describe": True})
        said, self._name = answer.get("description"), answer["model"]
        if not isinstance(said, dict) or not isinstance(said.get("settings"), dict):
            raise EngineError(f"{client.address}: the server does not say what it serves; see docs/vllm.md.")
        self._settings: dict[bool, Settings] = {
            is_query: fill(Settings, said["settings"].get(side), f"{client.address}: settings of the {side} side")
            for side, is_query in (("query", True), ("passage", False))
        }
        passages = self._settings[False]
        sizes = {"hidden_size": passages.hidden_size, "sparse_top_k": passages.sparse_top_k}
        more = {"default_mode": said.get("mode"), "cut_in_training": said.get("cut_in_training")}
        weight = {"recommended_fusion_weight": said.get("recommended_fusion_weight")}
        check_fields(f"{client.address}: ", weight, RULES)
        self.config = SimpleNamespace(**sizes, **more, **weight)
        self.device = torch.device("meta")
        rooms = passages.model_parts["text_tokens"]
        self.layouts = {True: SimpleNamespace(room=rooms["query"]), False: SimpleNamespace(room=rooms["passage"])}

    @property
    def texts(self) -> ServedModel:
        """What prepares texts: the model itself, since the server tokenises."""
        return self

    def prepare(self, texts: Sequence[str], is_query: bool, content_filter: bool = True) -> list[ServedText]:
        """Return texts as `encode_prepared` takes them."""
        room = self.layouts[is_query].room
        return [ServedText(text, range(PROMPT + min(len(text) // CHARACTERS, room))) for text in texts]

    def describe(self, is_query: bool, dtype: str, options: Mapping[str, Any]) -> Settings:
        """Return what the server says of a store of its vectors; see `describe_model`.

        Raises:
            ValueError: an option that the server does not follow.
        """
        said, given = self._settings[is_query], dict(options)
        top_k = given.pop("sparse_top_k", None) or said.sparse_top_k
        if top_k > said.sparse_top_k:
            raise ValueError(
                f"sparse_top_k is {top_k}, but {self._client.address} gives {said.sparse_top_k} weights a text."
            )
        if not given.get("content_filter", True):
            raise ValueError(
                f"{self._client.address} weighs content words alone; leave out --no-content-filter. A store that was "
                "encoded with it is searched by a server in the dense modes alone."
            )
        return replace(said, dtype=dtype, sparse_top_k=top_k, options=said.options | given)

    def encode_batches(
        self,
        prepared: Sequence[ServedText],
        batches: Sequence[Sequence[int]],
        is_query: bool,
        compute_sparse: bool = True,
        sparse_top_k: int | None = None,
    ) -> Generator[tuple[Sequence[int], DiffRetrieverOutput], None, None]:
        """Have batches encoded, a few requests at a time; see `DiffRetriever.encode_batches`."""

        def ask(rows: Sequence[int]) -> DiffRetrieverOutput:
            return self.encode_prepared([prepared[row] for row in rows], is_query, compute_sparse, sparse_top_k)

        yield from run_side_by_side(ask, batches, REQUESTS)

    def encode_prepared(
        self,
        prepared: Sequence[ServedText],
        is_query: bool,
        compute_sparse: bool = True,
        sparse_top_k: int | None = None,
    ) -> DiffRetrieverOutput:
        """Have B texts encoded in one request.

        Args:
            prepared: of `prepare`.
            is_query: the side.
            compute_sparse: also return the sparse vectors.
            sparse_top_k: T, weights kept a text; None is the server's.

        Returns:
            As `DiffRetriever.encode_prepared`, on the CPU.

        Raises:
            ValueError: the server refuses a text.
            EngineError: the server serves another model than before, or its vectors are not this model's.
            EngineAwayError: it does not answer.
        """
        texts = [text.text for text in prepared]
        side = "query" if is_query else "passage"
        answer = self._client.ask({"side": side, "texts": texts, "allow_empty": True})
        if answer["model"] != self._name:
            raise EngineError(
                f"{self._client.address}: the server serves another model than when this run began, and its vectors "
                "are not kept. Start it again as it was, or encode into another folder."
            )
        top_k = min(sparse_top_k or self.config.sparse_top_k, self.config.sparse_top_k)
        zeros = partial(torch.zeros, device="cpu")
        shape = len(texts), self._settings[is_query].num_masks, self.config.hidden_size
        output = DiffRetrieverOutput(repr_hidden=zeros(shape, dtype=torch.float32)).on_side(is_query)
        if compute_sparse:
            output["sparse_indices"] = zeros((len(texts), top_k), dtype=torch.int64)
            output["sparse_values"] = zeros((len(texts), top_k), dtype=torch.float32)
        for row, (text, found) in enumerate(zip(prepared, answer["vectors"], strict=True)):
            try:
                self._take(output, row, found)
                text.sequence, text.cut = range(found["tokens"]), found["tokens"] >= self.layouts[is_query].room
            except (KeyError, TypeError, ValueError, RuntimeError, binascii.Error) as error:  # torch's: another shape
                raise EngineError(
                    f"{self._client.address}: the server's vectors are not those that it announced ({error!s:.200})."
                ) from error
        return output

    def _take(self, output: DiffRetrieverOutput, row: int, found: Mapping[str, Any]) -> None:
        """Put one text's vectors into their row, each number checked."""
        dense = np.frombuffer(base64.b64decode(found["dense"], validate=True), "<f4")
        output["repr_hidden"][row] = torch.from_numpy(dense.astype(np.float32)).view(output["repr_hidden"].shape[1:])
        if not torch.isfinite(output["repr_hidden"][row]).all():
            raise ValueError("dense numbers that are not finite")
        if "sparse_indices" not in output:
            return
        top_k = output["sparse_indices"].shape[1]
        indices = torch.tensor(found["sparse"]["indices"][:top_k], dtype=torch.int64, device="cpu")
        values = torch.tensor(found["sparse"]["values"][:top_k], dtype=torch.float32, device="cpu")
        if len(indices) != len(values):
            raise ValueError(f"{len(indices)} token ids with {len(values)} weights")
        if not bool(((indices >= 0) & (indices < self._settings[True].vocab_size)).all()):
            raise ValueError("token ids outside the vocabulary")
        if not bool((torch.isfinite(values) & (values > 0)).all()):
            raise ValueError("sparse weights that are not above 0")
        output["sparse_indices"][row, : len(indices)] = indices
        output["sparse_values"][row, : len(values)] = values

    def encode_texts(
        self,
        texts: Iterable[str],
        is_query: bool,
        compute_sparse: bool = True,
        content_filter: bool = True,
        show_progress_bar: bool = False,
    ) -> DiffRetrieverOutput:
        """Have any number of texts encoded; see `DiffRetriever.encode_texts`."""
        if compute_sparse:
            self.describe(is_query, "float32", {"content_filter": content_filter})
        options: Any = {"compute_sparse": compute_sparse, "sparse_top_k": None, "content_filter": content_filter}
        found = encode_in_order(self, texts, is_query, None, None, show_progress_bar, **options)
        return DiffRetrieverOutput(**found).on_side(is_query)
