"""Several damaged files at once: each is named by `npo verify`, commands end without a traceback, and copies help.

NPO_DAMAGES is the number of damaged runs (default 20).
"""

import os
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest

from tests.attack.workflow import Workflow
from tests.helpers.cli_errors import npo

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
NUM_RUNS = int(os.environ.get("NPO_DAMAGES", "20"))
RUNS = ("run", "stale", "auto", "ladder", "past", "imported")
UNREAD = {"log.txt"}
READERS = (("show", "costs"), ("index",), ("resume", "train.num_steps=13"))


def damage(path: Path, rng: random.Random) -> str:
    """One of the ways in which files are damaged; returns its name. A scoring without scores.json is unfinished."""
    data = path.read_bytes()
    ways = ("flip", "cut", "empty", "zeros", *(("delete",) if path.name != "scores.json" else ()))
    match how := rng.choice(ways):
        case "flip":
            place = rng.randrange(len(data) // 2)  # a document ends with the name of its checksum, which is no content
            path.write_bytes(data[:place] + bytes([data[place] ^ 8]) + data[place + 1 :])
        case "cut":
            path.write_bytes(data[: rng.randrange(len(data) // 2)])
        case "empty":
            path.write_bytes(b"")
        case "delete":
            path.unlink()
        case "zeros":  # what a file system may leave of a file after a power cut
            path.write_bytes(bytes(len(data)))
    return how


def pick_files(run: Path, rng: random.Random) -> list[Path]:
    """Two to five files, at most one in each folder of a checkpoint, and no log together with its head: what is left
    without a trace is as if it had never been made."""
    files = [path for path in sorted(run.rglob("*")) if path.is_file() and path.stat().st_size > 10]
    files = [path for path in files if not path.name.startswith(".") and path.name not in {*UNREAD, "npo_run.json"}]
    chosen: dict[str, Path] = {}
    for path in rng.sample(files, rng.randint(2, 5)):
        place = path.with_suffix("") if path.suffix == ".head" else path
        step = [part for part in path.parts if part.startswith("step_")]
        chosen.setdefault(f"{path.relative_to(run).parts[:2]}{step}" if step else str(place), path)
    return list(chosen.values())


@pytest.mark.parametrize("number", range(NUM_RUNS))
def test_several_damages_are_all_named(workflow: Workflow, tmp_path: Path, number: int):
    rng = random.Random(number)
    whole = workflow.root / rng.choice(RUNS)
    run = shutil.copytree(whole, tmp_path / "damaged" / whole.name)
    damaged = {path: damage(path, rng) for path in pick_files(run, rng)}
    result = npo("verify", run)
    assert result.code == 1, damaged
    for path, how in damaged.items():
        name = path.stem if path.suffix == ".head" else path.name
        place = path.parent.parent if path.parent.name == "training_state" else path.parent
        is_named = any(place.name in line and name in line for line in result.out.splitlines())
        assert is_named, (how, str(path.relative_to(run)), result.out)
    outcomes: Counter[str] = Counter()
    for words in READERS:
        copy = shutil.copytree(run, tmp_path / words[0] / whole.name)
        found = npo(words[0], copy, *words[1:])
        assert "please report" not in found.err, (words, damaged, found.err)
        assert len(found.err.splitlines()) <= 4 or found.code == 0, (words, damaged, found.err)
        outcomes["refused" if found.code else "done"] += 1
    for path in damaged:
        shutil.copy(whole / path.relative_to(run), path)
    assert npo("verify", run).code == 0
    print(f"\n{whole.name}: {', '.join(damaged.values())}; {dict(outcomes)}")
