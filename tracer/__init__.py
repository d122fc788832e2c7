"""TRACER: robust fine-tuning of CLIP-like models. Importing this package imports nothing heavy."""

__version__ = "0.1.0"
