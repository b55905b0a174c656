"""A Llama out of a GGUF file is the model that was put in, and what transformers' own reader makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

gguf_files = pytest.importorskip("gguf_files", reason="needs the package gguf", exc_type=ImportError)

from diffretriever.backbones.gguf_file import GgufLlama  # noqa: E402


@pytest.mark.parametrize("tied", [True, False])
def test_unquantised_weights_are_the_models(tied: bool, tmp_path: Path) -> None:
    model = gguf_files.tiny_llama(tied)
    for weight in model.parameters():
        weight.data = weight.data.bfloat16().float()
    GgufLlama(gguf_files.write_gguf(tmp_path / "model.gguf", model)).write(tmp_path)
    found = AutoModelForCausalLM.from_pretrained(tmp_path, torch_dtype=torch.float32)
    assert found.config.tie_word_embeddings is tied
    expected = dict(model.named_parameters())
    assert all(torch.equal(weight, expected[name]) for name, weight in found.named_parameters())
    ids = torch.arange(30)[None]
    assert torch.equal(found(ids).logits, model(ids).logits)


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0", "F16"])
def test_quantised_weights_are_those_of_another_reader(kind: str, tmp_path: Path) -> None:
    file = gguf_files.write_gguf(tmp_path / "model.gguf", gguf_files.tiny_llama(tied=True), kind)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name).state_dict()
    ours = GgufLlama(file).weights()
    assert ours.keys() == theirs.keys() - {"lm_head.weight"}
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name].float(), rtol=0, atol=0, msg=name)


def test_the_tokenizer(tmp_path: Path) -> None:
    GgufLlama(gguf_files.write_gguf(tmp_path / "model.gguf", gguf_files.tiny_llama(tied=True))).write(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokens, _ = gguf_files.tokens_and_merges()
    assert tokenizer.get_vocab() == {token: place for place, token in enumerate(tokens)}
    text = "the cat sat in 1984 <|im_end|> \N{SNOWMAN}"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert [tokens[token] for token in ids if tokens[token][-1].isdigit()] == list("1984")
    assert 2 in ids
    names = tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token
    assert names == ("<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>")
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "the sea"}], tokenize=False)
    assert chat == "<|im_start|>user\nthe sea<|im_end|>\n"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architecture": "qwen2"}, "its architecture is 'qwen2'; only \"llama\" is read"),
        ({"llama/rope/scaling/type": "yarn"}, "it says llama.rope.scaling.type, which is not read here"),
        ({"llama/expert_count": 8}, "it says llama.expert_count, which is not read here"),
        ({"llama/rope/dimension_count": 8}, "its llama.rope.dimension_count is 8, its heads are 16 wide"),
        ({"llama/block_count": None}, "it does not say llama.block_count"),
        ({"tokenizer/ggml/model": "llama"}, "its tokenizer is 'llama' with the pre-tokenizer 'smollm'"),
        ({"tokenizer/ggml/pre": "qwen2"}, "its tokenizer is 'gpt2' with the pre-tokenizer 'qwen2'"),
        ({"tokenizer/ggml/merges": ["a b c"]}, "its tokenizer's lists do not fit together"),
        ({"tokenizer/ggml/token_type": [1]}, "its tokenizer's lists do not fit together"),
        ({"tokenizer/chat_template": None}, "it does not say tokenizer.chat_template"),
        ({"tensors": {"blk.1.attn_q.weight": None}}, "it holds no model.layers.1.self_attn.q_proj.weight"),
        (
            {"tensors": {"output_norm.weight": np.ones(32, np.float32)}},
            r"model.norm.weight has the shape \(32,\); its sizes make it \(64,\)",
        ),
        ({"llama/block_count": 1}, r"model.layers.1.\S+ has the shape \S+( \d+\))?; its sizes make it None"),
    ],
)
def test_what_is_no_plain_llama(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    file = gguf_files.write_gguf(tmp_path / "model.gguf", gguf_files.tiny_llama(tied=True), **changes)
    with pytest.raises(ValueError, match=rf"model\.gguf cannot be read as a backbone: {words}"):
        GgufLlama(file).write(tmp_path)


def test_a_quantisation_that_is_not_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gguf

    file = gguf_files.write_gguf(tmp_path / "model.gguf", gguf_files.tiny_llama(tied=True), "Q8_0")
    monkeypatch.setattr(gguf, "dequantize", lambda *_: (_ for _ in ()).throw(NotImplementedError()))
    with pytest.raises(ValueError, match=r"is quantised as Q8_0, which gguf cannot read back"):
        GgufLlama(file).weights()


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\3\0\0\0", b"{}" * 1000])
def test_no_gguf_file(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.gguf is no whole GGUF file"):
        GgufLlama(tmp_path / "model.gguf")


def test_a_file_that_is_cut_off(tmp_path: Path) -> None:
    file = gguf_files.write_gguf(tmp_path / "model.gguf", gguf_files.tiny_llama(tied=True))
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(ValueError, match=r"model\.gguf is no whole GGUF file"):
        GgufLlama(file)
