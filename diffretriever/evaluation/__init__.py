"""Evaluation: rankings of a benchmark's queries, the field's metrics, significance, tables."""
