"""kill -9 of every command that writes: each repeated command ends as if nothing had happened.

`NPO_ATTACK_KILLS` sets the number of kills (default 200), in turn at a random moment and before a random change of a
file. Compared are all files that the workflow makes, byte for byte in checkpoints and outputs and as JSON without
clocks and run ids elsewhere. Costs and timings are not: lost work was paid for. After each kill an output is whole or
absent.
"""

import csv
import json
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet
import pytest

from tests.attack.outcomes import list_differences, outcome, run_npo, words_of
from tests.attack.workflow import list_commands
from tests.helpers.warm_process import ForkServer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]
NUM_KILLS = int(os.environ.get("NPO_ATTACK_KILLS", "200"))
KILLS_PER_COMMAND = 8
ENDS = {".png": b"IEND\xaeB`\x82", ".svg": b"</svg>", ".html": b"</html>"}
"""How whole files of these kinds end."""


@pytest.mark.usefixtures("producers")
def test_killed_commands_end_the_same(warm: ForkServer, tmp_path: Path):
    straight, seconds, changes = tmp_path / "straight", {}, {}
    for command in list_commands(straight):
        began = time.monotonic()
        child = warm.npo(*words_of(command), err=tmp_path / "err", watched=straight)
        assert child.wait() == 0, (command.name, child.read_stderr())
        seconds[command.name], changes[command.name] = time.monotonic() - began, child.count_changes()
    expected = outcome(straight)
    assert len(expected) > 100
    kills: Counter[str] = Counter()
    rng, num_rounds = random.Random(0), 0
    while kills.total() < NUM_KILLS:
        num_rounds += 1
        root = tmp_path / f"killed-{num_rounds}"
        for command in list_commands(root):
            for number in range(KILLS_PER_COMMAND):
                if command.words() is None:
                    break
                began = time.monotonic()
                when = {"kill_after": rng.uniform(0, seconds[command.name])}
                if number % 2 and changes[command.name]:
                    when = {"die_at": rng.randint(1, changes[command.name]), "watched": root}
                code = run_npo(warm, words_of(command), tmp_path, **when)
                kills[command.name] += code == -signal.SIGKILL
                for path in command.outputs:
                    assert not path.exists() or is_whole(path), (command.name, path, when)
                if code == 0:
                    seconds[command.name] = min(seconds[command.name], time.monotonic() - began)
                    break
            else:
                if command.words() is not None:
                    assert run_npo(warm, words_of(command), tmp_path) == 0
        assert not list_differences(outcome(root), expected), kills
        print(f"\nround {num_rounds}: {kills.total()} kills so far: {dict(kills)}", flush=True)


def is_whole(path: Path) -> bool:
    """Whether it is not cut."""
    data = path.read_bytes()
    match path.suffix:
        case ".csv":
            return data.endswith(b"\n") and len({len(row) for row in csv.reader(data.decode().splitlines())}) == 1
        case ".json":
            return bool(json.loads(data))
        case ".jsonl":
            return data.endswith(b"\n") and all(json.loads(line) for line in data.splitlines())
        case ".parquet":
            return pyarrow.parquet.read_table(path).num_rows > 0
        case suffix:
            return data.rstrip().endswith(ENDS[suffix])
