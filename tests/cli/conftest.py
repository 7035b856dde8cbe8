"""One tiny run that went round the circle, for the whole session. Tests that harm it copy it first."""

from pathlib import Path

import pytest

from tests.helpers.cli_errors import SMALL, npo

FEW = ("scoring.num_prompts=8", "scoring.samples_per_prompt=2", "scoring.bootstrap_resamples=50")


@pytest.fixture(scope="session")
def circle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints 0, 2 and 4 on main, scored and guided for step 0, and a replay named again."""
    root = tmp_path_factory.mktemp("circle") / "a run é"
    for args in (
        ("train", "micro", root, *SMALL),
        ("eval", root, "--step", "4"),
        ("score-checkpoints", root, "--at", "0", *FEW),
        ("sample-guide", root, "--source", "4", "--at", "0", "--name", "near"),
        ("resume", root, "--at", "0", "--guide", "near", "--new-branch", "again"),
    ):
        assert npo(*args).code == 0, args
    return root
