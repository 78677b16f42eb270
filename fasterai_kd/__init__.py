"Knowledge distillation for fastai: one callback, fifteen losses."

__version__ = "0.1.0"

from . import data, losses, teacher
from . import distill as _distill  # noqa: F401  # adds Learner.distill
from ._docs import describe_parameters as _describe
from .data import *
from .distillation_callback import KnowledgeDistillationCallback
from .losses import *
from .mutual_learning import MutualLearning
from .schedule import Schedule
from .teacher import *

__all__ = ["KnowledgeDistillationCallback", "MutualLearning", "Schedule"]
__all__ += data.__all__
__all__ += losses.__all__
__all__ += teacher.__all__

for _name in dict.fromkeys(__all__):
    _describe(globals()[_name])
