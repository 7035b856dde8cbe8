"""A disk that is full at any moment of any command: one error, nothing lost, and the repeated command ends the same."""

import random
from collections import Counter
from pathlib import Path

import pytest

from tests.attack.outcomes import list_differences, outcome, run_npo, words_of
from tests.attack.workflow import DONE, list_commands
from tests.helpers.small_disk import fill_disk, mount_small_disk
from tests.helpers.warm_process import ForkServer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
TRIES = 4
FULL = ("no room left to write", "No space left on device", "MB and the disk has", "does not fit on the disk")


@pytest.mark.usefixtures("producers")
def test_commands_on_a_full_disk_end_the_same_once_there_is_room(warm: ForkServer, workflow, tmp_path: Path):
    failures: Counter[str] = Counter()
    rng = random.Random(0)
    with mount_small_disk(tmp_path / "disk", megabytes=600) as disk:
        root = disk / "full"
        for command in list_commands(root):
            for _ in range(TRIES):
                if command.words() is None:
                    break
                words = words_of(command)
                filler = fill_disk(disk, leaving=int(10 ** rng.uniform(3, 6.5)))
                child = warm.npo(*words, err=tmp_path / "err")
                code, said = child.wait(), child.read_stderr()
                filler.unlink()
                if code == 0 or any(words in said for words in DONE):
                    break
                failures[command.name] += 1
                assert code in (1, 2), (command.name, said)
                assert any(words in said for words in FULL), (command.name, said)
                assert "please report" not in said, (command.name, said)
            else:
                if command.words() is not None:
                    assert run_npo(warm, words_of(command), tmp_path) == 0, command.name
        assert not list_differences(outcome(root), outcome(workflow.root)), failures
    print(f"\n{failures.total()} full disks: {dict(failures)}")
