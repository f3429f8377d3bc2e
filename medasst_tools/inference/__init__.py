"""Answers of a model: through LLaMA-Factory on this machine, or through an OpenAI-style endpoint."""
