"Records in memory and in files: whole, or passed over; no code runs, and headers that lie allocate nothing."

import os
import pickle
import threading
import tracemalloc

import numpy as np
import pytest

from fasterai_kd.teacher._packing import KEY
from fasterai_kd.teacher._shards import MemoryShard, Store, bytes_in, find_shards, write_shard

DTYPE = np.dtype([(KEY, "<i8", (2,)), ("a", "<f4", (3,))])


def records(n=5, start=0):
    made = np.zeros(n, DTYPE)
    made[KEY] = np.arange(2 * n).reshape(n, 2) + start
    made["a"] = np.random.default_rng(start).normal(size=(n, 3))
    return made


def make(where, tmp_path, data):
    return MemoryShard(data, False) if where == "memory" else write_shard(tmp_path, "q", data, False)


@pytest.mark.parametrize("where", ["memory", "file"])
def test_records_are_read_by_number_in_any_order(tmp_path, where):
    data = records()
    shard = make(where, tmp_path, data)
    for numbers in ([0], [4, 1, 1], [2, 3], list(range(5))):
        assert np.array_equal(shard.read(numbers), data[numbers])
    assert list(shard.keys()) == [tuple(k) for k in data[KEY].tolist()]


def test_a_file_is_found_by_its_question_with_what_was_written(tmp_path):
    data = records()
    shard = write_shard(tmp_path, "q", data, True)
    write_shard(tmp_path, "other", records(), True)
    (found,) = find_shards(tmp_path, "q", set())
    assert np.array_equal(found.read([3, 0]), data[[3, 0]])
    assert list(find_shards(tmp_path, "q", {shard.path})) == []
    assert bytes_in(tmp_path) == sum(p.stat().st_size for p in tmp_path.iterdir())


def test_no_half_file_is_ever_seen(tmp_path, monkeypatch):
    def stop(f, data, **kwargs):
        f.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np.lib.format, "write_array", stop)
    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path, "q", records(), False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", [lambda p: os.truncate(p, p.stat().st_size - 1), lambda p: p.unlink()])
def test_a_file_that_shrinks_or_goes_is_a_miss_and_the_others_stay(tmp_path, damage):
    store, first, second = Store("q"), records(), records(start=100)
    for data in (first, second):
        store.add(write_shard(tmp_path, "q", data, False))
    path = next(s.path for s in store.shards if next(s.keys()) == (0, 1))
    damage(path)
    assert store.read([(8, 9)]) is None
    assert store.read([(0, 1)]) is None
    assert np.array_equal(store.read([(100, 101)]), second[:1])


def test_a_batch_is_read_from_several_shards_in_its_own_order(tmp_path):
    store, first, second = Store("q"), records(), records(start=100)
    store.add(MemoryShard(first, False))
    store.add(write_shard(tmp_path, "q", second, False))
    got = store.read([(102, 103), (4, 5), (100, 101), (4, 5)])
    assert np.array_equal(got, np.concatenate([second[1:2], first[2:3], second[:1], first[2:3]]))
    assert store.read([(4, 5), (1, 1)]) is None


def header(shape, descr):
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape!r}, }}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


GOOD = [(KEY, "<i8", (2,)), ("a", "<f4", (3,))]
HOSTILE = {
    "empty": b"",
    "text": b"hello" * 100,
    "objects": header((1,), "|O") + pickle.dumps(Bomb()),
    "an object among the fields": header((1,), [(KEY, "<i8", (2,)), ("a", "|O")]) + pickle.dumps(Bomb()),
    "objects of the right size": header((1,), [(KEY, "<i8", (2,)), ("a", "|O")]) + bytes(24),
    "3e8 classes": header((10,), [(KEY, "<i8", (2,)), ("a", "<f4", (300_000_000,))]),
    "1e15 records": header((10**15,), GOOD),
    "no key": header((1,), [("a", "<f4", (3,))]) + bytes(12),
    "a key alone": header((1,), [(KEY, "<i8", (2,))]) + bytes(16),
    "a key of another form": header((1,), [(KEY, "<f8", (2,)), ("a", "<f4")]) + bytes(20),
    "a plain array": header((4,), "<f4") + bytes(16),
    "two dimensions": header((1, 1), GOOD) + bytes(28),
    "too long": header((1,), GOOD) + bytes(29),
    "too short": header((1,), GOOD) + bytes(27),
    "code in the header": b"\x93NUMPY\x01\x00"
    + (64).to_bytes(2, "little")
    + b"__import__('os').abort()".ljust(63)
    + b"\n",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_file_that_is_no_sound_shard_is_passed_over(tmp_path, kind):
    (tmp_path / "q-0.npy").write_bytes(HOSTILE[kind])
    good = write_shard(tmp_path, "q", records(), False)
    tracemalloc.start()
    found = [shard.path for shard in find_shards(tmp_path, "q", set())]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == [good.path]
    assert peak < 2**22


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "sparse", "loop"])
def test_what_is_no_plain_file_is_passed_over_at_once(tmp_path, kind):
    path = tmp_path / "q-0.npy"
    if kind == "pipe":
        os.mkfifo(path)  # reading it would wait for ever
    elif kind == "folder":
        path.mkdir()
    elif kind == "sparse":
        with path.open("wb") as f:
            f.truncate(2**30)
    else:
        path.symlink_to("/dev/zero" if kind == "device" else path)
    done = []
    thread = threading.Thread(target=lambda: done.append(list(find_shards(tmp_path, "q", set()))), daemon=True)
    thread.start()
    thread.join(20)
    assert done == [[]]


def test_a_file_of_a_gigabyte_of_holes_with_a_sound_header_is_passed_over_at_once(tmp_path):
    n = 2**30 // DTYPE.itemsize
    start = header((n,), GOOD)
    with (tmp_path / "q-0.npy").open("wb") as f:
        f.write(start)
        f.truncate(len(start) + n * DTYPE.itemsize)
    good = write_shard(tmp_path, "q", records(), False)
    store = Store("q")
    tracemalloc.start()
    for shard in find_shards(tmp_path, "q", set()):
        store.add(shard)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert {shard.path for shard in store.shards} == {good.path}
    assert len(store.index) == 5
    assert peak < 2**22


def test_a_file_of_one_record_or_none_is_sound(tmp_path):
    write_shard(tmp_path, "q", records(1), False)
    write_shard(tmp_path, "q", records(0), False)
    assert sorted(len(list(shard.keys())) for shard in find_shards(tmp_path, "q", set())) == [0, 1]


def test_a_write_that_fails_leaves_no_file(tmp_path, monkeypatch):
    def fail(f, *args, **kwargs):
        f.write(b"half of it")
        names.extend(p.suffix for p in tmp_path.iterdir())
        raise OSError("the disk is full")

    names = []
    monkeypatch.setattr(np.lib.format, "write_array", fail)
    with pytest.raises(OSError, match="full"):
        write_shard(tmp_path, "q", records(), False)
    assert names == [".tmp"]  # under which nobody reads it
    assert not list(tmp_path.iterdir())


def test_dropped_shards_leave_the_others_pending():
    gone, kept = (MemoryShard(records(), True) for _ in range(2))
    store = Store("q", pending=[gone, kept])
    store.drop({gone})
    assert store.pending == [kept]
