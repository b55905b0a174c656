"""What a sample of the data says before training: texts that are cut, queries that have nothing to learn from."""

from __future__ import annotations

from itertools import islice

import torch

from ..data.pair_files import PairFiles
from ..model.tokenization_helpers import RetrievalTokenizer
from .adapter_recipe import AdapterRecipe
from .batches import SampledItems, candidate_hashes
from .candidates import known_positives
from .epochs import EpochSampler

SAMPLED = 500  # items that are measured


def measure_texts(
    files: PairFiles, rules: RetrievalTokenizer, recipe: AdapterRecipe
) -> tuple[list[str], dict[str, float]]:
    """Measure an even sample of the texts.

    Args:
        files: the data.
        rules: the model's `texts`, which tokenise.
        recipe: mask budgets.

    Returns:
        A line for each side: how many are cut; and {"query", "passage": their share}.

    Raises:
        ValueError: K masks for texts that have fewer tokens than K, all of them.
    """
    numbers = range(0, len(files), max(1, len(files) // SAMPLED))
    sampled = [files[number] for number in numbers]
    lines, shares = [], {}
    sides = (("query", True, [item.query for item in sampled]), ("passage", False, [i.positives[0] for i in sampled]))
    for side, is_query, texts in sides:
        prepared = rules.prepare(texts, is_query, content_filter=False)
        longest = max(len(text.text_ids) for text in prepared)
        masks = recipe.num_query_masks if is_query else recipe.num_passage_masks
        plural = "queries" if is_query else "passages"
        if masks > max(longest, 1):
            raise ValueError(
                f"num_{side}_masks is {masks}, but the longest of {len(texts)} sampled {plural} has {longest} tokens: "
                f"more masks than tokens have nothing to say. Set num_{side}_masks to {longest} or less"
            )
        cut, room = sum(text.cut for text in prepared), rules.layouts[is_query].room
        lines.append(f"{cut} of {len(texts)} sampled {plural} are longer than {room} tokens and are cut")
        shares[side] = round(cut / len(texts), 4)
    return lines, shares


def measure_candidates(items: SampledItems, recipe: AdapterRecipe) -> list[str]:
    """Count the queries of some of the first epoch's batches that have no negative: their loss is 0.

    Args:
        items: the data.
        recipe: sizes of the batches.

    Returns:
        A line, if there are such queries.

    Raises:
        ValueError: all of them are such queries.
    """
    # One process's view: a query meets the passages of all processes, which together are these.
    size, steps = recipe.global_batch_size, recipe.accumulation_steps
    groups = recipe.groups(items.files.report.counts)
    batches = EpochSampler(items.files.lengths, size, recipe.seed, steps, groups=groups)
    every = max(1, len(batches) * size // steps // SAMPLED)
    alone = queries = 0
    for batch in islice(batches, 0, None, every):
        hashes = candidate_hashes([items[key] for key in batch])
        excluded = known_positives(**hashes, targets=torch.arange(len(batch)))  # [Q, P]
        alone += int(((~excluded).sum(dim=1) == 1).sum())  # the positive alone
        queries += len(batch)
    what = "sampled queries have no negative in their batch, as each of its passages is known to answer them"
    if alone == queries:
        raise ValueError(
            f"all of {queries} {what}: nothing can be learned. Give them hard negatives, or raise global_batch_size"
        )
    return [f"{alone} of {queries} {what}; they teach nothing"] if alone else []
