"""Initial weights from the corpus's own word statistics, so that a small budget is not spent on finding them.

Masked denoising from random weights stays at the unigram distribution for millions of tokens. Which tokens stand beside
which is known after one pass of counting: the factors of that table are the embeddings and the output head (Levy &
Goldberg 2014: word vectors factorise pointwise mutual information), and the first layer's heads begin by looking at the
previous token, the next one, and the neighbourhood. Everything is trained from there.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import nn

from ..model.modeling_diffretriever import DiffRetriever
from .corpus import IdLists

WINDOW = 4  # tokens to each side that count as neighbours, with weight 1 / distance
RAREST = 0.5  # a weighted count that is no more than this is one distant meeting: chance
SMOOTHING = 0.75  # exponent on the context counts, as in word2vec
SPARE_DIRECTIONS, POWER_ITERATIONS = 16, 4  # of the randomised factorisation
EMBEDDING_NORM = 0.35  # median norm of an embedding's statistics beside its constant coordinate of 1
HEAD_GAIN = 2.0  # the first layer averages over several tokens, which weakens each one's vote
PEAK = 8.0  # attention logit of a head at the distance it looks at
# By the format's shift: distance from the predicted token and share of the peak, for the first layer's heads in turn.
# With shift 1 the state that predicts a token is the previous token's own: the heads look at those that follow.
HEADS = {0: ((-1.0, 1.0), (1.0, 1.0), (0.0, 0.5)), 1: ((1.0, 1.0), (1.0, 1.0), (2.0, 1.0))}
SLOWEST = 0.15  # radians a token: RoPE frequencies below it hardly tell neighbouring positions apart


def neighbour_counts(ids: IdLists, vocab_size: int) -> csr_array:
    """Return symmetric weighted counts of tokens within `WINDOW` of each other in one text: float32 [V, V]."""
    flat, starts = np.frombuffer(ids.flat, dtype=np.int32), np.frombuffer(ids.starts, dtype=np.int64)
    text = np.repeat(np.arange(len(ids)), np.diff(starts))
    counts = csr_array((vocab_size, vocab_size), dtype=np.float32)
    for distance in range(1, min(WINDOW, len(flat) - 1) + 1):
        same = text[:-distance] == text[distance:]
        weights = np.full(int(same.sum()), 1 / distance, dtype=np.float32)
        pairs = (flat[:-distance][same], flat[distance:][same])
        counts = counts + csr_array((weights, pairs), shape=counts.shape)  # equal pairs add up
    return csr_array(counts + counts.T)


def positive_pmi(counts: csr_array) -> csr_array:
    """Return positive pointwise mutual information: max(0, log(p(a, b) / (p(a) p(b)))), with p(b) smoothed.

    Args:
        counts: [V, V].

    Returns:
        float32 [V, V]; entries that are not positive are absent.
    """
    total, table = counts.sum(), counts.tocoo()
    rows = counts.sum(axis=1)  # [V]
    columns = rows**SMOOTHING
    columns = columns * (total / columns.sum())
    left, right = table.coords
    value = np.log(table.data * total / (rows[left] * columns[right]))
    kept = (value > 0) & (table.data > RAREST)
    return csr_array((value[kept].astype(np.float32), (left[kept], right[kept])), shape=counts.shape)


def low_rank_factors(table: csr_array, rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the strongest `rank` directions of a table, its singular values shared by both factors.

    Args:
        table: [V, V].
        rank: R.
        seed: of the randomised SVD (Halko, Martinsson & Tropp 2011).

    Returns:
        Two float32 [V, R], the first times the transposed second being near the table.
    """
    entries = table.tocoo()
    index = torch.from_numpy(np.stack(entries.coords).astype(np.int64))
    sparse = torch.sparse_coo_tensor(index, torch.from_numpy(entries.data), table.shape, check_invariants=False)
    torch.manual_seed(seed)
    width = min(rank + SPARE_DIRECTIONS, table.shape[0])
    left, strength, right = torch.svd_lowrank(sparse.coalesce(), width, POWER_ITERATIONS)
    root = strength[:rank].sqrt()
    return left[:, :rank] * root, right[:, :rank] * root


