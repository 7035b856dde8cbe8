"""The ladder under attack: kills in the window of every rung, and flipped bytes in the files that its rungs leave.

NPO_LADDER_KILLS is the number of kills (default 20): in turn at a random moment of a rung's window, and before a random
change of a file after the restart in it.
"""

import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from npo_cli.storage.layout import open_run
from npo_cli.storage.lineage import find_first_segment
from npo_cli.types.rollouts import StepReport
from tests.attack.outcomes import list_differences, outcome, run_npo
from tests.attack.workflow import LADDER, clear_unborn
from tests.autonpo.test_kill_resume import is_running, kill_if_running
from tests.autonpo.test_ladder_run import ladder
from tests.helpers.autonpo_runs import deterministic_digests, start_autonpo, transitions_of
from tests.helpers.cli_errors import npo
from tests.helpers.warm_process import ForkServer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
NUM_KILLS = int(os.environ.get("NPO_LADDER_KILLS", "20"))
NUM_FLIPS = int(os.environ.get("NPO_FLIPS", "2"))
RUNGS = ("mistakes", "token_weight", "guide", "scout", "dense", "rollback")
WINDOW_SECONDS, CHANGES = 0.4, 40
"""At most, of a window of two steps that has the machine to itself."""
LOGS = {
    "autonpo.jsonl": "autonpo.jsonl",
    "segments.jsonl": "segments.jsonl",
    "metrics of the window": "branches/{branch}/metrics.jsonl",
    "recipe of the window": "branches/{branch}/recipe.yaml",
    "description of the lazy cache": "guides/{guide}/guide.json",
    "responses of the lazy cache": "guides/{guide}/rollouts.jsonl",
}


