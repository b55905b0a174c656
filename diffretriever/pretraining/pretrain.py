"""`diffretriever pretrain`: a small backbone in LLaDA's or Dream's format from random weights.

First masked denoising (the backbone's own objective) on plain text, from weights that begin with the corpus's token
statistics; then the retrieval prompt together with denoising: a small backbone does not follow a prompt it has never
seen.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import random
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from ..training import losses
from ..training.evaluate import Vectors, evaluate, read_benchmark
from ..training.recipe import PretrainRecipe, Stage
from .backbone import mask_states, new_backbone
from .checkpoint import load_checkpoint, save_checkpoint
from .data import (
    Batches,
    EncodedPairs,
    IdLists,
    Pair,
    WordIds,
    cloze_pair,
    drop_tokens,
    encode_pairs,
    encode_texts,
    pad_left,
    read_pairs,
    read_texts,
)
from .denoising import Denoiser
from .formats import FORMATS
from .neighbours import cached_neighbours, with_neighbours
from .prompts import Prompt, prompt_training_texts
from .tokenizer import build_tokenizer, save_tokenizer
from .warm_start import start_from_statistics

HELD_OUT_EVERY = 400  # one plain text in so many measures the denoising loss and is never trained on
MIN_CLOZE = 16  # tokens of a text that is split into a query and a passage


@dataclasses.dataclass
class Corpus:
    """Everything that steps draw from, as token ids."""

    pairs: EncodedPairs
    texts: IdLists
    held_out: IdLists  # plain texts that are never trained on
    neighbours: torch.Tensor | None


class Pretrainer:
    """Runs the stages of a recipe, resumable at any step: all randomness follows from (seed, stage, step).

    Args:
        recipe: what to do.
        corpus: what to learn from.
        tokenizer_folder: the tokenizer's files.
        out: output folder; its checkpoint, if any, is resumed.
        dev: folder of a BEIR-style benchmark to evaluate on (split "dev"), or None.
    """

    def __init__(
        self, recipe: PretrainRecipe, corpus: Corpus, tokenizer_folder: Path, out: Path, dev: Path | None = None
    ) -> None:
        self.recipe, self.corpus, self.out, self.tokenizer_folder = recipe, corpus, out, tokenizer_folder
        self.tokenizer: Any = AutoTokenizer.from_pretrained(str(tokenizer_folder))
        self.format = FORMATS[recipe.backbone_type]
        self.ids = self.format.tokenizer.special_ids(self.tokenizer)
        self.model = new_backbone(self.format, self.format.new_config(recipe.shape, self.ids), recipe.seed)
        budgets = sorted({k for stage in recipe.stages for k in stage.budgets})
        self.prompts = {
            (is_query, k): Prompt.build(self.tokenizer, self.format.tokenizer, is_query, k)
            for k in budgets
            for is_query in (True, False)
        }
        self.words = WordIds(self.tokenizer)
        self.benchmark = read_benchmark(dev, "dev", recipe.eval_passages) if dev else None
        self.stage_number, self.step = 0, 0
        self.started = time.monotonic()
        self.averages: dict[str, float] = {}

    def run(self, stop_after: int | None = None) -> None:
        """Trains to the end (or for `stop_after` more steps) and writes the backbone.

        Raises:
            FloatingPointError: if the loss is not a number; the last checkpoint stays.
        """
        resumed = self._resume()
        if resumed is None and self.recipe.start_from_statistics:
            start_from_statistics(self.model, self.corpus.texts, self.recipe.seed, self.format.shift)
        left = stop_after
        for number in range(self.stage_number, len(self.recipe.stages)):
            stage = self.recipe.stages[number]
            if resumed is None or number != self.stage_number:
                self.stage_number, self.step, resumed = number, 0, None
            optimizer = self._optimizer(stage)
            if resumed is not None:
                optimizer.load_state_dict(resumed)
                resumed = None
            plan = _Plan(
                stage, self.corpus, self._denoiser(stage, self.recipe.seed + number + 3), self.recipe.seed + number
            )
            while self.step < stage.steps:
                if left == 0:
                    self.save(optimizer)
                    return
                self._train_step(stage, plan, optimizer)
                left = None if left is None else left - 1
                if self.recipe.save_every and self.step % self.recipe.save_every == 0:
                    self.save(optimizer)
                if self.recipe.eval_every and self.step % self.recipe.eval_every == 0:
                    self.log(evaluation=self.evaluate(stage, plan))
            self.save(optimizer)
            if not self.recipe.eval_every or stage.steps % self.recipe.eval_every:
                self.log(evaluation=self.evaluate(stage, plan))
        self.export()

    def _resume(self) -> dict[str, Any] | None:
        """Loads the checkpoint; returns the optimizer's state, or None at the start."""
        state = load_checkpoint(self.out / "pretrain.ckpt")
        if state is None:
            return None
        self.model.load_state_dict(state["model"])
        self.stage_number, self.step = state["stage"], state["step"]
        self.log(note=f"resumed at stage {self.stage_number}, step {self.step}")
        optimizer: dict[str, Any] = state["optimizer"]
        return optimizer

    def save(self, optimizer: torch.optim.Optimizer) -> None:
        """Writes the checkpoint to resume from."""
        state = {"model": self.model.state_dict(), "optimizer": optimizer.state_dict()}
        save_checkpoint(self.out / "pretrain.ckpt", {**state, "stage": self.stage_number, "step": self.step})

    def export(self) -> None:
        """Writes the backbone in its format to <out>/backbone."""
        self.format.save(self.model, self.tokenizer_folder, self.out / "backbone", self.ids)

    def _denoiser(self, stage: Stage, seed: int) -> Denoiser:
        sizes = stage.denoise_length, stage.denoise_tokens
        return Denoiser(self.corpus.texts, self.ids, *sizes, seed, self.format.shift)

    def _optimizer(self, stage: Stage) -> torch.optim.AdamW:
        tables = [self.model.model.embed_tokens.weight, self.model.lm_head.weight]
        known = {id(parameter) for parameter in tables}
        body = [p for p in self.model.parameters() if id(p) not in known]
        groups = [
            {"params": body, "factor": 1.0},
            {"params": tables, "factor": stage.embedding_rate, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            groups, lr=stage.learning_rate, betas=(0.9, 0.95), weight_decay=stage.weight_decay, fused=True
        )

    def _train_step(self, stage: Stage, plan: _Plan, optimizer: torch.optim.Optimizer) -> None:
        """One optimiser step; which batch it takes and what it masks depends on (seed, stage, step) alone."""
        rng = random.Random(f"{self.recipe.seed}-{self.stage_number}-{self.step}")
        torch.manual_seed(rng.getrandbits(48))
        for group in optimizer.param_groups:
            group["lr"] = group["factor"] * stage.learning_rate * rate(self.step, stage)
        kind, number = plan.kind(self.step)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.bf16):
            if kind == "denoise":
                loss = plan.denoiser.loss(self.model, number, rng)
                self._note(denoise=loss.item())
            else:
                loss = self._contrast(stage, plan.draw(kind, number, rng), plan.budget(self.step), rng)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss.item()} at stage {self.stage_number}, step {self.step} ({kind}); "
                f"the last checkpoint is {self.out / 'pretrain.ckpt'}; lower the learning rate and resume"
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), stage.clip)
        optimizer.step()
        self.step += 1
        if self.step % self.recipe.log_every == 0:
            self.log(rate=optimizer.param_groups[0]["lr"])

    def _note(self, **values: float) -> None:
        """Keeps running averages for the log."""
        for name, value in values.items():
            self.averages[name] = 0.9 * self.averages.get(name, value) + 0.1 * value

    def log(self, **extra: Any) -> None:
        """Prints one line of JSON and appends it to <out>/log.jsonl."""
        record = {"minutes": round((time.monotonic() - self.started) / 60, 2), "stage": self.stage_number}
        record |= {"step": self.step} | {k: round(v, 4) for k, v in self.averages.items()} | extra
        line = json.dumps(record)
        print(line, flush=True)
        self.out.mkdir(parents=True, exist_ok=True)
        with (self.out / "log.jsonl").open("a") as log:
            log.write(line + "\n")

    def _contrast(self, stage: Stage, batch: Drawn, k: int, rng: random.Random) -> torch.Tensor:
        """InfoNCE on dense and sparse scores of one batch of (query, passage) pairs."""
        queries, passages, query_words, passage_words = batch
        if stage.token_drop:
            passages = [drop_tokens(ids, stage.token_drop, rng) for ids in passages]
        query = self._masks(queries, True, k, stage.max_query)  # [B, K, H]
        passage = self._masks(passages, False, k, stage.max_passage)  # [B, K, H]
        targets, head = torch.arange(len(queries)), self.model.lm_head.weight.__getitem__
        dense = losses.dense_loss(query, passage, targets, stage.temperature, symmetric=True)
        scores = losses.sparse_scores(query, passage, head, query_words, passage_words)
        sparse = losses.info_nce(scores, targets)
        both = torch.cat([query, passage])
        words = losses.word_loss(both, head, [*query_words, *passage_words], 256, self.recipe.shape.vocab_size)
        self._note(dense=dense.item(), sparse=sparse.item(), words=words.item())
        self._note(right=(scores.argmax(1) == targets).float().mean().item())
        return dense + stage.sparse_weight * sparse + stage.word_weight * words

    def _masks(self, texts: Sequence[list[int]], is_query: bool, k: int, limit: int) -> torch.Tensor:
        prompt = self.prompts[is_query, k]
        ids, mask = pad_left([prompt.wrap(text, limit) for text in texts], self.ids["eos"])
        return mask_states(self.model, ids, mask, k, len(prompt.tail))

    @torch.no_grad()
    def evaluate(self, stage: Stage, plan: _Plan) -> dict[str, dict[str, float]]:
        """Held-out denoising loss, and nDCG@10 on the benchmark's dev split for each K where the stage trains that."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.bf16):
            found = {"denoise": plan.denoiser.held_out(self.model, self.corpus.held_out)}
        if self.benchmark is None or set(stage.pattern) == {"denoise"}:
            return found
        return found | {
            f"K={k}": {
                name: round(value, 4)
                for name, value in evaluate(self._encoder(stage, k), self.benchmark, len(self.tokenizer)).items()
            }
            for k in sorted(set(stage.budgets))
        }

    def _encoder(self, stage: Stage, k: int) -> Any:
        def encode(texts: Sequence[str], is_query: bool) -> Vectors:
            limit = 64 if is_query else 128
            ids, kept = encode_texts(list(texts), self.tokenizer, limit)
            words = [self.words(text) for text in kept]
            lengths = ids.lengths(limit)
            order = sorted(range(len(ids)), key=lengths.__getitem__)
            width = max(map(len, words))
            dense = torch.zeros(len(ids), k, self.recipe.shape.d_model)
            columns = torch.zeros(len(ids), width, dtype=torch.long)
            values = torch.zeros(len(ids), width)
            for start in range(0, len(order), 64):
                rows = order[start : start + 64]
                with torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.bf16):
                    states = self._masks([ids[n] for n in rows], is_query, k, limit).float()
                    weights = losses.sparse_weights(states, self.model.lm_head.weight)  # [B, V]
                dense[rows] = torch.nn.functional.normalize(states, dim=-1)
                for n, weight in zip(rows, weights, strict=True):
                    columns[n, : len(words[n])] = torch.tensor(words[n], dtype=torch.long)
                    values[n, : len(words[n])] = weight[columns[n, : len(words[n])]]
            return Vectors(dense, columns, values)

        return encode


Drawn = tuple[list[list[int]], list[list[int]], list[list[int]], list[list[int]]]


class _Plan:
    """Which step does what: the stage's pattern, and the batches of each kind in order."""

    def __init__(self, stage: Stage, corpus: Corpus, denoiser: Denoiser, seed: int) -> None:
        self.stage, self.corpus, self.denoiser = stage, corpus, denoiser
        lengths = corpus.pairs.passages.lengths(stage.max_passage)
        if "pairs" in stage.pattern:
            self.pairs = Batches(lengths, stage.batch_size, seed)
        if "neighbours" in stage.pattern:
            self.seeds = Batches(lengths, max(stage.batch_size // 2, 1), seed + 1)
        lengths = corpus.texts.lengths(stage.max_passage)
        self.long = [number for number, length in enumerate(lengths) if length >= MIN_CLOZE]
        if "cloze" in stage.pattern:
            self.cloze = Batches([lengths[number] for number in self.long], stage.batch_size, seed + 2)

    def kind(self, step: int) -> tuple[str, int]:
        """The kind of a step, and how many of that kind came before it."""
        pattern = self.stage.pattern
        rounds, place = divmod(step, len(pattern))
        kind = pattern[place]
        return kind, rounds * pattern.count(kind) + pattern[:place].count(kind)

    def budget(self, step: int) -> int:
        """K of a step: the budgets in turn."""
        contrastive = [kind != "denoise" for kind in self.stage.pattern]
        rounds, place = divmod(step, len(contrastive))
        return self.stage.budgets[(rounds * sum(contrastive) + sum(contrastive[:place])) % len(self.stage.budgets)]

    def draw(self, kind: str, number: int, rng: random.Random) -> Drawn:
        """The texts of one contrastive batch, as token ids, with their content words."""
        if kind == "cloze":
            return self._cloze(number, rng)
        if kind == "neighbours":
            assert self.corpus.neighbours is not None
            chosen = with_neighbours(self.seeds[number], self.corpus.neighbours, rng)
        else:
            chosen = self.pairs[number]
        chosen = _distinct(chosen, self.corpus.pairs)
        pairs = self.corpus.pairs
        return (
            [pairs.queries[n] for n in chosen],
            [pairs.passages[n] for n in chosen],
            [pairs.query_words[n] for n in chosen],
            [pairs.passage_words[n] for n in chosen],
        )

    def _cloze(self, number: int, rng: random.Random) -> Drawn:
        queries, passages = [], []
        for item in self.cloze[number]:
            text = self.corpus.texts[self.long[item]]
            start = rng.randrange(max(len(text) - self.stage.max_passage, 0) + 1)
            query, passage = cloze_pair(text[start : start + self.stage.max_passage], rng)
            queries.append(query)
            passages.append(passage)
        return queries, passages, [sorted(set(q)) for q in queries], [sorted(set(p)) for p in passages]


def _distinct(chosen: Sequence[int], pairs: EncodedPairs) -> list[int]:
    """Leaves out pairs whose query or passage is already in the batch: they would be false negatives."""
    seen: set[tuple[int, ...]] = set()
    kept = []
    for number in chosen:
        keys = {(0, *pairs.queries[number]), (1, *pairs.passages[number])}
        if not keys & seen:
            kept.append(number)
            seen |= keys
    return kept


def rate(step: int, stage: Stage) -> float:
    """Factor on the learning rate: linear warm-up, then cosine down to `final_rate`."""
    if step < stage.warmup:
        return (step + 1) / stage.warmup
    done = (step - stage.warmup) / max(stage.steps - stage.warmup, 1)
    return stage.final_rate + (1 - stage.final_rate) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def read_corpus(
    recipe: PretrainRecipe, pair_files: Iterable[Path], text_files: Iterable[Path], tokenizer: Any, cache: Path
) -> Corpus:
    """Reads and tokenises the training data.

    Args:
        recipe: lengths and what the stages ask for.
        pair_files: JSONL of pairs.
        text_files: JSONL of plain texts.
        tokenizer: transformers tokenizer.
        cache: folder for the mined neighbours.
    """
    pairs: list[Pair] = [pair for path in pair_files for pair in read_pairs(path)]
    texts = [text for path in text_files for text in read_texts(path)][:: recipe.texts_every]
    stages = recipe.stages
    encoded = encode_pairs(pairs, tokenizer, max(s.max_query for s in stages), max(s.max_passage for s in stages))
    flat = [(pair.query, positive) for pair in pairs for positive in pair.positives]
    found = None
    if any("neighbours" in stage.pattern for stage in stages):
        found = cached_neighbours([q for q, _ in flat], [p for _, p in flat], recipe.neighbours, cache)
    ids, _ = encode_texts(texts, tokenizer, 512)
    kept = [number for number in range(len(ids)) if number % HELD_OUT_EVERY != HELD_OUT_EVERY - 1]
    held_out = [number for number in range(len(ids)) if number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1]
    return Corpus(encoded, IdLists(ids[n] for n in kept), IdLists(ids[n] for n in held_out or kept[:1]), found)


def pretrain(
    recipe: PretrainRecipe,
    pair_files: Sequence[Path],
    text_files: Sequence[Path],
    out: Path,
    dev: Path | None = None,
    threads: int | None = None,
) -> Path:
    """Trains tokenizer and backbone; run again after an interruption, it goes on from its checkpoint.

    Args:
        recipe: from `read_recipe`.
        pair_files, text_files: JSONL data.
        out: output folder; the result is <out>/backbone.
        dev: BEIR-style folder whose dev split is evaluated along the way.
        threads: CPU threads.

    Returns:
        The backbone's folder.
    """
    if threads:
        torch.set_num_threads(threads)
    tokenizer_folder, form = out / "tokenizer", FORMATS[recipe.backbone_type].tokenizer
    if not (tokenizer_folder / "tokenizer_config.json").is_file():
        texts = _tokenizer_texts(recipe, text_files)
        built = build_tokenizer(form, texts, recipe.shape.vocab_size, prompt_training_texts(form))
        save_tokenizer(form, built, tokenizer_folder)
    tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_folder))
    corpus = read_corpus(recipe, pair_files, text_files, tokenizer, out)
    print(f"{len(corpus.pairs)} pairs, {len(corpus.texts)} texts, {len(corpus.texts.flat)} tokens", flush=True)
    trainer = Pretrainer(recipe, corpus, tokenizer_folder, out, dev)
    (out / "recipe.json").write_text(json.dumps(dataclasses.asdict(recipe), indent=2) + "\n")
    with contextlib.suppress(KeyboardInterrupt):
        trainer.run()
    return out / "backbone"


def _tokenizer_texts(recipe: PretrainRecipe, text_files: Iterable[Path]) -> Iterable[str]:
    """Every n-th text, cut."""
    for path in text_files:
        for number, text in enumerate(read_texts(path)):
            if number % recipe.tokenizer_every == 0:
                yield text[: recipe.tokenizer_characters]
