"""`npo recipes`."""

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from npo_cli.cli.completion import complete_recipe
from npo_cli.cli.options import JsonOpt, MethodOpt
from npo_cli.cli.output import print_records
from npo_cli.cli.terminal import print_data

if TYPE_CHECKING:
    from npo_cli.types.views import RecipeView


def recipes(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME",
            help="Recipe to print, with every setting.",
            show_default=False,
            autocompletion=complete_recipe,
        ),
    ] = None,
    *,
    method: MethodOpt = None,
    methods: Annotated[bool, typer.Option("--methods", help="List the shipped methods instead.")] = False,
    as_json: JsonOpt = False,
) -> None:
    """List the shipped recipes and methods, or print a recipe."""
    from npo_cli.config.loading import load_recipe, recipe_to_dict, recipe_to_yaml

    if name is not None:
        recipe = load_recipe(name, method=method)
        print_data(json.dumps(recipe_to_dict(recipe)) if as_json else recipe_to_yaml(recipe).rstrip())
        return
    from npo_cli.types.views import Conclusion

    views = list(_list_methods() if methods else _list_recipes())
    kind, one = ("methods", f"micro --method {views[0].name}") if methods else ("recipes", views[0].name)
    conclusion = Conclusion(sentence=f"{len(views)} {kind} are shipped", next=f"npo recipes {one}")
    print_records([*views, conclusion], as_json=as_json)


def _list_recipes() -> "Iterator[RecipeView]":
    from npo_cli.config.loading import load_recipe
    from npo_cli.config.locate import find_recipe, list_recipe_names
    from npo_cli.types.views import RecipeView

    for name in list_recipe_names():
        yield RecipeView(name=name, description=load_recipe(name).description, path=str(find_recipe(name)))


def _list_methods() -> "Iterator[RecipeView]":
    """The first comment of a method's file is its description."""
    from npo_cli.config.locate import find_method, list_method_names
    from npo_cli.types.views import RecipeView

    for name in list_method_names():
        path = find_method(name)
        first = path.read_text(encoding="utf-8").splitlines()[0]
        yield RecipeView(name=name, description=first.removeprefix("# "), path=str(path))
