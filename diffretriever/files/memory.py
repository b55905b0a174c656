"""A memory that is full, a GPU's or the machine's, as torch and its libraries tell it."""

from __future__ import annotations

# None but torch's on a GPU has a type of its own, and that is a RuntimeError. What cuDNN's attention lacks it does not
# say; on a GPU that others had filled it was this.
FULL = (
    "out of memory", "DefaultCPUAllocator: ", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED",
    "mha_graph.execute",
)  # fmt: skip


def memory_is_full(error: BaseException) -> bool:
    """Return whether an error says so.

    >>> memory_is_full(RuntimeError("CUDA out of memory. Tried to allocate 2.00 MiB.")), memory_is_full(RuntimeError())
    (True, False)
    """
    told = isinstance(error, RuntimeError) and any(words in str(error) for words in FULL)
    return told or isinstance(error, MemoryError)


def in_short(error: BaseException) -> str:
    """Return the first two sentences of what torch says, which names all processes of a GPU and several settings.

    >>> in_short(RuntimeError("CUDA out of memory. Tried to allocate 36.00 MiB. GPU 0 has 139 GiB. Process 7 has 1."))
    'CUDA out of memory. Tried to allocate 36.00 MiB'
    """
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return ". ".join(first.split(". ")[:2]).rstrip(".")
