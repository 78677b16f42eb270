"The star door for notebooks: `from fasterai_kd.all import *`."

from .data import *
from .distillation_callback import *
from .losses import *
from .mutual_learning import *
from .teacher import *
