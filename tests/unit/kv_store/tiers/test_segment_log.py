import errno
import os
import threading

import pytest

from kv_store.tiers.folder_lock import claim_folder
from kv_store.tiers.segment_log import ALIGNMENT, RECORD_HEADER_BYTES, SegmentLog
from tests.kv_pages import make_chain, make_layout

KEYS = make_chain(make_layout(), 40)
SEGMENT = 4 * ALIGNMENT


def open_log(folder, budget_bytes=64 * ALIGNMENT):
    return SegmentLog(folder, budget_bytes=budget_bytes, segment_bytes=SEGMENT)


def blob_of(key):
    return bytes([key.index]) * 3000


def fill(log, keys):
    for key in keys:
        assert log.append(key, blob_of(key))


def held(log):
    """Indices of the pages that can be read, each with its own bytes."""
    found = {key.index: log.read(key) for key in KEYS}
    assert all(blob in (None, blob_of(KEYS[index])) for index, blob in found.items())
    return [index for index, blob in found.items() if blob is not None]


def segments(folder):
    return sorted(folder.glob("segment-*.log"))


def test_pages_survive_a_restart(tmp_path):
    log = open_log(tmp_path)
    fill(log, KEYS[:10])
    usage = log.usage()
    log.close()
    again = open_log(tmp_path)
    assert held(again) == list(range(10))
    assert again.usage() == usage == (10, 10 * ALIGNMENT)
    assert len(segments(tmp_path)) == 3


@pytest.mark.parametrize("cut", [1, 96, ALIGNMENT - RECORD_HEADER_BYTES, ALIGNMENT - 1])
def test_a_torn_tail_is_dropped_and_cut_off(tmp_path, cut):
    log = open_log(tmp_path)
    fill(log, KEYS[:3])
    log.close()
    [segment] = segments(tmp_path)
    os.truncate(segment, 3 * ALIGNMENT - cut)
    again = open_log(tmp_path)
    assert held(again) == [0, 1]
    assert segment.stat().st_size == 2 * ALIGNMENT
    fill(again, KEYS[2:4])
    again.close()
    assert held(open_log(tmp_path)) == [0, 1, 2, 3]


def test_a_damaged_header_hides_what_follows_it_in_its_file_only(tmp_path):
    log = open_log(tmp_path)
    fill(log, KEYS[:8])
    log.close()
    with segments(tmp_path)[0].open("r+b") as file:
        file.seek(ALIGNMENT + 20)
        file.write(b"\xff")
    assert held(open_log(tmp_path)) == [0, 4, 5, 6, 7]


def test_a_header_damaged_behind_our_back_is_a_miss(tmp_path):
    log = open_log(tmp_path)
    fill(log, KEYS[:2])
    with segments(tmp_path)[0].open("r+b") as file:
        file.write(b"\xff")
    assert log.read(KEYS[0]) is None
    assert not log.contains(KEYS[0])
    assert held(log) == [1]


def test_deleted_pages_stay_deleted_and_can_be_written_again(tmp_path):
    log = open_log(tmp_path)
    fill(log, KEYS[:3])
    assert log.delete(KEYS[1])
    assert not log.delete(KEYS[1])
    log.close()
    log = open_log(tmp_path)
    assert held(log) == [0, 2]
    fill(log, [KEYS[1]])
    log.close()
    assert held(open_log(tmp_path)) == [0, 1, 2]


def test_the_budget_is_kept_by_dropping_the_oldest_file(tmp_path):
    log = open_log(tmp_path, budget_bytes=8 * ALIGNMENT)
    for count, key in enumerate(KEYS, start=1):
        assert log.append(key, blob_of(key))
        on_disk = sum(path.stat().st_size for path in segments(tmp_path))
        assert on_disk == log.usage().num_bytes <= 8 * ALIGNMENT
        assert count - 1 in held(log)
    assert held(log) == list(range(32, 40))
    log.close()
    assert held(open_log(tmp_path, budget_bytes=4 * ALIGNMENT)) == list(range(36, 40))


def test_a_page_written_again_survives_the_reclaim_of_its_first_copy(tmp_path):
    log = open_log(tmp_path, budget_bytes=8 * ALIGNMENT)
    fill(log, KEYS[:3])
    log.delete(KEYS[0])  # fills the first file
    fill(log, [KEYS[0], *KEYS[4:7]])
    fill(log, [KEYS[7]])  # reclaims the first file
    assert held(log) == [0, 4, 5, 6, 7]


def test_what_exceeds_a_segment_is_refused(tmp_path):
    log = open_log(tmp_path)
    assert log.append(KEYS[0], bytes(SEGMENT - RECORD_HEADER_BYTES))
    assert not log.append(KEYS[1], bytes(SEGMENT - RECORD_HEADER_BYTES + 1))
    assert log.usage().num_pages == 1


def test_a_page_is_written_once(tmp_path):
    log = open_log(tmp_path)
    fill(log, KEYS[:1])
    assert log.append(KEYS[0], b"other")
    assert held(log) == [0]


@pytest.mark.parametrize("num_before", [0, 2])
@pytest.mark.parametrize(("is_torn", "is_raised"), [(False, True), (True, False), (True, True)])
def test_a_full_disk_leaves_the_log_as_it_was(
    tmp_path, monkeypatch, num_before, is_torn, is_raised
):
    log = open_log(tmp_path)
    fill(log, KEYS[:num_before])
    real = os.pwritev

    def full(fd, buffers, offset):
        num_written = real(fd, [buffers[0]], offset) if is_torn else 0
        if is_raised:
            raise OSError(errno.ENOSPC, "No space left on device")
        return num_written

    monkeypatch.setattr(os, "pwritev", full)
    for _ in range(3):
        with pytest.raises(OSError, match=r"No space|only a part"):
            log.append(KEYS[5], blob_of(KEYS[5]))
    assert held(log) == list(range(num_before))
    assert sum(path.stat().st_size for path in segments(tmp_path)) == num_before * ALIGNMENT
    monkeypatch.undo()
    fill(log, [KEYS[5]])
    log.close()
    assert held(open_log(tmp_path)) == [*range(num_before), 5]


def test_readers_never_see_another_pages_bytes_while_files_are_reclaimed(tmp_path):
    log = open_log(tmp_path, budget_bytes=8 * ALIGNMENT)
    is_done = threading.Event()
    wrong = []
    num_read = [0]

    def read_all():
        while not is_done.is_set():
            for key in KEYS:
                blob = log.read(key)
                num_read[0] += blob is not None
                if blob not in (None, blob_of(key)):
                    wrong.append(key)

    threads = [threading.Thread(target=read_all) for _ in range(2)]
    for thread in threads:
        thread.start()
    for key in KEYS * 8:
        log.append(key, blob_of(key))
    is_done.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert num_read[0] > 0


def test_each_claim_has_its_own_folder_and_a_free_one_is_taken_again(tmp_path):
    first, second = claim_folder(tmp_path / "a" / "b"), claim_folder(tmp_path / "a" / "b")
    assert first.path != second.path
    first.release()
    third = claim_folder(tmp_path / "a" / "b")
    assert third.path == first.path
    second.release()
    third.release()
