"""A tiny Qwen3-VL for every room, made once, as recipes/tiny_vl.py makes it."""

from pathlib import Path

import pytest

from recipes import tiny_vl


@pytest.fixture(scope="session")
def untaught_vl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights."""
    folder = tmp_path_factory.mktemp("vl") / "untaught"
    tiny_vl.save_untaught(folder, seed=0)
    return folder
