"""Made-up training pairs, and small models and runs for the tests of training."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel

from diffretriever.training.adapter_recipe import AdapterRecipe
from diffretriever.training.batches import Collator
from diffretriever.training.objective import ContrastiveModel
from diffretriever.training.train import prepare_model

WORDS = (
    "river mountain engine kernel window garden music planet silver bridge winter candle forest market doctor camera "
    "button castle dragon energy finger hammer island jacket kitchen lemon mirror needle orange pencil rabbit saddle "
    "ticket umbrella violin whale yellow zebra anchor basket carpet desert eagle farmer guitar helmet insect jungle"
).split()


def made_up_pairs(count: int, negatives: int = 0, seed: int = 5) -> list[dict[str, Any]]:
    """Queries of three words whose passage holds them among others; negatives hold one of them."""
    rng, records = random.Random(seed), []
    for number in range(count):
        words = rng.sample(WORDS, 3)
        passage = rng.sample([word for word in WORDS if word not in words], 6) + words
        rng.shuffle(passage)
        wrong = [" ".join([words[0], *rng.sample(WORDS, 5), str(n)]) for n in range(negatives)]
        record = {"query": " ".join(words), "positive": f"{' '.join(passage)} {number}"}
        records.append(record | ({"negatives": wrong} if negatives else {}))
    return records


def write_lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def small_recipe(**changes: Any) -> AdapterRecipe:
    """A recipe for a few seconds on one core."""
    fields: dict[str, Any] = {
        "max_length": 140, "max_steps": 4, "global_batch_size": 4, "hard_negatives": 0, "rank": 4, "alpha": 8,
        "learning_rate": 1e-2, "warmup": 0.0, "bf16": False, "save_steps": 2, "log_steps": 1,
        "temperature": 0.05,
    }  # fmt: skip
    return AdapterRecipe(**(fields | changes))


def contrastive_model(release: Path, recipe: AdapterRecipe, seed: int = 3) -> ContrastiveModel:
    """A release with LoRA matrices, both of them random (B starts at zero otherwise)."""
    retriever = AutoModel.from_pretrained(
        release, trust_remote_code=True, torch_dtype=torch.float32, **recipe.lengths(),
        num_query_masks=recipe.num_query_masks, num_passage_masks=recipe.num_passage_masks,
        num_denoise_steps=recipe.num_denoise_steps,
    )  # fmt: skip
    model = prepare_model(retriever, recipe)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    return model.train()


def batch_of(model: ContrastiveModel, records: list[dict[str, Any]], path: Path) -> dict[str, Any]:
    """The collated batch of some pairs, every negative of theirs in it."""
    from diffretriever.data.pair_files import PairFiles

    files = PairFiles([write_lines(path, records)])
    drawn = [{"item": i, "positive": i.positives[0], "negatives": list(i.negatives)} for i in files]
    files.close()
    return Collator(model.retriever, model.recipe)(drawn)


def gradients(model: ContrastiveModel) -> dict[str, torch.Tensor]:
    """Gradients of the LoRA matrices; every one must be there."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            found[name] = parameter.grad.clone()
    return found
