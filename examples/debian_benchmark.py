"""Build a benchmark and training pairs from Debian's package lists: what checkpoints/README.md calls DATA/debian.

python examples/debian_benchmark.py --output DATA/debian

A package's short description is the query, its long description the passage. The folder has BEIR's layout
(corpus.jsonl, queries.jsonl, qrels/test.tsv, qrels/dev.tsv) and train_pairs.jsonl. Of a source's packages one is taken,
the one of its name or else the first; each is asked for in test, asked for in dev, or a training pair. Which, is drawn
by --seed; another draw or another day's lists give figures that differ a little from those in checkpoints/README.md.
"""

from __future__ import annotations

import argparse
import gzip
import json
import lzma
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

MIRROR = "http://deb.debian.org/debian/dists/bookworm/main"
OPENERS = {".xz": lzma.decompress, ".gz": gzip.decompress}
SHORTEST = 8  # words; a passage below says less than its query


def read_list(place: str) -> Iterator[dict[str, str]]:
    """Yield the paragraphs of a package list, {field: value}; a value's lines stay as they are.

    Args:
        place: a file, or a URL; `.xz` and `.gz` are unpacked.
    """
    if "://" in place:
        with urlopen(place) as answer:
            packed = answer.read()
    else:
        packed = Path(place).read_bytes()
    text = OPENERS.get(Path(place).suffix, bytes)(packed).decode()
    for paragraph in text.split("\n\n"):
        fields: dict[str, str] = {}
        name = ""
        for line in paragraph.splitlines():
            if line.startswith((" ", "\t")):
                fields[name] += "\n" + line
            elif ":" in line:
                name, value = line.split(":", 1)
                fields[name] = value.strip()
        if fields:
            yield fields


def read_packages(packages: str, translations: str) -> list[dict[str, str]]:
    """Return {"_id", "source", "section", "query", "positive"} of one package a source, sorted by source.

    Args:
        packages: the list with sources and sections, `Packages`.
        translations: the list with long descriptions, `Translation-en`.
    """
    known = {entry["Package"]: entry for entry in read_list(packages)}
    found: dict[str, dict[str, str]] = {}
    seen = set()
    for entry in sorted(read_list(translations), key=lambda entry: entry.get("Package", "")):
        name = entry.get("Package", "")
        query, _, rest = entry.get("Description-en", "").partition("\n")
        passage = " ".join(line.strip() for line in rest.splitlines() if line.strip() != ".").strip()
        if name not in known or passage in seen or len(passage.split()) < SHORTEST:
            continue
        source = known[name].get("Source", name).split(" ")[0]  # "name (version)" where the versions differ
        if source not in found or name == source:
            seen.add(passage)
            section = known[name].get("Section", "")
            found[source] = {"_id": name, "source": source, "section": section, "query": query, "positive": passage}
    return [found[source] for source in sorted(found)]


def split(found: list[dict[str, str]], test: int, dev: int, seed: int) -> dict[str, list[dict[str, str]]]:
    """Return the packages of "test", "dev" and "train", drawn by a seed."""
    if len(found) <= test + dev:
        raise SystemExit(f"{len(found)} sources are too few for {test} + {dev} queries and training; ask for fewer.")
    drawn = random.Random(seed).sample(found, len(found))
    return {"test": drawn[:test], "dev": drawn[test : test + dev], "train": drawn[test + dev :]}


def write_lines(file: Path, records: list[dict[str, Any]]) -> None:
    """Write JSON Lines."""
    file.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def write_benchmark(folder: Path, parts: dict[str, list[dict[str, str]]], passages: int) -> None:
    """Write the folder.

    Args:
        folder: made if it is not there.
        parts: of `split`.
        passages: how many the corpus holds: all that is asked for, and of the training pairs what there is room for.
    """
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    asked = [*parts["test"], *parts["dev"]]
    others = parts["train"][: max(0, passages - len(asked))]
    write_lines(
        folder / "corpus.jsonl",
        [{"_id": one["_id"], "title": "", "text": one["positive"]} for one in [*others, *asked]],
    )
    write_lines(folder / "queries.jsonl", [{"_id": f"q-{one['_id']}", "text": one["query"]} for one in asked])
    for part in ("test", "dev"):
        judged = "".join(f"q-{one['_id']}\t{one['_id']}\t1\n" for one in parts[part])
        (folder / "qrels" / f"{part}.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged, encoding="utf-8")
    pairs = [{**one, "in_corpus": number < len(others)} for number, one in enumerate(parts["train"])]
    write_lines(folder / "train_pairs.jsonl", pairs)
    print(f"{folder}: {len(others) + len(asked)} passages, {len(asked)} queries, {len(pairs)} training pairs")


def main(arguments: list[str] | None = None) -> None:
    """Read, split, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the folder to write")
    parser.add_argument("--packages", default=f"{MIRROR}/binary-amd64/Packages.xz", help="file or URL (%(default)s)")
    parser.add_argument("--translations", default=f"{MIRROR}/i18n/Translation-en.xz", help="file or URL (%(default)s)")
    parser.add_argument("--passages", type=int, default=20_000, help="in the corpus (%(default)s)")
    parser.add_argument("--test", type=int, default=1000, help="queries (%(default)s)")
    parser.add_argument("--dev", type=int, default=500, help="queries (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (%(default)s)")
    options = parser.parse_args(arguments)
    found = read_packages(options.packages, options.translations)
    write_benchmark(options.output, split(found, options.test, options.dev, options.seed), options.passages)


if __name__ == "__main__":
    main()
