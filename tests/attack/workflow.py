"""The workflow under attack: the commands that together make every kind of file, each as a user would repeat it.

The kill test kills them, the flip test damages what they made.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.autonpo_runs import EAGER
from tests.helpers.runs import LORA, TINY, WHOLE_REPLAY

Words = tuple[object, ...]
SCORING = ("scoring.num_prompts=8", "scoring.samples_per_prompt=2", "scoring.bootstrap_resamples=50")
LONGER = (*TINY, "train.num_steps=12", "train.save_every=3", "eval.every=6")
AHEAD = ("train.staleness=2", "sampling.dynamic=true", "sampling.max_gen_batches=3")
PAST = ("guide.experience.replay_fraction=0.5", "train.save_every=1")
AT_6 = ("--at", "6")
SCOUT = ("scout.num_updates=2", "scout.stop_reward=0.01", "scout.stop_window=2")
TAUGHT = (
    *("target.kind=distribution", "target.teacher=scout:ahead", "target.num_steps=3", "target.group_size=2"),
    "train.num_steps=12",
)
LADDER = (
    *EAGER,
    *("autonpo.ladder=[mistakes,token_weight,guide,scout,dense,rollback]", "autonpo.rungs.num_steps=2"),
    *("autonpo.rungs.teacher=base", "autonpo.rungs.guide=extrapolated:logits,k=2,a=1"),
    *("autonpo.rungs.scout_steps=2", "scout.num_updates=2", "scout.group_size=6"),
    *("autonpo.trigger.cooldown_steps=2", "autonpo.max_interventions=6", "train.num_steps=35"),
    "train.seed=4",
)
"""With this seed every rung is taken, the rollback last, at step 34."""
BENCH = ("--methods", "grpo", "--seeds", "1", "--jobs", "1", "--grid", "train.lr=1e-4", *TINY, "eval.every=2")
DONE = (
    *("the run has completed step", "already has a complete guide", "any more: it was removed"),
    *("exist already; nothing was written", "were dropped when used"),
)
"""What a command says that was killed after its last change."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkflowCommand:
    """One command."""

    name: str
    words: Callable[[], Words | None]
    """Its words now, after whatever happened to earlier calls; None: it has made what it makes."""
    outputs: tuple[Path, ...] = ()
    """Files that it writes outside of run directories, whole or not at all."""
    makes_kinds: bool = True
    """Whether files in run directories or in the folder of a bench come from it that no other command makes."""


