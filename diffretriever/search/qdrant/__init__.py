"""Qdrant behind the interface of exact search."""
