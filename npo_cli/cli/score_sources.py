"""`npo score-sources`."""

from pathlib import Path
from typing import Annotated

import typer

from npo_cli.cli.checks import load_run_recipe, parse_steps
from npo_cli.cli.options import AllowCodeOpt, BranchOpt, JsonOpt, OverridesArg, RunArg
from npo_cli.cli.output import print_records

AtOpt = Annotated[
    int | None, typer.Option("--at", min=0, metavar="STEP", help="Step of the learner. [default: guide.replay.at_step]")
]
CandidatesOpt = Annotated[
    str | None, typer.Option("--candidates", metavar="STEPS", help="Such as 20,40,60. [default: every later step]")
]
SourcesOpt = Annotated[
    list[str] | None,
    typer.Option("--source", metavar="SPEC", help="One more guide source; may be repeated."),
]


def score_sources(
    run: RunArg,
    overrides: OverridesArg = None,
    *,
    at: AtOpt = None,
    candidates: CandidatesOpt = None,
    far: Annotated[int | None, typer.Option("--far", min=1, metavar="STEP", help="The far future.")] = None,
    source: SourcesOpt = None,
    figure: Annotated[Path | None, typer.Option("--figure", metavar="FILE", help="Draw it: F.png or F.svg.")] = None,
    branch: BranchOpt = None,
    allow_code: AllowCodeOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Compare past, futures and teachers by S = Q/V.

    The learner itself and its later steps are always compared. --source SPEC adds one more, in the form that npo
    sample-guide --help lists.
    """
    chosen = None if candidates is None else parse_steps(candidates)
    load_run_recipe(run, overrides, branch=branch)

    from npo_cli.guides.registry import parse_spec
    from npo_cli.guides.score import score_sources as scored

    records = scored(
        run,
        at=at,
        candidates=chosen,
        far=far,
        sources=[parse_spec(text) for text in source or ()],
        branch=branch,
        figure=figure,
        overrides=overrides or (),
    )
    print_records(records, as_json=as_json)
