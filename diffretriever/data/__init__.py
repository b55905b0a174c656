"""Corpora, benchmarks and training pairs, read one record at a time."""
