"""One finished tiny run with a guide cache, which tests copy, and one process that starts others at once."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.stages.auto_runs import start_autonpo, train_grpo
from tests.stages.running import sample, train
from tests.stages.warm import ForkServer, start_fork_server


@pytest.fixture(scope="session")
def scout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 steps of plain GRPO, checkpoints 0, 2 and 4, and what step 4 answers to the prompts of steps 3 and 4."""
    root = tmp_path_factory.mktemp("scout") / "run"
    train(root)
    sample(root)
    return root


@pytest.fixture(scope="session")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 steps under AutoNPO with two interventions (see auto_runs)."""
    root = tmp_path_factory.mktemp("watched") / "run"
    list(start_autonpo(root))
    return root


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same 12 steps of plain GRPO."""
    root = tmp_path_factory.mktemp("plain") / "run"
    train_grpo(root)
    return root


@pytest.fixture(scope="session")
def warm() -> Iterator[ForkServer]:
    with start_fork_server() as process:
        yield process
