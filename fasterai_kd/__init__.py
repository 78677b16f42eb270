"Knowledge distillation for fastai: one callback, a dozen losses."

__version__ = "0.1.0"

from . import learner as _learner  # noqa: F401  # adds Learner.distill
from .cache import TeacherCache
from .distillation_callback import (
    KnowledgeDistillationCallback,
    get_model_layers,
    get_module_by_name,
    match_feature_layers,
)
from .ema import EMATeacher
from .inputs import renormalize
from .losses import (
    CWD,
    DIST,
    PKT,
    RKD,
    ActivationBoundaries,
    Attention,
    DecoupledKD,
    FitNet,
    Logits,
    Mutual,
    Similarity,
    SoftTarget,
    combine,
)
from .mutual import MutualLearning
from .recipes import recipe
from .schedule import Schedule

__all__ = [
    "CWD",
    "DIST",
    "PKT",
    "RKD",
    "ActivationBoundaries",
    "Attention",
    "DecoupledKD",
    "EMATeacher",
    "FitNet",
    "KnowledgeDistillationCallback",
    "Logits",
    "Mutual",
    "MutualLearning",
    "Schedule",
    "Similarity",
    "SoftTarget",
    "TeacherCache",
    "combine",
    "get_model_layers",
    "get_module_by_name",
    "match_feature_layers",
    "recipe",
    "renormalize",
]
