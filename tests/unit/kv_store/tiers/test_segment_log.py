import errno
import fcntl
import os
import random
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from kv_store.tiers.base import TierUsage
from kv_store.tiers.folder_lock import claim_folder
from kv_store.tiers.segment_log import SegmentLog
from kv_store.tiers.segment_records import ALIGNMENT, RECORD_HEADER_BYTES, erase, read_pages
from tests.bench.kv.eviction import SimulatedLog
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
    assert again.usage() == usage == TierUsage(10, 10 * ALIGNMENT)
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


def test_files_that_are_not_the_log_s_are_left_alone(tmp_path):
    log = open_log(tmp_path)
    fill(log, KEYS[:3])
    log.close()
    [segment] = segments(tmp_path)
    strange = [tmp_path / f"segment-{name}.log" for name in ("0000000000-copy", "", "7", "main")]
    for path in strange:
        path.write_bytes(segment.read_bytes())
    again = open_log(tmp_path)
    fill(again, KEYS[3:6])
    assert held(again) == list(range(6))
    records = read_pages(tmp_path)
    assert len(records) == 6
    assert not {record.path for record in records.values()} & {*strange}
    assert all(path.exists() for path in strange)


def test_a_file_that_somebody_removed_is_misses_and_no_error(tmp_path):
    log = open_log(tmp_path)
    fill(log, KEYS[:8])
    segments(tmp_path)[0].unlink()
    assert log.delete(KEYS[0])
    assert held(log) == [4, 5, 6, 7]


def test_the_budget_is_kept_by_dropping_the_oldest_file(tmp_path):
    log = open_log(tmp_path, budget_bytes=8 * ALIGNMENT)
    for count, key in enumerate(KEYS, start=1):
        assert log.append(key, blob_of(key))
        on_disk = sum(path.stat().st_size for path in segments(tmp_path))
        assert on_disk == log.usage().num_bytes <= 8 * ALIGNMENT
        assert log.contains(KEYS[count - 1])
    assert held(log) == list(range(32, 40))
    log.close()
    assert held(open_log(tmp_path, budget_bytes=4 * ALIGNMENT)) == list(range(36, 40))


def present(log):
    return [key.index for key in KEYS if log.contains(key)]


def test_a_page_that_is_read_outlives_those_that_are_not(tmp_path):
    log = open_log(tmp_path, budget_bytes=12 * ALIGNMENT)
    fill(log, KEYS[:12])
    log.read(KEYS[1])
    fill(log, KEYS[12:16])
    assert present(log) == [1, *range(8, 16)]
    log.close()
    assert held(open_log(tmp_path, budget_bytes=12 * ALIGNMENT)) == [1, *range(8, 16)]


def test_a_page_that_is_no_longer_read_leaves_in_the_end(tmp_path):
    log = open_log(tmp_path, budget_bytes=16 * ALIGNMENT)
    fill(log, KEYS[:1])
    for _ in range(9):
        log.read(KEYS[0])  # once or often is the same
    lives = []
    for round_ in range(100):
        key = KEYS[1 + round_ % 39]
        log.delete(key)
        log.append(key, blob_of(key))
        lives.append(log.contains(KEYS[0]))
    assert 12 <= lives.index(False) < 64
    assert lives == sorted(lives, reverse=True)


def test_a_page_that_comes_back_is_kept_longer_also_after_a_restart(tmp_path):
    log = open_log(tmp_path, budget_bytes=16 * ALIGNMENT)
    fill(log, KEYS[:20])
    assert not log.contains(KEYS[0])
    fill(log, [KEYS[0], *KEYS[20:28]])
    assert sorted(path.name.endswith("-main.log") for path in segments(tmp_path)).count(True) == 1
    assert log.contains(KEYS[0])
    log.close()
    again = open_log(tmp_path, budget_bytes=16 * ALIGNMENT)
    fill(again, KEYS[28:36])
    assert again.contains(KEYS[0])
    assert not again.contains(KEYS[20])


def test_only_half_of_a_file_moves_the_last_read_first(tmp_path):
    log = SegmentLog(tmp_path, budget_bytes=24 * ALIGNMENT, segment_bytes=8 * ALIGNMENT)
    fill(log, KEYS[:8])
    for index in (6, 4, 0, 3):
        log.read(KEYS[index])
    fill(log, KEYS[8:12])
    for index in (7, 2, 1):
        log.read(KEYS[index])
    fill(log, KEYS[12:25])
    assert [index for index in present(log) if index < 8] == [0, 1, 2, 7]
    assert log.usage().num_bytes <= 24 * ALIGNMENT


