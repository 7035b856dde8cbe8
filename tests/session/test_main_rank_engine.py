"""An engine with weights of its own beside several ranks: rank 0 sends it the gathered weights, all get its answers."""

import json
from pathlib import Path

import pytest

from tests.helpers.runs import LORA
from tests.helpers.torchrun import run


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [(), LORA])
def test_main_rank_engine_gets_whole_weights_and_all_ranks_its_samples(overrides: tuple[str, ...], tmp_path: Path):
    log = tmp_path / "log"
    run(*overrides, log=log, module="tests.helpers.main_rank_engine_worker")
    outcomes = json.loads(next(line for line in log.read_text().splitlines() if line.startswith("{")))
    digest = outcomes["expected"][0]
    assert outcomes["samples"] == [[f"a {digest} 1", f"b {digest} 1"]] * 2
    assert outcomes["logps"] == [[[0.0]]] * 2
    assert outcomes["version"] == ["second"] * 2
    assert outcomes["warning"] == ["fake"] * 2
    assert outcomes["is_open"] == [True, False]
