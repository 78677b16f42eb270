"What the library knows of a loss beyond its signature, and the registry of its own losses."

import inspect
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from functools import partial, wraps
from typing import Any, TypeVar

from torch import nn

__all__ = [
    "REGISTRY",
    "feature_loss",
    "function_of",
    "ignores_labels",
    "is_own",
    "logit_loss",
    "name_of",
    "parameters_of",
    "trait",
    "unequal_losses",
]

REGISTRY: dict[str, Callable[..., Any]] = {}  # this library's losses by name
OUTPUTS = ("pred", "teacher_pred", "fm_s", "fm_t", "target")
DEFAULTS = {
    "over_classes": False,  # compares distributions over the classes in dim 1
    "raw_outputs": False,  # compares outputs as they are: log-probabilities in their place are something else
    "reads_predictions": None,  # of the teacher; None: if it names them, or no features
    "same_shape": None,  # needs features of equal shapes, so that an adapter is for it; None: if it names features
    "compares_positions": False,  # of features: tokens and maps are brought to one form
    "needs_labels": None,  # None: if it names `target`
    "reduction": False,  # takes reduction="none", which gives one value a sample
}
Loss = TypeVar("Loss", bound=Callable[..., Any])


def logit_loss(
    *,
    over_classes: bool = False,
    raw_outputs: bool = False,
    reduction: bool = False,
    needs_labels: bool = False,
) -> Callable[[Loss], Loss]:
    "Registers a loss on predictions, with its traits."
    return partial(
        _register,
        over_classes=over_classes,
        raw_outputs=raw_outputs,
        reduction=reduction,
        needs_labels=needs_labels,
        reads_predictions=True,
        same_shape=False,
    )


def feature_loss(
    *,
    same_shape: bool = False,
    compares_positions: bool = False,
) -> Callable[[Loss], Loss]:
    "Registers a loss on features alone, with its traits."
    return partial(
        _register,
        reads_predictions=False,
        needs_labels=False,
        same_shape=same_shape,
        compares_positions=compares_positions,
    )


def _register(loss: Loss, **traits: Any) -> Loss:
    name = name_of(loss)

    @wraps(loss)
    def checked(*args: Any, **kwargs: Any) -> Any:
        if not args and not {"pred", "fm_s"} & kwargs.keys():
            options = "".join(f", {key}={value!r}" for key, value in kwargs.items())
            raise TypeError(f"{name} got no predictions: to set its options give partial({name}{options})")
        return loss(*args, **kwargs)

    for trait_name, value in traits.items():
        setattr(checked, trait_name, value)
    REGISTRY[name] = checked
    return checked  # type: ignore[return-value]


def trait(
    loss: Callable[..., Any],  # of the library or the user's own, which may have an attribute of this name
    name: str,  # one of `DEFAULTS`
) -> Any:
    "A trait of `loss`; one that functools.wraps copied from another function does not count."
    own, default = function_of(loss), DEFAULTS[name]
    value = getattr(own, name, default)
    if hasattr(own, "__wrapped__") and value == getattr(own.__wrapped__, name, default):
        value = default
    return _by_names(name, parameters_of(loss)) if value is None else value


def _by_names(name: str, params: Mapping[str, Any]) -> bool:
    "A trait of a function by what it calls its arguments."
    if name == "reads_predictions":
        return "teacher_pred" in params or "fm_s" not in params
    return {"same_shape": "fm_s", "needs_labels": "target"}[name] in params


def ignores_labels(loss: Callable[..., Any]) -> bool:
    "Is it told of a label that does not count?"
    return getattr(loss, "keywords", {}).get("ignore_index") is not None


def is_own(loss: Callable[..., Any]) -> bool:
    "Is it the user's, and none of this library?"
    return function_of(loss) not in REGISTRY.values()


def unequal_losses() -> list[str]:
    "Names of the losses that compare features of unequal shapes."
    return sorted(n for n, loss in REGISTRY.items() if not trait(loss, "reads_predictions") | trait(loss, "same_shape"))


def function_of(loss: Callable[..., Any]) -> Any:
    "Without the arguments that a `partial` sets."
    return getattr(loss, "func", loss)


def name_of(loss: Callable[..., Any]) -> str:
    "As the user knows it."
    loss = function_of(loss)
    return getattr(loss, "__name__", type(loss).__name__)


def parameters_of(loss: Callable[..., Any]) -> dict[str, bool]:
    "The named parameters of `loss` → are they required? TypeError if the callback could not call it."
    if isinstance(loss, (list, tuple, dict)):
        raise TypeError(
            f"loss must be one function, got a {type(loss).__name__}: for several losses use "
            "combine((SoftTarget, 1.0), (Attention, 10.0))"
        )
    if not callable(loss):
        raise TypeError(f"loss must be a function such as SoftTarget, got {loss!r}")
    signature = inspect.signature(loss.forward if isinstance(loss, nn.Module) else loss)
    try:
        signature.bind(**dict.fromkeys(OUTPUTS))
    except TypeError as e:
        raise TypeError(
            f"{name_of(loss)}{signature} cannot be called as loss(pred=, teacher_pred=, fm_s=, fm_t=, target=): {e}. "
            "Name the arguments it uses so, and add **kwargs for the others"
        ) from None
    if isinstance(loss, partial) and loss.func in REGISTRY.values():
        _check_options(loss)
    return {name: p.default is p.empty for name, p in signature.parameters.items()}


def _check_options(loss: partial[Any]) -> None:
    "Of a loss of this library, whose **kwargs would take a misspelt one without a word."
    known = list(_named(loss.func))
    for name in loss.keywords:
        if name not in (*known, *OUTPUTS):
            options = [name for name in known if name not in OUTPUTS]
            near = get_close_matches(name, options, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise TypeError(f"{name_of(loss)} has no argument {name!r}: {hint}It has {', '.join(options) or 'none'}")


def _named(function: Callable[..., Any]) -> Iterator[str]:
    return (name for name, p in inspect.signature(function).parameters.items() if p.kind != p.VAR_KEYWORD)
