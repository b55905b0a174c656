"""transformers' Trainer for retrieval adapters: what it does otherwise than for language models, and no more."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from ..files.hashes import hash64
from ..model.adapter_loading import WEIGHTS_FILE
from .adapter_output import save_adapter
from .adapter_recipe import AdapterRecipe
from .batches import Collator, SampledItems
from .candidates import world
from .checkpoints import PARTIAL, checkpoints, publish_checkpoint, remove_partial
from .epochs import EpochLoader, EpochSampler
from .lora import load_lora
from .objective import ContrastiveModel


class RetrievalTrainer(Trainer):
    """Trains a `ContrastiveModel`; batches, dropout and so the weights follow from (seed, step, process) alone.

    Args:
        model: the release with its LoRA matrices.
        items: the data.
        recipe: what to do.
        arguments: from `training_arguments`.
        record: of the run, from `run_record`; goes into each checkpoint.
    """

    def __init__(
        self, model: ContrastiveModel, items: SampledItems, recipe: AdapterRecipe, arguments: TrainingArguments,
        record: dict[str, Any],
    ) -> None:  # fmt: skip
        self.recipe, self.record, self.items = recipe, record, items
        self.folder = Path(str(arguments.output_dir))
        self.seen = {"tokens": 0, "cut": 0}  # since the last line of the log
        self.figures: dict[str, list[torch.Tensor]] = {}
        self.micro_step, self.clock = 0, time.monotonic()
        super().__init__(
            model=model, args=arguments, train_dataset=items, data_collator=Collator(model.retriever, recipe)
        )

    def get_train_dataloader(self) -> EpochLoader:
        """Return what makes this process's part of each batch; accelerate need not cut batches again."""
        process, processes = world()
        sampler = EpochSampler(
            self.items.files.lengths, self.recipe.global_batch_size, self.recipe.seed,
            self.recipe.accumulation_steps, process, processes, self.recipe.groups(self.items.files.report.counts),
        )  # fmt: skip
        return EpochLoader(
            self.items, batch_sampler=sampler, collate_fn=self.data_collator, num_workers=self.recipe.workers,
            pin_memory=torch.cuda.is_available(), persistent_workers=self.recipe.workers > 0,
        )  # fmt: skip

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Do one micro-batch, with dropout drawn anew from (seed, step, micro-batch, process).

        Raises:
            FloatingPointError: the loss is not finite; names the batch and the last checkpoint.
        """
        process, _ = world()
        step = self.state.global_step
        place = step * self.recipe.accumulation_steps + self.micro_step
        torch.manual_seed(hash64(f"{self.recipe.seed}-{place}-{process}"))
        self.micro_step = (self.micro_step + 1) % self.recipe.accumulation_steps
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not torch.isfinite(loss):
            raise FloatingPointError(self._not_finite(float(loss), inputs["where"]))
        for name in self.seen:
            self.seen[name] += inputs[name]
        return loss

    def _not_finite(self, loss: float, where: list[str]) -> str:
        lines = ", ".join(where[:8]) + (f" and {len(where) - 8} more" if len(where) > 8 else "")
        kept = checkpoints(self.folder)
        last = f"the last good checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"
        return (
            f"the loss is {loss} at step {self.state.global_step + 1}, on the batch of {lines}; {last}. "
            "Lower learning_rate or raise temperature, and start again"
        )

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the loss, and keep its parts for the log."""
        found = model(inputs)
        for name in sorted(found.keys() - {"loss"}):
            self.figures.setdefault(name, []).append(found[name].detach())
        loss: torch.Tensor = found["loss"]
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the loss's parts, tokens per second (of this process) and the number of texts cut."""
        if "loss" in logs and self.figures:
            logs |= {name: float(torch.stack(values).mean()) for name, values in self.figures.items()}
            now = time.monotonic()
            logs["tokens_per_second"] = round(self.seen["tokens"] / max(now - self.clock, 1e-9), 1)
            logs["texts_cut"] = self.seen["cut"]
            self.seen, self.figures, self.clock = {"tokens": 0, "cut": 0}, {}, now
        super().log(logs, *args, **kwargs)

    def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
        """Do as transformers does; the clock of tokens per second starts here, after loading."""
        super().create_optimizer_and_scheduler(num_training_steps)
        self.clock = time.monotonic()

    # ------------------------------------------------------------------------------------------------ checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        """Return where Trainer writes a checkpoint: aside, until it is whole."""
        return str(self.folder / PARTIAL)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save adapter, optimiser, schedule and state; a failure leaves the previous checkpoint as it is.

        Raises:
            OSError: the disk is full, or the folder cannot be written.
        """
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()  # other processes write their part, too
            if self.args.should_save:
                step, keep = self.state.global_step, self.recipe.keep_checkpoints
                publish_checkpoint(self.folder, step, keep, self.record)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            remove_partial(self.folder)
            kept = checkpoints(self.folder)
            last = f"the previous one, {kept[-1]}, is whole" if kept else "there is no earlier one"
            number = getattr(error, "errno", None) or errno.EIO
            raise OSError(number, f"the checkpoint could not be saved ({error}); {last}", str(self.folder)) from error
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Write the adapter in the method's layout."""
        retriever = self.accelerator.unwrap_model(self.model).retriever
        if self.args.should_save:
            save_adapter(retriever, self.recipe, Path(output_dir or self.folder), self.record["base"])

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Read the adapter back."""
        file = os.path.join(resume_from_checkpoint, WEIGHTS_FILE)
        retriever: Any = self.accelerator.unwrap_model(model or self.model).retriever
        load_lora(retriever, load_file(file), file)


class StepsOfNow(TrainerCallback):
    """Has a resumed run save and log as its recipe says now; transformers takes the checkpoint's steps."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the recipe's steps in the checkpoint's place."""
        state.save_steps, state.logging_steps = args.save_steps, args.logging_steps


