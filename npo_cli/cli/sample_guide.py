"""`npo sample-guide`."""

from typing import Annotated, Literal

import typer

from npo_cli.cli.checks import load_run_recipe
from npo_cli.cli.options import AllowCodeOpt, BranchOpt, JsonOpt, OverridesArg, RunArg
from npo_cli.cli.output import print_records

GuideOpt = Annotated[
    int | None,
    typer.Option(
        "--guide",
        min=1,
        metavar="STEP",
        help="Step of the guide. [default: guide.replay.guide_step; of a run: its newest]",
    ),
]
AtOpt = Annotated[
    int | None, typer.Option("--at", min=0, metavar="STEP", help="Step of the learner. [default: guide.replay.at_step]")
]
StepsOpt = Annotated[
    int | None,
    typer.Option("--steps", min=1, metavar="N", help="Length of the replay. [default: guide minus at, or the rest]"),
]
SourceOption = Literal["checkpoint", "self", "base", "extrapolated", "model", "endpoint", "file", "past", "run"]
SourceOpt = Annotated[SourceOption, typer.Option("--source", metavar="KIND", help="Who is asked, of the list above.")]
OriginOpt = Annotated[
    str | None,
    typer.Option(
        "--from", metavar="WHAT", help="Where a model, endpoint, file or run is found; extrapolated: SPACE:K:A."
    ),
]
ModelOpt = Annotated[str | None, typer.Option("--model", metavar="NAME", help="endpoint: name of its model.")]


def sample_guide(
    run: RunArg,
    overrides: OverridesArg = None,
    *,
    guide: GuideOpt = None,
    at: AtOpt = None,
    steps: StepsOpt = None,
    source: SourceOpt = "checkpoint",
    origin: OriginOpt = None,
    model: ModelOpt = None,
    name: Annotated[str | None, typer.Option("--name", metavar="NAME", help="Name of the guide cache.")] = None,
    branch: BranchOpt = None,
    allow_code: AllowCodeOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Keep correct answers of a later step, or of others.

    Asked are the prompts that a replay from --at will visit; one verified-correct answer a prompt is kept.
    --source: checkpoint (a later step of the run), self (the learner), base (step 0), extrapolated
    (the learner pushed along its own motion, --from logits:20:1 or weights:20:1), model (--from a folder or hub
    id), endpoint (--from an address that speaks OpenAI's language), file (--from traces in .jsonl or .parquet), past
    (the run's own earlier successes), run (--from another run, --guide a step of it).
    """
    load_run_recipe(run, overrides, branch=branch)

    from npo_cli.guides.registry import SourceSpec
    from npo_cli.guides.sample_guide import build_guide_cache

    records = build_guide_cache(
        run,
        spec=SourceSpec(kind=source, guide_step=guide, origin=origin, model=model),
        at=at,
        name=name,
        branch=branch,
        steps=steps,
        overrides=overrides or (),
    )
    print_records(records, as_json=as_json)
