"""kill -9 at random moments of every command that writes: each repeated command ends as if nothing had happened.

`NPO_ATTACK_KILLS` sets the number of kills (default 200). Compared are all files of the finished run, byte for byte in
checkpoints and as JSON without clocks and run ids elsewhere. Costs and timings are not: lost work was paid for.
"""

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.autonpo_runs import EAGER
from tests.helpers.runs import TINY, WHOLE_REPLAY
from tests.helpers.warm_process import ForkServer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]
NUM_KILLS = int(os.environ.get("NPO_ATTACK_KILLS", "200"))
KILLS_PER_COMMAND = 8
CLOCKED_FILES = {"costs.jsonl", "timings.jsonl", "events.jsonl", "npo_run.json", "log.txt"}
CLOCKED_KEYS = {
    *("time", "created", "saved", "saved_at", "seconds", "run_id"),
    *("sequence", "logs", "checksum", "overrides"),  # numbers of saves and of starts, sums over clocks
}
LONGER = (*TINY, "train.num_steps=12", "train.save_every=3", "eval.every=6")
AHEAD = ("train.staleness=2", "sampling.dynamic=true", "sampling.max_gen_batches=3")
AT_6 = ("--at", "6")
SCORING = ("scoring.num_prompts=8", "scoring.samples_per_prompt=2", "scoring.bootstrap_resamples=50")
DONE = ("the run has completed step", "already has a complete guide 'near'")
"""What a command says that was killed after its last line."""
Words = tuple[str, ...]
NamedCommand = tuple[str, Callable[[], Words]]


def commands(run: Path, auto: Path, stale: Path) -> list[NamedCommand]:
    """Name and next words of each command of the workflow, as a user would repeat it."""
    r, a, s = str(run), str(auto), str(stale)

    def train() -> Words:
        clear_unborn(run)
        return ("resume", r) if (run / "npo_run.json").exists() else ("train", "micro", r, *LONGER)

    def train_asynchronously() -> Words:
        clear_unborn(stale)
        return ("resume", s) if (stale / "npo_run.json").exists() else ("train", "micro", s, *LONGER, *AHEAD)

    def replay() -> Words:
        is_there = '"branch":"near"' in (run / "segments.jsonl").read_text()
        return (
            ("resume", r, "--branch", "near")
            if is_there
            else (*("resume", r, *AT_6, "--guide", "near", "--new-branch", "near"),)
        )

    def autonpo() -> Words:
        clear_unborn(auto)
        is_there = (auto / "npo_run.json").exists()
        return ("resume", a, "--autonpo") if is_there else ("train", "micro", a, *EAGER, "--autonpo")

    return [
        ("train", train),
        ("train train.staleness=2", train_asynchronously),
        ("score-checkpoints", lambda: ("score-checkpoints", r, *AT_6, "--candidates", "9,12", *SCORING)),
        (
            "sample-guide",
            lambda: ("sample-guide", r, *AT_6, "--source", "12", "--name", "near", *WHOLE_REPLAY),
        ),
        ("resume --guide", replay),
        ("resume --autonpo", autonpo),
    ]


@pytest.mark.usefixtures("producers")
def test_killed_commands_end_the_same(warm: ForkServer, tmp_path: Path):
    straight, seconds = tmp_path / "straight", {}
    for name, words in commands(straight / "run", straight / "auto", straight / "stale"):
        began = time.monotonic()
        assert run_npo(warm, words(), tmp_path) == 0
        seconds[name] = time.monotonic() - began
    expected = outcome(straight)
    assert len(expected) > 50
    kills: Counter[str] = Counter()
    rng, num_rounds = random.Random(0), 0
    while kills.total() < NUM_KILLS:
        num_rounds += 1
        root = tmp_path / f"killed-{num_rounds}"
        for name, words in commands(root / "run", root / "auto", root / "stale"):
            for _ in range(KILLS_PER_COMMAND):
                began = time.monotonic()
                code = run_npo(warm, words(), tmp_path, kill_after=rng.uniform(0, seconds[name]))
                kills[name] += code == -signal.SIGKILL
                if code == 0:
                    seconds[name] = min(seconds[name], time.monotonic() - began)
                    break
            else:
                assert run_npo(warm, words(), tmp_path) == 0
        assert outcome(root) == expected, kills
    print(f"\n{num_rounds} rounds, {kills.total()} kills: {dict(kills)}")


def clear_unborn(root: Path) -> None:
    """Remove what a training left that was killed while it made the folder, as its error says."""
    if root.exists() and not (root / "npo_run.json").exists():
        shutil.rmtree(root)


def run_npo(warm: ForkServer, args: Sequence[str], folder: Path, *, kill_after: float | None = None) -> int:
    """Exit code; -9 if it was killed."""
    child = warm.npo(*args, err=folder / "err")
    if kill_after is not None:
        time.sleep(kill_after)
        with contextlib.suppress(ProcessLookupError):
            child.kill()
    code = child.wait()
    if code == 2 and any(words in child.read_stderr() for words in DONE):
        return 0
    assert code in (0, -signal.SIGKILL), f"{args}: {child.read_stderr()}"
    return code


def outcome(root: Path) -> dict[str, str]:
    """Digest of every file that does not hold clocks only."""
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(read_content(path)).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
        and path.name not in CLOCKED_FILES
        and not path.name.startswith(".")
        and path.suffix != ".head"
    }


def read_content(path: Path) -> bytes:
    """The bytes; JSON without clocks and run ids."""
    if path.suffix == ".jsonl":
        lines = [json.dumps(timeless(json.loads(line))) for line in path.read_text().splitlines()]
        # every start of a branch is a line
        return "\n".join(dict.fromkeys(lines) if path.name == "segments.jsonl" else lines).encode()
    if path.suffix == ".json":
        return json.dumps(timeless(json.loads(path.read_text()))).encode()
    return path.read_bytes()


def timeless(found: Any) -> Any:
    if isinstance(found, dict):
        return {key: timeless(value) for key, value in found.items() if key not in CLOCKED_KEYS}
    return [timeless(each) for each in found] if isinstance(found, list) else found
