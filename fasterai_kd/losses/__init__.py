"The eight distillation losses and `match_feature_layers`, which pairs the layers that some of them compare."

from .intermediate import ActivationBoundaries, Attention, FitNet, Similarity
from .matching import get_model_layers, get_module_by_name, match_feature_layers
from .output import DecoupledKD, Logits, Mutual, SoftTarget

__all__ = [
    "ActivationBoundaries",
    "Attention",
    "DecoupledKD",
    "FitNet",
    "Logits",
    "Mutual",
    "Similarity",
    "SoftTarget",
    "get_model_layers",
    "get_module_by_name",
    "match_feature_layers",
]
