"""One byte of a finished run flipped at a time: reported with its file, or without any effect.

NPO_FLIPS is the number of positions per file (default 3; 40 make 1,000 in all).
"""

import os
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.cli_errors import copy_run, npo

NUM_FLIPS = int(os.environ.get("NPO_FLIPS", "3"))
READERS = {
    "verify": ("verify",),
    "costs": ("show", "costs"),
    "index": ("index",),
    "report": ("report", "--out"),
    "resume": ("resume", "--branch", "again", "train.num_steps=5"),
}
EVERY = {"report": 10, "resume": 4}
"""These take a second and more: they are run at every tenth and every fourth position."""
RESUMED = ("model.safetensors", "metrics.jsonl", "rollouts.jsonl", "optimizer.safetensors", "state.json")
"""Files of the resumed branch that seed and recipe alone decide."""
KINDS = (
    *("npo_run.json", "recipe.yaml", "segments.jsonl", "events.jsonl", "evals.jsonl", "prompt_results.jsonl"),
    *("costs.jsonl", "costs.jsonl.head", "branches/again/recipe.yaml", "branches/again/metrics.jsonl"),
    *("branches/again/metrics.jsonl.head", "branches/again/timings.jsonl", "branches/again/rollouts.jsonl"),
    *("branches/again/checkpoints/step_000004/npo.json", "branches/again/checkpoints/step_000004/config.json"),
    "branches/again/checkpoints/step_000004/model.safetensors",
    "branches/again/checkpoints/step_000004/training_state/npo_training_state.json",
    "branches/again/checkpoints/step_000004/training_state/optimizer.safetensors",
    "branches/again/checkpoints/step_000004/training_state/state.json",
    *("guides/near/guide.json", "guides/near/rollouts.jsonl", "guides/near/rollouts.jsonl.head"),
    *("scores/*/settings.json", "scores/*/scores.json", "scores/*/rollouts.jsonl"),
)


def outcome_of(command: str, run: Path) -> tuple[int, str, str]:
    """Exit code, message, and everything that the command gave out."""
    args = READERS[command]
    page = run.parent / "r.html"
    page.unlink(missing_ok=True)
    more = {"report": [page], "resume": []}.get(command, ["--json"])
    result = npo(args[0], run, *args[1:], *more)
    out = page.read_text() if page.exists() else result.out
    if command == "resume":
        branch = run / "branches" / "again"
        out = "".join(f"{path}{path.read_bytes()!r}" for path in sorted(branch.rglob("*")) if path.name in RESUMED)
    return result.code, result.err, out


@pytest.fixture(scope="module")
def whole(circle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each command gives out of the undamaged run."""
    found = {}
    for command in READERS:
        run = copy_run(circle, tmp_path_factory.mktemp(command))
        code, _, out = outcome_of(command, run)
        assert code == 0, command
        found[command] = out.replace(str(run.parent), "")
    return found


def flips(path: Path, rng: random.Random) -> Iterator[tuple[int, bytes]]:
    data = path.read_bytes()
    for place in rng.sample(range(len(data)), min(NUM_FLIPS, len(data))):
        yield place, data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1 :]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("pattern", KINDS)
def test_flipped_byte_is_reported_or_has_no_effect(circle, tmp_path, whole, pattern):
    counts: Counter[tuple[str, str]] = Counter()
    (name,) = [path.relative_to(circle) for path in circle.glob(pattern)]
    for number, (place, data) in enumerate(flips(circle / name, random.Random(pattern))):
        for command in (each for each in READERS if number % EVERY.get(each, 1) == 0):
            # A copy of its own: files are cached by size, time and inode.
            run = copy_run(circle, tmp_path, f"{number}-{command}/run")
            (run / name).write_bytes(data)
            code, error, out = outcome_of(command, run)
            if command == "index" and '"complete": false' in out:
                kind = "reported"  # in the checkpoint's row
            elif code:
                kind = "reported"
                said = error + out
                assert str(name.parent) in said and (name.stem in said or name.name in said), (command, place, said)
                assert "please report" not in error, (command, place, error)
            else:
                kind = "no effect"
                assert out.replace(str(run.parent), "") == whole[command], f"{command}: byte {place} of {name}"
            counts[command, kind] += 1
            shutil.rmtree(run.parent)
    print(f"\n{name}: " + ", ".join(f"{command} {kind} {num}" for (command, kind), num in sorted(counts.items())))
