"""What a server does around an engine that runs an exported model: texts to token ids, states to vectors.

The protocol is that of `TextServer`'s requests and answers, JSON values, whatever carries them; with vLLM, `data` of
/pooling.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from ..files.hashes import hash_json
from ..files.lines import read_object
from ..files.sealed import Damaged, check_seal
from ..model.backbone_loading import load_tokenizer
from ..model.chat_template import render_prompts
from ..model.checked_files import read_headers
from ..model.configuration_diffretriever import DiffRetrieverConfig
from ..model.release_code import hash_code
from ..model.sparse_head import content_columns, sparse_vectors
from ..model.tokenization_helpers import RetrievalTokenizer, name_mask_token
from .plain_model import SERVING_FILE

SIDES = {"query": True, "passage": False, "document": False}
EXPECTED = (
    '`data` must be {"side": "query" or "passage", "texts": [strings]}, or {"describe": true}; "allow_empty": true '
    "lets in texts without words"
)
HEAD = "lm_head.weight"


class TextServer:
    """Texts in, vectors out, for an engine that returns the states at the masks.

    Args:
        folder: as `export_plain` made it.
        dtype: that the engine computes in.
        versions: of the engine, by its name.

    Raises:
        FileNotFoundError, ValueError: the folder is no export, was altered, or is of another version's code.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, versions: Mapping[str, str]) -> None:
        facts = read_facts(folder)
        try:
            check_seal(folder)
        except Damaged as error:
            raise ValueError(f"{folder} {error}; export it again.") from error
        _check_code(folder, facts["settings"]["passage"]["model_parts"]["code"])
        config = DiffRetrieverConfig(**facts["config"])
        tokenizer = load_tokenizer([folder], config.vocab_size or 0)
        name_mask_token(tokenizer, config.mask_token, config.backbone_type in ("llada", "dream"))
        self._texts = RetrievalTokenizer(tokenizer, config, render_prompts(tokenizer, config))
        self._head = _head_of(folder, dtype)
        self._config, self.mask_id = config, self._texts.mask_id
        if self.mask_id != facts["mask_id"]:
            raise ValueError(f"{folder / SERVING_FILE}: mask_id {facts['mask_id']}; the tokenizer's is {self.mask_id}.")
        self._description = _description(facts, dtype, versions, config)
        self._name = hash_json(self._description)

    def prompts(self, data: Any) -> list[list[int]]:
        """Return the token ids that a request has the engine read.

        Args:
            data: as the request has it. One that asks for a description has the engine read a single mask, since an
                engine answers nothing without a prompt.

        Raises:
            ValueError: the request is wrong; the message says in what, and what was expected.
        """
        if isinstance(data, dict) and data.get("describe") is True and len(data) == 1:
            return [[self.mask_id]]
        is_query, texts = _checked(data)
        return self._texts.tokenize(texts, is_query)

    @torch.inference_mode()
    def answer(self, outputs: Iterable[tuple[Sequence[int], torch.Tensor]]) -> dict[str, Any]:
        """Return the answer to a request.

        Args:
            outputs: of each of its prompts the token ids, and the states at the masks [K, H].

        Returns:
            For texts, `model`, the SHA-256 of the description, and `vectors`, of each text: `dense`, base64 of K·H
            little-endian float32 numbers; `sparse`, {"indices", "values"} by falling value; and how many `tokens` of it
            were read. For a description, `model` and `description`: `settings` of each side, as the stores of these
            vectors have them, `mode`, the scoring mode that suits the release, and `cut_in_training`.

        Raises:
            RuntimeError: states that are not finite.
        """
        outputs = list(outputs)
        if [list(ids) for ids, _ in outputs] == [[self.mask_id]]:
            return {"model": self._name, "description": self._description}
        return {"model": self._name, "vectors": [self._vectors(list(ids), states) for ids, states in outputs]}

    def _vectors(self, ids: list[int], states: torch.Tensor) -> dict[str, Any]:
        states = states.float().cpu()  # [K, H]
        if not torch.isfinite(states).all():
            raise RuntimeError("the states at the masks are not finite; serve the model in bfloat16 or float32.")
        dense = nn.functional.normalize(states, dim=-1) if self._config.normalize else states
        text_ids = self._text_in(ids)
        words = self._texts.content_ids(self._texts.text_of(text_ids))
        content = content_columns([words], self._head.out_features, self.mask_id)
        top_k = min(self._config.sparse_top_k, self._head.out_features)
        indices, values = sparse_vectors(self._head, states[None], content, top_k, self.mask_id)
        found = int((values[0] > 0).sum())
        return {
            "dense": base64.b64encode(dense.numpy().astype("<f4").tobytes()).decode(),
            "sparse": {"indices": indices[0, :found].tolist(), "values": values[0, :found].tolist()},
            "tokens": len(text_ids),
        }

    def _text_in(self, ids: list[int]) -> list[int]:
        """Return the token ids of the text in a prompt, of whichever side."""
        row = torch.tensor([ids])
        for is_query in (True, False):
            try:
                return self._texts.locate(row, torch.ones_like(row), is_query)[1][0]
            except ValueError as error:
                wrong = error
        raise RuntimeError(f"the engine answered to a prompt that was not asked: {wrong}") from wrong


