"""Every kind of file that the commands make is in the format's document, and every one in it is made."""

from pathlib import Path

import pytest

from tests.attack.kinds import find_kind, group_files, list_documented_kinds
from tests.attack.workflow import list_commands
from tests.helpers.cli_errors import npo

PAGE = Path(__file__).parents[2] / "docs/reference/run-directory.md"
CHECKPOINT = "RUN/branches/BRANCH/checkpoints/STEP"
MADE_ELSEWHERE = {f"{CHECKPOINT}/training_state/shard-N.safetensors"}
"""By several processes; those have tests of their own (tests/distributed)."""


@pytest.mark.slow
def test_documented_kinds_are_the_kinds_that_commands_make(tmp_path: Path):
    """Those of a bench, which starts processes, are compared in test_flipped_bytes.py."""
    for command in list_commands(tmp_path):
        if command.makes_kinds and command.name != "bench":
            words = command.words()
            assert words is not None and npo(*words).code == 0, command.name
    documented = {kind for kind in list_documented_kinds(PAGE.read_text()) if kind.startswith("RUN/")}
    assert set(group_files(tmp_path)) == documented - MADE_ELSEWHERE


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("run/branches/near/metrics.jsonl", "RUN/branches/BRANCH/metrics.jsonl"),
        ("auto/probes/main_step_000006_0a1b2c3d/settings.json", "RUN/probes/KEY/settings.json"),
        ("run/calibrations/a_step_000006_0a1b2c3d/guides/g/guide.json", "RUN/calibrations/KEY/guides/NAME/guide.json"),
        ("bench/tuning/m/train.lr=1e-4/seed-7/done.json", "OUT/tuning/METHOD/SETTING/SEED/done.json"),
        ("bench/runs/m/as-it-is/seed-0/run/npo_run.json", "RUN/npo_run.json"),
        ("past/branches/main/checkpoints/step_000004/npo.json", f"{CHECKPOINT}/npo.json"),
        (
            "run/branches/main/checkpoints/step_000004/model-00002-of-00002.safetensors",
            f"{CHECKPOINT}/model-N.safetensors",
        ),
    ],
)
def test_kind_of_a_file(path: str, kind: str):
    assert find_kind(path) == kind
