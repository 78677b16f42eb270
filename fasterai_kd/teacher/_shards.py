"Records of a teacher's outputs: in memory, or in immutable files."

import contextlib
import os
import stat
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ._packing import KEY

__all__ = ["Key", "MemoryShard", "Shard", "Store", "bytes_in", "find_shards", "write_shard"]

Key = tuple[int, int]

_MAX_HEADER = 2**20  # bytes


class MemoryShard:
    "An array of records."

    def __init__(self, records: np.ndarray, training: bool):
        self.records, self.training, self.dtype, self.nbytes = records, training, records.dtype, records.nbytes

    def __len__(self) -> int:
        return len(self.records)

    def keys(self) -> Iterator[tuple[int, int]]:
        "In the order of the records."
        return map(tuple, self.records[KEY].tolist())

    def read(self, numbers: Sequence[int]) -> np.ndarray | None:
        "These records."
        return self.records[numbers]


class Shard:
    """One `.npy` file of records, read by position: a file that is cut short or gone is a miss.

    Raises ValueError or OSError for a file that is not a sound shard; nothing is executed, and nothing allocated for
    what its header claims.
    """

    def __init__(
        self,
        path: Path,
        training: bool = False,  # are its samples of training, where augmentation may make them useless?
    ):
        self.path, self.training = path, training
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would block
            raise ValueError(f"{path} is not a file")
        with path.open("rb") as f:
            version = np.lib.format.read_magic(f)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, self.dtype = read(f, max_header_size=_MAX_HEADER)
            self._start, self.nbytes = f.tell(), os.fstat(f.fileno()).st_size
        names = self.dtype.names or ()
        sound = len(shape) == 1 and names[:1] == (KEY,) and len(names) > 1 and not self.dtype.hasobject
        if not sound or self.dtype[KEY] != np.dtype(("<i8", (2,))):
            raise ValueError(f"{path} has no records")
        if self._start + shape[0] * self.dtype.itemsize != self.nbytes:
            raise ValueError(f"{path} is not whole")
        self._n = shape[0]
        if self._n > 1 and len(set(self._keys((0, self._n - 1)))) == 1:  # a file of holes, say
            raise ValueError(f"{path} has records of one key")

    def keys(self) -> Iterator[tuple[int, int]]:
        "In the order of the records."
        return self._keys(range(self._n))

    def read(self, numbers: Sequence[int]) -> np.ndarray | None:
        "These records; None if the file is cut short or gone."
        size = self.dtype.itemsize
        data = bytearray(size * len(numbers))
        view = memoryview(data)
        try:
            with self.path.open("rb", buffering=0) as f:
                for i, number in enumerate(numbers):
                    f.seek(self._start + number * size)
                    if f.readinto(view[i * size : (i + 1) * size]) != size:
                        return None
        except OSError:
            return None
        return np.frombuffer(data, self.dtype)

    def _keys(self, numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
        size = self.dtype[KEY].itemsize
        with self.path.open("rb") as f:
            for number in numbers:
                f.seek(self._start + number * self.dtype.itemsize)
                high, low = np.frombuffer(f.read(size), "<i8").tolist()
                yield high, low


@dataclass
class Store:
    "What is stored for one question: a teacher's weights, layers and precision."

    question: str
    index: dict[Key, tuple[Any, int]] = field(default_factory=dict)  # shard, and number in it
    shards: set[Any] = field(default_factory=set)
    pending: list[MemoryShard] = field(default_factory=list)  # of this epoch, not yet known to be of these weights
    fields: tuple[str, ...] | None = None  # of a record, from the first of the teacher's own on
    looked: bool = False  # has the teacher been asked again in this fit?
    off: bool = False  # until the next fit

    def add(self, shard: MemoryShard | Shard) -> None:
        "Index its records, if they have the fields of the others."
        if self.fields in (None, shard.dtype.names):
            self.shards.add(shard)
            self.index |= {key: (shard, number) for number, key in enumerate(shard.keys())}

    def keep(self, fields: tuple[str, ...] | None) -> bool:
        "Drop the shards of other fields than these, which the teacher's own records have. Were there any?"
        if self.fields == fields:
            return False
        self.fields, others = fields, {shard for shard in self.shards if shard.dtype.names != fields}
        self.drop(others)
        return bool(others)

    def drop(self, gone: set[Any]) -> None:
        "Forget these shards."
        self.shards -= gone
        self.pending = [shard for shard in self.pending if shard not in gone]
        self.index = {key: place for key, place in self.index.items() if place[0] not in gone}

    def drop_training(self) -> None:
        "Forget the shards of training, and delete their files."
        gone = {shard for shard in self.shards if shard.training}
        self.drop(gone)
        for shard in gone:
            if isinstance(shard, Shard):
                with contextlib.suppress(OSError):
                    shard.path.unlink(missing_ok=True)

    def read(self, keys: Sequence[Key]) -> np.ndarray | None:
        "The records, if all are there."
        by_shard: dict[Any, tuple[list[int], list[int]]] = {}
        for i, key in enumerate(keys):
            if key not in self.index:
                return None
            shard, number = self.index[key]
            positions, numbers = by_shard.setdefault(shard, ([], []))
            positions.append(i)
            numbers.append(number)
        parts = [(shard, positions, shard.read(numbers)) for shard, (positions, numbers) in by_shard.items()]
        gone = {shard for shard, _, part in parts if part is None}  # someone deleted or cut the file
        if gone:
            self.drop(gone)
        if gone or len({part.dtype for _, _, part in parts}) != 1:
            return None
        if len(parts) == 1 and parts[0][1] == sorted(parts[0][1]):
            return parts[0][2]
        records = np.empty(len(keys), parts[0][2].dtype)
        for _, positions, part in parts:
            records[positions] = part
        return records


def write_shard(folder: Path, question: str, records: np.ndarray, training: bool) -> Shard:
    "Under a temporary name, then renamed: readers see whole files only. Raises OSError, e.g. on a full disk."
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{question}-{uuid.uuid4().hex[:16]}.npy"
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as f:
            np.lib.format.write_array(f, records, allow_pickle=False)
        temporary.rename(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    return Shard(path, training)


def find_shards(folder: Path, question: str, known: set[Path]) -> Iterator[Shard]:
    "Sound shards of the folder that answer the question, without the known ones."
    for path in sorted(folder.glob(f"{question}-*.npy")):
        if path not in known:
            with contextlib.suppress(OSError, ValueError, MemoryError):
                yield Shard(path)


def bytes_in(folder: Path) -> int:
    "Of all shards in the folder."
    total = 0
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            if entry.name.endswith(".npy"):
                with contextlib.suppress(OSError):
                    total += entry.stat().st_size
    return total
