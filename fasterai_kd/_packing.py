"A teacher's outputs for a batch as one row of bytes a sample, and back."

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._tensors import shape_of

__all__ = ["PREDICTIONS", "Outputs", "Packing"]

PREDICTIONS = "final predictions"  # among layers' names: no layer's own

_CUT = tuple(f"{PREDICTIONS}, {part}" for part in ("top", "classes", "rest"))

Outputs = dict[str, Tensor]  # by name, each (B, ...)


@dataclass(frozen=True)
class Packing:
    "Of tensors (B, ...) by name; the predictions are cut to `top_k` classes, if given."

    dtype: torch.dtype | None = None  # of floating point numbers; None: as they are
    top_k: int | None = None

    def pack(self, outputs: Outputs) -> tuple[str, np.ndarray]:
        "Their layout, which `unpack` needs, and the rows (B, bytes)."
        parts: Outputs = {}
        layout: dict[str, Any] = {}
        for name, x in outputs.items():
            if name == PREDICTIONS and self.top_k is not None:
                parts.update(_cut(x, self.top_k))
                layout["classes"] = x.shape[1]
            else:
                parts[name] = x
        stored = {name: self._cast(name, x) for name, x in parts.items()}
        layout["parts"] = [[name, str(x.dtype).removeprefix("torch."), *x.shape[1:]] for name, x in stored.items()]
        return json.dumps(layout), torch.cat([_rows(x.cpu()) for x in stored.values()], 1).numpy()

    def unpack(self, layout: str, rows: np.ndarray, device: torch.device) -> Outputs:
        "In float32 where they were stored in half precision."
        spec, data, outputs = json.loads(layout), torch.from_numpy(rows).to(device), {}
        for name, kind, *shape in spec["parts"]:
            dtype = getattr(torch, kind)
            size = math.prod(shape) * dtype.itemsize
            part, data = data[:, :size].clone(memory_format=torch.contiguous_format), data[:, size:]
            x = part.view(-1).view(dtype).view(len(rows), *shape)  # a copy begins where any dtype may
            outputs[name] = x.float() if dtype in (torch.float16, torch.bfloat16) else x
        if "classes" in spec:
            top, classes, rest = (outputs.pop(name) for name in _CUT)
            outputs = {PREDICTIONS: _spread(top, classes, rest, spec["classes"])} | outputs
        return outputs

    def _cast(self, name: str, x: Tensor) -> Tensor:
        x = x.detach()
        if self.dtype is None or not x.is_floating_point():
            return x
        cast = x.to(self.dtype)
        if not torch.equal(cast.isinf(), x.isinf()):
            raise ValueError(
                f"the teacher's {name} have values up to {x.abs().max():.3g}, too large for {self.dtype}: "
                "give the cache dtype=torch.bfloat16, or none"
            )
        return cast


def _cut(predictions: Tensor, k: int) -> Outputs:
    "The log-probabilities of the `k` likeliest classes, and of each of the others if they were equal."
    if predictions.ndim != 2 or predictions.shape[1] <= k:
        raise ValueError(
            f"top_k={k} is for logits (B, C) of more than {k} classes, the teacher gives {shape_of(predictions)}"
        )
    log_p = predictions.log_softmax(1)
    top, classes = log_p.topk(k, 1)
    rest = log_p.scatter(1, classes, -math.inf).logsumexp(1, keepdim=True) - math.log(log_p.shape[1] - k)
    return dict(zip(_CUT, (top, classes.int(), rest), strict=True))


def _spread(top: Tensor, classes: Tensor, rest: Tensor, n_classes: int) -> Tensor:
    return rest.expand(-1, n_classes).scatter(1, classes.long(), top)


def _rows(x: Tensor) -> Tensor:
    "Its bytes, of each sample."
    return x.contiguous().reshape(-1).view(torch.uint8).view(len(x), math.prod(x.shape[1:]) * x.element_size())
