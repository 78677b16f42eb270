"Stored outputs of a teacher, so that it does not run again for a sample that it has seen."

import hashlib
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ._fingerprint import content_keys
from ._measure import difference
from ._packing import Outputs, Packing
from ._shelf import FileShelf, MemoryShelf, bytes_in, open_shelves
from ._tensors import shape_of

__all__ = ["GIB", "TeacherCache"]

GIB = 4.0  # the default size
_OVERHEAD = 300  # bytes in memory of a key and what belongs to it

Key = tuple[int, int]
Ask = Callable[[Sequence[Any]], Outputs]
Shelf = MemoryShelf | FileShelf
_AUGMENTED = (
    "since random augmentation or mixing makes others of them each time: use the cache with deterministic transforms, "
    "or with a few fixed views of each image as items"
)


class TeacherCache:
    """Outputs of teachers by the content of the sample that the model sees, bit for bit.

    Shuffling, several dataloaders, workers, processes and students may share it: another sample, another teacher,
    other layers or another precision is another key. In a folder, each process writes a file of its own and reads
    those of all others; an interrupted one leaves whole rows. Delete the folder to be rid of it.

    Samples that random augmentation changes each epoch are never found again. After an epoch of training with hardly
    any found, the cache says so, forgets them and serves validation only.

    Raises ValueError for a `top_k`, `size` or `dtype` that makes no sense, a path that is a file; in use, for a
    teacher whose output for a sample depends on the rest of the batch or on chance.
    """

    def __init__(
        self,
        path: str | Path | None = None,  # a folder; None: in memory
        size: float = GIB,  # at most so many GiB; what comes later is not stored
        dtype: torch.dtype | None = None,  # store in this one, e.g. torch.float16; None: as the teacher gives it
        top_k: int | None = None,  # store this many classes of the predictions, the rest spread evenly
    ):
        if not size > 0:
            raise ValueError(f"the size of the cache, in GiB, must be positive, got {size}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be 1 or more classes, got {top_k}")
        if dtype not in (None, torch.float16, torch.bfloat16, torch.float32):
            raise ValueError(f"dtype must be torch.float16, torch.bfloat16 or torch.float32, got {dtype}")
        self.path, self.size, self.packing = Path(path).expanduser() if path else None, size, Packing(dtype, top_k)
        if self.path is not None and self.path.exists() and not self.path.is_dir():
            raise ValueError(f"the cache is a folder, but {self.path} is a file")
        self._warned: set[str] = set()
        self._turn_to("")

    def __call__(
        self,
        xb: Sequence[Any],  # inputs of a batch
        ask: Ask,  # the teacher: inputs → outputs by name, each (B, ...)
        question: str,  # all that its outputs depend on but the inputs
        training: bool,  # may the inputs be augmented?
    ) -> Outputs:
        "What `ask(xb)` gives; asked only for the samples whose outputs are not stored."
        if question != self._question:
            self._turn_to(question)
        if training and self._off:
            return ask(xb)
        keys = self._keys(xb)
        if training:
            self._seen += len(keys)
            self._found += sum(key in self._index for key in keys)
        found = [self._read(key) for key in keys]
        new = [i for i, row in enumerate(found) if row is None]
        if new:
            inputs = xb if len(new) == len(keys) else [x[new] for x in xb]
            outputs = ask(inputs)
            layout, rows = self._pack(outputs, len(new))
            self._check_once(inputs, outputs, ask)
            self._store([keys[i] for i in new], layout, rows, training)
            if len(new) == len(keys):
                return outputs
            for i, row in zip(new, rows, strict=True):
                found[i] = layout, row
        same = len({row[0] for row in found if row is not None}) == 1
        return self._unpack(found, xb[0].device) if same else ask(xb)

    def begin_fit(self) -> None:
        "The data may be others now, the disk have room: try again."
        self._off, self._limit = False, int(min(self.size * 2**30, 2**62))
        self._seen = self._found = self._before = 0  # samples in this epoch, those found; samples in the last one

    def end_epoch(self) -> None:
        "Of training: were there any hits? See also what other processes have stored."
        had_chance = self._before >= self._seen / 2  # a schedule may let the teacher rest in part of an epoch
        if had_chance and self._found < 0.05 * self._seen and not self._off:
            self._off = True
            self._drop_training()
            if self._limit:  # else the reason was given
                self._warn(
                    "off",
                    f"in this epoch {self._found} of {self._seen} samples were found in the teacher's cache, "
                    + ("which is too small: give a larger cache_size" if self._full else _AUGMENTED)
                    + ". In training it is off now, in validation it stays on",
                )
        self._before, self._seen, self._found = self._seen, 0, 0
        self._look_around()

    def __len__(self) -> int:
        "Samples stored."
        return len(self._index)

    @property
    def used(self) -> int:
        "Bytes, with those of other processes in the folder."
        return self._elsewhere + sum(self._spent.values())

    def __repr__(self) -> str:
        where = "in memory" if self.path is None else f"in {str(self.path)!r}"
        return f"TeacherCache of {len(self)} samples {where}, {self.used / 2**20:.1f} of {self.size * 1024:.0f} MiB"

    def __deepcopy__(self, memo: dict[int, Any]) -> "TeacherCache":
        "Copies of a callback share it."
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        "What is stored in memory stays here."
        return TeacherCache, (self.path, self.size, self.packing.dtype, self.packing.top_k)

    def _turn_to(self, question: str) -> None:
        "Another teacher: what is in memory is of no use any more."
        self._question, self._checked, self._full = question, False, False
        self._index: dict[Key, tuple[Shelf, int]] = {}
        self._own: dict[tuple[str, bool, int], Shelf] = {}  # by layout, whether rows are of training, and process
        self._others: list[FileShelf] = []
        self._spent: dict[Shelf, int] = {}  # bytes, of each own one
        self._elsewhere = 0
        self.begin_fit()
        if question:
            self._look_around()

    def _look_around(self) -> None:
        "Index what other processes, also earlier ones, have stored."
        if self.path is None:
            return
        own = self._own_files()
        self._elsewhere = bytes_in(self.path, besides=own)
        self._others += open_shelves(self.path, self._digest(), own | {shelf.path for shelf in self._others})
        for shelf in self._others:
            for key, number in shelf.new_keys():
                self._index.setdefault(key, (shelf, number))

    def _own_files(self) -> set[Path]:
        return {shelf.path for shelf in self._own.values() if isinstance(shelf, FileShelf)}

    def _digest(self) -> str:
        return hashlib.blake2b(f"{self._question} {self.packing}".encode(), digest_size=16).hexdigest()

    def _keys(self, xb: Sequence[Any]) -> list[Key]:
        try:
            return [(a, b) for a, b in content_keys(xb).tolist()]
        except (TypeError, ValueError) as e:
            raise type(e)(f"the teacher's outputs cannot be stored by sample ({e}): use no cache") from None

    def _read(self, key: Key) -> tuple[str, np.ndarray] | None:
        place = self._index.get(key)
        if place is None:
            return None
        row = place[0].read(place[1], key)
        if row is None:  # damaged
            del self._index[key]
            return None
        return place[0].layout, row

    def _unpack(self, found: Sequence[Any], device: torch.device) -> Outputs:
        return self.packing.unpack(found[0][0], np.stack([row for _, row in found]), device)

    def _pack(self, outputs: Outputs, n: int) -> tuple[str, np.ndarray]:
        for name, x in outputs.items():
            if not x.ndim or len(x) != n:
                raise ValueError(
                    f"the teacher's {name} are {shape_of(x)} for {n} samples: they cannot be stored by sample, "
                    "use no cache"
                )
        return self.packing.pack(outputs)

    def _check_once(self, inputs: Sequence[Any], outputs: Outputs, ask: Ask) -> None:
        "Does a sample's output depend on the others, or on chance?"
        if self._checked:
            return
        chance = _chance(inputs[0].device)
        if len(inputs[0]) == 1:
            inputs = [torch.cat([torch.zeros_like(x), x]) for x in inputs]
            outputs = ask(inputs)
        others = [x.clone() for x in inputs]
        for x in others:
            x[::2] = x[1]
        again = ask(others)  # as many, so that rounding is the same
        drawn = any(not torch.equal(a, b) for a, b in zip(chance, _chance(inputs[0].device), strict=True))
        for name, x in again.items():
            if drawn or difference(_finite(outputs[name][1::2]), _finite(x[1::2]), floor=1e-12) > 1e-4:
                raise ValueError(
                    f"the teacher's {name} for a sample depend on the rest of the batch, or on chance (BatchNorm "
                    "without running statistics? dropout that never rests?): use no cache"
                )
        self._checked = True

    def _store(self, keys: list[Key], layout: str, rows: np.ndarray, training: bool) -> None:
        cost = rows.shape[1] + _OVERHEAD
        if self.path is not None:
            self._elsewhere = bytes_in(self.path, besides=self._own_files())
        n = min(len(rows), max(0, (self._limit - self.used) // cost))
        if n < len(rows) and not self._full:
            self._full = True
            self._warn("full", f"the teacher's cache is full ({len(self) + n} samples): give a larger cache_size")
        if not n:
            return
        try:
            shelf = self._shelf(layout, training, rows.shape[1])
            numbers = shelf.append(keys[:n], rows[:n])
        except OSError as e:
            self._limit, self._full = 0, True
            self._warn("broken", f"nothing more is stored in the teacher's cache: {e}")
            return
        self._spent[shelf] = self._spent.get(shelf, 0) + n * cost
        self._index.update(zip(keys, ((shelf, number) for number in numbers), strict=False))

    def _shelf(self, layout: str, training: bool, row_bytes: int) -> Shelf:
        place = layout, training, os.getpid()  # a process that was forked must not write into its parent's file
        shelf = self._own.get(place)
        if shelf is not None and shelf.exists():
            return shelf
        if shelf is not None:  # someone deleted the file
            self._spent.pop(shelf, None)
        if self.path is None:
            shelf = MemoryShelf(layout)
        else:
            self.path.mkdir(parents=True, exist_ok=True)
            shelf = FileShelf.create(self.path, self._digest(), layout, row_bytes)
        self._own[place] = shelf
        return shelf

    def _drop_training(self) -> None:
        gone = [self._own.pop(k) for k in list(self._own) if k[1]]
        self._index = {key: place for key, place in self._index.items() if place[0] not in gone}
        for shelf in gone:
            self._spent.pop(shelf, None)
            shelf.remove()

    def _warn(self, what: str, message: str) -> None:
        "Once."
        if what not in self._warned:
            self._warned.add(what)
            warnings.warn(message, stacklevel=2)


def _chance(device: torch.device) -> list[torch.Tensor]:
    "States of the random numbers that a teacher may draw."
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _finite(x: torch.Tensor) -> torch.Tensor:
    return x.nan_to_num(0.0, 0.0, 0.0)  # nan is the callback's business
