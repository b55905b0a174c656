"""`diffretriever train`: a LoRA adapter on a frozen backbone, trained contrastively (paper §3.4, App. B.1)."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModel

from . import losses
from .checkpoint import load_checkpoint, save_checkpoint
from .data import Batches, IdLists, Pair, encode_texts, read_pairs
from .evaluate import Vectors, evaluate, read_benchmark
from .llada_format import BLOCK_NAMES, to_llada_name
from .neighbours import cached_neighbours, fingerprint, with_neighbours
from .recipe import AdapterRecipe

ADAPTER_PREFIX = "base_model.model."
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


@dataclass
class PairTexts:
    """Training pairs with their content words, as the model's own filter finds them."""

    queries: list[str]
    passages: list[str]
    query_words: IdLists
    passage_words: IdLists
    lengths: list[int]


def prepare_pairs(pairs: Sequence[Pair], model: Any, room: int) -> PairTexts:
    """Cuts texts to what the model reads and looks up their content words.

    Args:
        pairs: text pairs; one with several positives counts once for each.
        model: a DiffRetriever.
        room: tokens of text kept.
    """
    flat = [(pair.query, positive) for pair in pairs for positive in pair.positives]
    query_ids, queries = encode_texts([q for q, _ in flat], model.tokenizer, room)
    passage_ids, passages = encode_texts([p for _, p in flat], model.tokenizer, room)
    lengths = passage_ids.lengths(room)
    del query_ids, passage_ids
    return PairTexts(
        queries,
        passages,
        IdLists(model.content_token_ids(queries)),
        IdLists(model.content_token_ids(passages)),
        lengths,
    )


