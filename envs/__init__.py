"""LLM training as Gymnasium environments."""
