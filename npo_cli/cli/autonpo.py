"""`npo autonpo`."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from npo_cli.api.checks import check_figure_path, load_run_recipe
from npo_cli.cli.options import BranchOpt, FullOpt, JsonOpt, OverridesArg, make_results_option
from npo_cli.cli.output import print_records
from npo_cli.errors import NpoError, quote_path
from npo_cli.types.autonpo import NonTriggerSpan, Transition

SourceArg = Annotated[
    Path,
    typer.Argument(
        metavar="RUN_OR_METRICS",
        help="Run directory, or metrics of a trainer: .jsonl, .csv, trainer_state.json, TensorBoard event files.",
        show_default=False,
    ),
]
ExplainOpt = Annotated[
    bool,
    typer.Option(
        "--explain", help="Dry run on the recorded metrics: when it would have triggered, and why not elsewhere."
    ),
]
StepOpt = Annotated[
    str | None, typer.Option("--step", metavar="COLUMN", help="explain: column with the step. [default: a known name]")
]
RewardOpt = Annotated[
    str | None,
    typer.Option("--reward", metavar="COLUMN", help="explain: column with the reward. [default: a known name]"),
]
EntropyOpt = Annotated[
    str | None,
    typer.Option("--entropy", metavar="COLUMN", help="explain: column with the entropy. [default: a known name]"),
]
FigureOpt = Annotated[
    Path | None,
    typer.Option(
        "--figure", metavar="FILE", help="explain: figure (.png, .svg or .pdf). [default: beside the metrics]"
    ),
]


def autonpo(
    source: SourceArg,
    overrides: OverridesArg = None,
    *,
    explain: ExplainOpt = False,
    step: StepOpt = None,
    reward: RewardOpt = None,
    entropy: EntropyOpt = None,
    figure: FigureOpt = None,
    out: Annotated[Path | None, make_results_option("every transition")] = None,
    branch: BranchOpt = None,
    full: FullOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Show what AutoNPO did in a run, or would have done.

    With --explain, its state machine runs on recorded metrics of a run or of another trainer (TRL, verl, prime-rl,
    wandb exports, TensorBoard), with any settings. Nothing is sampled: every trigger counts as accepted.
    """
    given = {"KEY=VALUE": overrides, "--step": step, "--reward": reward, "--entropy": entropy, "--figure": figure}
    _check(source, explain=explain, branch=branch, given=[name for name, value in given.items() if value])
    from npo_cli.storage.layout import is_run_directory

    if is_run_directory(source):
        load_run_recipe(source, None, branch=branch)
    if not explain:
        from npo_cli.autonpo.dry_run import report_history
        from npo_cli.report.conclusions import conclude_autonpo

        conclude = partial(conclude_autonpo, source)
        print_records(
            report_history(source, branch=branch),
            as_json=as_json,
            full=full,
            conclude=conclude,
            out=out,
            saved_as=Transition,
        )
        return
    check_figure_path(figure)

    from npo_cli.autonpo.dry_run import explain_autonpo
    from npo_cli.autonpo.trainer_logs import LogColumns

    columns = LogColumns(step=step, reward=reward, entropy=entropy)
    shown = figure is not None or not as_json
    records = explain_autonpo(
        source, columns=columns, overrides=overrides or (), branch=branch, figure_path=figure, draw=shown
    )
    # With --json only transitions are printed, not the spans without a trigger.
    printed = (one for one in records if not (as_json and isinstance(one, NonTriggerSpan)))
    print_records(printed, as_json=as_json, full=full, out=out, saved_as=Transition)


def _check(source: Path, *, explain: bool, branch: str | None, given: list[str]) -> None:
    """Refuse options that need --explain or a run directory."""
    if not source.exists():
        raise NpoError(f"there is no run directory or file {source}", "name a run directory, or metrics of a trainer")
    from npo_cli.storage.layout import is_run_directory

    again = f"npo autonpo {quote_path(source)} --explain"
    if not explain and given:
        raise NpoError(f"{given[0]} needs --explain", again)
    if is_run_directory(source):
        return
    if not explain:
        raise NpoError(f"{source} is not a run directory, which is needed without --explain", again)
    if branch is not None:
        raise NpoError(f"--branch needs a run directory, and {source} is none", again)
