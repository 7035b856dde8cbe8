"""From task settings to a task: prompts of the source, and the verifier, both chosen by name."""

from npo_cli.config.recipe import TaskSettings
from npo_cli.errors import NpoError
from npo_cli.registry import TASKS, VERIFIERS
from npo_cli.tasks.base import LoadedPrompts, TaskSource, UnusableAnswer, Verifier
from npo_cli.tasks.custom_verifier import is_custom_verifier, make_custom_verifier
from npo_cli.tasks.task import Task
from npo_cli.types.rollouts import Prompt


def load_task(settings: TaskSettings, *, seed: int) -> Task:
    """The task of a run. `seed` is the run's, used unless task.seed is set; the same settings give the same task."""
    source: type[TaskSource] = TASKS.get(settings.source)
    source.validate(settings)
    loaded = source.load(settings, seed=seed if settings.seed is None else settings.seed)
    verifier = open_verifier(settings, loaded)
    try:
        verifier.check_answers((*loaded.train, *loaded.heldout))
    except BaseException as error:
        verifier.close()
        if isinstance(error, UnusableAnswer):
            raise NpoError(f"{source.locate(error.prompt, settings)}{error.message}", error.hint) from error
        raise
    return Task(train=loaded.train, heldout=loaded.heldout, verifier=verifier)


def format_location(prompt: Prompt, settings: TaskSettings) -> str:
    """`data.jsonl line 3: ` to start an error with; empty if prompts come from no file."""
    return TASKS.get(settings.source).locate(prompt, settings)


def open_verifier(settings: TaskSettings, loaded: LoadedPrompts) -> Verifier:
    """The verifier that task.verifier names: a registered one, or `file.py:function`."""
    name = TASKS.get(settings.source).default_verifier if settings.verifier == "auto" else settings.verifier
    if is_custom_verifier(name):
        return make_custom_verifier(name, num_workers=settings.verify_workers, timeout=settings.verify_timeout)
    if name not in VERIFIERS.names():
        raise NpoError(
            f"task.verifier={name} is not a known verifier", f"{VERIFIERS.suggest(name)} (or file.py:function)"
        )
    verifier: type[Verifier] = VERIFIERS.get(name)
    if verifier.sources and settings.source not in verifier.sources:
        raise NpoError(
            f"task.verifier={name} needs task.source={' or '.join(verifier.sources)}, but task.source is "
            f"{settings.source}",
            "set task.verifier=auto",
        )
    return verifier.open(settings, loaded)
