"""Why a passage is found: its scores side by side, the words of the sparse vectors, the similarities of MaxSim."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..model.scoring import fusion_weight_of
from ..model.tokenization_helpers import content_words, split_words
from ..store.segments import Segment, existing, query_vectors
from .exact import ExactEngine
from .modes import CANDIDATES
from .searcher import Searcher
from .sparse import sparse_of

MODE = "fusion_multi_sparse_max"  # with one vector a text it is fusion_single_sparse_max
SHOWN = 4000  # characters of a passage, more than models read


@dataclass(frozen=True)
class Word:
    """A word, or a part of a text.

    Args:
        text: as it stands there.
        weight: of its heaviest token in the sparse vector; 0 where it has none.
        shared: whether the other side's vector has one of its tokens, so that the sparse score counts it.
    """

    text: str
    weight: float = 0.0
    shared: bool = False


@dataclass(frozen=True)
class Match:
    """A found passage beside its query.

    Args:
        id: the passage's.
        parts: its text, cut into words of the sparse vector and what stands between; empty where it is not kept.
        words: of its sparse vector; those that the query has as well come first, then the heaviest.
        fused, dense, sparse: its scores; a dense one without a vector is -inf.
        similarity: float32 [K_q, K_p]; the mean of its rows' maxima is the dense score (paper Eq. 2).
    """

    id: str
    parts: list[Word]
    words: list[Word]
    fused: float
    dense: float
    sparse: float
    similarity: torch.Tensor

    @property
    def text(self) -> str:
        """The passage's text."""
        return "".join(part.text for part in self.parts)


@dataclass(frozen=True)
class Explanation:
    """What was found for a query, and the words of the query's own sparse vector, the heaviest first."""

    question: str
    words: list[Word]
    matches: list[Match]


class Explainer:
    """Searches by the fused score, and says of each passage what it has in common with the query.

    Args:
        model: from `AutoModel.from_pretrained`, with sparse vectors.
        passages: a store, or an output of the model's `encode_texts`.
        ids, texts: the passages', for the latter.

    Raises:
        ValueError: as `Searcher`.
    """

    def __init__(
        self, model: Any, passages: Any, ids: Sequence[str] | None = None, texts: Sequence[str] | None = None
    ) -> None:
        self.model = model
        self._engine = ExactEngine(passages, ids=ids)
        self._searcher = Searcher(self._engine)
        self._texts = texts

    def __len__(self) -> int:
        return len(self._engine)

    def explain(self, question: str, top_k: int = 10, weight: float | None = None) -> Explanation:
        """Find a question's best passages.

        Args:
            question: its text.
            top_k: passages.
            weight: the dense scores' share of the fused one: 1 ranks by the dense scores alone, 0 by the sparse ones;
                None is the model's own, else half.

        Raises:
            ValueError: the passages have no sparse vectors, or the weight lies outside 0 to 1.
        """
        query = query_vectors(self._searcher.encode(self.model, [question], [MODE]))
        sides = self._searcher.rank_sides(query, MODE, max(CANDIDATES, top_k))
        hits = sides.fuse(fusion_weight_of(self.model.config, weight), top_k)[0]
        terms = _terms(query.require_sparse(), 0)
        vectors = query.dense[0][query.mask[0]]  # [K_q, H]
        at = torch.searchsorted(
            sides.positions[0], torch.tensor([hit.position for hit in hits], dtype=torch.int64, device="cpu")
        )
        scores = zip(sides.dense[0][at].tolist(), sides.sparse[0][at].tolist(), strict=True)
        matches = []
        for hit, (dense, sparse) in zip(hits, scores, strict=True):
            ((segment, row),) = self._engine.find([hit.position])
            text = (segment.text(row) if self._texts is None else self._texts[hit.position]) or ""
            found = _terms(sparse_of(segment), row)
            words = self._words(text[:SHOWN], found, terms)
            parts = list(_parts(text[:SHOWN], words)) + [Word("…")] * (len(text) > SHOWN)
            similarity = vectors @ _vectors(segment, row).T
            matches.append(Match(hit.id, parts, _sorted(words), hit.score, dense, sparse, similarity))
        return Explanation(question, _sorted(self._words(question, terms, {})), matches)

    def _words(self, text: str, terms: Mapping[int, float], others: Mapping[int, float]) -> dict[str, Word]:
        """Return the words that a sparse vector is of; a token that is in no word of the text stands for itself."""
        tokens = {word: self.model.texts.content_ids(word) for word in dict.fromkeys(content_words(text))}
        inside = {token for ids in tokens.values() for token in ids}
        for token in terms.keys() - inside:
            tokens.setdefault(self.model.tokenizer.decode([token]).strip(), [token])
        words = {}
        for word, ids in tokens.items():
            if held := [token for token in ids if token in terms]:
                shared = any(token in others for token in held)
                words[word] = Word(word, max(terms[token] for token in held), shared)
        return words


def _sorted(words: Mapping[str, Word]) -> list[Word]:
    return sorted(words.values(), key=lambda word: (not word.shared, -word.weight))


def _terms(sparse: tuple[torch.Tensor, torch.Tensor], row: int) -> dict[int, float]:
    """Return {token id: weight} of one sparse vector, given token ids and weights [N, T]; unused slots weigh 0."""
    pairs = zip(sparse[0][row].tolist(), sparse[1][row].tolist(), strict=True)
    return {token: weight for token, weight in pairs if weight > 0}


def _vectors(segment: Segment, row: int) -> torch.Tensor:
    """Return a passage's vectors, float32 [K_p, H], on the CPU."""
    there = existing(segment, row, row + 1)[0]
    return segment.rows(torch.tensor([row], device="cpu"))[0][there].cpu()


def _parts(text: str, words: Mapping[str, Word]) -> Iterator[Word]:
    """Cut a text into the words of its sparse vector and what stands between."""
    lower = "".join(char.lower() if len(char.lower()) == 1 else char for char in text)  # as long as the text
    done = start = 0
    for name in split_words(text.lower()):
        if (place := lower.find(name, start)) < 0:  # quotes, which become others
            continue
        start = place + len(name)
        if name in words:
            yield Word(text[done:place])
            yield Word(text[place:start], words[name].weight, words[name].shared)
            done = start
    yield Word(text[done:])
