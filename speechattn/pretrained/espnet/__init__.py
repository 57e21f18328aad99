"""ESPnet both ways: its encoders in this library's modules, and this library's encoders in its training."""

from speechattn.pretrained.espnet.config import EncoderConfig, read_config
from speechattn.pretrained.espnet.load import load_encoder
from speechattn.pretrained.espnet.register import register

__all__ = ["EncoderConfig", "load_encoder", "read_config", "register"]
