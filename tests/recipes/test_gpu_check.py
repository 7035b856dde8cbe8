"""recipes/gpu_check.py, run on a CPU as a user runs it on a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "recipes" / "gpu_check.py"


def run_checks(folder: Path, only: str, **environment: str) -> tuple[int, dict[str, dict], str]:
    """Exit code, the checks of the JSON file by name, and the printed table."""
    command = [sys.executable, str(SCRIPT), str(folder / "runs"), "--device", "cpu", "--only", only, "--minutes", "20"]
    found = subprocess.run(
        [*command, "--out", str(folder / "result.json")],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
    )
    checks = json.loads((folder / "result.json").read_text())["checks"]
    return found.returncode, {each["check"]: each for each in checks}, found.stdout


@pytest.mark.slow
def test_gpu_check_goes_on_after_a_failed_check_and_exits_with_1(tmp_path):
    # One of two processes, whose address is missing: no npo command starts.
    code, checks, table = run_checks(tmp_path, "doctor,liger,kill", RANK="0", WORLD_SIZE="2")
    assert code == 1
    assert [(name, each["result"]) for name, each in checks.items()] == [
        *(("doctor", "failed"), ("liger", "skipped"), ("kill", "failed")),
    ]
    assert all("MASTER_ADDR is missing" in checks[name]["reason"] for name in ("doctor", "kill"))
    assert all(name in table for name in checks)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_gpu_check_passes_on_a_cpu(tmp_path):
    names = ["doctor", "micro", "lora", "kill", "agreement", "speed", "trl", "memory", "fsdp"]
    code, checks, _ = run_checks(tmp_path, ",".join(names))
    assert {name: each["reason"] for name, each in checks.items() if each["result"] != "passed"} == {}
    assert (code, list(checks)) == (0, names)
    figures = {name: each["figures"] for name, each in checks.items()}
    assert figures["kill"]["bitwise"] == "yes"
    assert figures["fsdp"]["tensors in shards"] > 30
    assert figures["agreement"]["transformers float32 max"] < 1e-3