def test_a_simulated_log_holds_what_a_real_one_does(tmp_path):
    real = SegmentLog(tmp_path, budget_bytes=32 * ALIGNMENT, segment_bytes=SEGMENT)
    simulated = SimulatedLog(32, 4)
    rng = random.Random(7)  # noqa: S311 - a fixed workload
    keys = make_chain(make_layout(), 200)
    for _ in range(3000):
        name = min(int(rng.expovariate(1 / 30)), 199)
        if rng.random() < 0.5:
            assert (real.read(keys[name]) is not None) == simulated.read(name)
        else:
            real.append(keys[name], bytes(3000))
            simulated.write(name)
    held = [simulated.holds(name) for name in range(200)]
    assert held == [real.contains(key) for key in keys]
    assert 16 <= sum(held) <= 32


def test_an_erased_page_is_a_miss_at_once_and_after_a_restart(tmp_path):
    log = open_log(tmp_path)
    fill(log, KEYS[:6])
    records = read_pages(tmp_path)
    assert erase(records[KEYS[1]])
    assert not erase(records[KEYS[1]]), "it is deleted already"
    assert log.read(KEYS[1]) is None
    assert not log.contains(KEYS[1])
    assert held(log) == [0, 2, 3, 4, 5]
    assert blob_of(KEYS[1]) not in b"".join(path.read_bytes() for path in segments(tmp_path))
    log.close()
    again = open_log(tmp_path)
    assert held(again) == [0, 2, 3, 4, 5]
    fill(again, [KEYS[1]])
    assert held(again) == [0, 1, 2, 3, 4, 5]
    segments(tmp_path)[0].unlink()
    assert not erase(records[KEYS[0]])


def test_a_disk_that_refuses_pages_that_move_loses_them_and_nothing_else(tmp_path, monkeypatch):
    log = open_log(tmp_path, budget_bytes=8 * ALIGNMENT)
    fill(log, KEYS[:8])
    log.read(KEYS[0])

    def refuse(fd, buffers, offset):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pwritev", refuse)
    with pytest.raises(OSError, match="Input/output"):
        log.append(KEYS[8], blob_of(KEYS[8]))
    monkeypatch.undo()
    fill(log, KEYS[8:10])
    assert held(log) == [4, 5, 6, 7, 8, 9]


def test_a_file_that_cannot_be_removed_stays_counted(tmp_path, monkeypatch):
    log = open_log(tmp_path, budget_bytes=8 * ALIGNMENT)
    fill(log, KEYS[:8])

    def refuse(path, **_):
        raise OSError(errno.EPERM, "Operation not permitted")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        for _ in range(3):
            with pytest.raises(OSError, match="not permitted"):
                log.append(KEYS[8], blob_of(KEYS[8]))
    assert held(log) == list(range(8))
    assert log.usage() == TierUsage(8, 8 * ALIGNMENT)
    fill(log, KEYS[8:9])
    assert log.usage() == TierUsage(7, 7 * ALIGNMENT), "half of the first file was moved"


def test_reads_and_writes_pass_the_page_cache_by_where_the_file_system_allows(tmp_path):
    log = open_log(tmp_path)
    fill(log, KEYS[:1])
    assert held(log) == [0]
    try:
        os.close(os.open(tmp_path / "probe", os.O_CREAT | os.O_WRONLY | os.O_DIRECT))
    except OSError:
        assert not log._io.is_direct
    else:
        assert log._io.is_direct


@pytest.mark.parametrize("refuses", ["open", "preadv", "pwritev"])
def test_a_file_system_without_direct_io_is_used_through_the_cache(tmp_path, monkeypatch, refuses):
    real = getattr(os, refuses)
    num_refused = [0]

    def refuse(target, *args):
        flags = args[0] if refuses == "open" else fcntl.fcntl(target, fcntl.F_GETFL)
        if flags & os.O_DIRECT:
            num_refused[0] += 1
            if refuses == "open" and flags & os.O_CREAT:
                Path(target).touch()  # as Linux does
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(target, *args)

    monkeypatch.setattr(os, refuses, refuse)
    log = open_log(tmp_path)
    fill(log, KEYS[:6])
    assert held(log) == list(range(6))
    assert num_refused[0] == 1
    assert not log._io.is_direct
    log.close()
    assert held(open_log(tmp_path)) == list(range(6))


