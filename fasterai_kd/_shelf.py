"Rows of bytes with keys: kept in memory, or appended to a file that outlives an interruption."

import json
import struct
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

__all__ = ["FileShelf", "MemoryShelf", "open_shelves"]

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

    def read(self, number: int) -> np.ndarray | None:
        "The row."
        return self._rows[number]

    def remove(self) -> None:
        "Forget all."
        self._rows.clear()


class FileShelf:
    """As MemoryShelf, in a file: a header, then records of key, checksum and row. One process writes, others may read.

    What an interruption leaves at the end is no whole record and not read; a row is checked when it is first read, and
    is None if it is damaged.
    """

    def __init__(self, path: Path, start: int, header: dict[str, str]):
        self.path, self._start, self.layout = path, start, header["layout"]
        row = ("row", np.uint8, (int(header["bytes"]),))
        self._record = np.dtype([("key", "<i8", (2,)), ("sum", "<u4"), row])
        self._records = np.empty(0, self._record)
        self._known, self._sound = 0, set[int]()

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
            text = f.read(size)
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
        with self.path.open("ab") as f:
            f.write(records.tobytes())
        numbers = range(self._known, self._known + len(rows))
        self._known += len(rows)
        self._sound.update(numbers)
        return numbers

    def new_keys(self) -> Iterator[tuple[Key, int]]:
        "Keys and numbers of the rows that came since the last look."
        self._map()
        for number in range(self._known, len(self._records)):
            high, low = self._records["key"][number].tolist()
            yield (high, low), number
        self._known = len(self._records)

    def read(self, number: int) -> np.ndarray | None:
        "The row, or None if it is damaged."
        if number >= len(self._records):
            self._map()
        record = self._records[number]
        if number not in self._sound:
            if _checksum(record) != record["sum"]:
                return None
            self._sound.add(number)
        return record["row"]

    def remove(self) -> None:
        "Delete the file."
        self._records = np.empty(0, self._record)
        self.path.unlink(missing_ok=True)

    def _map(self) -> None:
        count = (self.path.stat().st_size - self._start) // self._record.itemsize
        if count > len(self._records):
            self._records = np.memmap(self.path, self._record, "r", self._start, (count,))


def open_shelves(folder: Path, question: str, known: set[Path]) -> list[FileShelf]:
    "Those of the folder that answer the question, without the known ones."
    found = (FileShelf.open(path, question) for path in sorted(folder.glob("*.rows")) if path not in known)
    return [shelf for shelf in found if shelf is not None]


def _checksum(record: np.void) -> int:
    return zlib.crc32(record["row"].tobytes(), zlib.crc32(record["key"].tobytes()))
