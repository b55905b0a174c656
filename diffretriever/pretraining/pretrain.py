"""`diffretriever pretrain`: a small backbone in LLaDA's or Dream's format from random weights.

First masked denoising (the backbone's own objective) on plain text, from weights that begin with the corpus's token
statistics; then the retrieval prompt together with denoising: a small backbone does not follow a prompt it has never
seen.
"""

from __future__ import annotations

import dataclasses
import io
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from ..evaluation.small_task import SmallTask, read_small_task
from ..files.durable import write_json, write_whole
from ..model.backbone_loading import read_json
from ..model.modeling_diffretriever import DiffRetriever
from ..training.trainer import StopOnSignal
from .backbone import new_backbone
from .corpus import Corpus, read_corpus, read_texts
from .formats import FORMATS, write_description, write_weights
from .recipe import PretrainRecipe
from .steps import StageSteps
from .tokenizer import build_tokenizer, save_tokenizer
from .warm_start import start_from_statistics

CHECKPOINT_FILE, RECIPE_FILE, LOG_FILE = "pretrain.ckpt", "recipe.json", "log.jsonl"


def pretrain(
    recipe: PretrainRecipe,
    pair_files: Sequence[Path],
    text_files: Sequence[Path],
    out: Path,
    dev: Path | None = None,
    threads: int | None = None,
) -> Path:
    """Train tokenizer and backbone; called again after an interruption, it goes on from its checkpoint.

    Args:
        recipe: from `read_pretrain_recipe`.
        pair_files, text_files: JSONL data.
        out: output folder; the result is <out>/backbone.
        dev: BEIR-style folder whose dev split is evaluated along the way.
        threads: CPU threads.

    Returns:
        The backbone's folder.

    Raises:
        FileNotFoundError, ValueError: wrong input; the message names it.
        FloatingPointError: the loss is not finite; the last checkpoint stays.
        KeyboardInterrupt: SIGINT or SIGTERM, during the steps after saving a checkpoint.
    """
    if threads:
        torch.set_num_threads(threads)
    _check_same_backbone(recipe, out / RECIPE_FILE)
    split = read_small_task(dev, "dev", recipe.eval_passages) if dev else None
    write_json(out / RECIPE_FILE, dataclasses.asdict(recipe))
    folder = out / "backbone"
    if not (folder / "config.json").is_file():
        form = FORMATS[recipe.backbone_type].tokenizer
        texts = _tokenizer_texts(recipe, text_files)
        save_tokenizer(form, build_tokenizer(form, texts, recipe.shape.vocab_size), folder)
        write_description(recipe.backbone_type, recipe.shape, folder)
    model = new_backbone(folder, recipe.seed)
    corpus = read_corpus(recipe, pair_files, text_files, model.texts, out)
    print(f"{len(corpus.pairs)} pairs, {len(corpus.texts)} texts, {len(corpus.texts.flat)} tokens", flush=True)
    Pretrainer(recipe, model, corpus, out, split).run()
    write_weights(model, recipe.backbone_type, folder)
    return folder


def _check_same_backbone(recipe: PretrainRecipe, file: Path) -> None:
    """Refuse a folder that was begun for another backbone."""
    if not file.is_file():
        return
    before, now = read_json(file), dataclasses.asdict(recipe)
    for key in ("backbone_type", "shape"):
        if before.get(key) != now[key]:
            raise ValueError(
                f"{file}: this run was started with {key} = {before.get(key)!r}, now it is {now[key]!r}. Choose "
                "another --out, or remove the folder to start anew."
            )


def _tokenizer_texts(recipe: PretrainRecipe, text_files: Iterable[Path]) -> Iterator[str]:
    """Yield every n-th text, cut."""
    for path in text_files:
        for text in islice(read_texts(path), 0, None, recipe.tokenizer_every):
            yield text[: recipe.tokenizer_characters]


