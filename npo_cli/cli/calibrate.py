"""`npo calibrate`."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from npo_cli.api.checks import load_run_recipe
from npo_cli.cli.checks import parse_steps
from npo_cli.cli.options import (
    AllowCodeOpt,
    BranchOpt,
    FullOpt,
    JsonOpt,
    OverridesArg,
    RunArg,
    make_figure_option,
    make_results_option,
)
from npo_cli.cli.output import print_records
from npo_cli.errors import NpoError
from npo_cli.types.calibration import CandidateGain

NUM_EVALUATIONS = 4


def calibrate(
    run: RunArg,
    overrides: OverridesArg = None,
    *,
    at: Annotated[str, typer.Option("--at", metavar="STEPS", help="Learner steps, such as 0,40.", show_default=False)],
    candidates: Annotated[
        str,
        typer.Option(
            "--candidates",
            metavar="SPECS",
            help="Guide candidates separated by commas: steps, +D for D steps ahead of each learner, or a SPEC without "
            "a comma, such as self,+20,+40,past.",
        ),
    ] = "",
    source: Annotated[
        list[str] | None,
        typer.Option(
            "--source",
            metavar="SPEC",
            help="Any guide candidate, such as run:DIR@160 (see npo sample-guide --help); repeatable.",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, metavar="N", help="Replays of each candidate.")] = 3,
    steps: Annotated[
        int, typer.Option("--steps", min=NUM_EVALUATIONS, metavar="N", help="Steps of a replay, a multiple of 4.")
    ] = 40,
    branch: BranchOpt = None,
    out: Annotated[Path | None, make_results_option("the measured gains")] = None,
    figure: Annotated[Path | None, make_figure_option("a plot of gain against score")] = None,
    allow_code: AllowCodeOpt = False,
    full: FullOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Measure the gain of guide candidates, and how well each score predicts it.

    Each learner is trained for a few steps (a short replay) with each candidate's guide and without one, with the same
    seeds; the gain is the difference in held-out accuracy. The same command resumes an interrupted calibration and adds
    to a finished one. No branch and no checkpoint is made.
    """
    learners = parse_steps(at, option="--at")
    listed = [part.strip() for part in candidates.split(",")] if candidates else []
    specs = [*listed, *(source or ())]
    if not specs:
        raise NpoError("no candidates are given", "--candidates self,+20,+40")
    if steps % NUM_EVALUATIONS:
        raise NpoError(f"--steps {steps} is not a multiple of {NUM_EVALUATIONS}", f"--steps {steps + -steps % 4}")
    load_run_recipe(run, overrides, branch=branch)

    from npo_cli.experiments.calibrate import calibrate_run

    records = calibrate_run(
        run,
        at=tuple(dict.fromkeys(learners)),
        candidates=specs,
        num_seeds=seeds,
        num_steps=steps,
        branch=branch,
        overrides=overrides or (),
        figure=figure,
    )
    from npo_cli.report.conclusions import conclude_calibration

    print_records(
        records,
        as_json=as_json,
        full=full,
        conclude=partial(conclude_calibration, run),
        out=out,
        saved_as=CandidateGain,
    )
