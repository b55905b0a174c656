"""LoRA adapters for retrieval: pairs → epochs → batches → objective → adapter.

`train` runs it all on transformers' Trainer (`trainer`) from a recipe (`adapter_recipe`). `epochs` says which items
stand in which batch, `batches` makes the tensors, `objective` the loss, over the `candidates` of all processes.
`lora` and `adapter_output` are the adapter in memory and on disk; `checkpoints` and `run_record` are what a run is
resumed from. `hard_negatives` and `budget` prepare a training; `methods` is what
differs between DiffRetriever and the paper's baselines.
"""
