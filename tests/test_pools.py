"""A job that hangs, dies or eats memory costs itself alone, in a local pool as on a Dask cluster; children end with their parent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from volssl import pools
from volssl.files import BadInput
from volssl.pools import Lost, Means, apart, dismiss, spread

# What the jobs do; each runs in a child process.


def square(number):
    return number**2


def who(_):
    return os.getpid()


def hang(_):
    time.sleep(600)


def die(_):
    os.kill(os.getpid(), signal.SIGKILL)


def die_once(mark):
    if not Path(mark).exists():
        Path(mark).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "lived"


def fill(mebibytes):
    return int(np.ones(mebibytes << 20, np.uint8)[::4096].sum()) * 4096 >> 20


def fail(_):
    raise ValueError("seven")


class Awkward(Exception):
    def __init__(self, one, two):
        super().__init__(one)


def fail_awkwardly(_):
    raise Awkward(1, 2)


def threads(_):
    return [os.environ[name] for name in pools.ONE_THREAD]


def run(job):
    """Functions by their name, so that one spread mixes them."""
    function, argument = job
    return globals()[function](argument)


def answers(jobs, **means):
    return {name: answer.code if isinstance(answer, Lost) else answer for name, answer in spread(run, jobs, Means(**means))}


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_every_job_is_answered(workers):
    assert answers([(str(n), (("square", n),)) for n in range(7)], workers=workers) == {str(n): n**2 for n in range(7)}


def test_lost_jobs_cost_themselves_alone(tmp_path):
    jobs = [
        ("hangs", (("hang", 0),)),
        ("dies", (("die", 0),)),
        ("dies_once", (("die_once", str(tmp_path / "mark")),)),
        *((str(n), (("square", n),)) for n in range(4)),
    ]
    begun = time.monotonic()
    # The limit runs from the first word to a fresh child, so it holds the start of an interpreter.
    got = answers(jobs, workers=2, minutes=0.1)
    assert got == {"hangs": "timeout", "dies": "worker_killed", "dies_once": "lived"} | {str(n): n**2 for n in range(4)}
    assert 6 <= time.monotonic() - begun < 30


def test_memory_bound_stops_a_job_and_not_its_neighbours():
    got = []
    with pytest.raises(MemoryError):
        for name, answer in spread(run, [("a", (("fill", 100),)), ("b", (("fill", 900),))], Means(workers=1, memory_gib=0.5)):
            got.append((name, answer))
    assert got == [("a", 100)]
    assert answers([("b", (("fill", 900),))], workers=1, memory_gib=2) == {"b": 900}


def test_a_process_is_renewed():
    pids = answers([(str(n), (("who", n),)) for n in range(6)], workers=1, renew=2)
    assert len(set(pids.values())) == 3
    assert os.getpid() not in pids.values()


def test_exceptions_come_back_and_end_all():
    with pytest.raises(ValueError, match="seven"):
        answers([("a", (("fail", 0),)), ("b", (("square", 1),))], workers=1)
    with pytest.raises(RuntimeError, match="Awkward"):
        answers([("a", (("fail_awkwardly", 0),))], workers=1)


@pytest.mark.parametrize("ahead", [0, 1])
def test_jobs_are_taken_a_few_at_a_time(ahead):
    taken = []

    def jobs():
        for n in range(30):
            taken.append(n)
            yield str(n), (("square", n),)

    for done, _ in enumerate(spread(run, jobs(), Means(workers=2), ahead=ahead)):
        assert len(taken) <= done + 1 + (1 + ahead) * 2


@pytest.mark.parametrize("workers", [0, 2])
def test_a_source_that_waits_is_asked_again_when_a_job_has_ended(workers):
    ended = []

    def jobs():
        for n in range(3):
            yield str(n), (("square", n),)
        while len(ended) < 2:
            yield None
        yield "last", (("square", 5),)

    for name, answer in spread(run, jobs(), Means(workers=workers), ahead=1):
        ended.append(name)
        assert answer == (25 if name == "last" else int(name) ** 2)
    assert len(ended) == 4


def test_children_compute_with_one_thread():
    assert answers([("a", (("threads", 0),))], workers=1) == {"a": ["1"] * len(pools.ONE_THREAD)}


def test_dismissed_crew_does_nothing_more():
    bounds = pools.Bounds(30.0, None, 9)
    assert apart("crew", bounds, square, 3) == 9
    (child,) = pools._crews["crew"].idle
    dismiss("crew")
    assert child.process.returncode == -signal.SIGKILL
    with pytest.raises(Lost):
        apart("crew", bounds, square, 3)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_children_end_with_a_killed_parent(tmp_path):
    """Also in the midst of a job: an orphan must not write beside a resumed run."""
    code = (
        "import os, pathlib, sys, time\n"
        "from volssl.pools import Means, spread\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "import test_pools\n"
        "list(spread(test_pools.note_and_hang, [(str(n), (sys.argv[2],)) for n in range(2)], Means(workers=2)))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(pools.__file__).parents[1])}
    parent = subprocess.Popen([sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path)], env=environment)
    pids = wait_for(lambda: [int(path.name) for path in tmp_path.iterdir()], lambda found: len(found) == 2)
    parent.kill()
    parent.wait()
    wait_for(lambda: [pid for pid in pids if alive(pid)], lambda found: not found)


def note_and_hang(folder):
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(600)


def wait_for(look, fits, seconds=30):
    end = time.monotonic() + seconds
    while not fits(found := look()):
        assert time.monotonic() < end, found
        time.sleep(0.02)
    return found


@pytest.mark.parametrize(
    "means",
    [
        {"workers": -1},
        {"minutes": 0},
        {"minutes": float("nan")},
        {"renew": 0},
        {"memory_gib": 0.1},
        {"workers": 1, "scheduler": "tcp://x:1"},
    ],
)
def test_impossible_means_are_refused(means):
    with pytest.raises(BadInput):
        Means(**means)


def test_container_bound_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(pools, "CGROUP", tmp_path / "memory.max")
    whole = pools._machine_bytes()
    (tmp_path / "memory.max").write_text("max\n")
    assert pools._machine_bytes() == whole
    (tmp_path / "memory.max").write_text("1000000\n")
    assert pools._machine_bytes() == 1_000_000


def test_cluster_without_dask_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(BadInput, match=r"volssl\[dask\]"):
        answers([("a", (("square", 1),))], scheduler="tcp://127.0.0.1:1")


@pytest.mark.parametrize(
    "address, complaint",
    [
        ("tcp://127.0.0.1:9", "must be a Dask scheduler that answers"),
        ("http://127.0.0.1:9", "must be tcp:"),
        ("tcp://127.0.0.1", "must be tcp:"),
    ],
)
def test_cluster_that_is_not_there_is_refused(monkeypatch, address, complaint):
    pytest.importorskip("distributed")
    monkeypatch.setattr(pools, "CONNECT_S", 1.0)
    with pytest.raises(BadInput, match=complaint):
        answers([("a", (("square", 1),))], scheduler=address)


@pytest.fixture
def cluster():
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None, worker_dashboard_address=None, silence_logs=50
    ) as made:
        yield made


@pytest.mark.slow
def test_cluster_answers_and_loses_only_what_is_lost(tmp_path, cluster):
    jobs = [
        ("hangs", (("hang", 0),)),
        ("dies", (("die", 0),)),
        ("dies_once", (("die_once", str(tmp_path / "mark")),)),
        *((str(n), (("square", n),)) for n in range(4)),
    ]
    got = answers(jobs, scheduler=cluster.scheduler_address, minutes=0.15)
    assert got == {"hangs": "timeout", "dies": "worker_killed", "dies_once": "lived"} | {str(n): n**2 for n in range(4)}


@pytest.mark.slow
def test_exceptions_come_back_from_a_cluster(cluster):
    with pytest.raises(ValueError, match="seven"):
        answers([("a", (("fail", 0),)), ("b", (("square", 1),))], scheduler=cluster.scheduler_address)


def kill_the_dask_worker(mark):
    if not Path(mark).exists():
        Path(mark).touch()
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(600)  # ended with its parent
    return os.getpid()


@pytest.mark.slow
def test_killed_dask_worker_costs_a_retry(tmp_path, cluster):
    jobs = [("kills", (("kill_the_dask_worker", str(tmp_path / "mark")),)), *((str(n), (("square", n),)) for n in range(6))]
    got = answers(jobs, scheduler=cluster.scheduler_address)
    assert isinstance(got.pop("kills"), int)
    assert got == {str(n): n**2 for n in range(6)}


@pytest.mark.slow
def test_cluster_of_another_version_is_refused(cluster, monkeypatch):
    monkeypatch.setattr(pools, "__version__", "9.9")
    with pytest.raises(BadInput, match=r"must run volssl 9\.9; found 0"):
        answers([("a", (("square", 1),))], scheduler=cluster.scheduler_address)
