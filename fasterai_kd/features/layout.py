"What a layer returns: a map, a map with its channels last, or tokens; and how two layers come to one form."

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from .._modules import find_layer, unwrap
from .._tensors import shape_of

__all__ = ["Aligner", "Layout", "Layouts", "Size", "has_width", "is_channels_last", "token_grid"]

Size = tuple[int, int]  # height and width
MAX_PREFIX = 5  # class and distillation token, registers


class Layout(NamedTuple):
    "Where a layer has its channels and positions."

    grid: Size | None  # None: tokens of no image
    prefix: int | None = None  # how many tokens come before those of the grid; None: a map
    channels_last: bool = False

    def as_map(self, x: Tensor) -> Tensor:
        "(B, C, H, W), a view where it can be; tokens before those of the grid are left out."
        if self.channels_last:
            return x.movedim(-1, 1)
        if self.prefix is None or self.grid is None:
            return x
        return x[:, self.prefix :].transpose(1, 2).unflatten(2, self.grid)  # type: ignore[no-untyped-call]


class Layouts:
    """Decides for each layer of one model what it returns, at its first batch, and for each size of images.

    Maps (B, C, H, W) and (B, H, W, C) are told apart by the images' proportions and the layer's own modules. Tokens
    (B, N, C) lie on a grid of the images' proportions after a few others (class, registers); models of timm, and of
    transformers with registers, say how many. Raises ValueError where that cannot be told.
    """

    def __init__(
        self,
        model: nn.Module,
        whose: str,  # "student" or "teacher", for errors
    ):
        self._model, self._whose = model, whose
        self._known: dict[tuple[Any, ...], Layout | None] = {}

    def of(
        self,
        name: str,
        x: Tensor,  # what the layer of this name returned
        size: Size | None,  # of the images that the model got; None: it got none
    ) -> Layout | None:
        "None for a vector, and for what has more dimensions than a map."
        key = name.split("#")[0], tuple(x.shape[1:]), size
        if key not in self._known:
            decide = {3: self._tokens, 4: self._map}.get(x.ndim)
            self._known[key] = decide and decide(key[0], x, size)
        return self._known[key]

    def _map(self, name: str, x: Tensor, size: Size | None) -> Layout:
        last = is_channels_last(x, size, find_layer(self._model, name, self._whose))
        if last is None:
            raise ValueError(
                f"layer {name!r} of the {self._whose} gives {shape_of(x)} for images of {_by(size)}: are its channels "
                "in dim 1 or in dim 3? Name another layer, or train on images of another size"
            )
        grid = x.shape[1:3] if last else x.shape[2:]
        return Layout((grid[0], grid[1]), channels_last=last)

    def _tokens(self, name: str, x: Tensor, size: Size | None) -> Layout:
        if size is None:
            return Layout(None, 0)
        found = token_grid(x.shape[1], size, self._model)
        if found is None:
            raise ValueError(
                f"layer {name!r} of the {self._whose} gives {shape_of(x)} for images of {_by(size)}: its {x.shape[1]} "
                f"tokens are no grid of these proportions with up to {MAX_PREFIX} others before it. Name another layer"
            )
        return Layout(*found)


class Aligner:
    """Brings the features of pairs to one form; one for each batch.

    Maps have their channels in dim 1. Tokens become maps, but stay tokens where both sides have equally many. What is
    compared with a vector is averaged over its positions.
    """

    def __init__(
        self,
        student: Layouts,
        teacher: Layouts,
        sizes: tuple[Size | None, Size | None],  # of the images that student and teacher got
    ):
        self._layouts, self._sizes = (student, teacher), sizes

    def align(
        self,
        fm_s: Mapping[str, Tensor],  # in pairs by position
        fm_t: Mapping[str, Tensor],
        pool: bool,  # may be averaged over positions where the other is a vector?
    ) -> dict[str, dict[str, Tensor]]:
        "`fm_s` and `fm_t`, in one form."
        both = [self._pair(pair, pool) for pair in zip(fm_s.items(), fm_t.items(), strict=True)]
        sides = (dict(zip(fm, (pair[i] for pair in both), strict=True)) for i, fm in enumerate((fm_s, fm_t)))
        return dict(zip(("fm_s", "fm_t"), sides, strict=True))

    def _pair(self, named: tuple[tuple[str, Tensor], ...], pool: bool) -> tuple[Tensor, Tensor]:
        s, t = (x for _, x in named)
        vector = 2 in (s.ndim, t.ndim)
        same_tokens = s.ndim == t.ndim == 3 and s.shape[1] == t.shape[1]
        if s.ndim == t.ndim == 2 or same_tokens or (vector and not pool):
            return s, t
        layouts = [of.of(name, x, size) for of, (name, x), size in zip(self._layouts, named, self._sizes, strict=True)]
        s, t = (x if layout is None else layout.as_map(x) for layout, x in zip(layouts, (s, t), strict=True))
        return (_mean(s), _mean(t)) if vector else (s, t)


