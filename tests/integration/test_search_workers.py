"""Workers on one PostgreSQL server, killed with -9 in the middle of a trial: nothing is lost, nothing is done twice."""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import optuna
import pytest

from search.ledger import storage_url

pytestmark = pytest.mark.slow

BUDGET, HEARTBEAT, GRACE = 24, 1, 2
WORKER = """
import sys, time, torch
from samplers import NoiseSchedule
from search import SearchSpace, run_search

torch.set_num_threads(1)

made = []

def objective(schedule):
    made.append(schedule)
    print("evaluating", schedule.digest, flush=True)
    time.sleep(3600 if {hangs} and len(made) == 3 else 0.25)
    return sum((a - b) ** 2 for a, b in zip(schedule.times, schedule.times[1:])) + len(schedule.steps)

noise = NoiseSchedule.vp_linear()
run_search(SearchSpace(noise, 4), objective, "s3", {budget}, {url!r}, 0, study_name={study!r}, heartbeat={beat}, grace={grace})
"""


def _binaries() -> Path:
    found = shutil.which("postgres")
    folders = [Path(found).resolve().parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    for folder in folders:
        if (folder / "initdb").is_file():
            return folder
    pytest.fail("no PostgreSQL server here; install the package `postgresql` (Debian)")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """A server of our own on a free port; as root it runs as the user `postgres`, which the package makes."""
    binaries, folder = _binaries(), Path(tempfile.mkdtemp(prefix="pg-"))
    user = {"user": "postgres", "group": "postgres"} if os.geteuid() == 0 else {}
    if user:
        shutil.chown(folder, **user)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "cwd": folder, **user}
    data = folder / "data"
    subprocess.run([binaries / "initdb", "-D", data, "-U", "fewstep", "-A", "trust", "--no-sync"], check=True, **quiet)
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
    start = [binaries / "pg_ctl", "-D", data, "-l", folder / "log", "-w", "-o", options, "start"]
    subprocess.run(start, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder, **user)
    try:
        subprocess.run(
            [binaries / "createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "fewstep", "search"], check=True, **quiet
        )
        yield f"postgresql://fewstep@127.0.0.1:{port}/search"
    finally:
        subprocess.run([binaries / "pg_ctl", "-D", data, "-m", "immediate", "stop"], check=False, **quiet)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def worker(server: str, tmp_path: Path) -> Iterator[Callable[..., tuple[subprocess.Popen, Path]]]:
    """Start a worker that logs to a file; whatever still runs at the end is killed."""
    started = []

    def start(name: str, study: str = "shared", budget: int = BUDGET) -> tuple[subprocess.Popen, Path]:
        code = textwrap.dedent(WORKER).format(
            budget=budget, url=server, study=study, hangs=name == "victim", beat=HEARTBEAT, grace=GRACE
        )
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
        with (tmp_path / name).open("w") as log:
            started.append(subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], stdout=log, env=environment))
        return started[-1], tmp_path / name

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_killed_workers_lose_nothing(server: str, worker: Callable[[str], tuple[subprocess.Popen, Path]]) -> None:
    victim, log = worker("victim")
    _wait(lambda: log.read_text().count("evaluating") >= 3, victim, 400)
    survivor, other = worker("survivor")
    _wait(lambda: "evaluating" in other.read_text(), survivor, 400)
    victim.send_signal(signal.SIGKILL)  # in the middle of an evaluation
    victim.wait()
    late, _ = worker("late")
    assert survivor.wait(400) == 0
    assert late.wait(400) == 0
    storage = optuna.storages.RDBStorage(storage_url(server))
    trials = optuna.load_study(study_name="shared", storage=storage).get_trials(deepcopy=False)
    storage.engine.dispose()
    complete = [trial for trial in trials if trial.state == optuna.trial.TrialState.COMPLETE]
    assert BUDGET <= len(complete) < BUDGET + 2  # two workers were alive at the end
    assert max(Counter(trial.user_attrs["schedule"] for trial in complete).values()) == 1
    # The victim's trial was failed, and its schedule evaluated by another worker.
    failed = [trial for trial in trials if trial.state == optuna.trial.TrialState.FAIL]
    assert len(failed) == 1
    (retried,) = (trial for trial in trials if trial.system_attrs.get("failed_trial") == failed[0].number)
    assert retried.user_attrs["schedule"] == failed[0].user_attrs["schedule"]
    assert retried in complete


@pytest.mark.parametrize("seed", [0])
def test_killed_at_random_times(server: str, worker: Callable[..., tuple[subprocess.Popen, Path]], seed: int) -> None:
    """Between trials, in the middle of one, or of a transaction: wherever it is that the kill arrives."""
    rng, study, budget = random.Random(seed), f"random-{seed}", 40
    survivor, _ = worker("survivor", study, budget)
    victims = [worker(f"mortal-{k}", study, budget) for k in range(2)]
    for victim, log in victims:
        _wait(lambda log=log: "evaluating" in log.read_text(), victim, 400)
        time.sleep(rng.uniform(0.0, 0.7))
        victim.send_signal(signal.SIGKILL)
        victim.wait()
    late, _ = worker("late", study, budget)
    assert survivor.wait(400) == 0
    assert late.wait(400) == 0
    storage = optuna.storages.RDBStorage(storage_url(server))
    trials = optuna.load_study(study_name=study, storage=storage).get_trials(deepcopy=False)
    storage.engine.dispose()
    complete = [trial for trial in trials if trial.state == optuna.trial.TrialState.COMPLETE]
    assert budget <= len(complete) < budget + 2
    assert max(Counter(trial.user_attrs["schedule"] for trial in complete).values()) == 1
    done = {trial.user_attrs["schedule"] for trial in complete}
    lost = [t for t in trials if t.state == optuna.trial.TrialState.FAIL and t.user_attrs.get("schedule") not in {None, *done}]
    assert not lost


def _wait(condition, process: subprocess.Popen, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the worker ended before it was killed"
        assert time.monotonic() < end, "the worker never got going"
        time.sleep(0.02)
