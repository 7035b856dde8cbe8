"""One finished tiny run with a guide cache, which tests copy, and one process that starts others at once."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.stages.running import sample, train
from tests.stages.warm import Warm, warmed


@pytest.fixture(scope="session")
def scout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 steps of plain GRPO, checkpoints 0, 2 and 4, and what step 4 answers to the prompts of steps 3 and 4."""
    root = tmp_path_factory.mktemp("scout") / "run"
    train(root)
    sample(root)
    return root


@pytest.fixture(scope="session")
def warm() -> Iterator[Warm]:
    with warmed() as process:
        yield process
