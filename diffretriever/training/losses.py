"""Training objectives: InfoNCE over MaxSim and over sparse dot products (paper §3.4), and masked denoising."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional as F


def maxsim(query: torch.Tensor, passage: torch.Tensor) -> torch.Tensor:
    """Late interaction (paper §3.3): mean over the query's masks of the max over the passage's.

    Args:
        query: [Q, K_q, H], L2-normalised.
        passage: [P, K_p, H], L2-normalised.

    Returns:
        [Q, P].
    """
    queries, k_q, width = query.shape
    passages, k_p, _ = passage.shape
    similarity = query.reshape(-1, width) @ passage.reshape(-1, width).T  # [Q*K_q, P*K_p]
    return similarity.view(queries, k_q, passages, k_p).amax(-1).mean(1)


def info_nce(scores: torch.Tensor, targets: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """InfoNCE (paper eq. 5): -log softmax of the positive's score among all candidates, mean over queries.

    Args:
        scores: [Q, P].
        targets: int64 [Q], the positive's column.
        temperature: divides the scores.

    Raises:
        ValueError: if the temperature is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    return F.cross_entropy(scores.float() / temperature, targets)


def dense_loss(
    query: torch.Tensor, passage: torch.Tensor, targets: torch.Tensor, temperature: float, symmetric: bool = False
) -> torch.Tensor:
    """InfoNCE over MaxSim of the L2-normalised mask states (paper §3.4).

    Args:
        query: mask states [Q, K_q, H], not normalised.
        passage: mask states [P, K_p, H], not normalised; rows beyond the positives are negatives.
        targets: int64 [Q], each query's positive among the passages.
        temperature: of the softmax.
        symmetric: also rank the queries for each positive passage (small models learn faster so).
    """
    scores = maxsim(F.normalize(query.float(), dim=-1), F.normalize(passage.float(), dim=-1))  # [Q, P]
    loss = info_nce(scores, targets, temperature)
    if symmetric:
        own = torch.arange(len(targets), device=scores.device)
        loss = (loss + info_nce(scores[:, targets].T, own, temperature)) / 2
    return loss


def membership(id_lists: Sequence[Sequence[int]], columns: torch.Tensor) -> torch.Tensor:
    """Which of the columns each list holds.

    Args:
        id_lists: B lists of token ids.
        columns: int64 [C], sorted and unique.

    Returns:
        float [B, C] of 0 and 1.
    """
    found = torch.zeros(len(id_lists), len(columns), device=columns.device)
    place = {token: number for number, token in enumerate(columns.tolist())}
    for row, ids in enumerate(id_lists):
        here = [place[token] for token in ids if token in place]
        found[row, here] = 1.0
    return found


# Rows of the output head's weight for some token ids: int64 [C] -> [C, H]. A function, because a head with an
# adapter has no weight of its own, and the whole [V, H] product would be gigabytes at full size.
HeadRows = Callable[[torch.Tensor], torch.Tensor]


def sparse_weights(states: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Sparse weights log(1 + relu(max over K)) (paper §3.3).

    Args:
        states: mask states [B, K, H].
        rows: the output head's rows for the wanted columns, [C, H].

    Returns:
        [B, C], float32.
    """
    logits = states @ rows.T  # [B, K, C]
    return torch.log1p(torch.relu(logits.float().amax(1)))


def sparse_scores(
    query: torch.Tensor,
    passage: torch.Tensor,
    head: HeadRows,
    query_words: Sequence[Sequence[int]],
    passage_words: Sequence[Sequence[int]],
) -> torch.Tensor:
    """Dot products of content-filtered sparse vectors; only the queries' columns can contribute.

    Args:
        query, passage: mask states [Q, K_q, H] and [P, K_p, H].
        head: gives the output head's rows.
        query_words, passage_words: content token ids of each text.

    Returns:
        [Q, P].
    """
    columns = torch.tensor(sorted({token for ids in query_words for token in ids}), device=query.device)
    if not len(columns):
        return query.new_zeros(len(query), len(passage), dtype=torch.float32)
    rows = head(columns)  # [C, H]
    q = sparse_weights(query, rows) * membership(query_words, columns)  # [Q, C]
    p = sparse_weights(passage, rows) * membership(passage_words, columns)  # [P, C]
    return q @ p.T


def word_loss(
    states: torch.Tensor, head: HeadRows, words: Sequence[Sequence[int]], chance: int, vocab_size: int
) -> torch.Tensor:
    """Binary cross-entropy that gives a text's own content words positive logits and random words negative ones.

    Without it the relu of the sparse vectors is zero at the start and passes no gradient.

    Args:
        states: mask states [B, K, H].
        head: gives the output head's rows.
        words: content token ids of each text.
        chance: number of random vocabulary columns added as negatives.
        vocab_size: how many columns there are.
    """
    drawn = torch.randint(vocab_size, (chance,)).tolist()
    columns = torch.tensor(sorted({token for ids in words for token in ids} | set(drawn)), device=states.device)
    logits = (states @ head(columns).T).float().amax(1)  # [B, C]
    truth = membership(words, columns)
    each = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    positive = (each * truth).sum() / truth.sum().clamp(min=1)
    return (positive + (each * (1 - truth)).sum() / (1 - truth).sum().clamp(min=1)) / 2


def denoising_loss(logits: torch.Tensor, targets: torch.Tensor, t: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Masked diffusion objective: cross-entropy on the masked tokens, each over its text's t, per token.

    The divisor is the sum of 1/t over the masked tokens. Its expected value is the number of tokens, by which the
    objective divides; the sum itself gives a loss that varies less with how many tokens happened to be masked.

    Args:
        logits: [M, V] at the M masked tokens.
        targets: int64 [M], the tokens that were masked.
        t: float [B], each text's masking probability.
        rows: int64 [M], the text each masked token is from.

    Returns:
        Scalar: sum over masked tokens of cross-entropy / t, over the sum of 1 / t.
    """
    each = F.cross_entropy(logits.float(), targets, reduction="none")  # [M]
    weight = 1 / t[rows]
    return (each * weight).sum() / weight.sum()
