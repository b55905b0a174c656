"""`diffretriever train`: from a recipe, a zero-shot release and text pairs to an adapter (paper §3.4, App. B.1)."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ..data.pair_files import PairFiles
from ..evaluation.small_task import read_small_task
from ..files.durable import write_json
from ..files.lines import read_object
from ..model.adapter_loading import WEIGHTS_FILE
from ..model.backbone_loading import save_tokenizer
from ..model.configuration_diffretriever import DIFFUSION_TYPES
from ..model.optimized_layers import compile_layers
from .adapter_output import check_prompts, save_adapter
from .adapter_recipe import AdapterRecipe
from .batches import SampledItems
from .candidates import world
from .checkpoints import newest_whole, remove_partial, step_of
from .dev_evaluation import DevEvaluation
from .distillation import Teacher
from .lora import InitialAdapter, add_lora, load_lora
from .measuring import measure_candidates, measure_texts
from .methods import adapted, base_name
from .objective import ContrastiveModel
from .run_record import RUN_FILE, check_same_run, release_identity, run_record
from .step_bar import StepBar
from .trainer import RetrievalTrainer, StepsOfNow, StopOnSignal, training_arguments


class Interrupted(Exception):
    """Training was stopped by a signal after saving a checkpoint.

    Args:
        signal: its number.
        step: optimiser steps done.
    """

    def __init__(self, signal: int, step: int) -> None:
        super().__init__(f"stopped by signal {signal} after step {step}; the same command goes on from there")
        self.signal = signal


def train_adapter(
    recipe: AdapterRecipe,
    release: str,
    load: Callable[..., Any],
    pair_files: Sequence[str | Path],
    out: Path,
    dev: Path | None = None,
    base: str | None = None,
    start: InitialAdapter | None = None,
) -> None:
    """Train one adapter; called again after an interruption, it goes on from its last checkpoint.

    Run by several processes at once (`accelerate launch`), it spreads each batch over them.

    Args:
        recipe: from `read_adapter_recipe`.
        release: folder or Hub id of a zero-shot release (`publish.py build` without an adapter).
        load: takes settings of `from_pretrained` and returns the release, loaded with them.
        pair_files: JSONL of pairs, or Tevatron's layout.
        out: the adapter's folder; working files go to <out>/state.
        dev: BEIR-style folder whose dev split is evaluated along the way.
        base: the backbone's name for adapter_config.json (default: the release's).
        start: an adapter to go on from, of `read_initial_adapter`; None: a new one.

    Raises:
        FileNotFoundError, FileExistsError, ValueError: wrong input, or an `out` that is taken; before the model is
            loaded where that can be known.
        FloatingPointError, OSError: the loss is not finite, a checkpoint could not be saved; the last one stays.
        Interrupted: SIGTERM or SIGINT.
    """
    state = out / "state"
    files = PairFiles(pair_files, state)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    check_data(recipe, files, processes)
    items = SampledItems(files, recipe.hard_negatives, recipe.seed)
    alone = measure_candidates(items, recipe)
    task = read_small_task(dev, "dev", recipe.eval_passages) if dev is not None and is_main() else None
    teacher = None if recipe.teacher is None else Teacher(recipe.teacher, recipe.teacher_temperature)
    record = run_record(recipe, files, release, processes)
    record |= {"initial_adapter": start and start.sha256, "teacher_weights": teacher and teacher.sha256}
    kept, before = earlier_run(out, state)
    if is_main():
        check_same_run(before, record)
        remove_partial(state)
    arguments = training_arguments(recipe, files.report.counts, state, processes)
    retriever = check_prompts(load(attn_implementation=recipe.attention(), **recipe.model_settings()))
    record["base"] = base or base_name(retriever)
    if is_main():
        record["release"] = release_identity(retriever)
        check_same_run(before, record)
    lengths, retriever.config.cut_in_training = measure_texts(files, retriever.texts, recipe)
    say(describe(files, recipe), *alone, *lengths)
    model = prepare_model(retriever, recipe, start, teacher)
    trainer = RetrievalTrainer(model, items, recipe, arguments, record)
    if task is not None:
        trainer.add_callback(DevEvaluation(trainer, task, recipe))
    run(trainer, kept[0] if kept else None)
    if is_main():
        save_result(retriever, recipe, out, record)
    files.close()


def earlier_run(out: Path, state: Path) -> tuple[tuple[Path, dict[str, Any]] | None, ...]:
    """Return the checkpoint to go on from, None to begin, and what this run must be the same as: that, or the run whose
    adapter the folder holds.

    Raises:
        FileExistsError: it holds an adapter of no run that is known.
    """
    kept = newest_whole(state, say)
    if kept is not None or not (out / WEIGHTS_FILE).exists():
        return kept, kept
    if not (out / RUN_FILE).is_file():
        raise FileExistsError(f"{out} holds an adapter that was not trained there; choose another --output")
    return None, (out / RUN_FILE, read_object(out / RUN_FILE))


def save_result(retriever: Any, recipe: AdapterRecipe, out: Path, record: dict[str, Any]) -> None:
    """Write the adapter, its tokenizer and the run's record."""
    save_adapter(retriever, recipe, out, record["base"])
    save_tokenizer(retriever.tokenizer, out)
    write_json(out / RUN_FILE, record)
    say(f"saved the adapter in {out}")


