"""A corpus into a store."""
