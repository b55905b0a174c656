"""The methods that the paper compares DiffRetriever with, behind the model's own contract (§4.2).

- `PromptReps` (Zhuang et al. 2024, arXiv:2404.18424): the same prompt, words generated one by one;
- `RepLLaMA` (Ma et al. 2024, arXiv:2310.08319): the state of the last token;
- `DiffEmbed` (Zhang et al. 2025, arXiv:2505.15045): the mean of all states.

`load_baseline` loads each from its backbone and adapter. Whatever encodes, stores, searches or evaluates takes a
`contract.RetrievalModel`, which says what it may ask of a model; `DiffRetriever` and the baselines are such models:

- `tokenize`, `encode`, `encode_texts`, `score` as in `modeling_diffretriever.py`. `encode` returns `repr_hidden`
  [B, K, H]; `repr_mask` bool [B, K] where texts have different numbers of vectors, those that do not exist being zero;
  `sparse_indices` and `sparse_values` [B, T] where the method has sparse vectors and they are asked for;
- `config` with what decides the vectors beside the weights (budgets, lengths, prompts, normalisation, dimensions), and
  `loaded_from` with the folders of weights, adapter and tokenizer;
- `texts`, the rules of tokenisation; `encode_batches`, `device`, `dtype`.
"""

from .baseline import Baseline, BaselineOutput
from .configuration import METHODS, BaselineConfig
from .diffembed import DiffEmbed
from .loading import load_baseline
from .promptreps import PromptReps
from .repllama import RepLLaMA

__all__ = [
    "METHODS",
    "Baseline",
    "BaselineConfig",
    "BaselineOutput",
    "DiffEmbed",
    "PromptReps",
    "RepLLaMA",
    "load_baseline",
]
