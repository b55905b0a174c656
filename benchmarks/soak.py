"""Memory over a long run: many short passages through `encode_store` and search, resident memory over time.

python benchmarks/soak.py --model checkpoints/diffretriever-llada-tiny-single --num-passages 100000 --scratch DIR
"""

from __future__ import annotations

import random
import sys
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from transformers import AutoModel  # noqa: E402

from diffretriever.cli.parser import Parser  # noqa: E402
from diffretriever.encode.encode_store import encode_store  # noqa: E402
from diffretriever.search import MODES, Searcher, open_store  # noqa: E402
from diffretriever.store.store import Store  # noqa: E402

WORDS = "retrieval light from water systems index sun energy document moving passage library tool server audio".split()


def write_corpus(file: Path, count: int, new_words: bool) -> Path:
    """Write made-up passages of 3 to 12 words, each with a word of its own if `new_words`; returns the file."""
    numbers = random.Random(0)
    with file.open("w", encoding="utf-8") as stream:
        for number in range(count):
            words = numbers.choices(WORDS, k=numbers.randrange(3, 13))
            own = f"word{number} " if new_words else ""
            stream.write(f"passage-{number}\t{own}{' '.join(words)}\n")
    return file


def resident() -> tuple[float, float]:
    """Return this process's resident memory and its anonymous part (without mapped files) in MB."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) / 1024, int(fields["RssAnon"].split()[0]) / 1024


class Watch(threading.Thread):
    """Prints memory and finished shards every few seconds."""

    def __init__(self, folder: Path, shard_size: int, every: float) -> None:
        super().__init__(daemon=True)
        self.folder, self.shard_size, self.every = folder, shard_size, every
        self.ended = threading.Event()
        self.seen: list[tuple[int, float]] = []

    def run(self) -> None:
        """Print until told to end."""
        begun = time.perf_counter()
        while not self.ended.wait(self.every):
            texts = len(list(self.folder.glob("shard-*"))) * self.shard_size
            total, anonymous = resident()
            self.seen.append((texts, anonymous))
            took = time.perf_counter() - begun
            print(
                f"{took:7.0f} s {texts:>8} texts  resident {total:6.0f} MB, anonymous {anonymous:6.0f} MB", flush=True
            )


def search_repeatedly(model: Any, folder: Path, rounds: int) -> None:
    """Search the store in all five modes again and again and print memory after each round."""
    searcher = Searcher(open_store(folder))
    for number in range(rounds):
        numbers = random.Random(number)
        texts = [" ".join(numbers.choices(WORDS, k=4)) for _ in range(32)]
        queries = model.encode_texts(texts, is_query=True)
        begun = time.perf_counter()
        for mode in MODES:
            searcher.search(queries, mode=mode, top_k=100)
        took = (time.perf_counter() - begun) * 1000 / (len(texts) * len(MODES))
        total, anonymous = resident()
        print(
            f"search round {number + 1:>3}: {took:.1f} ms a query and mode, resident {total:.0f} MB, anonymous "
            f"{anonymous:.0f} MB",
            flush=True,
        )


def main() -> None:
    """Encode and print memory over time, read the whole store back, and search it."""
    parser = Parser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--num-passages", type=int, default=100_000)
    parser.add_argument("--shard-size", type=int, default=2048)
    parser.add_argument("--every", type=float, default=20.0, help="seconds between two lines")
    parser.add_argument("--short-prompt", action="store_true", help="the text alone: memory is what is looked at")
    parser.add_argument(
        "--new-words", action="store_true", help="a new word in each passage: the model keeps up to 200,000 words"
    )
    parser.add_argument("--search-rounds", type=int, default=10, help="of 32 queries in each of the five modes")
    parser.add_argument("--scratch", type=Path, required=True)
    options = parser.parse_args()
    options.scratch.mkdir(parents=True, exist_ok=True)
    source = write_corpus(options.scratch / "corpus.tsv", options.num_passages, options.new_words)
    prompt = {"passage_prompt": {"system": "", "user": "{text}", "assistant": ""}} if options.short_prompt else {}
    model = AutoModel.from_pretrained(options.model, trust_remote_code=True, **prompt)
    watch = Watch(options.scratch / "store", options.shard_size, options.every)
    watch.start()
    begun = time.perf_counter()
    encode_store(model, source, options.scratch / "store", shard_size=options.shard_size)
    took = time.perf_counter() - begun
    watch.ended.set()
    store = Store.open(options.scratch / "store", verify=True)
    assert store.ids() == [f"passage-{number}" for number in range(options.num_passages)]
    print(f"{len(store)} texts in {took:.0f} s, {len(store) / took:.0f} passages/s; all hashes match, all ids in order")
    for share in (0.1, 0.25, 0.5, 0.75, 1.0):
        at = [memory for texts, memory in watch.seen if texts <= share * options.num_passages]
        if at:
            print(f"after {share:4.0%} of the texts: {at[-1]:.0f} MB anonymous")
    search_repeatedly(model, options.scratch / "store", options.search_rounds)


if __name__ == "__main__":
    main()
