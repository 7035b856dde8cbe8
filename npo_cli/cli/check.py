"""`npo check`."""

import shlex

from npo_cli.cli.options import AllowCodeOpt, JsonOpt, MethodOpt, OverridesArg, RecipeArg
from npo_cli.cli.output import print_records
from npo_cli.errors import NpoError
from npo_cli.types.views import Conclusion


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
    faults = [each for each in checks if each.state == "fault"]
    if not faults:
        conclusion = Conclusion(sentence=f"{recipe} has no fault.", next=f"npo train {shlex.quote(recipe)}")
        print_records([*checks, conclusion], as_json=as_json)
        return
    print_records(checks, as_json=as_json)
    count = "a fault" if len(faults) == 1 else f"{len(faults)} faults"
    raise NpoError(f"{recipe} has {count}, listed above", faults[0].hint)