def read_facts(folder: Path) -> dict[str, Any]:
    """Read serving.json.

    Raises:
        FileNotFoundError: the folder has none.
        ValueError: it is damaged.
    """
    if not (folder / SERVING_FILE).is_file():
        raise FileNotFoundError(
            f"{folder} holds no {SERVING_FILE}; make a folder that does: `diffretriever export-vllm RELEASE --output "
            "DIR`."
        )
    return read_object(folder / SERVING_FILE)


def _check_code(folder: Path, recorded: Mapping[str, str]) -> None:
    """Refuse an export of which the installed code would make other vectors than its release's."""
    specs = {name: find_spec(f"diffretriever.model.{name}") for name in recorded}
    differing = [
        name
        for name, spec in specs.items()
        if not (spec and spec.origin) or hash_code(Path(spec.origin)) != recorded[name]
    ]
    if differing:
        raise ValueError(
            f"{folder} was exported with other code of diffretriever ({', '.join(sorted(differing))}); export it again "
            "with the installed version."
        )


def _head_of(folder: Path, dtype: torch.dtype) -> nn.Linear:
    """Return the output head on the CPU, [V, H]: mapped from its file where it is stored in the engine's dtype."""
    with safe_open(read_headers(folder)[HEAD][0], "pt") as file:
        weight = file.get_tensor(HEAD).to(dtype)
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    head.weight = nn.Parameter(weight, requires_grad=False)
    return head


def _description(
    facts: Mapping[str, Any], dtype: torch.dtype, versions: Mapping[str, str], config: DiffRetrieverConfig
) -> dict[str, Any]:
    settings = {side: dict(fields) for side, fields in facts["settings"].items()}
    for fields in settings.values():
        fields["options"] = fields["options"] | {"model_dtype": str(dtype).removeprefix("torch.")}
        fields["library_versions"] = fields["library_versions"] | versions
    more = {name: getattr(config, name) for name in ("cut_in_training", "recommended_fusion_weight")}
    return {"settings": settings, "mode": config.default_mode, **more}


def _checked(data: Any) -> tuple[bool, list[str]]:
    """Return a request's side and texts, or say what is wrong with it."""
    if not isinstance(data, dict) or not {"side", "texts"} <= data.keys() <= {"side", "texts", "allow_empty"}:
        got = sorted(map(str, data)) if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"{EXPECTED}; got {got!s:.200}.")
    side, texts = data["side"], data["texts"]
    if not isinstance(side, str) or side not in SIDES:
        raise ValueError(f"{EXPECTED}; `side` is {side!r:.80}.")
    if not isinstance(texts, list) or not texts:
        raise ValueError(f"{EXPECTED}; `texts` is {texts!r:.80}.")
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"{EXPECTED}; `texts[{number}]` is {text!r:.80}.")
        if not text.strip() and data.get("allow_empty") is not True:
            raise ValueError(f"{EXPECTED}; `texts[{number}]` has no words.")
    return SIDES[side], texts
