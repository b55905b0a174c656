"""vLLM's side of `TextServer`: an IO processor, in the process that answers requests, beside the engine's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import vllm
from vllm.plugins.io_processors.interface import IOProcessor
from vllm.pooling_params import PoolingParams

from ..text_server import TextServer


class TextIOProcessor(IOProcessor):
    """Turns the `data` of a request to /pooling into prompts, and the states at their masks into its answer.

    Args:
        vllm_config, renderer: vLLM's.

    Raises:
        FileNotFoundError, ValueError: as `TextServer`.
    """

    def __init__(self, vllm_config: Any, renderer: Any) -> None:
        super().__init__(vllm_config, renderer)
        served = vllm_config.model_config
        self._server = TextServer(Path(served.model), served.dtype, {"vllm": vllm.__version__})

    def parse_data(self, data: object) -> Any:
        """See `IOProcessor`; `pre_process` says what is wrong with a request."""
        return data

    def merge_pooling_params(self, params: PoolingParams | None = None) -> PoolingParams:
        """Ask for the states at the masks as they are, which the sparse vectors need."""
        return PoolingParams(task="token_embed", use_activation=False, step_tag_id=self._server.mask_id)

    def pre_process(self, prompt: Any, request_id: str | None = None, **_: Any) -> list[Any]:
        """Return the prompts of a request."""
        return [{"prompt_token_ids": ids} for ids in self._server.prompts(prompt)]

    def post_process(self, model_output: Sequence[Any], request_id: str | None = None, **_: Any) -> dict[str, Any]:
        """Return the answer to a request."""
        return self._server.answer((output.prompt_token_ids, output.outputs.data) for output in model_output)
