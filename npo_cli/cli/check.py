"""`npo check`."""

import shlex

from npo_cli.cli.options import AllowCodeOpt, JsonOpt, MethodOpt, OverridesArg, RecipeArg
from npo_cli.cli.output import print_records
from npo_cli.cli.terminal import escape_for_terminal, print_data
from npo_cli.errors import NpoError


def check(
    recipe: RecipeArg,
    overrides: OverridesArg = None,
    *,
    method: MethodOpt = None,
    allow_code: AllowCodeOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Check a recipe, its data, verifier and model before training.

    All faults are listed at once, each with its fix: settings, rows of the data, the verifier on three rows, the model
    folder, packages and engine, lengths of the prompts, memory and disk. Nothing is written. The exit code is 2 if
    there is a fault.
    """
    from npo_cli.preflight.project import check_project

    checks = list(check_project(recipe, overrides or (), method=method))
    print_records(checks, as_json=as_json)
    faults = [each for each in checks if each.state == "fault"]
    if faults:
        count = "a fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise NpoError(f"{recipe} has {count}, listed above", faults[0].hint)
    if not as_json:
        print_data(escape_for_terminal(f"no fault; next: npo train {shlex.quote(recipe)}"))