def _mean(x: Tensor) -> Tensor:
    "Over the positions of a map."
    return x.mean((2, 3)) if x.ndim == 4 else x


def is_channels_last(x: Tensor, size: Size | None, layer: nn.Module) -> bool | None:
    "Is this a map (B, H, W, C)? None where it may be one or (B, C, H, W), and the layer does not tell."
    first, last = _fit(x.shape[2:], size), _fit(x.shape[1:3], size)
    if not last:  # nor may the other fit, as of convolutions without padding: the channels are where torch has them
        return False
    kinds = {type(m).__name__ for m in layer.modules()}
    if not has_width(layer, x.shape[3]):  # as activations do not, and convolutions whose map looks so by chance
        return not first and not any("2d" in kind for kind in kinds)
    if last > first:
        return True
    if not any(_is_norm_of_last_dim(kind) for kind in kinds) or "BatchNorm2d" in kinds:
        return False
    return None if any("Conv2d" in kind for kind in kinds) else True


def has_width(layer: nn.Module, channels: int) -> bool:
    "Does a part of the layer work on the last dimension of its output, as those of transformers do?"
    return any(
        getattr(m, "out_features", 0) == channels or tuple(getattr(m, "normalized_shape", ()))[-1:] == (channels,)
        for m in layer.modules()
    )


def token_grid(
    n: int,  # tokens
    size: Size,  # of the images
    model: nn.Module,  # those of timm, and of transformers with registers, say how many tokens come first
) -> tuple[Size, int] | None:
    "The grid, and how many tokens come before it: as few as can be. None where there is no such grid."
    told = {k for m in unwrap(model).modules() if (k := _prefix_of(m)) is not None}
    exact, rounded = _grids(size)
    known = [*told, 0] if told else []
    tries = ((known, exact + rounded), (range(MAX_PREFIX + 1), exact), (range(3), rounded))
    for prefixes, grids in tries:
        for prefix in prefixes:
            found = next((grid for grid in grids if grid[0] * grid[1] == n - prefix), None)
            if found is not None:
                return found, prefix
    return None


def _prefix_of(module: nn.Module) -> int | None:
    "How many tokens it says come first: in timm all, in transformers the registers, after a class token."
    registers = getattr(getattr(module, "config", None), "num_register_tokens", None)
    told = registers + 1 if isinstance(registers, int) else getattr(module, "num_prefix_tokens", None)
    return told if isinstance(told, int) else None


def _grids(size: Size) -> tuple[list[Size], list[Size]]:
    "Of more than one patch: those of patches that divide the image, and those that need rounding."
    h, w = size
    sizes = range(1, max(h, w) + 1)
    exact = [(h // s, w // s) for s in sizes if h % s == w % s == 0]
    rounded = [grid for s in sizes for grid in ((-(-h // s), -(-w // s)), (h // s, w // s))]
    return [g for g in exact if g[0] * g[1] > 1], [g for g in rounded if g[0] * g[1] > 1]


def _fit(grid: tuple[int, ...], size: Size | None) -> int:
    "Has it the proportions of the images? 2: yes, 1: rounded, 0: no."
    if size is None or (size[0] == size[1] and grid[0] != grid[1]):
        return 0
    exact, rounded = _grids(size)
    return 2 if size[0] == size[1] or tuple(grid) in exact else int(tuple(grid) in rounded)


def _is_norm_of_last_dim(kind: str) -> bool:
    return kind.startswith(("LayerNorm", "RMSNorm")) and not kind.endswith("2d")


def _by(size: Size | None) -> str:
    return "unknown size" if size is None else f"{size[0]}×{size[1]}"
