"""`npo recipes`."""

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from npo_cli.cli.console import draw
from npo_cli.cli.options import JsonOpt
from npo_cli.cli.terminal import say

if TYPE_CHECKING:
    from npo_cli.report.lines import RecipeLine


def recipes(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Print this one whole.", show_default=False)
    ] = None,
    *,
    method: Annotated[
        str | None, typer.Option("--method", metavar="NAME", help="With this method on top of it.")
    ] = None,
    methods: Annotated[bool, typer.Option("--methods", help="List the methods instead.")] = False,
    as_json: JsonOpt = False,
) -> None:
    """List the shipped recipes, or print one whole."""
    from npo_cli.loading import load_recipe, recipe_dict, recipe_yaml

    if name is not None:
        recipe = load_recipe(name, method=method)
        say(json.dumps(recipe_dict(recipe)) if as_json else recipe_yaml(recipe).rstrip())
        return
    draw(list(_methods() if methods else _recipes()), as_json=as_json)


def _recipes() -> "Iterator[RecipeLine]":
    from npo_cli.loading import load_recipe
    from npo_cli.recipe_files import recipe_names, recipe_path
    from npo_cli.report.lines import RecipeLine

    for name in recipe_names():
        yield RecipeLine(name=name, description=load_recipe(name).description, path=str(recipe_path(name)))


def _methods() -> "Iterator[RecipeLine]":
    """Their first comment says what they are."""
    from npo_cli.recipe_files import method_names, method_path
    from npo_cli.report.lines import RecipeLine

    for name in method_names():
        path = method_path(name)
        first = path.read_text(encoding="utf-8").splitlines()[0]
        yield RecipeLine(name=name, description=first.removeprefix("# "), path=str(path))
