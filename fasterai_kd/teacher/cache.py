"Stored outputs of a teacher, so that it does not run again for samples that it has seen."

from __future__ import annotations

import hashlib
import warnings
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._fingerprint import content_keys
from ._packing import Packing, agree, finite_or_masked
from ._shards import Key, MemoryShard, Shard, Store, bytes_in, find_shards, write_shard

__all__ = ["TeacherCache"]

FLUSH = 64 * 2**20  # bytes that wait to be written
OVERHEAD = 300  # bytes in memory of a key and what belongs to it
TOLERANCE, HALF_TOLERANCE = 1e-3, 2e-2  # of the largest value: a batch of other samples rounds otherwise

Outputs = dict[str, Tensor]
SMALL = "which is too small: give it a larger size"
NAN = "which does not store the nan and inf that the teacher gives"
AUGMENTED = """since random augmentation or mixing changes them each time: give `fit` the callback RepeatedViews(2), \
or use deterministic transforms"""


class TeacherCache:
    """Outputs of one teacher by the content of the sample that the model sees: `Teacher(model, cache=True)`.

    A batch is served if all of its samples are stored; else the teacher runs on the whole batch. Shuffling, several
    dataloaders, workers, processes and students are safe: another sample, other weights, layers or precision is another
    key. What no key can see, such as an attribute or a hook of the model, is found by looking: on the first batch that
    could be served in a fit the teacher runs too, and where its outputs differ by more than rounding (1/1000 of the
    largest value, 1/50 in half precision), what was stored is left aside with a warning.

    Rows with nan or +inf are not stored.

    In a folder, records are written 64 MiB at a time and when an epoch ends, to files that never change; all processes
    read each other's. Delete the folder to remove the cache.

    Samples that random augmentation changes each epoch are never found again. After an epoch of training with hardly
    any found, the cache says so, drops them and serves validation only.

    Raises ValueError for a `top_k`, `size` or `dtype` that makes no sense and for a path that is a file.
    """

    def __init__(
        self,
        path: str | Path | None = None,  # a folder; None: in memory
        size: float = 4.0,  # at most so many GiB; what comes later is not stored
        dtype: torch.dtype | None = None,  # torch.float16 stores half as much; None: as the teacher gives it
        top_k: int | None = None,  # store this many classes of the predictions, the rest spread evenly
    ):
        if not size > 0:
            raise ValueError(f"the size of the cache, in GiB, must be positive, got {size}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be 1 or more classes, got {top_k}")
        if dtype not in (None, torch.float16):
            raise ValueError(f"dtype must be torch.float16 or None, got {dtype}")
        self.path, self.size, self.dtype, self.top_k = Path(path).expanduser() if path else None, size, dtype, top_k
        if self.path is not None and self.path.exists() and not self.path.is_dir():
            raise ValueError(f"the cache is a folder, but {self.path} is a file")
        self._packing = Packing(dtype is not None, top_k)
        self._stores: dict[str, Store] = {}
        self._warned: set[str] = set()
        self._waiting = self._in_folder = self._in_memory = 0  # bytes
        self._owner: weakref.ref[torch.nn.Module] | None = None
        self.begin_fit()

    def fetch(
        self,
        xb: Sequence[Any],  # inputs of a batch
        run: Callable[[], Outputs],  # the teacher on this batch: outputs by name, each (B, ...)
        question: str,  # all that its outputs depend on but the inputs
        half: bool = False,  # are they computed in half precision?
    ) -> Outputs:
        "What `run()` gives; it runs only where a sample is not stored, or to look."
        store = self._store(question)
        if store.off or self._off or (self._training and self._augmented):
            return run()
        keys = self._keys(xb)
        pairs = [(a, b) for a, b in keys.tolist()]
        if self._training:
            self._seen += len(pairs)
            self._found += sum(pair in store.index for pair in pairs)
        records = store.read(pairs)
        if records is None:
            outputs = run()
            self._add(store, pairs, self._packing.pack(keys, outputs))
            return outputs
        if store.looked:
            return self._packing.unpack(records, xb[0].device)
        return self._look(store, keys, records, run, HALF_TOLERANCE if half or self.dtype else TOLERANCE)

    @property
    def is_due(self) -> bool:
        "Is there enough to write?"
        return self._waiting > FLUSH

    def begin_fit(self, views: int = 1) -> None:
        "The data may be others now, the disk have room, the teacher other attributes: try again, and look again."
        self._views, self._epochs = views, 0
        self._training, self._seen, self._found = False, 0, 0
        self._off = self._augmented = self._full = self._left_out = False
        self._limit = int(min(self.size * 2**30, 2**62))
        self._before = 0  # samples in the last epoch of training
        for store in self._stores.values():
            store.looked = store.off = False

    def begin_epoch(self, training: bool) -> None:
        "Were there any hits in the last one? See also what other processes have stored."
        if self._training and self._seen:
            self._end_training()
        self._training = training
        for store in self._stores.values():
            self._look_around(store)

    def settle(
        self,
        same: bool,  # weights as before?
        fitting: bool,  # within a fit?
    ) -> None:
        "Write what is pending if it is of the teacher's weights; else drop it, and in memory all."
        if same:
            for store in self._stores.values():
                self._flush(store)
        else:
            self._stores = {}
            if fitting:
                self._off = True
                warnings.warn(
                    "the teacher changed during this fit: its outputs are not stored until the next fit", stacklevel=2
                )
        self._waiting = 0
        self._count_memory()

    def belong_to(self, model: torch.nn.Module) -> None:
        "ValueError where it belongs to another teacher already."
        owner = self._owner and self._owner()
        if owner is not None and owner is not model:
            raise ValueError("a cache belongs to one teacher: make another, or share the Teacher between callbacks")
        self._owner = weakref.ref(model)

    def __len__(self) -> int:
        "Samples stored."
        return sum(len(store.index) for store in self._stores.values())

    @property
    def used(self) -> int:
        "Bytes, with those of other processes in the folder."
        return self._in_folder + self._in_memory

    def __repr__(self) -> str:
        where = "in memory" if self.path is None else f"in {str(self.path)!r}"
        return f"TeacherCache of {len(self)} samples {where}, {self.used / 2**20:.1f} of {self.size * 1024:.0f} MiB"

    def _store(self, question: str) -> Store:
        if question not in self._stores:
            digest = hashlib.blake2b(f"{question} {self._packing}".encode(), digest_size=16).hexdigest()
            self._stores[question] = Store(digest)
            self._look_around(self._stores[question])
        return self._stores[question]

    def _count_memory(self) -> None:
        shards = [shard for store in self._stores.values() for shard in store.shards if isinstance(shard, MemoryShard)]
        self._in_memory = sum(shard.nbytes + OVERHEAD * len(shard) for shard in shards)

    def _look_around(self, store: Store) -> None:
        "Index what other processes, also earlier ones, have stored."
        if self.path is not None:
            self._in_folder = bytes_in(self.path)
            known = {shard.path for shard in store.shards if isinstance(shard, Shard)}
            for shard in find_shards(self.path, store.question, known):
                store.add(shard)

    def _keys(self, xb: Sequence[Any]) -> np.ndarray:
        try:
            return content_keys(xb).cpu().numpy()
        except (TypeError, ValueError) as e:
            raise type(e)(f"the teacher's outputs cannot be stored by sample ({e}): use no cache") from None

    def _look(
        self, store: Store, keys: np.ndarray, records: np.ndarray, run: Callable[[], Outputs], tolerance: float
    ) -> Outputs:
        "Are the stored outputs those that the teacher gives now? Once in a fit."
        store.looked, chance = True, torch.get_rng_state()
        outputs = run()
        drawn, cpu = not torch.equal(chance, torch.get_rng_state()), torch.device("cpu")
        new = self._packing.pack(keys, outputs)
        if store.keep(new.dtype.names):  # else a file with other fields was of this name
            store.looked = False
            return outputs
        stored, fresh = (self._packing.unpack(r, cpu) for r in (records, new))
        if drawn or not agree(stored, fresh, tolerance):
            store.off = True
            if self.path is None:
                store.drop(set(store.shards))
                self._count_memory()
            warnings.warn(
                "the teacher's cache is left aside in this fit: the teacher gives other outputs than were stored. Did "
                "an attribute or a hook of it change, does it draw random numbers, or depend on the rest of the batch?",
                stacklevel=2,
            )
        return outputs

    def _add(self, store: Store, keys: Sequence[Key], records: np.ndarray) -> None:
        store.keep(records.dtype.names)
        sound = finite_or_masked(records)  # else one fault of the teacher would be kept for good
        self._left_out |= not sound.all()
        new = sorted({key: i for i, key in enumerate(keys) if sound[i] and key not in store.index}.values())
        room = self._limit - self.used
        n = max(0, min(len(new), room // (records.itemsize + OVERHEAD)))
        if n < len(new) and not self._full:
            self._full = True
            self._warn("full", f"the teacher's cache is full ({len(self) + n} samples): give it a larger size")
        if n:
            shard = MemoryShard(records[new[:n]], self._training)
            store.add(shard)
            store.pending.append(shard)
            self._waiting += shard.nbytes
            self._in_memory += n * (records.itemsize + OVERHEAD)

    def _flush(self, store: Store) -> None:
        "One shard of all that is pending, in memory or a file; by dtype, and whether it is of training."
        groups: dict[tuple[np.dtype, bool], list[MemoryShard]] = {}
        for shard in store.pending:
            groups.setdefault((shard.dtype, shard.training), []).append(shard)
        for (_, training), together in groups.items():
            records = np.concatenate([shard.records for shard in together])
            if self.path is None:
                store.add(MemoryShard(records, training))
            else:
                self._write(self.path, store, records, training)
            store.drop(set(together))

    def _write(self, folder: Path, store: Store, records: np.ndarray, training: bool) -> None:
        room = self._limit - bytes_in(folder) - 2**12  # for the header
        records = records[: max(0, room // records.itemsize)]
        if not len(records):
            return
        try:
            store.add(write_shard(folder, store.question, records, training))
        except OSError as e:
            self._limit, self._full = 0, True
            self._warn("broken", f"nothing more is stored in the teacher's cache: {e}")
        self._in_folder = bytes_in(folder)

    def _end_training(self) -> None:
        self._epochs += 1  # of training
        repeats = self._epochs > self._views  # each image has so many views
        had_chance = repeats and self._before >= self._seen / 2  # a schedule may rest in part of an epoch
        if had_chance and self._found < 0.05 * self._seen and not self._augmented:
            self._augmented = True
            for store in self._stores.values():
                store.drop_training()
            self._count_memory()
            if self._limit:  # else the reason was given
                self._warn(
                    "augmented",
                    f"in this epoch {self._found} of {self._seen} samples were found in the teacher's cache, "
                    + (SMALL if self._full else NAN if self._left_out else AUGMENTED)
                    + ". The cache is now off in training and stays on in validation",
                )
        self._before, self._seen, self._found = self._seen, 0, 0

    def _warn(self, what: str, message: str) -> None:
        "Once."
        if what not in self._warned:
            self._warned.add(what)
            warnings.warn(message, stacklevel=2)
