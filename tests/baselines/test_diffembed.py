"""DiffEmbed against a plain loop over texts: LLaDA and Dream without, Llama and Qwen2 with the causal mask."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from causal_backbones import EACH_KIND, PARITY, TEXTS, language_model, tokenizer_of
from torch.nn import functional as F
from transformers import AutoModel

from diffretriever.baselines import load_baseline
from diffretriever.store.identity import describe_model

DIFFUSION = ("tiny-llada", "tiny-dream")
PLAIN = [text for text in TEXTS if text and "<|" not in text]


@pytest.fixture(scope="module")
def diffusion() -> Callable[..., Any]:
    """Return a function that loads the baseline on a parity backbone."""
    loaded: dict[Any, Any] = {}

    def load(name: str, **options: Any) -> Any:
        key = (name, *sorted(options.items()))
        if key not in loaded:
            folder = PARITY / "backbones" / name
            loaded[key] = load_baseline(folder, "diffembed", dtype=torch.float32, **options)
        return loaded[key]

    return load


@pytest.mark.parametrize("kind", EACH_KIND)
@pytest.mark.parametrize("end_of_text", [False, True])
def test_a_plain_loop_over_a_causal_backbone(
    load: Callable[..., Any], backbone: Callable[[str], Path], kind: str, end_of_text: bool
) -> None:
    model = load("diffembed", kind, passage_length=20, append_end_of_text=end_of_text)
    plain, tokenizer, expected = language_model(backbone(kind)), tokenizer_of(kind), []
    for text in PLAIN:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][:20] + [tokenizer.eos_token_id] * end_of_text
        with torch.no_grad():
            states = plain(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1]
        expected.append(F.normalize(states[0].mean(dim=0), dim=-1))
    found = model.encode_texts(PLAIN, False)
    assert found.keys() == {"repr_hidden"}
    assert torch.allclose(found.repr_hidden, torch.stack(expected)[:, None], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", DIFFUSION)
def test_a_plain_loop_over_a_diffusion_backbone(diffusion: Callable[..., Any], build_release: Any, name: str) -> None:
    model = diffusion(name, query_length=10)
    release = AutoModel.from_pretrained(build_release(name), trust_remote_code=True, torch_dtype=torch.float32)
    for text, vector in zip(PLAIN, model.encode_texts(PLAIN, True).repr_hidden, strict=True):
        ids = release.tokenizer(text, add_special_tokens=False)["input_ids"][:10]
        with torch.no_grad():
            states = release.hidden_states(torch.tensor([ids]))  # [1, L, H]
        assert torch.allclose(vector[0], F.normalize(states[0].mean(dim=0), dim=-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", DIFFUSION)
def test_batched_equals_alone(diffusion: Callable[..., Any], name: str) -> None:
    model = diffusion(name)
    together = model.encode_texts(TEXTS, False, tokens_per_batch=10**6)
    alone = model.encode_texts(TEXTS, False, batch_size=1)
    assert torch.allclose(together.repr_hidden, alone.repr_hidden, rtol=0, atol=1e-5)


def test_a_text_without_tokens_has_a_vector(load: Callable[..., Any], diffusion: Callable[..., Any]) -> None:
    for model in (load("diffembed", "llama"), diffusion("tiny-dream")):
        ids, mask = model.tokenize([""], True)
        assert ids.tolist() == [[model.tokenizer.eos_token_id]]
        assert model.encode(ids, mask, True).repr_hidden.norm(dim=-1).item() == pytest.approx(1.0)


@pytest.mark.parametrize("name", DIFFUSION)
def test_an_adapter_in_the_backbones_own_names(build_release: Any, tmp_path: Path, name: str) -> None:
    kind = name.removeprefix("tiny-")
    own = PARITY / "adapters" / f"{kind}-q4p4"
    for file in ("adapter_config.json", "adapter_model.safetensors"):  # without what says that masks trained it
        (tmp_path / file).write_bytes((own / file).read_bytes())
    options: dict[str, Any] = {"append_end_of_text": True, "passage_length": 60}
    folder = PARITY / "backbones" / name
    model: Any = load_baseline(folder, "diffembed", dtype=torch.float32, adapter_name_or_path=tmp_path, **options)
    release = AutoModel.from_pretrained(
        build_release(name, f"{kind}-q4p4"), trust_remote_code=True, torch_dtype=torch.float32, max_length=512
    )
    for text, vector in zip(PLAIN[:6], model.encode_texts(PLAIN[:6], False).repr_hidden, strict=True):
        ids = [*release.tokenizer(text, add_special_tokens=False)["input_ids"][:60], release.texts.end_of_text_id]
        with torch.no_grad():
            states = release.hidden_states(torch.tensor([ids]))  # [1, L, H]
        assert torch.allclose(vector[0], F.normalize(states[0].mean(dim=0), dim=-1), rtol=0, atol=1e-5)


def test_a_release_is_a_backbone_too(diffusion: Callable[..., Any], build_release: Any) -> None:
    model: Any = load_baseline(build_release("tiny-llada"), "diffembed", dtype=torch.float32)
    expected = diffusion("tiny-llada").encode_texts(TEXTS, False).repr_hidden
    assert torch.equal(model.encode_texts(TEXTS, False).repr_hidden, expected)
    assert model.loaded_from.weights == (PARITY / "backbones" / "tiny-llada").resolve()
    adapted: Any = load_baseline(build_release("tiny-llada", "llada-q4p4"), "diffembed", dtype=torch.float32)
    one, other = (describe_model(made, False, "float32") for made in (model, adapted))
    assert one.differences(other)["model_parts.adapter"] == (None, {**other.model_parts["adapter"]})


def test_a_release_without_its_code(tmp_path: Path, build_release: Any, diffusion: Callable[..., Any]) -> None:
    folder = shutil.copytree(build_release("tiny-llada"), tmp_path / "bare", ignore=shutil.ignore_patterns("*.py"))
    model: Any = load_baseline(folder, "diffembed", dtype=torch.float32)
    expected = diffusion("tiny-llada").encode_texts(TEXTS, False).repr_hidden
    assert torch.equal(model.encode_texts(TEXTS, False).repr_hidden, expected)


@pytest.mark.parametrize("name", DIFFUSION)
def test_gradients_against_finite_differences(name: str) -> None:
    model: Any = load_baseline(PARITY / "backbones" / name, "diffembed", dtype=torch.float64)
    ids, mask = model.tokenize(TEXTS[:4], False)
    weight = model.backbone.backbone.layers[1].mlp.down_proj.weight
    torch.manual_seed(0)
    target, direction = torch.randn(4, 1, 64), torch.randn_like(weight) * weight.detach().abs().mean()

    def loss() -> torch.Tensor:
        return (F.normalize(model(ids, mask).states, dim=-1) * target).sum()

    (gradient,) = torch.autograd.grad(loss(), weight)
    step, values = 1e-2, []
    with torch.no_grad():
        for sign in (1, -2):
            weight += sign * step * direction
            values.append(float(loss()))
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(float((gradient * direction).sum()), rel=0.02)
