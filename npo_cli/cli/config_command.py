"""`npo config`: the settings of a recipe, explained."""

import json
from typing import Annotated

import typer

from npo_cli.cli.completion import complete_key
from npo_cli.cli.options import JsonOpt
from npo_cli.cli.output import print_records
from npo_cli.cli.terminal import print_data
from npo_cli.errors import NpoError

KeyArg = Annotated[
    str | None,
    typer.Argument(
        metavar="KEY", help="Section or setting, such as train.lr.", show_default=False, autocompletion=complete_key
    ),
]
SchemaOpt = Annotated[
    bool, typer.Option("--schema", help="Print the JSON schema of recipe files, for the completion of editors.")
]


def config(key: KeyArg = None, *, schema: SchemaOpt = False, as_json: JsonOpt = False) -> None:
    """Explain the settings of a recipe.

    Without KEY: the sections. With a section: its settings. With a setting: its meaning, type, default, allowed values,
    when it may change, and the shipped recipes and methods with another value.
    """
    if schema and key is not None:
        raise NpoError("--schema prints the schema of a whole recipe, without KEY", "npo config --schema")

    from npo_cli.config.describe import build_schema, describe_config

    if schema:
        print_data(json.dumps(build_schema(), indent=None if as_json else 2, ensure_ascii=False))
        return
    print_records(describe_config(key), as_json=as_json)