def test_an_error_that_is_not_about_direct_io_is_not_tried_again(tmp_path, monkeypatch):
    log = open_log(tmp_path)
    fill(log, KEYS[:1])
    calls = []

    def fail(*args):
        calls.append(args)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(OSError, match="Input/output"):
        log.read(KEYS[0])
    assert len(calls) == 1
    assert log._io.is_direct


def test_a_page_written_again_survives_the_reclaim_of_its_first_copy(tmp_path):
    log = open_log(tmp_path, budget_bytes=8 * ALIGNMENT)
    fill(log, KEYS[:4])
    log.delete(KEYS[0])
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


class SmallDisk:
    """Has room for so many bytes in a folder."""

    def __init__(self, folder, num_bytes, monkeypatch):
        self.num_bytes = num_bytes
        self._folder = folder
        self._pwritev = os.pwritev
        monkeypatch.setattr(os, "pwritev", self._write)
        monkeypatch.setattr(
            os, "statvfs", lambda _: SimpleNamespace(f_bavail=self.free, f_frsize=1)
        )

    @property
    def free(self):
        return self.num_bytes - sum(path.stat().st_size for path in segments(self._folder))

    def _write(self, fd, buffers, offset):
        if offset + len(buffers[0]) - os.fstat(fd).st_size > self.free:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self._pwritev(fd, buffers, offset)


@pytest.mark.parametrize("disk_blocks", [2, 11, 20])
def test_a_disk_smaller_than_the_budget_is_used_as_far_as_it_goes(
    tmp_path, monkeypatch, disk_blocks
):
    SmallDisk(tmp_path, disk_blocks * ALIGNMENT, monkeypatch)
    log = open_log(tmp_path)
    fewest = disk_blocks
    for count, key in enumerate(KEYS, start=1):
        fill(log, [key])
        if count >= disk_blocks:
            fewest = min(fewest, log.usage().num_pages)
    assert fewest >= disk_blocks // 2
    assert held(log)[-1] == 39
    log.close()
    assert held(open_log(tmp_path)) == held(log)


def test_what_is_read_stays_on_a_small_disk_too(tmp_path, monkeypatch):
    SmallDisk(tmp_path, 24 * ALIGNMENT, monkeypatch)
    log = open_log(tmp_path)
    fill(log, KEYS[:25])  # from here on the log knows how small it is
    for key in KEYS[25:]:
        log.read(KEYS[20])
        fill(log, [key])
    for key in KEYS[:12]:
        log.delete(key)
        log.read(KEYS[20])
        fill(log, [key])
    assert log.contains(KEYS[20])
    assert not log.contains(KEYS[21])


def test_room_that_others_give_back_is_used(tmp_path, monkeypatch):
    disk = SmallDisk(tmp_path, 4 * ALIGNMENT, monkeypatch)
    log = open_log(tmp_path)
    fill(log, KEYS[:8])
    assert log.usage().num_pages <= 4
    disk.num_bytes = 1 << 30
    fill(log, KEYS[8:])
    assert held(log)[-32:] == list(range(8, 40))


@pytest.mark.parametrize("num_before", [0, 2])
@pytest.mark.parametrize(("is_torn", "is_raised"), [(False, True), (True, False), (True, True)])
def test_a_disk_that_refuses_leaves_the_log_as_it_was_and_a_full_one_makes_room(
    tmp_path, monkeypatch, num_before, is_torn, is_raised
):
    log = open_log(tmp_path)
    fill(log, KEYS[:num_before])

    def refuse(fd, buffers, offset):
        num_written = 0
        if is_torn:  # through the cache, since direct writes are whole blocks
            with Path(f"/proc/self/fd/{fd}").open("r+b", buffering=0) as file:
                file.seek(offset)
                num_written = file.write(buffers[0][:128])
        if is_raised:
            raise OSError(errno.EIO, "Input/output error")
        return num_written

    monkeypatch.setattr(os, "pwritev", refuse)
    for _ in range(3):
        with pytest.raises(OSError, match=r"Input/output|only a part"):
            log.append(KEYS[5], blob_of(KEYS[5]))
    num_left = num_before if is_raised else 0
    assert held(log) == list(range(num_left))
    assert sum(path.stat().st_size for path in segments(tmp_path)) == num_left * ALIGNMENT
    monkeypatch.undo()
    fill(log, [KEYS[5]])
    log.close()
    assert held(open_log(tmp_path)) == [*range(num_left), 5]


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
