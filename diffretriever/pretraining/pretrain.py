"""`diffretriever pretrain`: a small backbone in LLaDA's or Dream's format from scratch.

First masked denoising (the backbone's own objective) on plain text, from weights that begin with the corpus's token
statistics; then the retrieval prompt together with denoising: a small backbone does not follow a prompt it has never
seen.
"""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..evaluation.small_task import SmallTask, read_small_task
from ..files.durable import write_json, write_whole
from ..files.hashes import hash_file
from ..files.lines import read_object
from ..model.modeling_diffretriever import DiffRetriever
from ..progress import progress_bar
from ..training.checkpoints import newest_whole, partial_checkpoint, publish_checkpoint, remove_partial
from ..training.run_record import RUN_FILE, check_same_run
from ..training.trainer import StopOnSignal
from .backbone import new_backbone
from .corpus import Corpus, read_corpus, read_texts
from .formats import FORMATS, write_description, write_weights
from .recipe import PretrainRecipe
from .steps import StageSteps
from .tokenizer import build_tokenizer, save_tokenizer
from .warm_start import start_from_statistics

STATE_FILE, LOG_FILE = "state.pt", "log.jsonl"
EARLIER_CHECKPOINT = "pretrain.ckpt"  # of versions that kept one file, without hashes
KEEP = 2  # checkpoints; the older one is for where the newer is damaged
# Keys that do not touch the weights: they may change between an interruption and its resumption.
FREE_KEYS = frozenset("save_every log_every eval_every eval_passages".split())


def pretrain(
    recipe: PretrainRecipe,
    pair_files: Sequence[Path],
    text_files: Sequence[Path],
    out: Path,
    dev: Path | None = None,
) -> Path:
    """Train tokenizer and backbone; called again after an interruption, it goes on from its checkpoint.

    Args:
        recipe: from `read_pretrain_recipe`.
        pair_files, text_files: JSONL data.
        out: output folder; the result is <out>/backbone.
        dev: BEIR-style folder whose dev split is evaluated along the way.

    Returns:
        The backbone's folder.

    Raises:
        FileNotFoundError, ValueError: wrong input; the message names it.
        FloatingPointError: the loss is not finite; the last checkpoint stays.
        KeyboardInterrupt: SIGINT or SIGTERM, during the steps after saving a checkpoint.
    """
    record = {"recipe": dataclasses.asdict(recipe), "data": [_describe(file) for file in [*pair_files, *text_files]]}
    _begin(out, record)
    split = read_small_task(dev, "dev", recipe.eval_passages) if dev else None
    write_json(out / RUN_FILE, record)
    folder = out / "backbone"
    if not (folder / "config.json").is_file():
        form = FORMATS[recipe.backbone_type].tokenizer
        texts = _tokenizer_texts(recipe, text_files)
        save_tokenizer(form, build_tokenizer(form, texts, recipe.shape.vocab_size), folder)
        write_description(recipe.backbone_type, recipe.shape, folder)
    model = new_backbone(folder, recipe.seed)
    corpus = read_corpus(recipe, pair_files, text_files, model.texts, out)
    print(f"{len(corpus.pairs)} pairs, {len(corpus.texts)} texts, {len(corpus.texts.flat)} tokens", flush=True)
    record["backbone"] = {file.name: hash_file(file) for file in sorted(folder.glob("*.json"))}
    Pretrainer(recipe, model, corpus, out, record, split).run()
    write_weights(model, recipe.backbone_type, folder)
    return folder


