"""MaxSim and cosines of a few queries in one reading of the stored vectors, compiled by numba.

torch and numpy write float32 of what is stored before they multiply, and products before their maximum is taken. Here
a number is widened in a register on its way into the product, and of a passage nothing but its scores is written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.extending import intrinsic

from ..model.scoring import LEAST_LENGTH, PreparedQueries, check_width
from ..store.segments import Segment

NEAR, PART = 1152, 512  # dimensions up to which a vector is multiplied whole, and of a part of a wider one
AHEAD = 2048  # bytes from what is multiplied to what is fetched: a processor's own guess ends with each page
TOGETHER = 64  # passages whose products wait for their maximum
LINE = 64  # bytes that come from memory at once
# numba knows neither of the small floats: integers of their size carry the bits.
BITS = {torch.float16: np.uint16, torch.bfloat16: np.int16, torch.float32: np.float32, torch.int8: np.int8}
NO_NUMBERS, NO_LENGTHS = torch.empty(0, 0, device="cpu"), torch.empty(0, device="cpu")
NO_FLAGS = torch.empty(0, 0, dtype=torch.bool, device="cpu")
SUMS_IN_ANY_ORDER = {"reassoc", "contract", "nsz"}  # but NaN stays NaN
SETTINGS: dict[str, Any] = {"nogil": True, "fastmath": SUMS_IN_ANY_ORDER, "error_model": "numpy"}


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function at its first call."""
    return numba.njit(**SETTINGS)(function)


def kept(function: Callable[..., Any]) -> Any:
    """Compile a function at its first call, and keep it and what it calls on the disk, where there is a place."""
    try:
        return numba.njit(cache=True, **SETTINGS)(function)
    except RuntimeError:  # neither the package's folder nor the user's can be written
        return compiled(function)


def part_of_others(function: Callable[..., Any]) -> Callable[..., Any]:
    """Have a function compiled within each that calls it: a call takes as long as a short product."""
    return numba.njit(inline="always", **SETTINGS)(function)


@intrinsic
def widened(_: Any, number: Any) -> Any:
    """Return a stored number as float32: uint16 holds float16's bits, int16 bfloat16's, others are themselves."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (value,) = arguments
        if number == numba.types.uint16:
            return builder.fpext(builder.bitcast(value, ir.HalfType()), ir.FloatType())
        if number == numba.types.int16:  # the upper half of a float32
            upper = builder.shl(builder.zext(value, ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
            return builder.bitcast(upper, ir.FloatType())
        return context.cast(builder, value, number, numba.types.float32)

    return numba.types.float32(number), emit


@intrinsic
def prefetch(_: Any, array: Any, offset: Any) -> Any:
    """Ask for the cache line `offset` bytes behind an array's first number; there may be none."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
        start = builder.bitcast(context.make_array(array)(context, builder, arguments[0]).data, byte)
        kind = ir.FunctionType(ir.VoidType(), [byte, flag, flag, flag])
        function = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
        read, near, data = flag(0), flag(3), flag(1)
        builder.call(function, [builder.gep(start, [arguments[1]]), read, near, data])
        return context.get_dummy_value()

    return numba.types.void(array, numba.types.intp), emit


@part_of_others
def four_products(row, first, second, third, fourth):  # type: ignore[no-untyped-def]  # numba finds the types
    """Return the dot products of a stored vector with four of a query, which load it once."""
    sum1 = sum2 = sum3 = sum4 = np.float32(0.0)
    for place in range(len(row)):
        number = widened(row[place])
        sum1 += number * first[place]
        sum2 += number * second[place]
        sum3 += number * third[place]
        sum4 += number * fourth[place]
    return sum1, sum2, sum3, sum4


@part_of_others
def one_product(row, other):  # type: ignore[no-untyped-def]
    """Return the dot product of a stored vector with one of a query."""
    total = np.float32(0.0)
    for place in range(len(row)):
        total += widened(row[place]) * other[place]
    return total


