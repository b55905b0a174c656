"""Texts in batches of similar length, side by side on a CPU and ahead of an accelerator, and their results in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from numbers import Integral
from threading import Lock
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn
from transformers.utils import ModelOutput, logging

from .device_copies import HostBatch, Packed, runs_apart

Batch = TypeVar("Batch")
Result = TypeVar("Result")
MOST_WORKERS = 8  # each holds the states of a batch
WINDOW = 8192  # texts that are sorted by length at a time
FIRST_WINDOW = 512  # of a device that waits for it; each next one is four times as long
AHEAD = 2  # batches that a device has to do while the host works on the results of an earlier one
_MODES = Lock()  # over the modes of all models
# Over the runs side by side of all threads and releases, which may each have this module once more, and torch's threads
# before the first of these runs, once for each.
_THREADS, _running = vars(torch).setdefault("_diffretriever_running", (Lock(), []))


@dataclass
class DiffRetrieverOutput(ModelOutput):
    """What the model returns for B texts.

    Args:
        repr_hidden: float32 [B, K, H], the dense vectors (`encode`, `encode_texts`).
        sparse_indices: int64 [B, T], token ids by falling value; unused slots are 0.
        sparse_values: float32 [B, T], log1p weights; unused slots are 0.0.
        mask_hidden: [B, K, H] in the model's dtype, the final states at the masks (`forward`).
        repr_mask: bool [B, K], which vectors exist, where queries differ in K_q; None where all do. The others are 0.
        side: "query" or "passage" for what was encoded; an attribute, no item.
    """

    repr_hidden: torch.Tensor | None = None
    sparse_indices: torch.Tensor | None = None
    sparse_values: torch.Tensor | None = None
    mask_hidden: torch.Tensor | None = None
    repr_mask: torch.Tensor | None = None
    side: ClassVar[str | None] = None

    def on_side(self, is_query: bool) -> DiffRetrieverOutput:
        """Note which side was encoded, as an attribute: mappings of tensors have no place for it."""
        self.__dict__["side"] = "query" if is_query else "passage"
        return self


def check_kind_of_texts(texts: Any) -> None:
    """Raise TypeError for what is no series of strings, whatever its entries are, with what to pass instead."""
    kind, shape = type(texts).__name__, getattr(texts, "shape", None)
    instead = None
    if isinstance(texts, (str, bytes, bytearray, memoryview)):
        instead = f"one {kind}; write [text]"
    elif not isinstance(texts, Iterable):
        instead = kind
    elif isinstance(texts, Mapping):
        instead = f"{kind}, whose entries have names; pass list(texts.values())"
    elif isinstance(texts, (set, frozenset)):
        instead = f"{kind}, which has no order; pass a list"
    elif isinstance(shape, tuple) and len(shape) != 1:
        instead = f"{kind} of shape {list(shape)}; pass one column of it, as a list or a series"
    if instead:
        raise TypeError(f"`texts` must be a list of strings, got {instead}.")


def check_texts(texts: Any, first: int = 0) -> list[str]:
    """Return `texts` as a list, or say which entry is no string; `first` is the number of the first entry.

    Args:
        texts: a list, tuple, generator, numpy array, pandas Series, column of a dataset, or another series of strings.

    Raises:
        TypeError: something else, as one string or a table; or an entry that is not a string.
        ValueError: no entry.
    """
    check_kind_of_texts(texts)
    texts = list(texts)
    for number, text in enumerate(texts, first):
        if not isinstance(text, str):
            raise TypeError(f"`texts[{number}]` must be a string, got {type(text).__name__}: {text!r:.80}.")
    if not texts:
        raise ValueError("`texts` is empty; pass at least one string.")
    return texts


def check_count(name: str, value: Any) -> int:
    """Return a whole number of at least 1, numpy's included, or raise ValueError that names the argument."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"`{name}` must be a whole number of at least 1, got {value!r:.80}.")
    return int(value)


def check_side(is_query: Any) -> bool:
    """Return `is_query`, or raise TypeError for what is neither True nor False, numpy's included."""
    if type(is_query).__name__ not in ("bool", "bool_"):
        raise TypeError(f"`is_query` must be True (queries) or False (passages), got {is_query!r:.80}.")
    return bool(is_query)


def check_id_tensor(ids: Any) -> None:
    """Raise ValueError for what is no tensor of token ids [B, L]."""
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        got = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, torch.Tensor) else type(ids).__name__
        raise ValueError(
            f"input_ids must be an integer tensor [B, L], as tokenize() returns it; got {got}. Give texts to "
            "encode_texts()."
        )
    if not len(ids):
        raise ValueError("input_ids has no rows; encode at least one text.")


