"""The producer of `train.staleness` killed alone: one error, and the resumed run ends as if nothing had happened."""

import random
import signal
import threading
from pathlib import Path

import pytest

from npo_cli.errors import RunFailed
from npo_cli.session import producer as module
from npo_cli.training.train import train_run
from tests.attack.workflow import AHEAD, LONGER
from tests.helpers.runs import reproducible_digests, resume, start_resume, tiny_recipe, train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
NUM_RUNS, KILLS_PER_RUN = 3, 6


@pytest.mark.usefixtures("producers")
def test_runs_whose_producers_are_killed_end_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    settings = (*LONGER, *AHEAD)
    train(tmp_path / "straight", *settings)
    rng, start, started = random.Random(0), module.start_process, []

    def start_mortal(*streams):
        process = start(*streams)
        started.append(process)
        threading.Timer(rng.uniform(0, 1.5), process.kill).start()
        return process

    num_errors = 0
    for number in range(NUM_RUNS):
        root = tmp_path / f"killed-{number}"
        with monkeypatch.context() as patch:
            patch.setattr(module, "start_process", start_mortal)
            for _ in range(KILLS_PER_RUN):
                is_born = (root / "npo_run.json").exists()
                try:
                    list(start_resume(root) if is_born else train_run(root, tiny_recipe(*settings)))
                    break
                except RunFailed as error:
                    assert f"the producer (train.staleness=2) was killed by {signal.SIGKILL.name}" in error.message
                    num_errors += 1
        if reproducible_digests(root) != reproducible_digests(tmp_path / "straight"):
            resume(root)
        assert reproducible_digests(root) == reproducible_digests(tmp_path / "straight")
    assert num_errors >= NUM_RUNS
    assert all(process.poll() is not None for process in started)
    print(f"\n{num_errors} errors of {len(started)} producers")
