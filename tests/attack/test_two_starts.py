"""The same command started twice at once: one does the work, the other one is refused, and nothing is spoiled."""

from collections import Counter
from pathlib import Path

import pytest

from tests.attack.outcomes import list_differences, outcome, run_npo, words_of
from tests.attack.workflow import DONE, list_commands
from tests.helpers.warm_process import ForkServer, start_fork_server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
REFUSED = (
    "is in use by",
    "another npo process is writing",
    "already holds a run",
    "is not empty",
    "exists already",
    *DONE,
)
"""What the second one says."""


@pytest.mark.usefixtures("producers")
def test_commands_started_twice_at_once_end_as_if_started_once(warm: ForkServer, workflow, tmp_path: Path):
    codes: Counter[tuple[int, ...]] = Counter()
    with start_fork_server() as other:
        for command in list_commands(tmp_path / "twice"):
            words = words_of(command)
            pair = [server.npo(*words, err=tmp_path / f"err-{name}") for name, server in (("a", warm), ("b", other))]
            both = [child.wait() for child in pair]
            for child, code in zip(pair, both, strict=True):
                said = child.read_stderr()
                assert code == 0 or any(words in said for words in REFUSED), (command.name, code, said)
                assert "please report" not in said, (command.name, said)
            codes[tuple(sorted(both))] += 1
            if command.words() is not None:
                assert run_npo(warm, words_of(command), tmp_path) == 0, command.name
    assert not list_differences(outcome(tmp_path / "twice"), outcome(workflow.root)), codes
    print(f"\nexit codes of both: {dict(codes)}")
