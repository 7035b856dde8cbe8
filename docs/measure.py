"""Size of the package and the walks through it: `python docs/measure.py [--walks]`.

Sizes: files, lines, records (dataclasses), public names, and the share of each package. Walks, measured by running
tiny commands under `sys.setprofile`: the distinct files and functions of the package that execute (1) one training
step, from the prompts to the updated weights; (2) one step with a guide, from `npo sample-guide` on; (3) one AutoNPO
decision, from the probe to the rollback. Files of the packages around the work are listed apart.
"""

import argparse
import ast
import contextlib
import importlib
import io
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "npo_cli"
AROUND = ("cli", "config", "errors", "seeds", "types", "distributed")
"""Packages around the work: command line, settings, records, the launcher."""
TINY = (
    *("train.num_steps=4", "train.save_every=2", "train.prompts_per_step=4", "train.group_size=4"),
    *("task.pool_size=16", "task.heldout_size=4", "model.threads=1"),
    # So that a guide of a few steps has responses.
    *("guide.cache.prompts=all", "guide.cache.keep=all", "guide.cache.min_yield=0"),
)
AUTONPO = (
    *("train.num_steps=8", "autonpo.trigger.warmup_steps=4", "autonpo.trigger.window=2", "autonpo.trigger.patience=1"),
    *("autonpo.trigger.max_reward_gain_se=100", "autonpo.trigger.min_entropy_drop=0"),
    *("autonpo.trigger.min_entropy_drop_se=0", "autonpo.rollback.distances=[2]", "autonpo.probe.min_quality=0"),
    *("autonpo.rollback.min_value=0", "scoring.quality_baseline=none"),
    *("autonpo.rollback.min_failed_prompts=1", "autonpo.max_interventions=1", "autonpo.probe.num_prompts=8"),
    *("scoring.quality_baseline=none", "autonpo.rollback.min_value=0"),
)


def measure_size() -> Iterator[str]:
    """One line per figure."""
    files = sorted(PACKAGE.rglob("*.py"))
    lines = Counter({path: len(path.read_text(encoding="utf-8").splitlines()) for path in files})
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in files]
    classes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    records = sum(any("dataclass" in ast.unparse(mark) for mark in node.decorator_list) for node in classes)
    public = [name for tree in trees for name in _public_names(tree)]
    total = sum(lines.values())
    shares = Counter()
    for path, count in lines.items():
        parts = path.relative_to(PACKAGE).parts
        shares[parts[0] if len(parts) > 1 else "(root)"] += count
    yield f"{len(files)} files, {total:,} lines, {records} dataclasses, {len(public):,} public names"
    yield "largest packages: " + ", ".join(f"{name} {count / total:.1%}" for name, count in shares.most_common(6))


def _public_names(tree: ast.Module) -> Iterator[str]:
    """Public functions, classes and their public methods."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node.name


class Walk:
    """Files and functions that run while one of the entry functions is on the stack."""

    def __init__(self, entries: Sequence[str]) -> None:
        self.entries = {tuple(entry.split(":")) for entry in entries}
        self.files: dict[str, None] = {}
        self.functions: dict[tuple[str, str], None] = {}
        self.depth = 0
        self.inside: list[FrameType] = []

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        path = frame.f_code.co_filename
        if not path.startswith(str(PACKAGE)):
            return
        name = Path(path).relative_to(PACKAGE).with_suffix("").as_posix()
        if event == "call":
            if (name, frame.f_code.co_name) in self.entries:
                self.inside.append(frame)
            if self.inside:
                self.files[name] = None
                self.functions[name, frame.f_code.co_name] = None
        elif event == "return" and self.inside and self.inside[-1] is frame:
            self.inside.pop()


def run_npo(*args: object) -> None:
    """A command in this process, its output dropped."""
    main = importlib.import_module("npo_cli.cli.main").main
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            main([str(arg) for arg in args])
        except SystemExit as end:
            if end.code:
                raise RuntimeError(errors.getvalue()) from end


@contextlib.contextmanager
def tracing(walk: Walk) -> Iterator[None]:
    """The walk as the profile function of this thread."""
    sys.setprofile(walk)
    try:
        yield
    finally:
        sys.setprofile(None)


def measure_walks() -> Iterator[str]:
    """The three walks, each as counts and as a list of files in the order of first use."""
    step = ("training/loop:run_step",)
    with tempfile.TemporaryDirectory() as folder:
        run, auto = Path(folder) / "run", Path(folder) / "auto"
        with tracing(rollout := Walk(step)):
            run_npo("train", "micro", run, *TINY)
        yield from describe("one training step", rollout)
        made = Walk(("guides/build_cache:build_guide_cache", *step))
        with tracing(made):
            run_npo("sample-guide", run, "--at", 2, "--source", 4, "--name", "late")
            run_npo("resume", run, "--at", 2, "--guide", "late", "--new-branch", "late")
        yield from describe("one step with a guide, from sample-guide on", made)
        decision = Walk(
            (
                "autonpo/probe:run_probe",
                "autonpo/controller:advance",
                "autonpo/trigger:observe",
                "autonpo/actions:perform_guide_build",
                "autonpo/actions:perform_rollback",
            )
        )
        with tracing(decision):
            run_npo("train", "micro", auto, *TINY, *AUTONPO, "--autonpo")
        yield from describe("one AutoNPO decision", decision)


def describe(title: str, walk: Walk) -> Iterator[str]:
    """Counts, then the files."""
    work = [name for name in walk.files if name.split("/")[0] not in AROUND]
    around = [name for name in walk.files if name not in work]
    yield f"{title}: {len(work)} files, {len(walk.functions)} functions (and {len(around)} files around the work)"
    yield "  " + ", ".join(work)
    yield "  around: " + ", ".join(around)


def main() -> None:
    """Print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--walks", action="store_true", help="run tiny commands and list the files that each crosses")
    arguments = parser.parse_args()
    for line in measure_size():
        print(line)
    for line in measure_walks() if arguments.walks else ():
        print(line)


if __name__ == "__main__":
    main()
