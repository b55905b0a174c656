"""From the states at the masks to vectors: dense, and lexical weights from their logits (paper §3.3, Eq. 2 and 3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

LOGITS_ELEMENTS = 32 * 1024 * 1024  # logits held at once when the whole vocabulary is asked for


def content_columns(
    content: Sequence[Sequence[int]], vocab_size: int, mask_id: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the vocabulary of a batch, on the CPU.

    Args:
        content: the ids that each text may use, B lists.
        vocab_size: V.
        mask_id: no text may use it; None for a model without.

    Returns:
        Token ids int64 [C], rising, that some text may use, and which of them each text may, bool [B, C].

    Raises:
        ValueError: an id outside the vocabulary.
    """
    kept = [[token for token in ids if token != mask_id] for ids in content]
    flat = torch.tensor([token for ids in kept for token in ids], dtype=torch.long, device="cpu")
    columns, places = flat.unique(return_inverse=True)
    if len(columns) and not 0 <= columns[0] <= columns[-1] < vocab_size:
        raise ValueError(f"content_token_ids must lie in 0 … {vocab_size - 1}, got {columns[[0, -1]].tolist()}.")
    counts = torch.tensor(list(map(len, kept)), device="cpu")
    rows = torch.arange(len(kept), device="cpu").repeat_interleave(counts)
    allowed = torch.zeros(len(kept), len(columns), dtype=torch.bool, device="cpu")
    allowed[rows, places] = True
    return columns, allowed


