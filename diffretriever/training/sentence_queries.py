"""`diffretriever make-pairs`: of texts without queries, a sentence asks for the text that it was taken out of.

The inverse cloze task of Lee et al. (2019), "Latent Retrieval for Weakly Supervised Open Domain Question
Answering", §4.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..data.corpus import Passage
from ..files.durable import write_whole
from ..files.hashes import hash64
from ..model.tokenization_helpers import without_lone_surrogates
from ..progress import progress_bar

WORD = re.compile(r"\w+")
# White space after a closing mark and before what may begin a sentence; "e.g. this", "Dr. Who", "J. Doe" go on.
END_OF_SENTENCE = re.compile(
    r"(?<=[.!?])(?<!\b[a-z]\.[a-z]\.)(?<!\b[A-Z]\.)(?<!\b(?:Dr|Mr|St|vs|cf|al|No)\.)(?<!\b(?:Mrs|Fig|Inc|etc|Eqs)\.)"
    r"\s+(?=[\"'“(\[]?[A-Z0-9])"
)
# What begins so says little without the sentence before it.
LEANS = re.compile(
    r"(?:this|that|these|those|it|its|they|their|he|his|she|her|such|here|there|both|each|some|others?|another|also|and|"
    r"but|or|so|then|thus|hence|therefore|however|moreover|furthermore|additionally|similarly|finally|first|second|third|"
    r"instead|otherwise|for example|for instance|as a result|as such|(?:in|with|for|by|at|on|from|to|as|if) "
    r"(?:this|that|these|those|such|some|addition|contrast|particular|turn|fact|general|other|most|many|all|doing))\b",
    re.IGNORECASE,
)


@dataclass
class WordCounts:
    """What is counted over all texts before a sentence is chosen."""

    texts: int = 0
    texts_with: Counter[str] = field(default_factory=Counter)  # texts that have a word, in lower case
    repeated: set[int] = field(default_factory=set)  # hashes of sentences that two texts have

    @classmethod
    def of(cls, texts: Iterable[str]) -> WordCounts:
        """Count texts; memory grows with their words and their sentences, by some 70 bytes each."""
        counted, seen = cls(), set[int]()
        for text in texts:
            counted.texts += 1
            counted.texts_with.update(set(WORD.findall(text.lower())))
            sentences = set(map(hash64, split_sentences(text)))
            counted.repeated |= sentences & seen
            seen |= sentences
        return counted

    def few(self, share: float) -> int:
        """Return how many texts at most have a rare word."""
        return max(1, int(share * self.texts))


@dataclass(frozen=True)
class SentenceChoice:
    """Which sentences of a text become queries.

    Args:
        per_text: so many at most.
        min_words: of a sentence.
        max_words: of a sentence; the rest of its text must have more.
        rare_words: words of a sentence that few texts have: it must say which text it is of.
        rare_share: "few" is this share of all texts, or one.
        keep_share: share of the texts that keep their sentences, so that the words of a query count (Lee et al.: 0.1).
        seed: fixes the choice.

    Raises:
        ValueError: no sentence can have both numbers of words.
    """

    per_text: int = 1
    min_words: int = 9
    max_words: int = 32
    rare_words: int = 2
    rare_share: float = 0.01
    keep_share: float = 0.1
    seed: int = 42

    def __post_init__(self) -> None:
        if self.min_words > self.max_words:
            raise ValueError(f"--min-words {self.min_words} is above --max-words {self.max_words}; lower it")

    def pairs_of(self, text: str, words: WordCounts, number: int) -> list[tuple[str, str]]:
        """Take queries out of one text.

        Args:
            text: the passage.
            words: of all texts.
            number: the text's.

        Returns:
            (query, passage) for each sentence that was chosen, in the text's order; the passage is the text without any
            of them, or the whole text: one for all, so that none is a negative of another.
        """
        sentences = split_sentences(text)
        rng = random.Random(f"{self.seed}-{number}")
        able = [place for place, sentence in enumerate(sentences) if self._asks(sentence, words)]
        chosen = sorted(rng.sample(able, min(self.per_text, len(able))))
        rest = " ".join(sentence for place, sentence in enumerate(sentences) if place not in chosen)
        if len(WORD.findall(rest)) <= self.max_words:
            return []
        passage = " ".join(sentences) if rng.random() < self.keep_share else rest
        return [(sentences[place], passage) for place in chosen]

    def _asks(self, sentence: str, counted: WordCounts) -> bool:
        """Say whether a sentence stands alone and is of one text."""
        words = WORD.findall(sentence.lower())
        if not self.min_words <= len(words) <= self.max_words or not sentence.endswith(".") or LEANS.match(sentence):
            return False
        few = counted.few(self.rare_share)
        rare = {word for word in words if counted.texts_with[word] <= few}
        return len(rare) >= self.rare_words and hash64(sentence) not in counted.repeated


def split_sentences(text: str) -> list[str]:
    """Split a text where a sentence ends and another begins with a capital or a digit; white space becomes one space.

    >>> split_sentences("Dr. Wu saw it. Ice, e.g. Antarctica's, is old.\\nIs it?")
    ['Dr. Wu saw it.', "Ice, e.g. Antarctica's, is old.", 'Is it?']
    """
    return END_OF_SENTENCE.split(" ".join(text.split()))


def write_pairs(read: Callable[[], Iterable[Passage]], out: Path, choice: SentenceChoice) -> dict[str, int]:
    """Write the pairs of a corpus; the file appears whole or not at all.

    Args:
        read: begins to read the corpus, which is done twice: its words are counted before.
        out: JSONL of {"query", "positive"} to write.
        choice: which sentences become queries.

    Returns:
        Numbers of "texts", "pairs" and "texts_without_pairs".

    Raises:
        ValueError: no sentence of any text can be a query; nothing is written.
    """
    counted = WordCounts.of(passage.text for passage in read())
    counts = {"texts": counted.texts, "pairs": 0, "texts_without_pairs": 0}

    def lines() -> Iterator[bytes]:
        for number, passage in enumerate(read()):
            pairs = choice.pairs_of(passage.text, counted, number)
            counts["pairs"] += len(pairs)
            counts["texts_without_pairs"] += not pairs
            for query, positive in pairs:
                record = {"query": query, "positive": positive}
                yield without_lone_surrogates(json.dumps(record, ensure_ascii=False)).encode() + b"\n"
            bar.update(1)
        if not counts["pairs"]:
            raise ValueError(
                f"no sentence of {counted.texts} texts can be a query: {choice.min_words} to {choice.max_words} words "
                f"and a full stop, {choice.rare_words} of the words in at most {counted.few(choice.rare_share)} texts, "
                f"itself in one, beside more than {choice.max_words} other words. Lower --min-words or "
                "--rare-words, or raise --rare-share"
            )

    with progress_bar(counts["texts"], "text", "make pairs") as bar:
        write_whole(out, lines())
    return counts
