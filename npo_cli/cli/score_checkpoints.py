"""`npo score-checkpoints`."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from npo_cli.cli.checks import parse_steps
from npo_cli.cli.completion import complete_source, complete_steps
from npo_cli.cli.options import (
    AllowCodeOpt,
    AtOpt,
    BranchOpt,
    DryRunOpt,
    FullOpt,
    JsonOpt,
    OverridesArg,
    RunArg,
    make_figure_option,
    make_results_option,
)
from npo_cli.cli.output import print_plan, print_records
from npo_cli.errors import NpoError
from npo_cli.types.scores import CandidateScore


def score_checkpoints(
    run: RunArg,
    overrides: OverridesArg = None,
    *,
    at: AtOpt = None,
    candidates: Annotated[
        str | None,
        typer.Option(
            "--candidates",
            autocompletion=complete_steps,
            metavar="STEPS",
            help="Later checkpoints, such as 60,80: one --source each. [default: all, if no --source is given]",
        ),
    ] = None,
    source: Annotated[
        list[str] | None,
        typer.Option(
            "--source",
            autocompletion=complete_source,
            metavar="SPEC",
            help="Guide source, such as self, past or model:FOLDER (see npo sample-guide --help); repeatable.",
        ),
    ] = None,
    branch: BranchOpt = None,
    out: Annotated[Path | None, make_results_option("the scores")] = None,
    figure: Annotated[Path | None, make_figure_option("a plot of Q_net, V and S")] = None,
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
    if dry_run and out is not None:
        raise NpoError("--out has no effect with --dry-run, which scores nothing", "leave one of the two out")
    steps = () if candidates is None else parse_steps(candidates)

    from npo_cli.api.guides import score

    records = score.stream(
        run,
        at=at,
        candidates=[*steps, *(source or ())] or None,
        branch=branch,
        overrides=overrides or (),
        figure=figure,
    )
    if dry_run:
        print_plan(records.plan(), as_json=as_json)
        return
    from npo_cli.report.conclusions import conclude_scoring

    conclude = partial(conclude_scoring, run, at, branch)
    print_records(records, as_json=as_json, full=full, conclude=conclude, out=out, saved_as=CandidateScore)