class Pretrainer:
    """Runs the stages of a recipe, and can go on from any step.

    Args:
        recipe: what to do.
        model: from `new_backbone`.
        corpus: what to learn from.
        out: folder of checkpoint and log; the checkpoint, if any, is resumed.
        dev: what to evaluate on, or None.
    """

    def __init__(
        self, recipe: PretrainRecipe, model: DiffRetriever, corpus: Corpus, out: Path, dev: SmallTask | None = None
    ) -> None:
        self.recipe, self.model, self.corpus, self.out, self.dev = recipe, model, corpus, out, dev
        self.stage, self.step = 0, 0
        self._started = time.monotonic()
        self._averages: dict[str, float] = {}

    def run(self) -> None:
        """Train to the end.

        Raises:
            FloatingPointError: the loss is not finite; the last checkpoint stays.
            KeyboardInterrupt: SIGINT or SIGTERM; the checkpoint holds the step that was just taken.
        """
        resumed = self._read_checkpoint()
        if resumed is None and self.recipe.start_from_statistics:
            start_from_statistics(
                self.model, self.corpus.texts, self.recipe.seed, FORMATS[self.recipe.backbone_type].shift
            )
        stop = StopOnSignal()
        with stop.listening():
            for number in range(self.stage, len(self.recipe.stages)):
                steps = StageSteps(self.model, self.recipe, number, self.corpus)
                if resumed is not None:
                    steps.optimizer.load_state_dict(resumed)
                    resumed = None
                else:
                    self.stage, self.step = number, 0
                self._run_stage(steps, stop)

    def _run_stage(self, steps: StageSteps, stop: StopOnSignal) -> None:
        recipe, total = self.recipe, steps.stage.steps
        while self.step < total:
            self._note(steps.take(self.step))
            self.step += 1
            if self.step % recipe.log_every == 0:
                self.log(rate=steps.optimizer.param_groups[0]["lr"])
            if stop.received:
                self._save(steps)
                self.log(note=f"interrupted; {self.out / CHECKPOINT_FILE} is saved")
                raise KeyboardInterrupt
            if recipe.save_every and self.step % recipe.save_every == 0:
                self._save(steps)
            if recipe.eval_every and self.step % recipe.eval_every == 0 and self.step < total:
                self.log(evaluation=self.evaluate(steps))
        self._save(steps)
        self.log(evaluation=self.evaluate(steps))

    def _read_checkpoint(self) -> dict[str, Any] | None:
        """Read weights, stage and step; return the optimiser's state, or None at the start."""
        file = self.out / CHECKPOINT_FILE
        if not file.is_file():
            return None
        state = torch.load(file, map_location="cpu", weights_only=True)
        self.model.load_state_dict(state["model"])
        self.stage, self.step = state["stage"], state["step"]
        self.log(note=f"resumed at stage {self.stage}, step {self.step}")
        optimizer: dict[str, Any] = state["optimizer"]
        return optimizer

    def _save(self, steps: StageSteps) -> None:
        """Write the checkpoint to go on from; a crash or a full disk leaves the previous one."""
        state = {"model": self.model.state_dict(), "optimizer": steps.optimizer.state_dict()}
        buffer = io.BytesIO()
        torch.save({**state, "stage": self.stage, "step": self.step}, buffer)
        write_whole(self.out / CHECKPOINT_FILE, [buffer.getbuffer()])

    @torch.no_grad()
    def evaluate(self, steps: StageSteps) -> dict[str, dict[str, float]]:
        """Return the held-out denoising loss, and nDCG@10 on the dev split for each K where the stage trains that."""
        model, stage = self.model, steps.stage
        with torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.bf16):
            found = {"denoise": steps.denoiser.held_out(model, self.corpus.held_out)}
            if self.dev is None or set(stage.pattern) == {"denoise"}:
                return found
            for k, rules in steps.rules.items():
                model.config.num_query_masks = model.config.num_passage_masks = k
                model.config.max_length = rules.max_length
                figures = self.dev.evaluate(model.encode_texts)
                found[f"K={k}"] = {name: round(value, 4) for name, value in figures.items()}
        return found

    def _note(self, figures: dict[str, float]) -> None:
        """Keep running averages for the log."""
        for name, value in figures.items():
            self._averages[name] = 0.9 * self._averages.get(name, value) + 0.1 * value

    def log(self, **extra: Any) -> None:
        """Print one line of JSON and append it to <out>/log.jsonl."""
        record = {"minutes": round((time.monotonic() - self._started) / 60, 2), "stage": self.stage}
        record |= {"step": self.step} | {name: round(value, 4) for name, value in self._averages.items()} | extra
        line = json.dumps(record)
        print(line, flush=True)
        self.out.mkdir(parents=True, exist_ok=True)
        with (self.out / LOG_FILE).open("a") as log:
            log.write(line + "\n")
