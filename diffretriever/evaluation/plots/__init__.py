"""Pictures of measurements: quality against latency, growth with the corpus, the (K_q, K_p) landscape."""