def sparse_vectors(
    head: Any,
    hidden: torch.Tensor,
    content: tuple[torch.Tensor, torch.Tensor] | None,
    top_k: int,
    mask_id: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the largest weights of log1p(relu(max over K of the logits)); no step waits for an accelerator.

    Args:
        head: the output head, [V, H].
        hidden: [B, K, H], the states at the masks.
        content: `content_columns` of the batch, the only columns that are computed; None lets the whole vocabulary in.
        top_k: T, weights kept a text.
        mask_id: never weighted; None for a model without.

    Returns:
        Token ids int64 [B, T] by falling value, and weights float32 [B, T]; unused slots are 0 and 0.0.
    """
    if content is None:
        rows = max(1, LOGITS_ELEMENTS // (hidden.shape[1] * head.out_features))
        parts = [_top(_whole_vocabulary(head, part, mask_id), None, top_k) for part in hidden.split(rows)]
        return torch.cat([indices for indices, _ in parts]), torch.cat([values for _, values in parts])
    columns, allowed = (part.to(hidden.device) for part in content)  # [C], [B, C]
    return _top(lexical_weights(logits_at(head, hidden, columns)) * allowed, columns, top_k)


def _whole_vocabulary(head: Any, hidden: torch.Tensor, mask_id: int | None) -> torch.Tensor:
    weights = lexical_weights(head(hidden))  # [B, V]
    if mask_id is not None:
        weights[:, mask_id] = 0.0
    return weights


def lexical_weights(logits: torch.Tensor) -> torch.Tensor:
    """Return log(1 + relu(max over K)) of logits [B, K, C], with gradient: float32 [B, C] (paper Eq. 3)."""
    return torch.log1p(F.relu(logits.float().amax(dim=1)))


def logits_at(head: Any, hidden: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Return the logits of some vocabulary entries, as the whole head gives them, with gradient.

    No other column is computed where the head is a plain Linear, alone or with a LoRA adapter beside it.

    Args:
        head: the output head, [V, H].
        hidden: [B, K, H].
        columns: int64 [C], vocabulary entries.

    Returns:
        float32 [B, K, C].
    """
    base = head.get_base_layer() if _is_plain_lora(head) else head
    if type(base) is not nn.Linear or any(hasattr(module, "_hf_hook") for module in head.modules()):
        logits = head(hidden)  # perhaps on another device
        return logits[..., columns.to(logits.device)].float().to(hidden.device)
    hidden = hidden.to(base.weight.dtype)
    logits = F.linear(hidden, base.weight[columns]).float()
    if base is head:
        return logits
    down, up = head.lora_A["default"], head.lora_B["default"].weight[columns]  # [r, H], [C, r]
    update = F.linear(down(head.lora_dropout["default"](hidden.to(down.weight.dtype))), up)
    return logits + head.scaling["default"] * update.float()


def _is_plain_lora(head: Any) -> bool:
    """Whether the head is peft's LoRA layer whose update is scaling · B A x and nothing else."""
    if not hasattr(head, "lora_A") or head.merged or head.disable_adapters:
        return False
    return list(head.lora_A) == ["default"] and not head.lora_variant and not head.lora_bias["default"]


def _top(weights: torch.Tensor, columns: torch.Tensor | None, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids int64 and values float32, both [B, top_k], of the largest weights [B, C] by falling value."""
    size = weights.shape[1]
    weights = weights.float().nan_to_num(nan=torch.inf, posinf=torch.inf)  # encode refuses both
    # Of equal weights the lower ids come first, whatever the batch; topk alone promises nothing about ties. So each key
    # has its weight's bits, which rise with it as there is no sign, and below them its place from the end.
    keys = (weights.view(torch.int32).long() << 32) + torch.arange(size - 1, -1, -1, device=weights.device)
    keys = keys.topk(min(top_k, size), dim=1).values
    places = size - 1 - (keys & 0xFFFFFFFF)
    values = weights.gather(1, places)
    indices = places if columns is None else columns[places]
    indices = indices.masked_fill(values <= 0, 0)
    unused = top_k - indices.shape[1]
    return F.pad(indices, (0, unused)), F.pad(values, (0, unused))


def vectors_of(
    model: Any, batch: Any, top_k: int | None, states: Callable[..., torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """Encode a batch; no step waits for an accelerator, nor looks at what it computes.

    Args:
        model: a DiffRetriever in eval mode.
        batch: a `device_copies.HostBatch`, on the model's device.
        top_k: T, weights kept a text; None leaves the sparse vectors out.
        states: as for `states_at_masks`.

    Returns:
        What of `batching.DiffRetrieverOutput` `encode` returns.
    """
    hidden, _ = states_at_masks(model, batch.ids, batch.mask, batch.positions, states)
    vectors = F.normalize(hidden.float(), dim=-1) if model.config.normalize else hidden.float()
    found = {"repr_hidden": vectors}
    if batch.exists is not None:
        found["repr_mask"] = batch.exists.to(hidden.device)
        found["repr_hidden"] = vectors * found["repr_mask"][..., None]
    if top_k is not None:
        content = None if batch.columns is None else (batch.columns, batch.allowed)
        indices, values = sparse_vectors(model.lm_head, hidden, content, top_k, model.texts.mask_id)
        found |= {"sparse_indices": indices, "sparse_values": values}
    return found


def states_at_masks(
    model: Any,
    ids: torch.Tensor,
    mask: torch.Tensor | None,
    positions: torch.Tensor,
    states: Callable[..., torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the states at the masks; over several steps, each as it was when its mask was filled.

    Multi-step (paper App. A.1): each step fills the K // steps masks that the backbone is surest of and freezes their
    states, which carry no gradient; the last step reads the rest, with gradient.

    Args:
        model: a DiffRetriever, whose config says how many steps.
        ids: int64 [B, L].
        mask: int64 [B, L], 1 for real tokens; None when no row is padded.
        positions: int64 [B, K], where the masks are.
        states: gives the states [B, K, H] of ids, mask and positions; None is the model's forward pass.

    Returns:
        [B, K, H] in the model's dtype, and which of them are frozen, bool [B, K].
    """
    if states is None:
        states = partial(_forward, model)
    steps = min(model.config.num_denoise_steps, positions.shape[1])
    frozen = torch.zeros(positions.shape, dtype=torch.bool, device=ids.device)  # [B, K]
    kept: torch.Tensor | None = None
    for _ in range(steps - 1):
        with torch.no_grad():
            kept = _with_frozen(kept, frozen, states(ids, mask, positions))  # [B, K, H]
            sure = confidence_of(model.lm_head(kept).float(), model.config.denoise_confidence)
        confidence, token = (values.to(ids.device) for values in sure)  # [B, K] each
        chosen = confidence.masked_fill(frozen, -torch.inf).topk(positions.shape[1] // steps, dim=1).indices
        ids = ids.scatter(1, positions.gather(1, chosen), token.gather(1, chosen))
        frozen = frozen.scatter(1, chosen, True)
    return _with_frozen(kept, frozen, states(ids, mask, positions)), frozen


def _forward(model: Any, ids: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor) -> torch.Tensor:
    hidden: torch.Tensor = model(ids, mask, mask_positions=positions).mask_hidden
    return hidden


def _with_frozen(kept: torch.Tensor | None, frozen: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Return new states [B, K, H] with those in place that an earlier step has frozen."""
    return hidden if kept is None else torch.where(frozen.to(hidden.device)[..., None], kept, hidden)


def confidence_of(logits: torch.Tensor, rule: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how sure the backbone is of each mask's best token, and that token (paper App. A.1).

    Args:
        logits: float32 [B, K, V].
        rule: "entropy", the distribution's negative entropy, as the method's code has it for both backbones; or
            "probability", the best token's, by which LLaDA itself decodes.

    Returns:
        Confidence float32 and token id int64, [B, K] each.
    """
    log_probability = logits.log_softmax(dim=-1)
    best, token = log_probability.max(dim=-1)
    if rule == "probability":
        return best.exp(), token
    return (log_probability.exp() * log_probability).sum(dim=-1), token
