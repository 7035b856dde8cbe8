"""`npo bench`."""

import itertools
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from npo_cli.cli.options import AllowCodeOpt, DryRunOpt, FullOpt, JsonOpt, OverridesArg, RecipeArg, make_figure_option
from npo_cli.cli.output import print_plan, print_records
from npo_cli.cli.terminal import escape_for_terminal, print_notice
from npo_cli.errors import NpoError

MethodsOpt = Annotated[
    str, typer.Option("--methods", metavar="NAMES", help="Comma-separated methods (npo recipes --methods).")
]
SeedsOpt = Annotated[
    str,
    typer.Option("--seeds", metavar="N|A,B", help="Number of seeds from 0, or comma-separated seeds (one seed: `7,`)."),
]
GridOpt = Annotated[
    list[str] | None,
    typer.Option(
        "--grid",
        metavar="KEY=A,B,C",
        help="Values of a setting to tune separately for each method, or alternatives of several keys in one option: "
        "'train.lr=1e-4,3e-4 train.num_updates=2'. Several --grid are combined with each other.",
    ),
]
TuningOpt = Annotated[str, typer.Option("--tuning-seeds", metavar="A,B", help="Seeds used to tune --grid.")]
TeacherOpt = Annotated[
    str,
    typer.Option("--teacher", metavar="OPTIONS", help="npo sample-guide options that define the external teacher."),
]
JobsOpt = Annotated[
    int | None, typer.Option("--jobs", min=1, metavar="N", help="Number of parallel runs. [default: number of cores]")
]


def bench(
    recipe: RecipeArg,
    overrides: OverridesArg = None,
    *,
    methods: MethodsOpt,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Output folder for all runs.", show_default=False)],
    seeds: SeedsOpt = "5",
    grid: GridOpt = None,
    tuning_seeds: TuningOpt = "100,101",
    teacher: TeacherOpt = "",
    jobs: JobsOpt = None,
    figure: Annotated[Path | None, make_figure_option("the mean learning curves of the methods")] = None,
    allow_code: AllowCodeOpt = False,
    dry_run: DryRunOpt = False,
    full: FullOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Train several methods with several seeds.

    With --grid, each method first selects its best value on the tuning seeds. The same command resumes an interrupted
    bench; npo compare DIR and npo report DIR evaluate it.
    """
    from npo_cli.experiments.bench import BenchSpec, run_bench

    spec = BenchSpec(
        recipe=recipe,
        methods=tuple(part.strip() for part in methods.split(",")),
        settings=tuple(overrides or ()),
        seeds=parse_seeds(seeds),
        grid=parse_grid(grid or ()),
        tuning_seeds=parse_seeds(tuning_seeds, as_list=True),
        teacher=teacher,
        out=out,
        jobs=jobs or len(os.sched_getaffinity(0)),
    )
    if dry_run:
        from npo_cli.experiments.bench_dry_run import plan_bench

        print_plan(plan_bench(spec), as_json=as_json)
        return
    from npo_cli.report.conclusions import conclude_bench

    print_records(run_bench(spec), as_json=as_json, full=full, conclude=partial(conclude_bench, out))
    if figure is not None:
        from npo_cli.experiments.compare import compare_runs

        list(compare_runs([str(out)], thresholds=(), baseline=None, figure=figure))
        print_notice(escape_for_terminal(f"picture: {figure}"))


def parse_seeds(text: str, *, as_list: bool = False) -> tuple[int, ...]:
    """`5` is the seeds 0 to 4 (with `as_list` the seed 5), `7,9` these two, `7,` this one."""
    parts = [part.strip() for part in text.removesuffix(",").split(",")]
    if not all(part.isdecimal() and part.isascii() and len(part) < 10 for part in parts):
        raise NpoError(f"seeds are comma-separated whole numbers, got {text!r}", "--seeds 5   # or --seeds 0,1,2")
    numbers = tuple(map(int, parts))
    seeds = numbers if as_list or "," in text else tuple(range(numbers[0]))
    if not seeds or len(set(seeds)) < len(seeds):
        raise NpoError(f"{text!r} names no seed, or a seed twice", "--seeds 5   # or --seeds 0,1,2")
    return seeds


def parse_grid(texts: Sequence[str]) -> tuple[str, ...]:
    """Every combination of one alternative per text: `KEY=VALUE KEY=VALUE ...`.

    `train.lr=1e-4,3e-4 train.num_updates=2` has three alternatives. Two texts may not set the same key.
    """
    hint = "--grid train.lr=1e-4,3e-4,6e-4"
    factors: list[list[str]] = []
    for text in texts:
        factors.append([])
        for word in text.split():
            key, equals, values = word.partition("=")
            if not equals or not key or not values:
                raise NpoError(f"--grid takes KEY=A,B,C, got {text!r}", hint)
            factors[-1] += [f"{key}={value}" for value in values.split(",")]
        if not factors[-1]:
            raise NpoError(f"--grid takes KEY=A,B,C, got {text!r}", hint)
    keys = [{one.partition("=")[0] for one in factor} for factor in factors]
    for key in sorted({key for found in keys for key in found}):
        if sum(key in found for found in keys) > 1:
            raise NpoError(f"two --grid set {key}", hint)
    return tuple(" ".join(combination) for combination in itertools.product(*factors)) if factors else ()
