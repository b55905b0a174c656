"""The plugin that lets vLLM serve an exported release by its texts, dense and sparse (docs/vllm.md).

vLLM calls `register` in each of its processes, through the entry point `vllm.general_plugins`, and asks `io_processor`,
through `vllm.io_processor_plugins`, for the class that turns requests into prompts and states into answers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

NAME = "diffretriever"


def register() -> None:
    """Let a folder of `diffretriever export-vllm` say itself how it is pooled, and that it takes texts."""
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    from ..plain_model import ARCHITECTURES, SERVING_FILE

    def configured(earlier: Any) -> Any:
        class Exported(earlier or VerifyAndUpdateConfig):  # type: ignore[misc]
            @staticmethod
            def verify_and_update_model_config(model_config: Any) -> None:
                if earlier is not None:
                    earlier.verify_and_update_model_config(model_config)
                if (Path(model_config.model) / SERVING_FILE).is_file():
                    _configure(model_config)

        return Exported

    for architecture in ARCHITECTURES.values():
        earlier = MODELS_CONFIG_MAP.get(architecture)
        if getattr(earlier, "__name__", None) != "Exported":  # vLLM may call this twice in a process
            MODELS_CONFIG_MAP[architecture] = configured(earlier)


def _configure(model_config: Any) -> None:
    """Set what serving.json says of the pooling; only the states at the masks leave the model.

    Args:
        model_config: vLLM's ModelConfig.

    Raises:
        ValueError: vLLM was started to generate.
    """
    from ..text_server import read_facts

    if model_config.pooler_config is None:
        raise ValueError(f"{model_config.model} is a retriever; start vLLM with --runner pooling.")
    said = read_facts(Path(model_config.model))["pooler_config"]
    for name, value in said.items():
        if name != "use_activation" or model_config.pooler_config.use_activation is None:
            setattr(model_config.pooler_config, name, value)
    model_config.io_processor_plugin = model_config.io_processor_plugin or NAME


def io_processor() -> str:
    """Return the class's name, as vLLM's entry point wants it."""
    return f"{__name__}.io_processor.TextIOProcessor"
