"""Training: tokenizer, data, losses, a small backbone, and adapters for any backbone."""