def cached_pairs(pairs: Sequence[Pair], model: Any, room: int, folder: Path) -> PairTexts:
    """As `prepare_pairs`, kept in a file of `folder` that is named after data, tokenizer and length."""
    rules = model.tokenizer.backend_tokenizer.to_str()
    texts = [text for pair in pairs for text in (pair.query, *pair.positives)]
    path = folder / f"pairs-{fingerprint(texts, [rules])}-{room}.pt"
    if path.is_file():
        kept = torch.load(path, weights_only=True)
        words = [IdLists(row.tolist() for row in flat.split(sizes)) for flat, sizes in kept["words"]]
        return PairTexts(kept["queries"], kept["passages"], words[0], words[1], kept["lengths"])
    made = prepare_pairs(pairs, model, room)
    flat = [
        (torch.tensor(ids.flat, dtype=torch.int32), ids.lengths(1 << 30))
        for ids in (made.query_words, made.passage_words)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    stored = {"queries": made.queries, "passages": made.passages, "words": flat, "lengths": made.lengths}
    torch.save(stored, path)
    return made


def add_adapter(model: Any, recipe: AdapterRecipe) -> list[nn.Parameter]:
    """Freezes the model and puts LoRA matrices beside its projections (LLaDA: the output head too).

    Args:
        model: a DiffRetriever without an adapter.
        recipe: rank, alpha, dropout.

    Returns:
        The trainable parameters.

    Raises:
        ImportError: if peft is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError("training an adapter needs the package peft: pip install peft") from error
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    if model.config.backbone_type == "llada":
        targets.append("lm_head")
    config = peft.LoraConfig(
        r=recipe.rank, lora_alpha=recipe.alpha, lora_dropout=recipe.dropout, target_modules=targets, bias="none"
    )
    model.requires_grad_(False)
    peft.inject_adapter_in_model(config, model)
    trainable = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            trainable.append(parameter)
    return trainable


def head_rows(head: Any) -> losses.HeadRows:
    """Rows of an output head, with its LoRA update B A * alpha / r where it has one."""

    def rows(columns: torch.Tensor) -> torch.Tensor:
        if not hasattr(head, "lora_A"):
            weight: torch.Tensor = head.weight[columns]
            return weight
        base = head.get_base_layer().weight[columns]  # [C, H]
        update = head.lora_B["default"].weight[columns] @ head.lora_A["default"].weight  # [C, r] @ [r, H]
        return base + head.scaling["default"] * update.to(base.dtype)

    return rows


def contrastive_loss(
    model: Any, queries: list[str], passages: list[str], words: tuple[Any, Any], recipe: AdapterRecipe
) -> tuple[torch.Tensor, dict[str, float]]:
    """Dense InfoNCE over MaxSim plus `sparse_weight` times sparse InfoNCE (paper §3.4, eq. 5).

    Args:
        model: a DiffRetriever.
        queries: Q texts.
        passages: P >= Q texts; passage i answers query i, every other one is a negative.
        words: content token ids of the queries and of the passages.
        recipe: temperature and weights.

    Returns:
        The loss, and figures for the log.
    """
    query, passage = (mask_hidden(model, texts, side) for texts, side in ((queries, True), (passages, False)))
    targets = torch.arange(len(queries), device=query.device)
    dense = losses.dense_loss(query, passage, targets, recipe.temperature, recipe.symmetric)
    scores = losses.sparse_scores(query, passage, head_rows(model.lm_head), *words)  # [Q, P]
    sparse = losses.info_nce(scores, targets)
    right = (scores.argmax(1) == targets).float().mean().item()
    return dense + recipe.sparse_weight * sparse, {"dense": dense.item(), "sparse": sparse.item(), "right": right}


def mask_hidden(model: Any, texts: list[str], is_query: bool) -> torch.Tensor:
    """Final states at the masks, with gradient: [B, K, H]."""
    ids, mask = model.tokenize(texts, is_query)
    hidden: torch.Tensor = model(ids.to(model.device), mask.to(model.device), is_query=is_query).mask_hidden
    return hidden


class AdapterTrainer:
    """A plain loop, resumable at any step: batches and dropout follow from (seed, step).

    Args:
        model: a DiffRetriever with its adapter from `add_adapter`.
        pairs: from `prepare_pairs`.
        neighbours: from `cached_neighbours`, or None.
        recipe: what to do.
        out: the adapter's folder; working files go to <out>/state.
        dev: BEIR-style folder, evaluated on its dev split, or None.
    """

    def __init__(
        self,
        model: Any,
        pairs: PairTexts,
        neighbours: torch.Tensor | None,
        recipe: AdapterRecipe,
        out: Path,
        dev: Path | None = None,
    ) -> None:
        self.model, self.pairs, self.neighbours, self.recipe = model, pairs, neighbours, recipe
        self.out, self.state = out, out / "state"
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
        )
        self.batches = Batches(pairs.lengths, recipe.batch_size, recipe.seed)
        self.seeds = Batches(pairs.lengths, max(recipe.batch_size // 2, 1), recipe.seed + 1)
        self.benchmark = read_benchmark(dev, "dev", recipe.eval_passages) if dev else None
        self.step, self.started = 0, time.monotonic()
        self.averages: dict[str, float] = {}

    def run(self, stop_after: int | None = None) -> None:
        """Trains to the end (or for `stop_after` more steps).

        Raises:
            FloatingPointError: if the loss is not a number; the last checkpoint stays.
        """
        self._resume()
        last = self.recipe.steps if stop_after is None else min(self.step + stop_after, self.recipe.steps)
        while self.step < last:
            self._train_step()
            if self.recipe.save_every and self.step % self.recipe.save_every == 0:
                self.save()
            if self.recipe.eval_every and self.step % self.recipe.eval_every == 0:
                self.log(evaluation=self.evaluate())
        self.save()

    def _resume(self) -> None:
        state = load_checkpoint(self.state / "train.ckpt")
        if state is not None:
            result = self.model.load_state_dict(state["adapter"], strict=False)  # the adapter's part of the model
            unmatched = [*result.unexpected_keys, *(name for name in result.missing_keys if "lora_" in name)]
            if unmatched:
                raise ValueError(
                    f"{self.state / 'train.ckpt'} is of another adapter ({', '.join(unmatched[:3])}); "
                    "remove the folder to start anew, or choose another --out"
                )
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]
            self.log(note=f"resumed at step {self.step}")

    def save(self) -> None:
        """Writes the checkpoint to resume from."""
        adapter = {name: value for name, value in self.model.state_dict().items() if "lora_" in name}
        state = {"adapter": adapter, "optimizer": self.optimizer.state_dict(), "step": self.step}
        save_checkpoint(self.state / "train.ckpt", state)

    def _draw(self, rng: random.Random) -> list[int]:
        """Pair numbers of this step's batch, no query or passage twice."""
        if self.neighbours is not None and rng.random() < self.recipe.neighbour_share:
            chosen = with_neighbours(self.seeds[self.step], self.neighbours, rng)
        else:
            chosen = self.batches[self.step]
        seen: set[tuple[bool, str]] = set()
        kept = []
        for number in chosen:
            texts = {(True, self.pairs.queries[number]), (False, self.pairs.passages[number])}
            if not texts & seen:
                kept.append(number)
                seen |= texts
        return kept

    def _train_step(self) -> None:
        recipe, pairs = self.recipe, self.pairs
        rng = random.Random(f"{recipe.seed}-{self.step}")
        torch.manual_seed(rng.getrandbits(48))
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.learning_rate * rate(self.step, recipe)
        batch = self._draw(rng)
        words = [pairs.query_words[n] for n in batch], [pairs.passage_words[n] for n in batch]
        self.model.train()
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=recipe.bf16):
            queries, passages = [pairs.queries[n] for n in batch], [pairs.passages[n] for n in batch]
            loss, figures = contrastive_loss(self.model, queries, passages, words, recipe)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss.item()} at step {self.step}; the last checkpoint is {self.state / 'train.ckpt'}; "
                "lower the learning rate and resume"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, recipe.clip)
        self.optimizer.step()
        self.step += 1
        for name, value in figures.items():
            self.averages[name] = 0.9 * self.averages.get(name, value) + 0.1 * value
        if self.step % recipe.log_every == 0:
            self.log(rate=self.optimizer.param_groups[0]["lr"])

    def log(self, **extra: Any) -> None:
        """Prints one line of JSON and appends it to <out>/state/log.jsonl."""
        record = {"minutes": round((time.monotonic() - self.started) / 60, 2), "step": self.step}
        line = json.dumps(record | {k: round(v, 4) for k, v in self.averages.items()} | extra)
        print(line, flush=True)
        self.state.mkdir(parents=True, exist_ok=True)
        with (self.state / "log.jsonl").open("a") as log:
            log.write(line + "\n")

    def evaluate(self) -> dict[str, float]:
        """nDCG@10 on the dev split, or nothing without one."""
        if self.benchmark is None:
            return {}
        self.model.eval()
        return {name: round(value, 4) for name, value in evaluate_model(self.model, self.benchmark).items()}


