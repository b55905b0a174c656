"""The scoring modes by name. `model.scoring` has them as well, but imports torch, for which a `--help` would wait."""

FUSED = {"fusion_single_sparse_max": "single_dense", "fusion_multi_sparse_max": "multi_dense"}  # and their dense side
MODES = ("single_dense", "multi_dense", "sparse_max", *FUSED)
SPARSE = ("sparse_max", *FUSED)  # that need sparse vectors
CANDIDATES = 1000  # of each side in the fusion modes
# How their two sides meet: both scores of every candidate, normalised over all of them; or each side's own ranking,
# normalised over itself, where a passage that it lacks counts 0, as in the method's research code
FUSIONS = ("exact", "runs")
QUANTIZATIONS = ("scalar", "binary")  # of Qdrant's vectors
