"The star door for notebooks: `from fasterai_kd.all import *`."

from .distillation_callback import *
from .ema import *
from .inputs import *
from .losses import *
from .mutual import *
from .recipes import *