def check_ids(ids: Any, mask: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and attention mask (None: all ones) on the CPU, [B, L] each, or say what is wrong with them."""
    check_id_tensor(ids)
    if mask is None:
        return ids.cpu(), torch.ones(ids.shape, dtype=torch.long, device="cpu")
    if not isinstance(mask, torch.Tensor) or mask.shape != ids.shape:
        got = str(list(mask.shape)) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask must have the shape of input_ids, {list(ids.shape)}; got {got}.")
    return ids.cpu(), mask.cpu()


def find_masks(ids: torch.Tensor, mask_id: int, budgets: Sequence[int]) -> torch.Tensor:
    """Return the positions of each row's [MASK] tokens, int64 [B, K], the last one again where a row has fewer than K.

    Args:
        ids: [B, L].
        mask_id: of the [MASK] token.
        budgets: how many a row may have, rising; the last is K.

    Raises:
        ValueError: a row has another number.
    """
    is_mask = ids == mask_id
    counts = is_mask.sum(dim=1)
    wrong = ~torch.isin(counts, torch.tensor(budgets, device=ids.device))
    if bool(wrong.any()):
        row, wanted = int(wrong.nonzero()[0]), " or ".join(map(str, budgets))
        raise ValueError(f"ids row {row} holds {int(counts[row])} [MASK] tokens (id {mask_id}), not {wanted}.")
    order = (counts.cumsum(0) - counts)[:, None] + torch.arange(budgets[-1], device=ids.device)
    return is_mask.nonzero()[:, 1][torch.minimum(order, (counts.cumsum(0) - 1)[:, None])]


def existing_masks(positions: torch.Tensor) -> torch.Tensor:
    """Return which of the positions [B, K] are masks of their own, bool: behind a row's last one it is repeated."""
    own = positions[:, 1:] > positions[:, :-1]
    return torch.cat([torch.ones_like(positions[:, :1], dtype=torch.bool), own], dim=1)


def batches_by_length(
    lengths: Sequence[int], tokens_per_batch: int, batch_size: int | None = None
) -> Iterator[list[int]]:
    """Group rows of similar length, longest first, so that a batch padded to its longest row keeps the budget.

    Args:
        lengths: tokens of each row.
        tokens_per_batch: at most so many tokens a batch, padding included; a longer row is a batch of its own.
        batch_size: at most so many rows a batch.

    Yields:
        Row numbers; each row once.

    >>> list(batches_by_length([3, 9, 4, 8], tokens_per_batch=18))
    [[1, 3], [2, 0]]
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    start = 0
    while start < len(order):
        size = max(1, tokens_per_batch // max(1, lengths[order[start]]))
        size = min(size, batch_size or size)
        yield order[start : start + size]
        start += size


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Keep a model in eval mode while any thread encodes with it; the last one gives each module its mode back."""
    with _MODES:
        state: Any = model.__dict__.setdefault("_encoding", {"threads": 0, "trained": []})
        if state["threads"] == 0:
            state["trained"] = [module for module in _parts(model) if module.training]
            for module in state["trained"]:
                module.training = False
        state["threads"] += 1
    try:
        yield
    finally:
        with _MODES:
            state["threads"] -= 1
            if state["threads"] == 0:
                for module in state["trained"]:
                    module.training = True
                state["trained"] = []


def _parts(model: nn.Module) -> list[nn.Module]:
    """Return a module and all within it; `modules()` puts their names together, which takes a short text's time."""
    found = [model]
    for module in found:  # which grows
        if module._modules:
            found += [part for part in module._modules.values() if part is not None]
    return found


def count_workers(model: nn.Module) -> int:
    """Return how many batches to run side by side: on a CPU one for each thread of torch, up to a limit; else 1.

    Threads that share an operation wait for each other at its end, and a batch has hundreds of small ones; threads that
    each have a batch do not. What keeps a state of its own during a forward pass (autocast; compiled, offloaded and
    quantised models) takes one batch at a time.

    Args:
        model: about to encode.
    """
    device = next(model.parameters()).device
    if device.type != "cpu" or torch.is_autocast_enabled("cpu") or getattr(model, "hf_quantizer", None) is not None:
        return 1
    for module in _parts(model):
        compiled = hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        if compiled or hasattr(module, "_hf_hook"):
            return 1
    return min(MOST_WORKERS, torch.get_num_threads())


def run_side_by_side(
    work: Callable[[Batch], Result], batches: Sequence[Batch], workers: int
) -> Generator[tuple[Batch, Result], None, None]:
    """Run `work` on every batch, some of them at the same time, each with its share of torch's threads.

    Args:
        work: called with one batch at a time, in some thread.
        batches: whatever `work` takes.
        workers: how many at the same time.

    Yields:
        Each batch and its result, in the batches' order; few results wait at any time.

    Raises:
        Whatever `work` raises; batches that have not begun are dropped.

    >>> [result for _, result in run_side_by_side(len, [[3, 1], [2]], workers=2)]
    [2, 1]
    """
    workers = min(workers, len(batches))
    if workers < 2:
        for batch in batches:
            yield batch, work(batch)
        return
    with _THREADS:
        threads = _running[0] if _running else torch.get_num_threads()
        _running.append(threads)
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(max(1, threads // workers),))
    waiting: deque[tuple[Batch, Future[Result]]] = deque()
    try:
        for batch in batches:
            waiting.append((batch, pool.submit(work, batch)))
            if len(waiting) > 2 * workers:
                batch, future = waiting.popleft()
                yield batch, future.result()
        for batch, future in waiting:
            yield batch, future.result()
    finally:
        pool.shutdown(cancel_futures=True)
        with _THREADS:  # torch gives the workers' number to every thread begun after them
            _running.pop()
            torch.set_num_threads(threads)


def run_ahead(
    pack: Callable[[Batch], HostBatch], launch: Callable[[HostBatch], Any], batches: Sequence[Batch]
) -> Generator[tuple[Batch, Any], None, None]:
    """Keep a device at work that runs apart: batches are packed in a thread and launched before results are waited for.

    Args:
        pack: makes a batch ready on the host, in a thread.
        launch: has the device encode it, without waiting, in the caller's thread; returns {name: tensor}.
        batches: whatever `pack` takes.

    Yields:
        Each batch and what `launch` returned, its tensors on the CPU, in the batches' order.

    Raises:
        What `pack` and `launch` raise, behind the results of the batches before.
    """
    if len(batches) == 1:  # nothing else could be done meanwhile
        yield _arrived(batches[0], *_copied_to_host(launch(pack(batches[0]))))
        return
    packed: deque[Future[HostBatch]] = deque()
    running: deque[tuple[Batch, Any, list[Any]]] = deque()
    failure: Exception | None = None
    packer = ThreadPoolExecutor(1, "pack")
    try:
        for number, batch in enumerate(batches):
            packed += (packer.submit(pack, other) for other in batches[number + len(packed) : number + AHEAD + 1])
            try:
                running.append((batch, *_copied_to_host(launch(packed.popleft().result()))))
            except (ValueError, RuntimeError) as error:  # also the device's, when its memory is full
                failure = error
                break
            if len(running) > AHEAD:
                yield _arrived(*running.popleft())
        while running:
            yield _arrived(*running.popleft())
        if failure is not None:
            raise failure
    finally:
        packer.shutdown(cancel_futures=True)


def _at_once(work: Callable[[Batch], Result], batch: Batch) -> Future[Result]:
    """Do in this thread what nothing else could be done beside: a thread for it costs more than a short text."""
    done: Future[Result] = Future()
    try:
        done.set_result(work(batch))
    except (ValueError, RuntimeError) as error:
        done.set_exception(error)
    return done


def _copied_to_host(results: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], list[Any]]:
    """Begin to copy {name: tensor} to the CPU; returns it, and events that happen when all is there."""
    devices = {values.device for values in results.values() if runs_apart(values.device)}
    arriving: dict[str, torch.Tensor]
    if isinstance(results, Packed):
        arriving = results.at(results.memory.to("cpu", non_blocking=True))
    else:
        arriving = {name: values.to("cpu", non_blocking=True) for name, values in results.items()}  # into pinned memory
    return arriving, [torch.cuda.current_stream(device).record_event() for device in devices]


def _arrived(batch: Batch, results: Any, events: list[Any]) -> tuple[Batch, Any]:
    for event in events:
        event.synchronize()
    return batch, results


class OrderedResults:
    """Collects the tensors of batches on the CPU, in the order of the texts.

    Args:
        total: how many texts will come, if known: then each result is written once, to its place.
    """

    def __init__(self, total: int | None) -> None:
        self._total = total
        self._blocks: list[dict[str, torch.Tensor]] = []
        self._window: dict[str, torch.Tensor] = {}
        self.count = 0  # texts in closed windows

    def put(self, rows: Sequence[int], window_size: int, results: Mapping[str, torch.Tensor]) -> None:
        """Store the results of a batch; `rows` are the texts' numbers in the current window."""
        place = torch.tensor(rows, device="cpu")
        for name, values in results.items():
            if name not in self._window:
                size = window_size if self._total is None else self._total
                self._window[name] = torch.empty((size, *values.shape[1:]), dtype=values.dtype, device="cpu")
            offset = 0 if self._total is None else self.count
            self._window[name][place + offset] = values.cpu()

    def close_window(self, window_size: int) -> None:
        """Say that all texts of the window are there."""
        self.count += window_size
        if self._total is None:
            self._blocks.append(self._window)
            self._window = {}

    def result(self) -> dict[str, torch.Tensor]:
        """Return {name: tensor [N, …]}; blocks are freed as they are copied."""
        if self._total is not None:
            return self._window
        names = list(self._blocks[0]) if self._blocks else []
        whole = {
            name: self._blocks[0][name].new_empty((self.count, *self._blocks[0][name].shape[1:])) for name in names
        }
        start = 0
        while self._blocks:
            block = self._blocks.pop(0)
            size = len(block[names[0]])
            for name in names:
                whole[name][start : start + size] = block.pop(name)
            start += size
        return whole


def encode_in_order(
    model: Any,
    texts: Iterable[str],
    is_query: bool,
    batch_size: int | None,
    tokens_per_batch: int | None,
    show_progress_bar: bool,
    *,
    compute_sparse: bool,
    sparse_top_k: int | None,
    content_filter: bool,
) -> dict[str, torch.Tensor]:
    """Encode any number of texts: what `encode_texts` of a model does, with its arguments.

    Args:
        model: has `encode_batches`, `texts` and `device`.

    Returns:
        {name: tensor [N, …]} of what `encode_batches` yields, in the texts' order, on the CPU.
    """
    check_kind_of_texts(texts)
    is_query, total = check_side(is_query), len(texts) if isinstance(texts, Sized) else None
    batch_size = None if batch_size is None else check_count("batch_size", batch_size)
    tokens_per_batch = None if tokens_per_batch is None else check_count("tokens_per_batch", tokens_per_batch)
    budget = tokens_per_batch or (1024 if model.device.type == "cpu" else 16384)
    collected = OrderedResults(total)

    def prepare(window: list[str]) -> list[Any]:
        prepared: list[Any] = model.texts.prepare(window, is_query, compute_sparse and content_filter)
        return prepared

    if total == 1 and isinstance(texts, (list, tuple)) and not show_progress_bar:  # less work than what keeps order
        [(_, out)] = model.encode_batches(prepare(check_texts(texts)), [[0]], is_query, compute_sparse, sparse_top_k)
        return {name: values.cpu().clone() for name, values in out.items()}
    with (
        logging.tqdm(total=total, disable=not show_progress_bar, unit="text", desc="encode") as bar,
        closing(_prepared_windows(texts, total, prepare, ahead=runs_apart(model.device))) as windows,
    ):
        for prepared in windows:
            batches = list(batches_by_length([len(text.sequence) for text in prepared], budget, batch_size))
            with closing(model.encode_batches(prepared, batches, is_query, compute_sparse, sparse_top_k)) as results:
                for rows, out in results:
                    collected.put(rows, len(prepared), out)
                    bar.update(len(rows))
            collected.close_window(len(prepared))
    return collected.result()


def _prepared_windows(
    texts: Iterable[str], total: int | None, prepare: Callable[[list[str]], list[Any]], ahead: bool
) -> Generator[list[Any], None, None]:
    """Read texts a window at a time, in the caller's thread, and yield them prepared: with `ahead` one is always made
    in a thread while its predecessor is encoded, and the first ones are small.

    Raises:
        TypeError, ValueError: an entry is no string, there is none, or there are not `total`.
    """
    stream, count, size = iter(texts), 0, min(FIRST_WINDOW, WINDOW) if ahead else WINDOW
    coming: deque[Future[list[Any]]] = deque()
    with ThreadPoolExecutor(1, "prepare") as preparer:
        while window := list(islice(stream, size)):
            size = min(4 * size, WINDOW)
            check_texts(window, first=count)
            count += len(window)
            if total is not None and count > total:
                raise ValueError(f"`texts` has a length of {total}, but gave more; pass a list of them.")
            first = count == len(window)
            coming.append(preparer.submit(prepare, window) if ahead and not first else _at_once(prepare, window))
            if len(coming) > ahead:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()
    if count == 0:
        check_texts([])
    if total is not None and count < total:
        raise ValueError(f"`texts` has a length of {total}, but gave {count}; pass a list of them.")
