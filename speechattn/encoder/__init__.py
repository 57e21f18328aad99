"""Encoders: features in, frames out, whole or in pieces."""

from speechattn.encoder.base import Encoder
from speechattn.encoder.branchformer import EBranchformer
from speechattn.encoder.conformer import Conformer
from speechattn.encoder.efficient import EfficientConformer
from speechattn.encoder.transformer import LabelEncoder, Transformer

__all__ = ["Conformer", "EBranchformer", "EfficientConformer", "Encoder", "LabelEncoder", "Transformer"]
