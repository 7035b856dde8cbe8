"""`npo sample-guide`."""

from functools import partial
from typing import Annotated

import typer

from npo_cli.cli.completion import complete_source
from npo_cli.cli.options import AllowCodeOpt, AtOpt, BranchOpt, DryRunOpt, FullOpt, JsonOpt, OverridesArg, RunArg
from npo_cli.cli.output import print_plan, print_records
from npo_cli.guides.source import describe_sources

SourceOpt = Annotated[
    str | None,
    typer.Option(
        "--source",
        autocompletion=complete_source,
        metavar="SPEC",
        help="Guide source, one of the list above. [default: the choice of the newest scoring of this learner, else "
        "guide.replay.guide_step]",
        show_default=False,
    ),
]
StepsOpt = Annotated[
    int | None,
    typer.Option(
        "--steps", min=1, metavar="N", help="Length of the replay. [default: up to the guide, or the rest of the run]"
    ),
]


def sample_guide(
    run: RunArg,
    overrides: OverridesArg = None,
    *,
    at: AtOpt = None,
    source: SourceOpt = None,
    steps: StepsOpt = None,
    name: Annotated[str | None, typer.Option("--name", metavar="NAME", help="Name of the guide cache.")] = None,
    branch: BranchOpt = None,
    allow_code: AllowCodeOpt = False,
    dry_run: DryRunOpt = False,
    full: FullOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Build a guide cache: sample a guide on the prompts of a replay."""
    from npo_cli.api.guides import sample_guide as build_guide_cache

    records = build_guide_cache.stream(
        run,
        at=at,
        source=source,
        name=name,
        steps=steps,
        branch=branch,
        overrides=overrides or (),
    )
    if dry_run:
        print_plan(records.plan(), as_json=as_json)
        return
    from npo_cli.report.conclusions import conclude_guide

    print_records(records, as_json=as_json, full=full, conclude=partial(conclude_guide, run))


_SOURCES = "\n".join(f"  {line}" for line in describe_sources().splitlines())
sample_guide.__doc__ = f"""Build a guide cache: sample a guide on the prompts of a replay.

The prompts are those that training visits after --at; verified-correct responses are kept.

\b
SPEC of --source:
{_SOURCES}
"""