def _coordinates(width: int, heads: int) -> torch.Tensor:
    """Return where direction d of the factorisation goes: spread over the heads, the strongest ones first. Int64 [H].

    Direction 0 is the constant; a head reads and writes its own block of width / heads coordinates.
    """
    direction = torch.arange(width)
    return (direction % heads) * (width // heads) + direction // heads


def start_from_statistics(model: DiffRetriever, ids: IdLists, seed: int, shift: int = 0) -> None:
    """Set embeddings, output head and the first layer's attention from a corpus's token statistics.

    Afterwards the other layers still add nothing (see `new_backbone`), and the model predicts a masked token from the
    tokens around it, better than the unigram distribution does.

    Args:
        model: from `new_backbone`.
        ids: the corpus.
        seed: of the randomised factorisation and the first layer's queries and keys.
        shift: a token is predicted from the state so many positions before it: 0 for LLaDA, 1 for Dream.

    Raises:
        ValueError: the corpus has no two neighbouring tokens.
    """
    config = model.backbone.config
    vocab_size, width = config.vocab_size, config.hidden_size
    if not len(ids) or int(np.diff(np.frombuffer(ids.starts, dtype=np.int64)).max()) < 2:
        raise ValueError("the plain texts hold no text of two tokens or more; statistics need neighbouring tokens")
    left, right = low_rank_factors(positive_pmi(neighbour_counts(ids, vocab_size)), width - 1, seed)
    tokens = torch.from_numpy(np.frombuffer(ids.flat, dtype=np.int32).astype(np.int64))
    uses = torch.bincount(tokens, minlength=vocab_size)  # [V]
    place = _coordinates(width, config.num_attention_heads)
    norms = left.norm(dim=1)[uses > 0]
    scale = EMBEDDING_NORM / float(norms.median().clamp(min=1e-6))
    log_p = torch.log((uses + 1.0) / (uses + 1.0).sum())
    embedding, head = torch.zeros(vocab_size, width), torch.zeros(vocab_size, width)
    embedding[:, place[0]] = 1.0
    embedding[:, place[1:]] = left * scale
    # A mask's state is the constant, which RMSNorm brings to sqrt(H), plus what attention adds.
    head[:, place[0]] = (log_p - log_p.mean()) / math.sqrt(width)
    head[:, place[1:]] = right * (HEAD_GAIN / (scale * math.sqrt(width)))
    with torch.no_grad():
        model.backbone.embed_tokens.weight.copy_(embedding)
        model.lm_head.weight.copy_(head)
        _look_at_neighbours(model, int(place[0]), shift)


def _look_at_neighbours(model: DiffRetriever, constant: int, shift: int) -> None:
    """Make the first layer's heads look at the predicted token's neighbours (`HEADS`); values pass through."""
    config, attention = model.backbone.config, model.backbone.layers[0].self_attn
    width, heads, size = config.hidden_size, config.num_attention_heads, attention.head_dim
    for projection in (attention.q_proj, attention.k_proj):
        nn.init.normal_(projection.weight, std=0.02)
    angles = model.backbone.rotary_emb.inv_freq.tolist()  # RoPE's radians a token, for each pair of coordinates
    used = [(pair, angle) for pair, angle in enumerate(angles) if angle > SLOWEST]
    # Query and key are this times the normalised constant, about sqrt(H) at a mask and 0.7 of it at a word.
    amplitude = math.sqrt(PEAK / (0.7 * width * len(used)))
    for number in range(heads):
        distance, share = HEADS[shift][number % len(HEADS[shift])]
        offset = distance + shift
        for pair, angle in used:
            row = number * size + pair
            attention.q_proj.weight[row, constant] += amplitude
            attention.k_proj.weight[row, constant] += share * amplitude * math.cos(angle * offset)
            attention.k_proj.weight[row + size // 2, constant] -= share * amplitude * math.sin(angle * offset)
    nn.init.eye_(attention.v_proj.weight).mul_(width**-0.25)
    nn.init.eye_(attention.o_proj.weight).mul_(width**-0.25)
    attention.v_proj.weight[constant] = 0.0