def evaluate_model(model: Any, benchmark: Any, weight: float = 0.5) -> dict[str, float]:
    """nDCG@10 of a DiffRetriever, dense, sparse and fused; see `evaluate.evaluate`."""

    def encode(texts: Sequence[str], is_query: bool) -> Vectors:
        out = model.encode_texts(list(texts), is_query)
        return Vectors(out["repr_hidden"], out["sparse_indices"], out["sparse_values"])

    return evaluate(encode, benchmark, model.config.backbone_config.vocab_size, weight)


def rate(step: int, recipe: AdapterRecipe) -> float:
    """Factor on the learning rate: linear warm-up over a share of the steps, then cosine to `final_rate`."""
    warmup = max(int(recipe.warmup * recipe.steps), 1)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(recipe.steps - warmup, 1)
    return recipe.final_rate + (1 - recipe.final_rate) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def original_key(name: str, backbone_type: str) -> str:
    """The method's name of an adapter weight.

    Args:
        name: e.g. `backbone.layers.0.self_attn.o_proj.lora_A.default.weight`.
        backbone_type: "llada" or "dream".

    Returns:
        e.g. `base_model.model.model.transformer.blocks.0.attn_out.lora_A.weight`.
    """
    module, _, part = name.partition(".lora_")
    module = module.replace("backbone.", "model.", 1)
    if backbone_type == "llada":
        module = to_llada_name(module)
    return f"{ADAPTER_PREFIX}{module}.lora_{part.replace('.default', '')}"


def save_adapter(model: Any, recipe: AdapterRecipe, tokenizer_folder: Path, out: Path, base: str) -> None:
    """Writes the adapter in the method's own output format.

    Args:
        model: with its adapter.
        recipe: what it was trained with.
        tokenizer_folder: tokenizer files to copy.
        out: the folder, made if absent: adapter_config.json, adapter_model.safetensors, retriever_config.json,
            tokenizer files.
        base: the backbone's name for adapter_config.json.
    """
    out.mkdir(parents=True, exist_ok=True)
    kind = model.config.backbone_type
    weights = {
        original_key(name, kind): value.detach().float().cpu().contiguous()
        for name, value in model.named_parameters()
        if "lora_" in name
    }
    save_file(weights, str(out / "adapter_model.safetensors.partial"), metadata={"format": "pt"})
    (out / "adapter_model.safetensors.partial").chmod(0o644)
    os.replace(out / "adapter_model.safetensors.partial", out / "adapter_model.safetensors")
    (out / "adapter_config.json").write_text(json.dumps(adapter_config(recipe, kind, base), indent=2) + "\n")
    (out / "retriever_config.json").write_text(json.dumps(retriever_config(model, recipe), indent=2) + "\n")
    for name in TOKENIZER_FILES:
        if (tokenizer_folder / name).is_file():
            shutil.copyfile(tokenizer_folder / name, out / name)
    rules = json.loads((out / "tokenizer.json").read_text(encoding="utf-8"))  # half the size without the white space
    compact = json.dumps(rules, ensure_ascii=False, separators=(",", ":"))
    (out / "tokenizer.json").write_text(compact, encoding="utf-8")


def adapter_config(recipe: AdapterRecipe, backbone_type: str, base: str) -> dict[str, Any]:
    """peft's adapter_config.json, with the backbone's original module names."""
    llama_names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    llada_names = [name for name in BLOCK_NAMES if not name.endswith("norm")]
    return {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": recipe.alpha,
        "lora_dropout": recipe.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": recipe.rank,
        "revision": None,
        "target_modules": llada_names if backbone_type == "llada" else llama_names,
        "task_type": "CAUSAL_LM",
        "use_rslora": False,
        "use_dora": False,
    }


