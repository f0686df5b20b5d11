"""Finding and ending the processes of one cluster and of no other."""

import os
import subprocess
import sys
import time

import psutil
import pytest

from cluster.processes import MARKER_VARIABLE, ClusterProcesses

SLEEP = "import time; time.sleep(600)"
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    "print('deaf', flush=True); time.sleep(600)"
)
POLITE = (
    "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(print('bye'))); "
    "print('ready', flush=True); time.sleep(600)"
)


@pytest.fixture
def start():
    started: list[subprocess.Popen] = []

    def run(code: str, *arguments: str, marker: str | None = None, **options) -> subprocess.Popen:
        environment = {**os.environ}
        environment.pop(MARKER_VARIABLE, None)
        if marker:
            environment[MARKER_VARIABLE] = marker
        command = [sys.executable, "-c", code, *arguments]
        started.append(subprocess.Popen(command, env=environment, **options))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.wait()


def wait_until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def pids(processes: ClusterProcesses) -> set[int]:
    return {process.pid for process in processes.find()}


def test_marked_processes_are_found_and_others_are_not(start, tmp_path):
    mine, other, plain = start(SLEEP, marker="one"), start(SLEEP, marker="two"), start(SLEEP)
    processes = ClusterProcesses("one", tmp_path / "unused")
    wait_until(lambda: mine.pid in pids(processes))
    assert not pids(processes) & {other.pid, plain.pid, os.getpid()}


def test_a_command_line_below_the_run_folder_marks_as_well(start, tmp_path):
    mine = start(SLEEP, f"--session={tmp_path}/run/session")
    processes = ClusterProcesses("one", tmp_path / "run")
    wait_until(lambda: mine.pid in pids(processes))


def test_an_orphan_that_lost_its_marks_is_still_ended(start, tmp_path):
    spawn = (
        "import os, subprocess, sys, time; e = dict(os.environ); e.pop('PACELINE_CLUSTER_ID'); "
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], env=e); "
        "print(p.pid, flush=True); time.sleep(600)"
    )
    parent = start(spawn, marker="one", stdout=subprocess.PIPE, text=True)
    orphan = psutil.Process(int(parent.stdout.readline()))
    processes = ClusterProcesses("one", tmp_path / "unused")
    processes.remember()
    parent.kill()
    parent.wait()
    assert orphan.pid in pids(processes)
    assert processes.end(10) == 0
    assert not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE


def test_a_process_that_ignores_sigterm_is_killed(start, tmp_path):
    deaf = start(STUBBORN, marker="one", stdout=subprocess.PIPE, text=True)
    assert deaf.stdout.readline() == "deaf\n"
    assert ClusterProcesses("one", tmp_path / "unused").end(2) == 0
    assert not psutil.pid_exists(deaf.pid)


def test_a_polite_process_may_end_by_itself(start, tmp_path):
    polite = start(POLITE, marker="one", stdout=subprocess.PIPE, text=True)
    assert polite.stdout.readline() == "ready\n"
    assert ClusterProcesses("one", tmp_path / "unused").end(20) == 0
    assert polite.stdout.readline() == "bye\n"


def test_nothing_to_end_ends_at_once(tmp_path):
    assert ClusterProcesses("nobody", tmp_path / "unused").end(0.1) == 0
