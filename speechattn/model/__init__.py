"""A model, and how to get one."""

from speechattn.model.folder import from_config, save_model
from speechattn.model.load import load_model
from speechattn.model.recognizer import Recognizer

__all__ = ["Recognizer", "from_config", "load_model", "save_model"]
