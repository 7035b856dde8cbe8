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
    typer.Option("--source", metavar="KIND[=WHAT]", help="One more source, of the list above; may be repeated."),
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

    The learner itself and its later steps are always compared. --source adds: past (what it once got right), base (step
    0), extrapolated=SPACE:K:A (the learner pushed along its own motion; logits:20,40:1,2 is a grid of four),
    model=FOLDER_OR_HUB_ID, run=OTHER_RUN[:BRANCH], file=TRACES, endpoint=NAME@http://127.0.0.1:8000/v1.
    """
    chosen = None if candidates is None else parse_steps(candidates)
    load_run_recipe(run, overrides, branch=branch)

    from npo_cli.guides.score import parse_source_specs
    from npo_cli.guides.score import score_sources as scored

    records = scored(
        run,
        at=at,
        candidates=chosen,
        far=far,
        sources=[ask for text in source or () for ask in parse_source_specs(text)],
        branch=branch,
        figure=figure,
        overrides=overrides or (),
    )
    print_records(records, as_json=as_json)
