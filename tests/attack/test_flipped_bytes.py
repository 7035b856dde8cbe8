"""One byte of what the workflow made flipped at a time: reported with its file, or without any effect.

The kinds of files are those of docs/reference/run-directory.md, and each flip is in a random file of its kind.
NPO_FLIPS is the number of positions per kind (default 2; 20 make over 1,000 in all).
"""

import hashlib
import json
import os
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.attack.kinds import list_documented_kinds
from tests.attack.test_kinds import MADE_ELSEWHERE, PAGE
from tests.attack.workflow import AT_6, BENCH, SCORING, Workflow, find_run
from tests.helpers.cli_errors import npo

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
NUM_FLIPS = int(os.environ.get("NPO_FLIPS", "2"))
KINDS = sorted(list_documented_kinds(PAGE.read_text()) - MADE_ELSEWHERE)
TRAINED = re.compile(r"(model|optimizer)\.safetensors|(metrics|rollouts|autonpo)\.jsonl|state\.json")
"""Files of a trained branch that seed and recipe alone decide."""
INCOMPLETE = '"complete": false'
RUNS = ("run", "stale", "auto", "ladder", "past", "imported")
EVERYWHERE = (*RUNS, "bench")
SCORED = ("--candidates", "9,12", *SCORING)


@dataclass(frozen=True, kw_only=True, slots=True)
class Reader:
    """A command that reads a run directory, or the folder of a bench."""

    name: str
    words: Callable[[Path, Path], tuple[object, ...]]
    """Of the run directory, and of the folder of the workflow that it is in."""
    where: tuple[str, ...]
    """Folders of the workflow in which it is run."""
    every: int = 1
    """It is run at every such position of a kind."""
    kinds: str = ""
    """A part of the kinds that it is run for."""
    result: Callable[[Path], list[Path]] | None = None
    """Files that it makes in the run directory, which then are its output; None: it writes nothing there."""
    writes: bool = False
    """Whether it changes files, so that it needs a copy of each one."""
    knows_its_path: bool = False
    """Whether it refuses a folder that was moved, so that the copy lies where the original was."""


def list_trained(*branches: str) -> Callable[[Path], list[Path]]:
    def find(run: Path) -> list[Path]:
        folders = [run / "branches" / branch for branch in branches or ("*",)]
        files = [path for folder in folders for path in run.glob(f"{folder.relative_to(run)}/**/*")]
        return sorted(
            path for path in (*files, run / "autonpo.jsonl") if TRAINED.fullmatch(path.name) and path.exists()
        )

    return find


READERS = (
    Reader(name="verify", words=lambda run, _: ("verify", run), where=EVERYWHERE),
    Reader(name="show costs", words=lambda run, _: ("show", run, "costs"), where=EVERYWHERE, every=5),
    Reader(name="index", words=lambda run, _: ("index", run), where=EVERYWHERE, every=5),
    Reader(name="compare", words=lambda run, _: ("compare", f"a={run}:main", f"b={run}:near"), where=("run",), every=9),
    Reader(
        name="compare OUT",
        words=lambda run, out: ("compare", out, f"again={next(out.glob('tuning/*/*/*/run'))}:main"),
        where=("bench",),
        every=2,
    ),
    Reader(name="autonpo", words=lambda run, _: ("autonpo", run, "--explain"), where=("auto", "ladder"), every=9),
    Reader(
        name="report",
        words=lambda run, _: ("report", run, "--out", run.parent / "r.html"),
        where=("run", "auto"),
        every=17,
        kinds="json",
        result=lambda run: [run.parent / "r.html"],
    ),
    Reader(
        name="resume",
        words=lambda run, _: ("resume", run, "--branch", "near", "train.num_steps=13"),
        where=("run",),
        every=17,
        result=list_trained("near"),
        writes=True,
    ),
    Reader(
        name="resume --guide",
        words=lambda run, _: ("resume", run, *AT_6, "--guide", "near", "--new-branch", "new", "--until", "7"),
        where=("run",),
        every=17,
        result=list_trained("new"),
        writes=True,
    ),
    Reader(
        name="resume",
        words=lambda run, _: ("resume", run, "train.num_steps=13"),
        where=("stale", "past"),
        every=17,
        result=list_trained("main"),
        writes=True,
    ),
    Reader(
        name="resume --autonpo",
        words=lambda run, _: ("resume", run, "--autonpo", "train.num_steps=13"),
        where=("auto",),
        every=17,
        result=list_trained(),
        writes=True,
    ),
    Reader(
        name="resume --autonpo, ladder",
        words=lambda run, _: ("resume", run, "--autonpo", "train.num_steps=40"),
        where=("ladder",),
        every=17,
        result=list_trained(),
        writes=True,
    ),
    Reader(
        name="score-checkpoints",
        words=lambda run, _: ("score-checkpoints", run, *AT_6, *SCORED),
        where=("run",),
        every=4,
        kinds="RUN/scores/",
        writes=True,
    ),
    Reader(
        name="calibrate",
        words=lambda run, _: ("calibrate", run, *AT_6, *SCORED, "--seeds", "1", "--steps", "4"),
        where=("run",),
        every=3,
        kinds="RUN/calibrations/",
        writes=True,
    ),
    Reader(
        name="eval",
        words=lambda run, _: ("eval", run, "--branch", "main"),
        where=("run", "imported", "past"),
        every=17,
        kinds="/checkpoints/",
        writes=True,
    ),
    Reader(
        name="bench",
        words=lambda _, out: ("bench", "micro", "--out", out, *BENCH),
        where=("bench",),
        every=4,
        kinds="OUT/",
        writes=True,
        knows_its_path=True,
    ),
)


