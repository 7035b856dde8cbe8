"""`npo eval`."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from npo_cli.cli.completion import complete_step
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
from npo_cli.cli.terminal import escape_for_terminal, print_notice
from npo_cli.types.rollouts import EvalReport


def evaluate(
    run: RunArg,
    overrides: OverridesArg = None,
    *,
    step: Annotated[
        int | None,
        typer.Option(
            "--step",
            min=0,
            metavar="N",
            help="Step of the checkpoint. [default: the last]",
            autocompletion=complete_step,
        ),
    ] = None,
    every_step: Annotated[bool, typer.Option("--all", help="Every checkpoint of the branch.")] = False,
    branch: BranchOpt = None,
    allow_code: AllowCodeOpt = False,
    out: Annotated[Path | None, make_results_option("the evaluations")] = None,
    figure: Annotated[Path | None, make_figure_option("the curve of held-out accuracy")] = None,
    full: FullOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Evaluate checkpoints on the held-out prompts.

    avg@k and pass@k, with 95 % intervals over prompts.
    """
    from npo_cli.api.training import evaluate as evaluate_run

    records = evaluate_run.stream(run, step=step, every_step=every_step, branch=branch, overrides=overrides or ())
    from npo_cli.report.conclusions import conclude_eval

    conclude = partial(conclude_eval, run)
    print_records(records, as_json=as_json, full=full, conclude=conclude, out=out, saved_as=EvalReport)
    if figure is not None:
        from npo_cli.report.run_figures import plot_topic

        plot_topic(run, "costs", figure, branch=branch)
        print_notice(escape_for_terminal(f"picture: {figure}"))
