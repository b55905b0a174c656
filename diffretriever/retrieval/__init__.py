"""Retrieval: corpus → vectors in a store → ranking → metrics."""
