"""The scoring modes by name; imports nothing, so that the command line can list them at once."""

FUSED = {"fusion_single_sparse_max": "single_dense", "fusion_multi_sparse_max": "multi_dense"}
MODES = ("single_dense", "multi_dense", "sparse_max", *FUSED)
CANDIDATES = 1000  # of each side in the fusion modes
QUANTIZATIONS = ("scalar", "binary")  # of Qdrant's vectors
