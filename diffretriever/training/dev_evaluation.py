"""nDCG@10 on a development split, along the way and at the end of training."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from ..evaluation.small_task import SmallTask, names_of
from .adapter_recipe import AdapterRecipe
from .candidates import world


class DevEvaluation(TrainerCallback):
    """Evaluates every `eval_steps` steps and after the last one; the figures go to the log.

    Args:
        trainer: logs, and holds the model.
        task: what is evaluated on.
        recipe: eval_steps.
    """

    def __init__(self, trainer: Any, task: SmallTask, recipe: AdapterRecipe) -> None:
        self.trainer, self.task, self.recipe = trainer, task, recipe

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate where it is time."""
        every = self.recipe.eval_steps
        due = (every and state.global_step % every == 0) or state.global_step == state.max_steps
        if due and world()[0] == 0:
            model = self.trainer.accelerator.unwrap_model(self.trainer.model).retriever
            model.eval()
            with self.trainer.accelerator.autocast():  # LoRA in float32 fits a bfloat16 backbone by autocast alone
                figures = self.task.evaluate(model.encode_texts, names_of(model))
            self.trainer.log({f"dev_{name}_ndcg@10": round(value, 4) for name, value in figures.items()})