class StopOnSignal(TrainerCallback):
    """After SIGTERM or SIGINT, ends the step, saves a checkpoint and stops.

    A second SIGINT acts at once; a second SIGTERM does not, as launchers pass on one that all processes have had.
    """

    def __init__(self) -> None:
        self.received = 0

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Catch the signals while training."""
        # `or`: of a C library's handler Python knows nothing, and cannot set it again
        before = {number: signal.getsignal(number) or signal.SIG_DFL for number in (signal.SIGTERM, signal.SIGINT)}
        for number in before:
            signal.signal(number, self._note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        if self.received == number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = number

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop all processes after the same step, whichever got the signal."""
        if world()[1] > 1:
            flag = torch.tensor(self.received, device=args.device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            self.received = int(flag)
        if self.received and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True


def training_arguments(recipe: AdapterRecipe, counts: Sequence[int], folder: Path, processes: int) -> TrainingArguments:
    """Translate a recipe into transformers' terms.

    Args:
        recipe: from `read_adapter_recipe`.
        counts: training items of each file.
        folder: for checkpoints and logs.
        processes: over which the global batch is spread.

    Raises:
        ValueError: the batch does not fit the data or the processes.
    """
    steps = recipe.total_steps(counts)
    on_cpu = not torch.accelerator.is_available()
    # The recipe decides: transformers takes an environment's bf16 over bf16=False, and leaves its own behind in 4.x.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if recipe.bf16 else "no"
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=recipe.process_batch_size(processes),
        gradient_accumulation_steps=recipe.accumulation_steps,
        max_steps=steps,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(recipe.warmup * steps),
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        optim="adamw_torch_fused",
        seed=recipe.seed,
        bf16=recipe.bf16,
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu and processes > 1 else None,
        ddp_find_unused_parameters=False,
        save_strategy="steps",
        save_steps=recipe.save_steps,
        logging_steps=recipe.log_steps,
        logging_nan_inf_filter=False,
        report_to=[] if recipe.report_to == "none" else [recipe.report_to],
        remove_unused_columns=False,
        dataloader_num_workers=recipe.workers,
        disable_tqdm=True,  # see StepBar
    )
