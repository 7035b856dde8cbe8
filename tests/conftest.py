"""Fixtures that several packages share. Imports wait inside them, so that tests of pure packages need no torch."""

import os
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# The suite is two processes of tiny models: more threads than that would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

TRAINERS = ("helpers.runs", "attack.workflow", "attack.outcomes")
"""Modules of the tests that train runs."""

if find_spec("torch") is None:
    # Modules of pure packages whose tests train a run.
    collect_ignore = [
        str(path)
        for path in Path(__file__).parent.rglob("test_*.py")
        if any(f"from tests.{name} import" in path.read_text(encoding="utf-8") for name in TRAINERS)
    ]

if TYPE_CHECKING:
    from tests.helpers.warm_process import ForkServer

NUM_WORKERS = 2


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """The default suite runs in two processes. Named files and folders, and `-m slow`, `-m vllm` and so on, run in this
    one: `-s` shows their output, and an engine, a GPU or a job of two processes has the machine to itself."""
    runs_all = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    return NUM_WORKERS if runs_all and config.option.markexpr.startswith("not ") else 0


@pytest.fixture(scope="session", autouse=True)
def state_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What --allow-code allowed is kept in a folder of the tests, not in the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="session")
def untaught_vl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3-VL with random weights, as recipes/tiny_vl.py makes it."""
    from recipes import tiny_vl

    folder = tmp_path_factory.mktemp("vl") / "untaught"
    tiny_vl.save_untrained(folder, seed=0)
    return folder


@pytest.fixture(scope="session")
def taught_vl(untaught_vl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same after 30 supervised steps: it answers with one digit, often a wrong one."""
    from recipes import tiny_vl
    from tests.helpers.images import load_vision_policy

    folder = tmp_path_factory.mktemp("vl") / "taught"
    policy = load_vision_policy(untaught_vl)
    for _ in tiny_vl.train_supervised(policy, num_steps=30, seed=0):
        pass
    folder.mkdir()
    policy.save(folder)
    return folder


@pytest.fixture(scope="session")
def scout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 steps of plain GRPO with checkpoints 0, 2 and 4, and a guide cache of step 4 for the prompts of steps 3 and
    4."""
    from tests.helpers.runs import sample, train

    root = tmp_path_factory.mktemp("scout") / "run"
    train(root)
    sample(root)
    return root


@pytest.fixture(scope="session")
def circle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints 0, 2 and 4 on main, scored and guided for step 0, and a replay named again."""
    from tests.helpers.cli_errors import SMALL, npo

    root = tmp_path_factory.mktemp("circle") / "a run é"
    few = ("scoring.num_prompts=8", "scoring.samples_per_prompt=2", "scoring.bootstrap_resamples=50")
    for args in (
        ("train", "micro", root, *SMALL),
        ("eval", root, "--step", "4"),
        ("score-checkpoints", root, "--at", "0", *few),
        ("sample-guide", root, "--source", "4", "--at", "0", "--name", "near"),
        ("resume", root, "--at", "0", "--guide", "near", "--new-branch", "again"),
    ):
        assert npo(*args).code == 0, args
    return root


@pytest.fixture(scope="session")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 steps under AutoNPO with two interventions (see tests/helpers/autonpo_runs.py)."""
    from tests.helpers.autonpo_runs import start_autonpo

    root = tmp_path_factory.mktemp("watched") / "run"
    list(start_autonpo(root))
    return root


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same 12 steps of plain GRPO."""
    from tests.helpers.autonpo_runs import train_grpo

    root = tmp_path_factory.mktemp("plain") / "run"
    train_grpo(root)
    return root


@pytest.fixture(scope="session")
def producers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Producers of this process, and of the commands of `warm` that ask for them, start at once."""
    from npo_cli.session import producer
    from tests.helpers.warm_process import PRODUCERS_VARIABLE
    from tests.helpers.warm_producer import fork_producers, start_producer_server

    address = Path(tempfile.mkdtemp(prefix="npo-")) / "producers"  # a socket's path is short
    with pytest.MonkeyPatch.context() as patch, start_producer_server(address):
        patch.setenv(PRODUCERS_VARIABLE, str(address))
        patch.setattr(producer, "start_process", fork_producers(str(address)))
        yield
    address.parent.rmdir()


@pytest.fixture(scope="session")
def warm() -> Iterator["ForkServer"]:
    """A process that has imported everything and forks an `npo` for each command line."""
    from tests.helpers.warm_process import start_fork_server

    with start_fork_server() as process:
        yield process