@pytest.fixture(scope="module")
def straight(warm: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that takes every rung and was never killed."""
    root = tmp_path_factory.mktemp("straight") / "run"
    child = warm.npo(*command(root), err=root.with_name("err"))
    assert child.wait() == 0, child.read_stderr()
    moves = transitions_of(root)
    taken = [one.evidence.get("rung", "rollback") for one in moves if one.event in ("rung_applied", "rolled_back")]
    assert set(taken) == set(RUNGS)
    return root


def command(root: Path) -> tuple[str, ...]:
    clear_unborn(root)
    if (root / "npo_run.json").exists():
        return ("resume", str(root), "--autonpo")
    return ("train", "micro", str(root), *LADDER, "--autonpo")


def read_place(root: Path) -> tuple[str, str | None]:
    """Phase and rung of the newest whole line of autonpo.jsonl."""
    path = root / "autonpo.jsonl"
    data = path.read_bytes() if path.exists() else b""
    lines = data[: data.rfind(b"\n") + 1].splitlines()
    state = json.loads(lines[-1])["state"] if lines else {"phase": "TRAIN"}
    return state["phase"], state.get("rung")


def is_in_window(root: Path, rung: str) -> bool:
    return read_place(root) == ("REPLAY" if rung == "rollback" else "WINDOW", rung)


def kill_in_window(warm: ForkServer, root: Path, rung: str, *, delay: float) -> bool:
    """Kill the run so many seconds after the rung's window began; False if it ended before."""
    child = warm.npo(*command(root), err=root.with_name("err"))
    while is_running(child) and not is_in_window(root, rung):
        time.sleep(0.001)
    time.sleep(delay)
    kill_if_running(child)
    code = child.wait()
    assert code in (0, -signal.SIGKILL), child.read_stderr()
    return code != 0


def test_ladder_killed_in_every_window_ends_the_same(warm: ForkServer, straight: Path, tmp_path: Path):
    expected, rng = outcome(straight), random.Random(0)
    kills: Counter[str] = Counter()
    num_rounds = 0
    while kills.total() < NUM_KILLS:
        num_rounds += 1
        root = tmp_path / f"killed-{num_rounds}"
        for rung in RUNGS:
            if not kill_in_window(warm, root, rung, delay=rng.uniform(0, WINDOW_SECONDS)):
                break
            kills["{} {}".format(*read_place(root))] += 1
            code = run_npo(warm, command(root), tmp_path, die_at=rng.randint(1, CHANGES), watched=root)
            kills["{} {}".format(*read_place(root))] += code == -signal.SIGKILL
        assert run_npo(warm, command(root), tmp_path) == 0
        assert not list_differences(outcome(root), expected), kills
    assert {rung for rung in RUNGS for place in kills if place.endswith(f" {rung}")} == set(RUNGS)
    assert npo("verify", root).code == 0
    print(f"\n{kills.total()} kills: {dict(kills)}")


def flip_bit(path: Path, rng: random.Random) -> str:
    """Damage a file; which bit it was."""
    data = bytearray(path.read_bytes())
    place, bit = rng.randrange(len(data)), rng.randrange(8)
    data[place] ^= 1 << bit
    path.write_bytes(data)
    return f"bit {bit} of byte {place} of {path.parent.name}/{path.name}"


@pytest.mark.parametrize("name", LOGS)
def test_flipped_byte_of_the_ladder_is_reported_or_has_no_effect(straight: Path, tmp_path: Path, name: str):
    """A byte of a log that a whole run left; then the run is verified, explained and trained on."""
    run, rng = open_run(straight), random.Random(name)
    windows = [one.state.branch for one in transitions_of(straight) if one.event == "rung_applied"]
    caches = [first.guide_cache for first in (find_first_segment(run, one) for one in windows) if first.guide_cache]
    more = ("train.num_steps=40",)
    whole = shutil.copytree(straight, tmp_path / "whole" / "run")
    assert npo("resume", whole, "--autonpo", *more).code == 0
    counts: Counter[str] = Counter()
    for number in range(NUM_FLIPS):
        path = LOGS[name].format(branch=rng.choice(windows), guide=rng.choice(caches))
        root = shutil.copytree(straight, tmp_path / str(number) / "run")
        data = (root / path).read_bytes()
        where = flip_bit(root / path, rng)
        damaged = (root / path).read_bytes()
        found = npo("verify", root)
        assert found.code == 1, where
        assert Path(path).name in found.out, (where, found.out)
        for words in (("autonpo", root, "--explain"), ("resume", root, "--autonpo", *more)):
            result = npo(*words)
            assert "please report" not in result.err, (where, result.err)
            assert result.code == 0 or Path(path).parent.name in result.err, (where, result.err)
            assert result.code == 0 or "try:" in result.err, (where, result.err)
            counts["reported" if result.code else "no effect"] += 1
        if not result.code:
            if (root / path).read_bytes() == damaged:  # it was not read
                (root / path).write_bytes(data)
            assert set(list_differences(outcome(root), outcome(whole))) <= {"autonpo.png"}, where
    print(f"\n{name}: {dict(counts)}")


def test_flipped_byte_of_a_lazy_cache_in_use_is_reported_or_has_no_effect(tmp_path: Path):
    """The run is stopped in the window of the rung, after a step with the guide."""
    settings = ladder("guide", "rollback", steps=10)
    list(start_autonpo(tmp_path / "straight", *settings))
    expected = deterministic_digests(tmp_path / "straight")
    stopped = tmp_path / "stopped"
    for record in (records := start_autonpo(stopped, *settings)):
        if isinstance(record, StepReport) and record.branch == "auto-1":
            records.close()
    rng, codes = random.Random(0), Counter[int]()
    for number in range(2 * NUM_FLIPS):
        root = shutil.copytree(stopped, tmp_path / f"run-{number}")
        where = flip_bit(root / "guides/auto-1" / ("guide.json", "rollouts.jsonl")[number % 2], rng)
        result = npo("resume", root, "--autonpo")
        codes[result.code] += 1
        if result.code:
            assert "guides/auto-1" in result.err, (where, result.err)
            assert "try:" in result.err, (where, result.err)
            assert "please report" not in result.err, (where, result.err)
        else:
            assert deterministic_digests(root) == expected, where
    print(f"\nexit codes: {dict(codes)}")
