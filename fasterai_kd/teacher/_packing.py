"A teacher's outputs for a batch as one record a sample, and back."

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .._tensors import shape_of

__all__ = ["KEY", "PREDICTIONS", "Packing", "agree", "finite_or_masked"]

KEY, PREDICTIONS = "key of the sample", "final predictions"  # among layers' names: no layer's own
_TOP, _CLASSES, _REST, _COUNT = (f"{PREDICTIONS}, {part}" for part in ("top", "classes", "rest", "count"))


@dataclass(frozen=True)
class Packing:
    "Of tensors (B, ...) by name. The dtype of the records says how they are read."

    half: bool = False  # floating point numbers as float16
    top_k: int | None = None  # the predictions cut to so many classes

    def pack(self, keys: np.ndarray, outputs: Mapping[str, Tensor]) -> np.ndarray:
        "Records (B,) of keys (B, 2) and outputs; ValueError for outputs that are not one row a sample."
        parts: dict[str, np.ndarray] = {KEY: keys}
        for name, x in outputs.items():
            if not x.ndim or len(x) != len(keys):
                raise ValueError(
                    f"the teacher's {name} are {shape_of(x)} for {len(keys)} samples: they cannot be stored by sample, "
                    "use no cache"
                )
            cut = name == PREDICTIONS and self.top_k is not None
            for part, value in (_cut(x, self.top_k) if cut else {name: x}).items():
                parts[part] = self._cast(part, value).cpu().numpy()
        records = np.empty(len(keys), [(name, column.dtype.str, column.shape[1:]) for name, column in parts.items()])
        for name, column in parts.items():
            records[name] = column
        return records

    def unpack(self, records: np.ndarray, device: torch.device) -> dict[str, Tensor]:
        "In float32 where they were stored in half precision."
        outputs = {}
        for name in (records.dtype.names or ())[1:]:
            x = torch.from_numpy(records[name].copy()).to(device)
            outputs[name] = x.float() if x.dtype == torch.float16 else x
        if _TOP in outputs:
            outputs[PREDICTIONS] = _spread(*(outputs.pop(name) for name in (_TOP, _CLASSES, _REST, _COUNT)))
        return outputs

    def _cast(self, name: str, x: Tensor) -> Tensor:
        x = x.detach()
        if not self.half or not x.is_floating_point():
            return x
        cast = x.half()
        if not torch.equal(cast.isinf(), x.isinf()):
            raise ValueError(
                f"the teacher's {name} have values up to {x.abs().max():.3g}, too large for float16: give the cache no "
                "dtype"
            )
        return cast


def _cut(predictions: Tensor, k: int | None) -> dict[str, Tensor]:
    "The log-probabilities of the `k` likeliest classes, and of each of the others if they were equal."
    if k is None or predictions.ndim != 2 or predictions.shape[1] <= k:
        raise ValueError(
            f"top_k={k} is for logits (B, C) of more than {k} classes, the teacher gives {shape_of(predictions)}"
        )
    log_p = predictions.log_softmax(1)
    top, classes = log_p.topk(k, 1)
    n = log_p.shape[1]
    rest = log_p.scatter(1, classes, -math.inf).logsumexp(1, keepdim=True) - math.log(n - k)
    return {_TOP: top, _CLASSES: classes.int(), _REST: rest, _COUNT: torch.full_like(classes[:, 0], n)}


def _spread(top: Tensor, classes: Tensor, rest: Tensor, count: Tensor) -> Tensor:
    return rest.expand(-1, int(count[0])).scatter(1, classes.long(), top)


def agree(stored: Mapping[str, Tensor], fresh: Mapping[str, Tensor], tolerance: float) -> bool:
    "Are they equal within a share of the largest value?"
    for name, x in stored.items():
        a, b = (t.double().nan_to_num(0.0, 0.0, 0.0) for t in (x, fresh[name]))  # nan is the callback's business
        if a.shape != b.shape or (a.numel() and (a - b).abs().max() > tolerance * a.abs().max()):
            return False
    return True


def finite_or_masked(records: np.ndarray) -> np.ndarray:
    "Which of the records (B,) have neither nan nor +inf? -inf is a mask."
    sound = np.ones(len(records), bool)
    for name in records.dtype.names or ():
        if records[name].dtype.kind == "f":
            sound &= (records[name] < np.inf).all(tuple(range(1, records[name].ndim)))
    return sound