def test_kinds_of_the_whole_workflow_are_documented(workflow: Workflow):
    assert sorted(workflow.files) == KINDS


Given = dict[str, str]
"""What a command gave out: its stdout, or a digest of each file that it made."""


def outcome_of(reader: Reader, workflow: Workflow, path: Path, to: Path, data: bytes | None) -> tuple[int, str, Given]:
    """Exit code, message, and what the command gave out, with the bytes in the file's place."""
    name = path.relative_to(workflow.root)
    original = workflow.root / name.parts[0]
    aside = workflow.root.with_name("aside") / name.parts[0]
    if reader.knows_its_path:
        aside.parent.mkdir(exist_ok=True)
        original, to = original.rename(aside), workflow.root
    # A new path, since what is read is cached by path, size and time.
    shutil.copytree(original, to / name.parts[0], copy_function=shutil.copy2 if reader.writes else os.link)
    if data is not None:
        (to / name).unlink()
        (to / name).write_bytes(data)
    run = to / find_run(workflow.root, path).relative_to(workflow.root)
    words = reader.words(run, to / name.parts[0])
    result = npo(*words, *(() if reader.result else ("--json",)))
    out = {"stdout": result.out.replace(str(to), "").replace(json.dumps(str(to))[1:-1], "")}
    if reader.result:
        made = [each for each in reader.result(run) if each.exists()]
        out = {each.relative_to(to).as_posix(): hash_content(each, to) for each in made}
    if reader.knows_its_path:
        shutil.rmtree(to / name.parts[0])
        aside.rename(to / name.parts[0])
    else:
        shutil.rmtree(to)
    return result.code, result.err, out


def hash_content(path: Path, root: Path) -> str:
    return hashlib.sha256(path.read_bytes().replace(str(root).encode(), b"")).hexdigest()


@pytest.mark.parametrize("kind", KINDS)
def test_flipped_byte_is_reported_or_has_no_effect(workflow: Workflow, tmp_path: Path, kind: str):
    counts: Counter[tuple[str, str]] = Counter()
    rng = random.Random(kind)
    for number in range(NUM_FLIPS):
        path = rng.choice(workflow.files[kind])
        data = bytearray(path.read_bytes())
        if not data:
            continue
        place, bit = rng.randrange(len(data)), rng.randrange(8)
        data[place] ^= 1 << bit
        name = path.relative_to(workflow.root)
        run = find_run(workflow.root, path)
        for reader in READERS:
            if name.parts[0] not in reader.where or reader.kinds not in kind or number % reader.every:
                continue
            if (reader.name, run) not in workflow.outputs:
                code, error, out = outcome_of(reader, workflow, path, tmp_path / "whole", None)
                assert code == 0, (reader.name, error)
                workflow.outputs[reader.name, run] = out
            expected = workflow.outputs[reader.name, run]
            where = f"{reader.name}: bit {bit} of byte {place} of {name}"
            code, error, out = outcome_of(reader, workflow, path, tmp_path / f"{number}", bytes(data))
            if code:
                said = error + out.get("stdout", "")
                assert path.parent.name in said and (path.stem in said or path.name in said), (where, said)
                assert "please report" not in error, (where, error)
                counts[reader.name, "reported"] += 1
            elif reader.name == "index" and INCOMPLETE in out["stdout"]:
                counts[reader.name, "reported"] += 1  # in the checkpoint's row
            else:
                # The file itself is as it was damaged, if the command did not read it.
                changed = [each for each in expected if each != name.as_posix() and out.get(each) != expected[each]]
                assert not changed, where
                counts[reader.name, "no effect"] += 1
    table = "; ".join(
        f"{name} {counts[name, 'reported']}/{counts[name, 'reported'] + counts[name, 'no effect']}"
        for name in dict.fromkeys(name for name, _ in counts)
    )
    print(f"\n{kind} ({len(workflow.files[kind])} files): {table}")
