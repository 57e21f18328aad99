"""ESPnet both ways: its models in this library's modules, and this library's encoders in its training."""

from speechattn.pretrained.espnet.config import EncoderConfig, read_config
from speechattn.pretrained.espnet.load import load_encoder
from speechattn.pretrained.espnet.model import is_espnet, load_espnet
from speechattn.pretrained.espnet.register import register

__all__ = ["EncoderConfig", "is_espnet", "load_encoder", "load_espnet", "read_config", "register"]
