"""A tiny Qwen3-VL for every room, made once, as recipes/tiny_vl.py makes it."""

from pathlib import Path

import pytest

from recipes import tiny_vl
from tests.pictures import load_vision_policy


@pytest.fixture(scope="session")
def untaught_vl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights."""
    folder = tmp_path_factory.mktemp("vl") / "untaught"
    tiny_vl.save_untrained(folder, seed=0)
    return folder


@pytest.fixture(scope="session")
def taught_vl(untaught_vl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same after a few lessons: it answers with one digit, often a wrong one."""
    folder = tmp_path_factory.mktemp("vl") / "taught"
    policy = load_vision_policy(untaught_vl)
    for _ in tiny_vl.train_supervised(policy, num_steps=30, seed=0):
        pass
    folder.mkdir()
    policy.save(folder)
    return folder
