"""`npo autonpo`."""

from pathlib import Path
from typing import Annotated

import typer

from npo_cli.cli.checks import load_run_recipe
from npo_cli.cli.options import BranchOpt, JsonOpt, OverridesArg
from npo_cli.cli.output import print_records
from npo_cli.errors import NpoError, quote_path
from npo_cli.types.autonpo import NonTriggerSpan

FIGURE_FORMATS = (".png", ".svg", ".pdf")

SourceArg = Annotated[
    Path, typer.Argument(metavar="RUN_OR_METRICS", help="A run directory, or a file of JSON lines.", show_default=False)
]
ExplainOpt = Annotated[
    bool, typer.Option("--explain", help="What it would have done on these records, and why it kept still.")
]
StepOpt = Annotated[
    str | None, typer.Option("--step", metavar="COLUMN", help="Column of the step. [default: a known name]")
]
RewardOpt = Annotated[
    str | None, typer.Option("--reward", metavar="COLUMN", help="Column of the reward. [default: a known name]")
]
EntropyOpt = Annotated[
    str | None, typer.Option("--entropy", metavar="COLUMN", help="Column of the entropy. [default: a known name]")
]
OutOpt = Annotated[
    Path | None,
    typer.Option("--out", metavar="FILE", help="Picture: .png, .svg or .pdf. [default: beside the records]"),
]


def autonpo(
    source: SourceArg,
    overrides: OverridesArg = None,
    *,
    explain: ExplainOpt = False,
    step: StepOpt = None,
    reward: RewardOpt = None,
    entropy: EntropyOpt = None,
    out: OutOpt = None,
    branch: BranchOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Tell what AutoNPO did, or would have done.

    With --explain its state machine is let run over recorded metrics, a run's or any other trainer's, with any
    settings: where it would have fired, and why not elsewhere. Nothing is sampled: every trigger counts as accepted.
    """
    given = {"KEY=VALUE": overrides, "--step": step, "--reward": reward, "--entropy": entropy, "--out": out}
    _check(source, explain=explain, branch=branch, given=[name for name, value in given.items() if value])
    if source.is_dir():
        load_run_recipe(source, None, branch=branch)
    if not explain:
        from npo_cli.autonpo.dry_run import report_history

        print_records(report_history(source, branch=branch), as_json=as_json)
        return
    _check_picture(out)

    from npo_cli.autonpo.dry_run import explain_autonpo
    from npo_cli.autonpo.trainer_logs import LogColumns

    columns = LogColumns(step=step, reward=reward, entropy=entropy)
    shown = out is not None or not as_json
    records = explain_autonpo(
        source, columns=columns, overrides=overrides or (), branch=branch, figure_path=out, draw=shown
    )
    # One JSON object a move: why nothing happened elsewhere is for tables.
    print_records((one for one in records if not (as_json and isinstance(one, NonTriggerSpan))), as_json=as_json)


def _check(source: Path, *, explain: bool, branch: str | None, given: list[str]) -> None:
    """What only one of the two kinds of source, or only --explain, can answer is refused at once."""
    if not source.exists():
        raise NpoError(f"there is no run directory or file {source}", "name a run directory, or a file of JSON lines")
    again = f"npo autonpo {quote_path(source)} --explain"
    if not explain and given:
        raise NpoError(f"{given[0]} belongs to --explain", again)
    if source.is_dir():
        return
    if not explain:
        raise NpoError(f"{source} is a file: what really happened is told of a run directory", again)
    if branch is not None:
        raise NpoError(f"--branch names a branch of a run, and {source} is a file", again)


def _check_picture(out: Path | None) -> None:
    """A file, whose ending says which kind of picture."""
    if out is None:
        return
    if out.is_dir():
        raise NpoError(f"--out {out} is a folder", f"--out {quote_path(out / 'autonpo.png')}")
    if out.suffix not in FIGURE_FORMATS:
        raise NpoError(f"--out {out}: a picture ends in {', '.join(FIGURE_FORMATS)}", f"--out {quote_path(out)}.png")
