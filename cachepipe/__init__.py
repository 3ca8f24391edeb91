"""Cache, deduplicate and replay calls to language models."""
