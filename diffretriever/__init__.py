"""Tools around the DiffRetriever model: training now, indexing and evaluation later."""
