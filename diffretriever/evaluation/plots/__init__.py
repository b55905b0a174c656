"""Pictures of measurements: quality against latency, growth with lengths and corpora, the (K_q, K_p) landscape."""
