"The distillation losses and `match_feature_layers`, which pairs the layers that some of them compare."

from . import intermediate, output, relations
from .combine import combine, select
from .intermediate import *
from .matching import get_model_layers, get_module_by_name, match_feature_layers
from .output import *
from .relations import *

__all__ = ["combine", "get_model_layers", "get_module_by_name", "match_feature_layers", "select"]
__all__ += output.__all__
__all__ += intermediate.__all__
__all__ += relations.__all__
