"The distillation losses and `match_feature_layers`, which pairs the layers that some of them compare."

from .combine import combine
from .intermediate import CWD, ActivationBoundaries, Attention, FitNet
from .matching import get_model_layers, get_module_by_name, match_feature_layers
from .output import DIST, DecoupledKD, Logits, Mutual, SoftTarget
from .relations import PKT, RKD, Similarity

__all__ = [
    "CWD",
    "DIST",
    "PKT",
    "RKD",
    "ActivationBoundaries",
    "Attention",
    "DecoupledKD",
    "FitNet",
    "Logits",
    "Mutual",
    "Similarity",
    "SoftTarget",
    "combine",
    "get_model_layers",
    "get_module_by_name",
    "match_feature_layers",
]
