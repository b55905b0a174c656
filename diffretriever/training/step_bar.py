"""The bar of `diffretriever train`: steps, loss, tokens a second and the time left."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback

from ..progress import progress_bar


class StepBar(TrainerCallback):
    """Draws a bar in place of transformers' own, whose lines of figures it takes up on a terminal.

    Args:
        trainer: that it is added to.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.bar: Any = None
        if sys.stderr.isatty():
            trainer.remove_callback(PrinterCallback)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw it."""
        self.bar = progress_bar(state.max_steps, "step", "train", state.is_world_process_zero, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count a step."""
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Show loss and speed beside the bar, what else is logged on the development split above it."""
        if logs and "loss" in logs and self.bar is not None:
            words = f"loss {float(logs['loss']):.4f}, {float(logs['tokens_per_second']):.0f} tokens/s"
            self.bar.set_postfix_str(words, refresh=False)
        elif logs and sys.stderr.isatty() and any(name.startswith("dev_") for name in logs):
            tqdm.write(", ".join(f"{name} {value}" for name, value in logs.items()))

    def close(self) -> None:
        """End it, whatever ended the training: what is said of that comes after."""
        if self.bar is not None:
            self.bar.close()
