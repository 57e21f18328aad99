"""A model, and how to get one."""

from speechattn.model.load import load_model

__all__ = ["load_model"]
