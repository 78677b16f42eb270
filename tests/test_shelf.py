"Rows in memory and in files: a reader gets the right row or none."

import shutil
import zlib

import numpy as np
import pytest

from fasterai_kd._shelf import FileShelf, MemoryShelf, bytes_in, open_shelves

KEYS = [(1, -2), (3, 4), (-(2**63), 2**63 - 1)]
ROWS = np.arange(15, dtype=np.uint8).reshape(3, 5) + 1


def written(folder, keys=KEYS, rows=ROWS, question="q"):
    shelf = FileShelf.create(folder, question, "layout", rows.shape[1])
    shelf.append(keys, rows)
    return shelf


def readable(folder, question="q"):
    "What another process gets, by key."
    got = {}
    for shelf in open_shelves(folder, question, set()):
        assert shelf.layout == "layout"
        for key, number in shelf.new_keys():
            row = shelf.read(number, key)
            if row is not None:
                got[key] = row.tolist()
    return got


EXPECTED = {key: row.tolist() for key, row in zip(KEYS, ROWS, strict=True)}


@pytest.mark.parametrize("make", [lambda _: MemoryShelf("layout"), lambda p: FileShelf.create(p, "q", "layout", 5)])
def test_rows_come_back_by_the_numbers_that_append_gave(tmp_path, make):
    shelf = make(tmp_path)
    numbers = [*shelf.append(KEYS[:1], ROWS[:1]), *shelf.append(KEYS[1:], ROWS[1:])]
    assert [shelf.read(n, key).tolist() for n, key in zip(numbers, KEYS, strict=True)] == ROWS.tolist()
    assert numbers == [0, 1, 2]


def test_another_process_reads_what_was_written_and_what_comes_later(tmp_path):
    writer = written(tmp_path)
    assert readable(tmp_path) == EXPECTED
    (reader,) = open_shelves(tmp_path, "q", set())
    assert len(list(reader.new_keys())) == 3
    assert list(reader.new_keys()) == []
    writer.append([(7, 7)], ROWS[:1] + 100)
    ((key, number),) = reader.new_keys()
    assert key == (7, 7)
    assert reader.read(number, key).tolist() == (ROWS[0] + 100).tolist()


def test_a_file_of_another_question_or_a_known_one_is_not_opened(tmp_path):
    path = written(tmp_path).path
    assert open_shelves(tmp_path, "other", set()) == open_shelves(tmp_path, "q", {path}) == []


def test_a_file_cut_at_any_byte_gives_right_rows_or_none_and_each_whole_one(tmp_path):
    path = written(tmp_path).path
    whole = path.read_bytes()
    record = 16 + 4 + 5
    start = len(whole) - 3 * record
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        n = max(0, size - start) // record
        assert readable(tmp_path) == dict(list(EXPECTED.items())[:n])


@pytest.mark.parametrize("bit", [1, 128, 255])
def test_a_byte_flipped_anywhere_gives_right_rows_or_none(tmp_path, bit):
    path = written(tmp_path).path
    whole = path.read_bytes()
    start = len(whole) - 75
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= bit
        path.write_bytes(damaged)
        got = readable(tmp_path)
        assert got.items() <= EXPECTED.items()
        assert len(got) == (0 if at < start else 2)


def test_a_tail_of_zeros_as_after_a_power_cut_gives_no_row(tmp_path):
    path = written(tmp_path).path
    path.write_bytes(path.read_bytes() + bytes(25 * 4))
    assert readable(tmp_path) == EXPECTED


def test_a_row_is_given_for_its_own_key_only(tmp_path):
    shelf = written(tmp_path)
    assert shelf.read(0, KEYS[1]) is None
    assert shelf.read(0, KEYS[0]).tolist() == ROWS[0].tolist()
    assert shelf.read(3, KEYS[0]) is None


def test_the_writer_checks_its_own_rows_too(tmp_path):
    shelf = written(tmp_path)
    data = bytearray(shelf.path.read_bytes())
    data[-1] ^= 1
    shelf.path.write_bytes(data)
    assert [shelf.read(n, key) is None for n, key in enumerate(KEYS)] == [False, False, True]


def test_a_failed_write_leaves_no_gap(tmp_path):
    shelf = written(tmp_path, KEYS[:1], ROWS[:1])
    with shelf.path.open("ab") as f:
        f.write(b"half a record")
    numbers = shelf.append(KEYS[1:], ROWS[1:])
    assert [shelf.read(n, key).tolist() for n, key in zip(numbers, KEYS[1:], strict=True)] == ROWS[1:].tolist()
    assert readable(tmp_path) == EXPECTED


@pytest.mark.parametrize("read_before", [True, False])
def test_a_deleted_file_is_not_begun_anew_and_what_is_read_stays_right(tmp_path, read_before):
    shelf = written(tmp_path)
    if read_before:
        shelf.read(0, KEYS[0])
    shelf.path.unlink()
    with pytest.raises(OSError, match="No such file"):
        shelf.append([(9, 9)], ROWS[:1])
    row = shelf.read(1, KEYS[1])
    assert (row.tolist() == ROWS[1].tolist()) if read_before else row is None
    assert list(shelf.new_keys()) == []
    shelf.remove()
    assert list(tmp_path.iterdir()) == []


def test_files_of_several_writers_are_all_read_and_counted(tmp_path):
    shelves = [written(tmp_path, [key], row[None]) for key, row in zip(KEYS, ROWS, strict=True)]
    assert readable(tmp_path) == EXPECTED
    sizes = [shelf.path.stat().st_size for shelf in shelves]
    assert bytes_in(tmp_path, set()) == sum(sizes)
    assert bytes_in(tmp_path, {shelves[0].path}) == sum(sizes[1:])


def test_what_cannot_be_opened_is_passed_over(tmp_path):
    written(tmp_path)
    (tmp_path / "folder.rows").mkdir()
    (tmp_path / "gone.rows").symlink_to(tmp_path / "nowhere")
    (tmp_path / "text.rows").write_text("hello")
    assert readable(tmp_path) == EXPECTED
    assert bytes_in(tmp_path, set()) > 0


def test_a_copied_folder_serves_as_well(tmp_path):
    written(tmp_path)
    shutil.copytree(tmp_path, tmp_path / "copy")
    assert readable(tmp_path / "copy") == EXPECTED


def test_a_row_of_no_bytes_is_a_row(tmp_path):
    written(tmp_path, KEYS, np.empty((3, 0), np.uint8))
    assert readable(tmp_path) == {key: [] for key in KEYS}


def test_the_checksum_is_over_key_and_row(tmp_path):
    shelf = written(tmp_path, KEYS[:1], ROWS[:1])
    record = shelf.path.read_bytes()[-25:]
    assert int.from_bytes(record[16:20], "little") == zlib.crc32(record[:16] + record[20:])
