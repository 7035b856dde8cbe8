"""`npo score-checkpoints`."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from npo_cli.api.checks import check_figure_path
from npo_cli.cli.checks import parse_steps
from npo_cli.cli.options import AllowCodeOpt, AtOpt, BranchOpt, DryRunOpt, FullOpt, JsonOpt, OverridesArg, RunArg
from npo_cli.cli.output import print_records


def score_checkpoints(
    run: RunArg,
    overrides: OverridesArg = None,
    *,
    at: AtOpt = None,
    candidates: Annotated[
        str | None,
        typer.Option(
            "--candidates",
            metavar="STEPS",
            help="Later checkpoints, such as 60,80: one --source each. [default: all, if no --source is given]",
        ),
    ] = None,
    source: Annotated[
        list[str] | None,
        typer.Option(
            "--source",
            metavar="SPEC",
            help="Guide source, such as self, past or model:FOLDER (see npo sample-guide --help); repeatable.",
        ),
    ] = None,
    branch: BranchOpt = None,
    figure: Annotated[
        Path | None, typer.Option("--figure", metavar="FILE", help="Save a plot of Q, V and S (.png, .svg or .pdf).")
    ] = None,
    allow_code: AllowCodeOpt = False,
    dry_run: DryRunOpt = False,
    full: FullOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Rank guide candidates for a learner by S = Q_net/V.

    Q_net: pass rate on prompts that the learner fails, minus the learner's own second try. V: variance that the
    candidate's samples bring into the learner's gradient. Candidates are later checkpoints of the run, any other guide
    source, and always no guide at all, which may win. Each figure has a 95 % interval.
    """
    check_figure_path(figure)
    steps = () if candidates is None else parse_steps(candidates)

    arguments: dict[str, Any] = {
        "at": at,
        "candidates": [*steps, *(source or ())] or None,
        "branch": branch,
        "overrides": overrides or (),
        "figure": figure,
    }
    if dry_run:
        from npo_cli.api.dry_run import plan_score

        print_records(plan_score(run, **arguments), as_json=as_json)
        return
    from npo_cli.api.guides import score

    records = score.stream(run, **arguments)
    from npo_cli.report.verdicts import conclude_scoring

    conclude = partial(conclude_scoring, run, at, branch)
    print_records(records, as_json=as_json, full=full, conclude=conclude)