def check_data(recipe: AdapterRecipe, files: PairFiles, processes: int) -> None:
    """Compare recipe, data and environment.

    Raises:
        ValueError: too few items, a batch that does not divide, several GPUs for one process, or negatives that no
            item has.
        ImportError: a package that the recipe needs is not installed.
    """
    recipe.steps_per_epoch(files.report.counts)
    recipe.process_batch_size(processes)
    reporter = [] if recipe.report_to == "none" else [recipe.report_to]
    for package in ("peft", *reporter, *([] if recipe.teacher is None else ["sentence-transformers"])):
        if importlib.util.find_spec(package.replace("-", "_")) is None:
            raise ImportError(f"this recipe needs the package {package}: pip install {package}")
    if processes == 1 and torch.cuda.device_count() > 1:  # transformers would split each batch, and its negatives
        raise ValueError(
            f"{torch.cuda.device_count()} GPUs, but one process: start with `accelerate launch -m diffretriever train "
            "...`, or show it one GPU (CUDA_VISIBLE_DEVICES=0)"
        )
    if recipe.hard_negatives and not files.report.most_negatives:
        raise ValueError(
            f"{', '.join(files.names)}: no query has negatives, but the recipe asks for hard_negatives = "
            f"{recipe.hard_negatives}. Mine some with `diffretriever mine-negatives`, or set hard_negatives=0"
        )


def prepare_model(
    retriever: Any, recipe: AdapterRecipe, start: InitialAdapter | None = None, teacher: Teacher | None = None
) -> ContrastiveModel:
    """Freeze the release and add LoRA: to LLaDA's head, too, as the released adapters have it, and with a row for the
    [MASK] of a backbone that was trained without one; new, or what `start` holds."""
    torch.manual_seed(recipe.seed)
    kind = getattr(retriever.config, "backbone_type", None)  # a DiffRetriever's; baselines read no mask and no head
    head, mask_row = kind == "llada", kind not in (None, *DIFFUSION_TYPES)
    add_lora(retriever, recipe.rank, recipe.alpha, recipe.dropout, head, mask_row)
    if start is not None:
        start.put_into(retriever)
    if recipe.bf16:
        leave_casts_to_autocast(retriever)
    if recipe.gradient_checkpointing:
        checkpoint_layers(adapted(retriever))
    if recipe.compile_layers:
        compile_layers(adapted(retriever))
    return ContrastiveModel(retriever, recipe, teacher)


def checkpoint_layers(retriever: Any) -> None:
    """Turn on transformers' gradient checkpointing, which has another name in 5.x."""
    newer = getattr(retriever, "activation_checkpointing_enable", None)
    (newer or retriever.gradient_checkpointing_enable)({"use_reentrant": False})


def leave_casts_to_autocast(retriever: Any) -> None:
    """Keep peft from copying each input into LoRA's float32, which autocast then casts back."""
    for module in retriever.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False


def run(trainer: RetrievalTrainer, last: Path | None) -> None:
    """Train from a whole checkpoint, if there is one, to the end.

    Raises:
        Interrupted: by SIGTERM or SIGINT.
        ValueError: the data changed meanwhile; names file and line.
    """
    if last is not None and step_of(last) >= trainer.args.max_steps:
        retriever: Any = trainer.accelerator.unwrap_model(trainer.model).retriever
        file = str(last / WEIGHTS_FILE)
        load_lora(retriever, load_file(file), file)
        say(f"all {trainer.args.max_steps} steps were done before")
        return
    if last is not None:
        say(f"going on from {last}")
    stop = StopOnSignal()
    bar = StepBar(trainer)
    for callback in (stop, bar, StepsOfNow()):
        trainer.add_callback(callback)
    try:
        with closing(bar), stop.listening():
            trainer.train(resume_from_checkpoint=str(last) if last else None)
    except ValueError as error:  # of a line of the data; a worker's has its traceback in front
        raise ValueError(str(error).strip().rpartition("\nValueError: ")[2]) from error
    if stop.received and trainer.state.global_step < trainer.args.max_steps:
        raise Interrupted(stop.received, trainer.state.global_step)


def describe(files: PairFiles, recipe: AdapterRecipe) -> str:
    """Return one line on data and steps."""
    report, steps = files.report, recipe.total_steps(files.report.counts)
    fewer = ""
    if recipe.hard_negatives and report.fewest_negatives < recipe.hard_negatives:
        fewer = f"; some have fewer than {recipe.hard_negatives} negatives ({report.without_negatives} have none)"
    return (
        f"{len(files)} queries, {steps} steps of {recipe.global_batch_size}; {report.dropped_negatives} negatives "
        f"dropped (equal to a positive, or given twice){fewer}"
    )


def is_main() -> bool:
    """Return whether this process speaks and writes for all."""
    return int(os.environ.get("RANK", "0")) == 0 and world()[0] == 0


def say(*lines: str) -> None:
    """Print lines, once for all processes."""
    if is_main():
        print(*lines, sep="\n", flush=True)