def list_commands(root: Path) -> list[WorkflowCommand]:
    """Every command, in an order in which each finds what it needs. All files are made below `root`."""
    run, stale, auto, ladder, past = (root / name for name in ("run", "stale", "auto", "ladder", "past"))
    imported, bench, out = root / "imported", root / "bench", root / "out"

    def train(folder: Path, *settings: object, more: Words = ()) -> Callable[[], Words]:
        def words() -> Words:
            clear_unborn(folder)
            is_born = (folder / "npo_run.json").exists()
            return ("resume", folder, *more) if is_born else ("train", "micro", folder, *settings, *more)

        return words

    def fork(branch: str, *options: object) -> Callable[[], Words]:
        def words() -> Words:
            is_there = f'"branch":"{branch}"' in (run / "segments.jsonl").read_text()
            more = ("--branch", branch) if is_there else (*AT_6, "--new-branch", branch, *options)
            return ("resume", run, *more)

        return words

    def unless(made: Path, *args: object) -> Callable[[], Words | None]:
        return lambda: None if made.exists() else args

    def always(*args: object) -> Callable[[], Words]:
        return lambda: args

    def writes(name: str, *args: object, out: Path, figure: Path | None = None) -> WorkflowCommand:
        def words() -> Words | None:
            out.parent.mkdir(parents=True, exist_ok=True)
            is_done = args[0] == "export" and out.exists()
            return None if is_done else (*args, "--out", out, *(("--figure", figure) if figure else ()))

        outputs = (out, *([figure] if figure else []))
        return WorkflowCommand(name=name, words=words, outputs=outputs, makes_kinds=False)

    def plain(name: str, words: Callable[[], Words | None], *, makes_kinds: bool = True) -> WorkflowCommand:
        return WorkflowCommand(name=name, words=words, makes_kinds=makes_kinds)

    scored = ("--candidates", "9,12", *SCORING)
    sample = ("sample-guide", run, *AT_6)
    again = ("replay", run, "--branch", "spoiled", "--at", "9", "--source", "base", "--name", "again")
    columns = ("trl", "verl")
    return [
        plain("train", train(run, *LONGER)),
        plain("train train.staleness=2", train(stale, *LONGER, *AHEAD), makes_kinds=False),
        plain("train with adapters and experience replay", train(past, *TINY, *LORA, *PAST)),
        plain("train --autonpo", train(auto, *EAGER, more=("--autonpo",))),
        plain("train --autonpo, ladder", train(ladder, *LADDER, more=("--autonpo",)), makes_kinds=False),
        plain("score-checkpoints", always("score-checkpoints", run, *AT_6, *scored)),
        plain("sample-guide", always(*sample, "--source", "12", "--name", "near", *WHOLE_REPLAY)),
        plain("resume --guide", fork("near", "--guide", "near")),
        plain(
            "sample-guide guide.cache.lazy=true",
            always(*sample, "--source", "9", "--name", "lazy", "guide.cache.lazy=true", "guide.cache.min_yield=0"),
            makes_kinds=False,
        ),
        plain("resume --guide, lazy", fork("lazy", "--guide", "lazy"), makes_kinds=False),
        plain("resume --no-guide", fork("spoiled", "--no-guide", "train.lr=3e-3"), makes_kinds=False),
        plain("scout", always("scout", run, *AT_6, "--steps", "4", "--name", "ahead", *SCOUT), makes_kinds=False),
        plain("resume, target.teacher=scout:ahead", fork("taught", "--no-guide", *TAUGHT), makes_kinds=False),
        plain(
            "scout with adapters",
            always("scout", run, *AT_6, "--steps", "3", "--name", "light", "scout.lora.rank=2"),
            makes_kinds=False,
        ),
        plain(
            "sample-guide --source scout:light",
            always(*sample, "--source", "scout:light", "--name", "light", "guide.cache.keep=all", *WHOLE_REPLAY),
            makes_kinds=False,
        ),
        plain("resume --guide light", fork("light-guided", "--guide", "light"), makes_kinds=False),
        plain("replay", always(*again, *SCORING, *WHOLE_REPLAY), makes_kinds=False),
        plain("eval", always("eval", run, "--all", "--branch", "near")),
        plain("calibrate", always("calibrate", run, *AT_6, *scored, "--seeds", "1", "--steps", "4")),
        plain("rm", always("rm", f"{run}:lazy", "--yes"), makes_kinds=False),
        plain("bench", always("bench", "micro", "--out", bench, *BENCH)),
        *(
            writes(f"export --guide --columns {each}", "export", run, "--guide", "near", "--columns", each, out=table)
            for each, table in ((each, out / f"{each}.parquet") for each in columns)
        ),
        *(
            plain("export --step", unless(folder, "export", run, "--step", step, "--out", folder), makes_kinds=False)
            for step, folder in ((step, root / f"trl/checkpoint-{step}") for step in (6, 12))
        ),
        plain(
            "index --import",
            unless(imported, "index", imported, "--import", root / "trl", "--recipe", "micro", "--with-base", *TINY),
            makes_kinds=False,
        ),
        writes("index", "index", run, out=out / "clocks/index.csv"),
        writes("report", "report", run, out=out / "clocks/report.html", figure=out / "clocks/report.png"),
        writes(
            "compare",
            *("compare", f"a={run}:main", f"b={run}:near"),
            out=out / "clocks/compare.csv",
            figure=out / "clocks/compare.svg",
        ),
        writes("show costs", "show", run, "costs", out=out / "clocks/costs.json", figure=out / "clocks/costs.png"),
        writes("autonpo", "autonpo", auto, "--explain", out=out / "auto.jsonl", figure=out / "auto.svg"),
        writes("plan", "plan", "micro", out=out / "plan.csv"),
        plain("verify", always("verify", run), makes_kinds=False),
        plain("init", always("init", root / "project"), makes_kinds=False),
    ]


def clear_unborn(root: Path) -> None:
    """Remove what a training left that was killed while it made the folder, as its error says."""
    if root.exists() and not (root / "npo_run.json").exists():
        shutil.rmtree(root)


@dataclass(frozen=True, kw_only=True, slots=True)
class Workflow:
    """What the commands made."""

    root: Path
    files: dict[str, list[Path]]
    """By kind."""
    outputs: dict[tuple[str, Path], dict[str, str]]
    """What each reader gives out of a run directory that is not damaged, once it was run."""


def find_run(root: Path, path: Path) -> Path:
    """The run directory that a file is in; of the folder of a bench one of its runs."""
    above = [folder for folder in path.parents if (folder / "npo_run.json").exists()]
    return above[0] if above else next(root.glob("bench/runs/*/*/*/run"))
