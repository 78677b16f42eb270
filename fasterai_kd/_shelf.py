"Rows of bytes with keys: kept in memory, or appended to a file that outlives an interruption."

import contextlib
import json
import struct
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

__all__ = ["FileShelf", "MemoryShelf", "bytes_in", "open_shelves"]

Key = tuple[int, int]
_MAGIC = b"fasterai_kd rows 1\n"
_NUMBERS = struct.Struct("<II")  # size and checksum of the header that follows


class MemoryShelf:
    "`append` gives rows their numbers, `read` gives them back."

    def __init__(self, layout: str):
        self.layout = layout
        self._rows: list[np.ndarray] = []

    def append(self, keys: list[Key], rows: np.ndarray) -> range:
        "Rows (n, bytes); their numbers."
        self._rows += list(rows)
        return range(len(self._rows) - len(rows), len(self._rows))

    def read(self, number: int, key: Key) -> np.ndarray | None:
        "The row."
        return self._rows[number]

    def exists(self) -> bool:
        "Always."
        return True

    def remove(self) -> None:
        "Forget all."
        self._rows.clear()


class FileShelf:
    """As MemoryShelf, in a file: a header, then records of key, checksum and row. One process writes, others may read.

    What an interruption leaves at the end is no whole record and not read; a row is checked when it is first read, and
    is None if it is damaged, gone, or another key's.
    """

    def __init__(self, path: Path, start: int, header: dict[str, str]):
        self.path, self._start, self.layout = path, start, header["layout"]
        row = ("row", np.uint8, (int(header["bytes"]),))
        self._record = np.dtype([("key", "<i8", (2,)), ("sum", "<u4"), row])
        self._records = np.empty(0, self._record)
        self._known, self._sound = 0, set[int]()  # records; those that were checked

    @classmethod
    def create(cls, folder: Path, question: str, layout: str, row_bytes: int) -> "FileShelf":
        "A new file of this process's own."
        header = {"question": question, "layout": layout, "bytes": str(row_bytes)}
        text = json.dumps(header).encode()
        path = folder / f"{uuid.uuid4().hex[:16]}.rows"
        path.write_bytes(_MAGIC + _NUMBERS.pack(len(text), zlib.crc32(text)) + text)
        return cls(path, len(_MAGIC) + _NUMBERS.size + len(text), header)

    @classmethod
    def open(cls, path: Path, question: str) -> "FileShelf | None":
        "A file that another wrote, if it is whole and answers the question."
        with path.open("rb") as f:
            if f.read(len(_MAGIC)) != _MAGIC:
                return None
            numbers = f.read(_NUMBERS.size)
            if len(numbers) < _NUMBERS.size:
                return None
            size, checksum = _NUMBERS.unpack(numbers)
            text = f.read(min(size, 2**20))
        if len(text) < size or zlib.crc32(text) != checksum:
            return None
        header = json.loads(text)
        start = len(_MAGIC) + _NUMBERS.size + size
        return cls(path, start, header) if header["question"] == question else None

    def append(self, keys: list[Key], rows: np.ndarray) -> range:
        "Rows (n, bytes); their numbers. Raises OSError, e.g. on a full disk."
        records = np.empty(len(rows), self._record)
        records["key"], records["row"] = keys, rows
        records["sum"] = [_checksum(record) for record in records]
        with self.path.open("r+b") as f:  # not "ab", which would begin a file that someone deleted anew
            f.seek(self._start + self._known * self._record.itemsize)
            f.write(records.tobytes())
        self._known += len(rows)
        return range(self._known - len(rows), self._known)

    def new_keys(self) -> Iterator[tuple[Key, int]]:
        "Keys and numbers of the rows that came since the last look."
        self._map()
        first, self._known = self._known, len(self._records)
        for number, (high, low) in enumerate(self._records["key"][first:].tolist(), first):
            yield (high, low), number

    def read(self, number: int, key: Key) -> np.ndarray | None:
        "The row of this key, or None."
        if number >= len(self._records):
            self._map()
        if number >= len(self._records):
            return None
        record = self._records[number]
        if tuple(record["key"].tolist()) != key:
            return None
        if number not in self._sound:
            if _checksum(record) != record["sum"]:
                return None
            self._sound.add(number)
        return record["row"]

    def exists(self) -> bool:
        "Or did someone delete it?"
        return self.path.exists()

    def remove(self) -> None:
        "Delete the file."
        self._records = np.empty(0, self._record)
        with contextlib.suppress(OSError):
            self.path.unlink()

    def _map(self) -> None:
        "What is there by now; if the file was deleted, what was there before."
        with contextlib.suppress(OSError):
            count = (self.path.stat().st_size - self._start) // self._record.itemsize
            if count > len(self._records):
                self._records = np.memmap(self.path, self._record, "r", self._start, (count,))


def open_shelves(folder: Path, question: str, known: set[Path]) -> list[FileShelf]:
    "Those of the folder that answer the question and can be read, without the known ones."
    found = []
    for path in sorted(folder.glob("*.rows")):
        with contextlib.suppress(OSError):  # another process may delete it meanwhile
            found.append(FileShelf.open(path, question) if path not in known else None)
    return [shelf for shelf in found if shelf is not None]


def bytes_in(folder: Path, besides: set[Path]) -> int:
    "Of the folder's files of rows, without some."
    total = 0
    for path in folder.glob("*.rows"):
        with contextlib.suppress(OSError):
            total += path.stat().st_size if path not in besides else 0
    return total


def _checksum(record: np.void) -> int:
    return zlib.crc32(record["row"].tobytes(), zlib.crc32(record["key"].tobytes()))
