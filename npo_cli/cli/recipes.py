"""`npo recipes`."""

import json
from typing import Annotated

import typer

from npo_cli.cli.console import draw, say
from npo_cli.cli.options import JsonOpt


def recipes(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Print this one whole.", show_default=False)
    ] = None,
    as_json: JsonOpt = False,
) -> None:
    """List the shipped recipes, or print one whole."""
    from npo_cli.loading import load_recipe, recipe_dict, recipe_names, recipe_path, recipe_yaml
    from npo_cli.report.lines import RecipeLine

    if name is not None:
        recipe = load_recipe(name)
        say(json.dumps(recipe_dict(recipe)) if as_json else recipe_yaml(recipe).rstrip())
        return
    named = [(each, load_recipe(each)) for each in recipe_names()]
    lines = [
        RecipeLine(name=each, description=recipe.description, path=str(recipe_path(each))) for each, recipe in named
    ]
    draw(lines, as_json=as_json)
