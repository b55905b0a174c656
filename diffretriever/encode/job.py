"""What one process's share in making a store is about: whose vectors, of which texts, where."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..data.corpus import read_corpus, read_queries
from ..files.memory import memory_is_full
from ..model.batching import batches_by_length
from ..model.tokenization_helpers import PreparedText
from ..store.plan import SHARD_NAME, Plan, Text
from ..store.shard_file import write_shard
from ..store.store import ShardContents, shard_tensors


@dataclass
class PreparedShard:
    """One shard's texts as the model reads them.

    Args:
        number: of the shard.
        texts: n texts with their ids.
        prepared: n texts, tokenised, with their content words unless the whole vocabulary is let in.
        batches: row numbers of each batch, longest first.
    """

    number: int
    texts: list[Text]
    prepared: list[PreparedText]
    batches: list[list[int]]


@dataclass(frozen=True)
class EncodingJob:
    """A corpus or queries to be encoded into a store.

    Args:
        model: from `AutoModel.from_pretrained`.
        source: what `read_corpus` or `read_queries` reads.
        folder: of the store, with the plan or a manifest in it.
        plan: what the store is to become.
        tokens_per_batch: padding included.
        surveyed: whether this process has read the whole source and knows it to be the plan's.
        tell: takes messages for the user.
    """

    model: Any
    source: str | Path
    folder: Path
    plan: Plan
    tokens_per_batch: int
    surveyed: bool
    tell: Callable[[str], None]

    @property
    def is_query(self) -> bool:
        """Whether the texts are queries."""
        return self.plan.settings.side == "query"

    def shard_path(self, number: int) -> Path:
        """Return where a shard is, or will be."""
        return self.folder / SHARD_NAME.format(number)

    def read_shards(self) -> Iterator[tuple[int, list[Text]]]:
        """Return an iterator over (shard number, its texts), from the first on.

        Raises:
            ValueError: they are not those that the store was begun with, or malformed.
        """
        texts = read_texts(self.source, self.is_query)
        return self.plan.shards_of(texts, str(self.source), self.folder)

    def prepare(self, number: int, texts: list[Text]) -> PreparedShard:
        """Tokenise one shard's texts, find their content words and cut them into batches."""
        settings = self.plan.settings
        content_filter = settings.options["content_filter"] and settings.sparse_top_k > 0
        prepared = self.model.texts.prepare([text.text for text in texts], self.is_query, content_filter)
        # a row's batch depends on the lengths alone, so that whichever process encodes a shard gets the same vectors
        batches = list(batches_by_length([len(text.sequence) for text in prepared], self.tokens_per_batch))
        return PreparedShard(number, texts, prepared, batches)

    def encode_shard(self, shard: PreparedShard, after_batch: Callable[[Sequence[int]], None]) -> ShardContents:
        """Encode a shard.

        Args:
            shard: its texts.
            after_batch: is told the rows of each batch that is done.

        Returns:
            What is to be written.

        Raises:
            ValueError: as `encode`.
        """
        settings, count = self.plan.settings, len(shard.texts)
        contents = ShardContents(
            [text.id for text in shard.texts],
            torch.empty(count, settings.num_masks, settings.hidden_size, dtype=torch.float32, device="cpu"),
            torch.empty(count, settings.sparse_top_k, dtype=torch.int32, device="cpu"),
            torch.empty(count, settings.sparse_top_k, dtype=torch.float32, device="cpu"),
            [text.text for text in shard.texts] if settings.options["keep_texts"] else None,
        )
        with closing(self.encode(shard)) as results:
            for rows, out in results:
                contents.put(torch.tensor(rows, device="cpu"), out)
                after_batch(rows)
        return contents

    def write(self, number: int, contents: ShardContents) -> None:
        """Write a shard's file.

        Raises:
            OSError: the disk is full or fails.
            ValueError: vectors that the store's dtype cannot hold.
        """
        tensors = shard_tensors(contents, self.plan.settings.dtype)
        write_shard(self.shard_path(number), tensors, self.plan.metadata(number))

    def encode(self, shard: PreparedShard) -> Generator[tuple[Sequence[int], Any], None, None]:
        """Encode a shard, batch by batch.

        Yields:
            The rows of a batch, and the model's output for them.

        Raises:
            ValueError: the model's output is not finite, and the message names the text; or the batch is too large for
                the device.
        """
        options: dict[str, Any] = {"is_query": self.is_query, "sparse_top_k": self.plan.settings.sparse_top_k}
        done = 0
        with closing(self.model.encode_batches(shard.prepared, shard.batches, **options)) as results:
            try:
                for rows, out in results:
                    yield rows, out
                    done += 1
            except ValueError:
                for row in shard.batches[done]:  # find the text to blame
                    self._blame(shard, row, options)
                raise
            except (RuntimeError, MemoryError) as error:
                if not memory_is_full(error):
                    raise
                rows = shard.batches[done]
                size = [len(rows), max(len(shard.prepared[row].sequence) for row in rows)]
                raise ValueError(
                    f"a batch of {size} tokens does not fit into memory; give a smaller --tokens-per-batch"
                ) from error

    def _blame(self, shard: PreparedShard, row: int, options: Mapping[str, Any]) -> None:
        try:
            self.model.encode_prepared([shard.prepared[row]], **options)
        except ValueError as error:
            raise ValueError(f"text {shard.texts[row].id!r} could not be encoded: {error}") from error


def read_texts(source: str | Path, is_query: bool) -> Iterator[Text]:
    """Read queries or passages, as the side has it."""
    return read_queries(source) if is_query else read_corpus(source)
