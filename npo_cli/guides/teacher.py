"""The teacher of a dense target as a guide source: found and checked, not loaded. The policy itself is none.

Which checkpoint it is follows from the recipe and from where the branch was forked, so a run that is resumed has the
same teacher.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from npo_cli.config.recipe import Recipe
from npo_cli.config.target import OWN_POLICY
from npo_cli.errors import NpoError, quote_path
from npo_cli.guides.source import GuideSource, ReplayTarget, create_source, make_spec, parse_spec
from npo_cli.registry import GUIDE_SOURCES
from npo_cli.session.learner import Learner
from npo_cli.storage.checkpoints import find_checkpoint
from npo_cli.storage.layout import FIRST_BRANCH, RunDir


def find_teacher(run: RunDir, recipe: Recipe, *, parent: str | None, fork_step: int) -> GuideSource:
    """The source of `target.teacher`, checked without loading it, for a branch that leaves `parent` at `fork_step`.

    Raises NpoError if the source has no distribution per token, or is not there.
    """
    assert recipe.target.teacher is not None, "the recipe has no dense target"
    spec = parse_spec(recipe.target.teacher)
    with named_in_errors(spec.text):
        kind: type[GuideSource] = GUIDE_SOURCES.get(spec.name)
        if not kind.has_distribution:
            raise NpoError(
                f"source {spec.name} has no distribution per token",
                "use checkpoint:STEP, scout:BRANCH, run:DIR@STEP, model:FOLDER_OR_ID or policy",
            )
        if kind.is_of_run and parent is None:
            raise NpoError(
                "a run begins without checkpoints of its own",
                f"fork it later: npo resume {quote_path(run.root)} --at STEP --no-guide target.kind="
                f"{recipe.target.kind} target.teacher={spec.text}; or use run:DIR@STEP, model:FOLDER_OR_ID",
            )
        checkpoint = None if parent is None else find_checkpoint(run, parent, fork_step)
        learner = Learner(recipe=recipe, branch=parent or FIRST_BRANCH, checkpoint=checkpoint)
        if spec.name == "run" and "step" not in spec.options:
            raise NpoError("without a step it would change while that run is trained", f"{spec.text}@STEP")
        return create_source(spec, ReplayTarget(run=run, learner=learner))


def settle_teacher(
    run: RunDir, recipe: Recipe, *, parent: str, fork_step: int
) -> tuple[Recipe, tuple[str, int] | None]:
    """The recipe of a fork with its teacher's whole SPEC, which is the same after every resume, however long a scout is
    trained; and branch and step of the checkpoint that the teacher needs besides the fork's, None if it needs none. Of
    an extrapolated policy that is the older copy."""
    if not recipe.has_target or recipe.target.is_self_taught:
        return recipe, None
    source = find_teacher(run, recipe, parent=parent, fork_step=fork_step)
    if source.place is None:
        return recipe, None if source.older_step is None else (parent, source.older_step)
    target = recipe.target.model_copy(update={"teacher": source.spec.text})
    return recipe.model_copy(update={"target": target}), source.place


@contextmanager
def named_in_errors(spec: str) -> Iterator[None]:
    """Errors of the block begin with the setting."""
    try:
        yield
    except NpoError as error:
        raise NpoError(f"target.teacher={spec}: {error.message}", error.hint) from error


def make_teacher_absolute(text: str) -> str:
    """The SPEC with an absolute path of its run or model folder, so that the run can be resumed from any folder."""
    if text == OWN_POLICY:
        return text
    spec = parse_spec(text)
    paths = {
        name: str(Path(str(spec.options[name])).expanduser().absolute())
        for name in {"run": ("dir",), "model": ("model",)}.get(spec.name, ())
        if Path(str(spec.options[name])).expanduser().is_dir()
    }
    return make_spec(spec.name, {**spec.options, **paths}).text if paths else text
