"""kill -9 in every phase of AutoNPO: the resumed run ends like one that was never killed.

Targets are states on disk (the phase in the last line of autonpo.jsonl, a checkpoint being written), followed by a
random delay with a fixed seed. The phase that a kill really interrupted is read from disk afterwards.
"""

import json
import os
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.helpers.autonpo_runs import EAGER, deterministic_digests, events_of, start_autonpo, start_autonpo_resume
from tests.helpers.runs import LORA
from tests.helpers.warm_process import ForkServer, NpoProcess

PHASES = ("TRAIN", "PROBE", "GUIDE_GEN", "ROLLBACK", "REPLAY", "ACCEPTANCE_TEST", "COOLDOWN")
SAVING = "saving a checkpoint"
LONGEST_DELAY = {SAVING: 0.003, "ROLLBACK": 0.006}
"""Seconds after an event; other phases are not as short."""
TESTED = "autonpo.replay.acceptance_test=true"


@dataclass(kw_only=True, slots=True)
class Matrix:
    """Kills so far, by what they interrupted."""

    warm: ForkServer
    folder: Path
    settings: tuple[str, ...]
    rng: random.Random
    kills: Counter[str] = field(default_factory=Counter)

    def command(self, root: Path) -> tuple[str, ...]:
        """The next command of a user."""
        if (root / "segments.jsonl").exists():
            return ("resume", str(root), "--autonpo")
        return ("train", "micro", *EAGER, *self.settings, "--run", str(root), "--autonpo")

    def kill_at(self, root: Path, target: str) -> bool:
        """Start the run and kill it at the target; False if it ended first."""
        # If it is in that phase already, starting takes its time as well.
        longest = 0.6 if phase_of(root) == target else LONGEST_DELAY.get(target, 0.1)
        child = self.warm.npo(*self.command(root), err=self.folder / "err")
        if reached(child, root, target):
            time.sleep(self.rng.uniform(0, longest))
            kill_if_running(child)
        code = child.wait()
        assert code in (0, -signal.SIGKILL), child.read_stderr()
        if code:
            self.kills[interrupted(root)] += 1
        return code != 0

    def table(self) -> str:
        """Kills per phase."""
        rows = [f"{name:<20} {self.kills[name]:>3}" for name in (*PHASES, SAVING)]
        return "\n".join([*rows, f"{'total':<20} {self.kills.total():>3}"])


def kill_if_running(child: NpoProcess) -> None:
    """It may have ended during the delay."""
    if is_running(child):
        child.kill()


def is_running(child: NpoProcess) -> bool:
    try:
        os.kill(child.pid, 0)
    except ProcessLookupError:
        return False
    return True


def reached(child: NpoProcess, root: Path, target: str) -> bool:
    """Poll until the target shows on disk, or the process has ended."""
    deadline = time.monotonic() + 60
    while is_running(child):
        if (target == SAVING and is_saving(root)) or target == phase_of(root):
            return True
        assert time.monotonic() < deadline, f"{target} never came"
        time.sleep(0.0005)
    return False


def is_saving(root: Path) -> bool:
    return any(root.glob("branches/*/checkpoints/.step_*"))


def interrupted(root: Path) -> str:
    return SAVING if is_saving(root) else phase_of(root) or "TRAIN"


def phase_of(root: Path) -> str | None:
    """Of the newest whole line; None before the first."""
    try:
        data = (root / "autonpo.jsonl").read_bytes()
    except FileNotFoundError:
        return None
    lines = data[: data.rfind(b"\n") + 1].splitlines()
    return json.loads(lines[-1])["phase"] if lines else None


@pytest.mark.slow
def test_autonpo_killed_while_it_samples_a_guide_ends_the_same(warm: ForkServer, watched: Path, tmp_path):
    matrix = Matrix(warm=warm, folder=tmp_path, settings=(), rng=random.Random(0))
    root = tmp_path / "killed"
    assert matrix.kill_at(root, "GUIDE_GEN"), "it ended before the kill"
    assert "trigger" in events_of(root)
    list(start_autonpo_resume(root))
    assert deterministic_digests(root) == deterministic_digests(watched)


@pytest.mark.slow
@pytest.mark.usefixtures("producers")
@pytest.mark.parametrize("kind", [(), LORA, ("train.staleness=1",)], ids=["full", "lora", "staleness"])
def test_autonpo_killed_in_every_phase_ends_the_same(warm: ForkServer, tmp_path, kind):
    settings = (*kind, TESTED, "autonpo.max_interventions=1", "train.num_steps=10")
    list(start_autonpo(tmp_path / "straight", *settings))
    assert {"probe_accepted", "rolled_back", "replay_accepted"} <= set(events_of(tmp_path / "straight"))
    matrix = Matrix(warm=warm, folder=tmp_path, settings=settings, rng=random.Random(5))
    root = tmp_path / "killed"
    for target in ("TRAIN", SAVING, "PROBE", "GUIDE_GEN", "ROLLBACK", "REPLAY", "ACCEPTANCE_TEST"):
        if not matrix.kill_at(root, target):
            break
    list(start_autonpo_resume(root))
    assert matrix.kills.total() >= 4
    assert deterministic_digests(root) == deterministic_digests(tmp_path / "straight")


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [(TESTED,), ("autonpo.early.enabled=true", "autonpo.early.scout_steps=4", "autonpo.early.replay_steps=4", TESTED)],
)
def test_autonpo_killed_forty_times_ends_the_same(warm: ForkServer, tmp_path, settings):
    list(start_autonpo(tmp_path / "straight", *settings))
    straight = deterministic_digests(tmp_path / "straight")
    matrix = Matrix(warm=warm, folder=tmp_path, settings=settings, rng=random.Random(11))
    num_runs = 0
    while matrix.kills.total() < 40 or any(matrix.kills[name] < 2 for name in (*PHASES, SAVING)):
        num_runs += 1
        assert num_runs <= 12, matrix.table()
        root = tmp_path / f"killed-{num_runs}"
        # Short phases come up more often than long ones: they are easily missed.
        targets = [*PHASES, SAVING, "ROLLBACK", "ACCEPTANCE_TEST", SAVING] * 3
        for target in targets:
            if not matrix.kill_at(root, target):
                break
        list(start_autonpo_resume(root))
        assert deterministic_digests(root) == straight, matrix.table()
    print(f"\n{num_runs} runs\n{matrix.table()}")
