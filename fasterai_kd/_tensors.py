"Tensors: plain ones out of subclasses, nested ones, predictions among several outputs."

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "DeferredBool",
    "as_input",
    "by_position",
    "device_of",
    "join",
    "map_tensors",
    "one_of",
    "only_tensor",
    "pixels",
    "plain",
    "predictions",
    "shape_of",
    "size_of",
    "take_first",
    "tensors",
]


class DeferredBool:
    "`bool(DeferredBool(flag))`, read when it is needed: the host does not wait for the device before that."

    def __init__(self, flag: Tensor):
        self._flag = flag.to("cpu", non_blocking=flag.is_cuda)
        self._ready = torch.cuda.Event() if flag.is_cuda else None  # type: ignore[no-untyped-call]
        if self._ready is not None:
            self._ready.record()

    def __bool__(self) -> bool:
        if self._ready is not None:
            self._ready.synchronize()
        return bool(self._flag)


def plain(x: Any) -> Any:
    "`x` without its tensor subclass (fastai's `TensorImage`, ...) and, if half precision, in float32."
    if not isinstance(x, Tensor):
        return x
    if type(x) is not Tensor:
        x = x.as_subclass(Tensor)
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def only_tensor(
    output: Any,  # what a module returned
    what: str,  # what it is, for the error: "layer 'rnn' of the student"
) -> Tensor:
    "The tensor in `output`, which may be a tuple, list or dict as long as it holds just one."
    if isinstance(output, Tensor):
        return output
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    found = [o for o in parts if isinstance(o, Tensor)]
    if len(found) != 1:
        raise TypeError(
            f"{what} returns a {type(output).__name__} with {len(found)} tensors, expected one tensor: "
            "name a layer inside it instead"
        )
    return found[0]


PREDICTION_KEYS = ("logits", "out")  # in dicts of transformers and torchvision
EMBEDDINGS = ("image_embeds", "pooler_output", "last_hidden_state")  # of encoders without a head


def predictions(
    output: Any,  # what a model returned
    whose: str = "the teacher",  # for the error
) -> Tensor:
    "The predictions among several outputs, by name, or the first of a tuple; of an encoder the embedding."
    if isinstance(output, Mapping):
        output = next((output[key] for key in (*PREDICTION_KEYS, *EMBEDDINGS) if output.get(key) is not None), output)
    elif isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        output = output[0]
    return only_tensor(output, whose)


def one_of(
    output: Any,  # what a model returned
    key: Any,  # of a dict, index of a tuple, or a function of the output; None: where the predictions are
    whose: str,  # for the error
) -> Tensor:
    "One of several outputs; a single tensor is taken as it is."
    if isinstance(output, Tensor) or key is None:
        return predictions(output, whose)
    try:
        return only_tensor(key(output) if callable(key) else output[key], f"output {key!r} of {whose}")
    except (KeyError, IndexError, TypeError) as e:
        has = list(output) if isinstance(output, Mapping) else f"0 to {len(output) - 1}"
        raise ValueError(f"{whose} has no output {key!r}: its outputs are {has}") from e


def tensors(x: Any) -> Iterator[Tensor]:
    "All tensors in a nest of tuples, lists and dicts."
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, (Mapping, tuple, list)):
        for part in x.values() if isinstance(x, Mapping) else x:
            yield from tensors(part)


def size_of(xb: Any) -> int:
    "How many samples, by the first tensor."
    return next(len(x) for x in tensors(xb))


def pixels(xb: Any) -> tuple[int, int] | None:
    "Height and width of the images among the inputs; None where there are none."
    return next(((x.shape[2], x.shape[3]) for x in tensors(xb) if x.ndim == 4), None)


def device_of(xb: Sequence[Any]) -> torch.device | None:
    "Where the first tensor is."
    return next((x.device for x in tensors(xb)), None)


def as_input(x: Tensor, param: Tensor) -> Tensor:
    "`x` where this parameter of a model is, and in its precision; whole numbers stay so."
    return x.to(param.device, param.dtype if x.is_floating_point() else None)


def map_tensors(f: Callable[[Tensor], Tensor], x: Any) -> Any:
    "`f` of a tensor, or of all in a nest of tuples, lists and dicts; anything else as it is."
    if isinstance(x, Tensor):
        return f(x)
    if isinstance(x, Mapping):
        parts = {k: map_tensors(f, v) for k, v in x.items()}
        return parts if type(x) is dict else type(x)(**parts)  # transformers' ModelOutput, BatchEncoding
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*(map_tensors(f, v) for v in x))
    return type(x)(map_tensors(f, v) for v in x) if type(x) in (tuple, list) else x


def join(a: Any, b: Any) -> Any:
    "Inputs or outputs of two batches as those of one; None where their shapes or forms differ."
    if a is b:  # an output without samples, such as a sum
        return a
    if isinstance(a, Tensor):
        if not isinstance(b, Tensor) or a.shape[1:] != b.shape[1:] or not a.ndim or a.dtype != b.dtype:
            return None
        return torch.cat([a.as_subclass(Tensor), b.as_subclass(Tensor)]).as_subclass(type(a))
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)) and len(a) == len(b):
        parts = [join(x, y) for x, y in zip(a, b, strict=True)]
        return None if any(p is None for p in parts) else type(a)(parts)
    return None


def take_first(x: Any, n: int, total: int) -> Any:
    "Of all tensors with `total` samples the first `n`; with a negative `n` the rest."
    return map_tensors(lambda t: (t[:n] if n >= 0 else t[-n:]) if t.ndim and len(t) == total else t, x)


def by_position(names: Sequence[str], features: Mapping[str, Tensor], whose: str) -> dict[str, Tensor]:
    "In the order of `names`; a repeated name gets `#2`, `#3`, ..."
    ordered: dict[str, Tensor] = {}
    for i, name in enumerate(names):
        if name not in features:
            raise RuntimeError(f"layer {name!r} of the {whose} did not run in the forward pass: name another layer")
        n = list(names[:i]).count(name) + 1
        ordered[name if n == 1 else f"{name}#{n}"] = features[name]
    return ordered


def shape_of(x: Tensor) -> str:
    "The shape as a user writes it: `(8, 64, 7, 7)`."
    return str(tuple(x.shape))