@compiled
def multiply(rows, matrix, products):  # type: ignore[no-untyped-def]
    """Write the dot products of passages' vectors [P, K, H] with those of queries [C, H] into [K, C, P].

    Wide vectors are multiplied part by part, so that a part of the queries stays in the nearest cache for all K.
    """
    width, columns = rows.shape[2], products.shape[1]
    few = columns < 4  # then memory alone is waited for
    # fetched meanwhile: what follows, or the same part of the next vector
    step, ahead = (width, AHEAD) if few or width <= NEAR else (PART, width * rows.itemsize)
    for passage in range(len(rows)):
        products[:, :, passage] = 0.0
        for start in range(0, width, step):
            part = slice(start, min(start + step, width))
            for vector in range(rows.shape[1]):
                row, found = rows[passage, vector, part], products[vector, :, passage]
                if not few:
                    for line in range(0, len(row) * row.itemsize, LINE):
                        prefetch(row, line + ahead)
                for at in range(0, columns // 4 * 4, 4):
                    made = four_products(
                        row, matrix[at, part], matrix[at + 1, part], matrix[at + 2, part], matrix[at + 3, part]
                    )
                    for number in range(4):
                        found[at + number] += made[number]
                for at in range(columns // 4 * 4, columns):
                    found[at] += one_product(row, matrix[at, part])


@compiled
def combine(products, there, lengths, exists, scores):  # type: ignore[no-untyped-def]
    """Write the scores [P, Q] of passages from their products [K_p, C, P]; the others as for `write_scores`.

    Passages lie in the last dimension, so that a processor's instruction takes sixteen.
    """
    count, queries = scores.shape
    found, broken = np.empty(count, np.float32), np.empty(count, np.bool_)
    for query in range(queries):
        total, counted = np.zeros(count, np.float32), 0
        broken[:] = False
        for vector in range(len(exists)):
            if exists[vector, query]:
                counted += 1
                best_products(products[:, vector * queries + query], there, len(lengths) > 0, found, broken)
                for passage in range(count):
                    total[passage] += found[passage]
        for passage in range(count):
            score = total[passage] / counted
            if len(lengths) > 0:
                score /= max(lengths[passage], np.float32(LEAST_LENGTH))
            if counted == 0 or (len(there) > 0 and not there[passage].any()):
                score = -np.float32(np.inf)
            elif broken[passage]:
                score = np.float32(np.nan)
            scores[passage, query] = score


@compiled
def best_products(products, there, cosine, found, broken):  # type: ignore[no-untyped-def]
    """Write the greatest of each passage's products [K_p, P] into [P], or for cosines their sum, and which are NaN."""
    found[:] = 0.0 if cosine else -np.inf
    for vector in range(len(products)):
        if len(there) > 0:
            for passage in range(len(found)):
                if not there[passage, vector]:
                    products[vector, passage] = 0.0 if cosine else -np.inf
        if cosine:
            for passage in range(len(found)):
                found[passage] += products[vector, passage]
        else:
            for passage in range(len(found)):
                value = products[vector, passage]
                broken[passage] |= value != value
                found[passage] = value if value > found[passage] else found[passage]


@kept
def write_scores(rows, scales, there, lengths, matrix, exists, scores):  # type: ignore[no-untyped-def]
    """Write the scores of passages with queries: NaN where a product is NaN, -inf where a side has no vector.

    Args:
        rows: stored vectors [P, K_p, H]; scales: float32 [P, K_p] to multiply them with, or empty.
        there: bool [P, K_p], which vectors exist, or empty where all do.
        lengths: float32 [P] of the sums of each passage's vectors, for cosines; empty for MaxSim.
        matrix: of `PreparedQueries`, K_q·Q rows or more; exists: bool [K_q, Q].
        scores: float32 [P, Q].
    """
    columns = exists.shape[0] * exists.shape[1]
    products = np.empty((rows.shape[1], columns, TOGETHER), np.float32)
    for start in range(0, len(rows), TOGETHER):
        stop = min(start + TOGETHER, len(rows))
        multiply(rows[start:stop], matrix, products)
        if len(scales) > 0:
            for vector in range(rows.shape[1]):
                for column in range(columns):
                    for passage in range(stop - start):
                        products[vector, column, passage] *= scales[start + passage, vector]
        made = products[:, :, : stop - start]
        combine(made, there[start:stop], lengths[start:stop], exists, scores[start:stop])


def takes(segment: Segment) -> bool:
    """Return whether a segment's vectors are stored in a form that is scored here: not as codes."""
    return segment.stored(slice(0, 0))[0].dtype in BITS


def scores_of_stored(
    vectors: torch.Tensor,
    scales: torch.Tensor | None,
    mask: torch.Tensor | None,
    lengths: torch.Tensor | None,
    queries: PreparedQueries,
) -> torch.Tensor:
    """Return the scores of passages with a few queries, float32 [P, Q]; -inf where a side has no vector.

    Args:
        vectors: as they are stored, of a dtype of `BITS`, [P, K_p, H] on the CPU.
        scales: float32 [P, K_p] that the vectors are multiplied with; None for none.
        mask: bool [P, K_p], which vectors exist; None where all do.
        lengths: float32 [P] of the sums of each passage's vectors, for cosines of means; None for MaxSim.
        queries: prepared, of means for cosines.

    Raises:
        ValueError: the sides' dimensions differ.
    """
    check_width(queries.width, vectors.shape[2])
    exists = queries.exists
    if exists is None:
        exists = torch.ones(queries.num_vectors, len(queries), dtype=torch.bool, device="cpu")
    scores = torch.empty(len(vectors), len(queries), dtype=torch.float32, device="cpu")
    given = (
        NO_NUMBERS if scales is None else scales.contiguous(),
        NO_FLAGS if mask is None else mask.contiguous(),
        NO_LENGTHS if lengths is None else lengths.contiguous(),
    )
    arrays = [tensor.numpy() for tensor in (*given, queries.matrix, exists, scores)]
    try:
        write_scores(bits_of(vectors), *arrays)
    except OSError:  # a full disk: what was compiled is there, and only not kept
        write_scores(bits_of(vectors), *arrays)
    return scores


def bits_of(vectors: torch.Tensor) -> np.ndarray:
    """Return stored vectors as an array of numbers of which `widened` makes float32; the memory is shared."""
    held = vectors.cpu().contiguous()
    return (held.view(torch.int16) if held.element_size() == 2 else held).numpy().view(BITS[held.dtype])
