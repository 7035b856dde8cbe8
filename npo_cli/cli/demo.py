"""`npo demo`."""

from pathlib import Path
from typing import Annotated

import typer

from npo_cli.cli.options import FullOpt, JsonOpt
from npo_cli.cli.output import print_records


def demo(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="New folder for the runs and the figure.")] = Path(
        "npo-demo"
    ),
    seed: Annotated[int, typer.Option("--seed", help="Seed of all runs.")] = 0,
    full: FullOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Run the whole workflow on a small task.

    Trains GRPO and NPO on the built-in arithmetic task, and ends with a table and a figure that compare them.
    """
    from npo_cli.config.loading import load_recipe
    from npo_cli.storage.layout import check_unused

    check_unused(out, flag="--out")

    from npo_cli.experiments.demo import RECIPE, run_demo
    from npo_cli.types.costs import CostToThreshold

    num_steps = load_recipe(RECIPE).train.num_steps
    print_records(run_demo(out, seed=seed), as_json=as_json, num_steps=num_steps, full=full, tables=(CostToThreshold,))