def _describe(file: Path) -> dict[str, str]:
    """Return name and hash of a data file, for the run's record."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such data file; give the path of a JSONL file (also .gz, .xz, .zst)")
    return {"file": file.name, "sha256": hash_file(file)}


def _begin(out: Path, record: dict[str, Any]) -> None:
    """Refuse a folder that was begun with another recipe or other data: its tokenizer would be theirs."""
    if (out / EARLIER_CHECKPOINT).is_file():
        raise ValueError(
            f"{out / EARLIER_CHECKPOINT} is the checkpoint of an earlier version, from which this one cannot go on. "
            "Choose another --output, or remove the folder to start anew."
        )
    file = out / RUN_FILE
    check_same_run((file, read_object(file)) if file.is_file() else None, record, FREE_KEYS)


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
        out: folder of checkpoints and log; the newest whole checkpoint, if any, is resumed.
        record: of the run: recipe, data, the backbone's files; goes into each checkpoint.
        dev: what to evaluate on, or None.
    """

    def __init__(
        self, recipe: PretrainRecipe, model: DiffRetriever, corpus: Corpus, out: Path, record: dict[str, Any],
        dev: SmallTask | None = None,
    ) -> None:  # fmt: skip
        self.recipe, self.model, self.corpus, self.out, self.dev = recipe, model, corpus, out, dev
        self.record, self.folder = record, out / "state"
        self.stage, self.step = 0, 0
        self._started = time.monotonic()
        self._averages: dict[str, float] = {}
        self._bar: Any = None

    def run(self) -> None:
        """Train to the end.

        Raises:
            FloatingPointError: the loss is not finite; the last checkpoint stays.
            KeyboardInterrupt: SIGINT or SIGTERM; the checkpoint holds the step that was just taken.
            ValueError: the checkpoint is another run's.
        """
        resumed = self._read_checkpoint()
        if resumed is None and self.recipe.start_from_statistics:
            start_from_statistics(
                self.model, self.corpus.texts, self.recipe.seed, FORMATS[self.recipe.backbone_type].shift
            )
        stop = StopOnSignal()
        before = sum(stage.steps for stage in self.recipe.stages[: self.stage]) + self.step
        total = sum(stage.steps for stage in self.recipe.stages)
        with stop.listening(), progress_bar(total, "step", "pretrain", initial=before) as self._bar:
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
            words = ", ".join(f"{name} {value:.3f}" for name, value in self._averages.items())
            self._bar.set_postfix_str(words, refresh=False)
            self._bar.update()
            if self.step % recipe.log_every == 0:
                self.log(rate=steps.optimizer.param_groups[0]["lr"])
            if stop.received:
                self.log(note=f"interrupted; {self._save(steps)} is saved")
                raise KeyboardInterrupt
            if self.step == total or (recipe.save_every and self.step % recipe.save_every == 0):
                self._save(steps)
            if recipe.eval_every and self.step % recipe.eval_every == 0 and self.step < total:
                self.log(evaluation=self.evaluate(steps))
        self.log(evaluation=self.evaluate(steps))

    def _read_checkpoint(self) -> dict[str, Any] | None:
        """Read weights, stage and step; return the optimiser's state, or None at the start."""
        kept = newest_whole(self.folder, lambda words: self.log(note=words))
        remove_partial(self.folder)
        if kept is None:
            return None
        check_same_run(kept, self.record, FREE_KEYS)
        file = kept[0] / STATE_FILE
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
            self.model.load_state_dict(state["model"])
            self.stage, self.step = state["stage"], state["step"]
            optimizer: dict[str, Any] = state["optimizer"]
        except (RuntimeError, KeyError, pickle.UnpicklingError) as error:  # whole, as its hash says
            raise ValueError(
                f"{file} was written by another version of this software or of torch, and does not fit this one "
                f"({error}). Go on with that version, or choose another --output."
            ) from error
        self.log(note=f"resumed at stage {self.stage}, step {self.step}")
        return optimizer

    def _save(self, steps: StageSteps) -> Path:
        """Write the checkpoint to go on from, and return it; a crash or a full disk leaves the previous one."""
        state = {"model": self.model.state_dict(), "optimizer": steps.optimizer.state_dict()}
        buffer = io.BytesIO()
        torch.save({**state, "stage": self.stage, "step": self.step}, buffer)
        done = sum(stage.steps for stage in self.recipe.stages[: self.stage]) + self.step
        try:
            write_whole(partial_checkpoint(self.folder, done) / STATE_FILE, [buffer.getbuffer()])
            return publish_checkpoint(self.folder, done, KEEP, self.record)
        except OSError:
            remove_partial(self.folder)
            raise

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
        tqdm.write(line)  # above the bar
        sys.stdout.flush()
        self.out.mkdir(parents=True, exist_ok=True)
        with (self.out / LOG_FILE).open("a") as log:
            log.write(line + "\n")
