"""Looking at attention: weights as return values, statistics, rollout and flow, saliency, and a picture of all."""

from speechattn.analysis.rollout import flow, rollout
from speechattn.analysis.saliency import half_explanation
from speechattn.analysis.weights import cross_weights, encoder_weights, self_weights

__all__ = ["cross_weights", "encoder_weights", "flow", "half_explanation", "rollout", "self_weights"]
