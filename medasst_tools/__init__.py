"""Data, configs, scores and the report around LLaMA-Factory; see README.md for the one picture."""

__version__ = "0.1.0"
