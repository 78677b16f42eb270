"The teacher: where it comes from, what it is asked, what is kept of its outputs."

from . import cache, ema, ensemble, inputs, teacher
from .cache import *
from .ema import *
from .ensemble import *
from .inputs import *
from .teacher import *

__all__: list[str] = []
__all__ += cache.__all__
__all__ += ema.__all__
__all__ += ensemble.__all__
__all__ += inputs.__all__
__all__ += teacher.__all__
