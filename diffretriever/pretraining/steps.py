"""The optimiser steps of one stage: draw a batch, compute its loss, change the weights."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch

from ..model.batching import find_masks
from ..model.chat_template import render_prompts
from ..model.configuration_diffretriever import DiffRetrieverConfig
from ..model.modeling_diffretriever import DiffRetriever
from ..model.tokenization_helpers import RetrievalTokenizer
from ..training.batches import padded_ids
from ..training.objective import Side
from .corpus import Corpus, drop_tokens
from .denoising import Denoiser
from .formats import FORMATS
from .losses import contrastive_loss
from .plan import Drawn, StagePlan
from .recipe import PretrainRecipe, Stage


class StageSteps:
    """Takes the steps of one stage; all randomness follows from (seed, stage, step).

    Args:
        model: what is trained.
        recipe: the stages.
        number: which of them.
        corpus: what to draw from.

    Raises:
        ValueError: a batch is larger than the data, or there are no texts.
    """

    def __init__(self, model: DiffRetriever, recipe: PretrainRecipe, number: int, corpus: Corpus) -> None:
        self.model, self.recipe, self.number, self.stage = model, recipe, number, recipe.stages[number]
        self.rules = {k: prompt_rules(model, k, self.stage.max_passage) for k in sorted(set(self.stage.budgets))}
        self.plan = StagePlan(self.stage, corpus, recipe.seed + number)
        sizes = self.stage.denoise_length, self.stage.denoise_tokens
        shift = FORMATS[recipe.backbone_type].shift
        self.denoiser = Denoiser(corpus.texts, model.texts, *sizes, recipe.seed + number + 3, shift)
        self.optimizer = build_optimizer(model, self.stage)

    def take(self, step: int) -> dict[str, float]:
        """Take one optimiser step.

        Args:
            step: its number in the stage; fixes batch and masks.

        Returns:
            What to log: "denoise", or "dense", "sparse", "words" and "right" (see `contrastive_loss`).

        Raises:
            FloatingPointError: the loss is not finite; the weights are left as they are.
        """
        rng = random.Random(f"{self.recipe.seed}-{self.number}-{step}")
        torch.manual_seed(rng.getrandbits(48))
        for group in self.optimizer.param_groups:
            group["lr"] = group["factor"] * self.stage.learning_rate * rate(step, self.stage)
        kind, number = self.plan.kind(step)
        if kind == "denoise":
            figures = self._denoise(number, rng)
        else:
            figures = self._contrast(self.plan.draw(kind, number, rng), self.plan.budget(step), rng)
        loss = figures.pop("loss")
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss.item()} at stage {self.number}, step {step} ({kind}); lower the learning rate and "
                "run again: it goes on from the last checkpoint"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.stage.clip)
        self.optimizer.step()
        return {name: value.item() for name, value in figures.items()}

    def _denoise(self, number: int, rng: random.Random) -> dict[str, torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.bf16):
            loss = self.denoiser.loss(self.model, number, rng)
        return {"loss": loss, "denoise": loss.detach()}

    def _contrast(self, batch: Drawn, k: int, rng: random.Random) -> dict[str, torch.Tensor]:
        passages = batch.passages
        if self.stage.token_drop:
            passages = [drop_tokens(ids, self.stage.token_drop, rng) for ids in passages]
        with torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.bf16):
            query = self._states(batch.queries, True, k, self.stage.max_query)
            passage = self._states(passages, False, k, self.stage.max_passage)
        words = padded_ids([*batch.query_words, *batch.passage_words])
        sides = Side(query.float(), words[: len(query)]), Side(passage.float(), words[len(query) :])
        return contrastive_loss(*sides, self.model.lm_head, self.stage)

    def _states(self, texts: Sequence[list[int]], is_query: bool, k: int, limit: int) -> torch.Tensor:
        """Return the states at the masks of `sequences`, with gradient: [B, K, H]."""
        ids, mask = self.sequences(texts, is_query, k, limit)
        positions = find_masks(ids, self.rules[k].mask_id, [k])
        states: torch.Tensor = self.model(ids, mask, mask_positions=positions).mask_hidden
        return states

    def sequences(
        self, texts: Sequence[list[int]], is_query: bool, k: int, limit: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put the prompt for K masks around each text's first `limit` tokens (paper Eq. 1).

        Returns:
            ids and attention mask, int64 [B, L] each, left-padded.
        """
        layout = self.rules[k].layouts[is_query]
        return self.rules[k].pad([layout.prefix + text[:limit] + layout.closing for text in texts])


def prompt_rules(model: DiffRetriever, k: int, room: int) -> RetrievalTokenizer:
    """Return the tokenisation rules for K masks on either side, with room for so many tokens of text."""
    config = DiffRetrieverConfig(num_query_masks=k, num_passage_masks=k)
    prompts = render_prompts(model.tokenizer, config)
    layouts = RetrievalTokenizer(model.tokenizer, config, prompts).layouts.values()
    config.max_length = room + max(len(layout.prefix) + len(layout.suffix) for layout in layouts)
    return RetrievalTokenizer(model.tokenizer, config, prompts)


def build_optimizer(model: DiffRetriever, stage: Stage) -> torch.optim.AdamW:
    """Return AdamW, in which the embeddings and the output head have a rate of their own and no decay."""
    tables = [model.backbone.embed_tokens.weight, model.lm_head.weight]
    known = {id(parameter) for parameter in tables}
    body = [parameter for parameter in model.parameters() if id(parameter) not in known]
    groups = [
        {"params": body, "factor": 1.0},
        {"params": tables, "factor": stage.embedding_rate, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=stage.learning_rate, betas=(0.9, 0.95), weight_decay=stage.weight_decay, fused=True
    )


def rate(step: int, stage: Stage) -> float:
    """Return the factor on the learning rate: linear warm-up, then cosine down to `final_rate`."""
    if step < stage.warmup:
        return (step + 1) / stage.warmup
    done = (step - stage.warmup) / max(stage.steps - stage.warmup, 1)
    return stage.final_rate + (1 - stage.final_rate) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