def retriever_config(model: Any, recipe: AdapterRecipe) -> dict[str, Any]:
    """retriever_config.json as the method's training code writes it: budgets, lengths, the prompts' token ids."""
    config: dict[str, Any] = {
        "model_type": "llada1" if model.config.backbone_type == "llada" else model.config.backbone_type,
        "mask_token_id": model.texts.mask_id,
        "hidden_size": model.config.backbone_config.hidden_size,
        "max_length": recipe.max_length,
        "n_gen_tokens": recipe.num_passage_masks,
        "n_gen_q_tokens": recipe.num_query_masks,
        "n_gen_p_tokens": recipe.num_passage_masks,
        "temperature": recipe.temperature,
        "flops_weight": 0.0,
        "num_denoise_steps": 1,
        "sparse_weight": recipe.sparse_weight,
        "normalize": True,
    }
    for side in ("query", "passage"):
        for part in ("prefix", "suffix"):
            config[f"{side}_{part}_ids"] = prompt_ids(model, side == "query")[part]
    masks = [1] if recipe.num_passage_masks == 1 else [2**n for n in range(recipe.num_passage_masks.bit_length())]
    return config | {
        "lora_rank": recipe.rank,
        "lora_alpha": recipe.alpha,
        "use_eos": False,
        "n_tail": 3,
        "use_k_adapter": False,
        "adapter_weight": 1.0,
        "teacher_temperature": 1.0,
        "k_adapter_options": masks,
        "use_k_pre_encoder": False,
        "gumbel_temperature": 1.0,
        "k_cost_lambda": 0.001,
        "k_pre_encoder_options": masks,
    }


def prompt_ids(model: Any, is_query: bool) -> dict[str, list[int]]:
    """Token ids before and after the text, read off two sequences that differ in their text alone."""
    ids, _ = model.tokenize(["a"], is_query)
    other, _ = model.tokenize(["a a"], is_query)
    short, long = ids[0].tolist(), other[0].tolist()
    text = model.tokenizer("a", add_special_tokens=False)["input_ids"]
    start = next(n for n, (x, y) in enumerate(zip(short, long, strict=False)) if x != y) - len(text)
    first_mask = short.index(model.texts.mask_id)
    return {"prefix": short[:start], "suffix": short[start + len(text) : first_mask]}


def train_adapter(
    recipe: AdapterRecipe,
    release: Path,
    pair_files: Sequence[Path],
    out: Path,
    dev: Path | None = None,
    threads: int | None = None,
    cache: Path | None = None,
    base: str | None = None,
) -> Path:
    """Trains one adapter; run again after an interruption, it goes on from its checkpoint.

    Args:
        recipe: from `read_recipe`.
        release: folder or Hub id of a zero-shot release (`publish.py build` without an adapter).
        pair_files: JSONL of pairs.
        out: the adapter's folder.
        dev: BEIR-style folder whose dev split is evaluated along the way.
        threads: CPU threads.
        cache: folder for mined neighbours (default: <out>/state).
        base: the backbone's name for adapter_config.json (default: the release's).

    Returns:
        The adapter's folder.
    """
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(recipe.seed)
    settings = {"num_query_masks": recipe.num_query_masks, "num_passage_masks": recipe.num_passage_masks}
    length = recipe.train_length or recipe.max_length
    model: Any = AutoModel.from_pretrained(
        str(release), trust_remote_code=True, max_length=length, dtype=torch.float32, **settings
    )
    add_adapter(model, recipe)
    pairs = [pair for path in pair_files for pair in read_pairs(path)]
    room = length - min(sum(map(len, prompt_ids(model, side).values())) for side in (True, False))
    state = out / "state"
    prepared = cached_pairs(pairs, model, room, cache or state)
    flat = [(pair.query, positive) for pair in pairs for positive in pair.positives]
    columns = [q for q, _ in flat], [p for _, p in flat]
    neighbours = cached_neighbours(*columns, recipe.neighbours, cache or state) if recipe.neighbour_share else None
    trainer = AdapterTrainer(model, prepared, neighbours, recipe, out, dev)
    trainer.log(note=f"{len(flat)} pairs, {sum(p.numel() for p in trainer.parameters)} trainable parameters")
    trainer.run()
    record = {"recipe": dataclasses.asdict(recipe), "pairs": len(flat), "data_fingerprint": fingerprint(*columns)}
    (state / "run.json").write_text(json.dumps(record, indent=2) + "\n")
    model.config.max_length = recipe.max_length
    save_adapter(model, recipe, Path(release), out, base or str(model.config.base_model_name_or_path or release))
    trainer.log(evaluation=trainer.evaluate())
    return out
