"""From task settings to a task: where its prompts come from and who verifies them."""

from difflib import get_close_matches

from npo_cli.config.recipe import TaskSettings
from npo_cli.errors import NpoError
from npo_cli.tasks.custom_verifier import is_custom_verifier, make_custom_verifier
from npo_cli.tasks.file_dataset import find_prompt_location, load_file_prompts
from npo_cli.tasks.math_verify import make_math_verifier
from npo_cli.tasks.micro import micro_prompts
from npo_cli.tasks.prompt_format import validate_task_settings
from npo_cli.tasks.reasoning_gym import GymProblems, load_gym_problems, make_gym_verifier
from npo_cli.tasks.shapes import shapes_prompts
from npo_cli.tasks.task import Task
from npo_cli.tasks.verifiers import BUILTIN_VERIFIERS, UnusableAnswer, Verifier
from npo_cli.types.rollouts import Prompt

DEFAULT_VERIFIERS = {"micro": "micro", "reasoning_gym": "reasoning_gym", "file": "math_verify", "shapes": "exact"}
"""What task.verifier `auto` means for each source. It never depends on what is installed: a missing package is an
error, as the same recipe must not be graded in two ways."""
VERIFIER_NAMES = ("auto", "exact", "number", "last_number", "reasoning_gym", "math_verify")


def load_task(settings: TaskSettings, *, seed: int) -> Task:
    """The task of a run. `seed` is the run's, used unless task.seed is set; the same settings give the same task."""
    validate_task_settings(settings)
    pool_seed = seed if settings.seed is None else settings.seed
    problems: GymProblems | None = None
    if settings.source == "micro":
        # The pool is the first part, so that it does not depend on the size of the held-out split.
        prompts = micro_prompts(settings.kind, settings.pool_size + settings.heldout_size, pool_seed)
        train, heldout = tuple(prompts[: settings.pool_size]), tuple(prompts[settings.pool_size :])
    elif settings.source == "shapes":
        prompts = shapes_prompts(settings.pool_size + settings.heldout_size, pool_seed)
        train, heldout = tuple(prompts[: settings.pool_size]), tuple(prompts[settings.pool_size :])
    elif settings.source == "file":
        train, heldout = load_file_prompts(settings, seed=pool_seed)
    else:
        problems = load_gym_problems(settings, seed=pool_seed)
        train, heldout = problems.train, problems.heldout
    grader = choose_verifier(settings, problems=problems)
    try:
        grader.check_answers((*train, *heldout))
    except BaseException as error:
        grader.close()
        if isinstance(error, UnusableAnswer):
            raise NpoError(f"{format_location(error.prompt, settings)}{error.message}", error.hint) from error
        raise
    return Task(train=train, heldout=heldout, verifier=grader)


def format_location(prompt: Prompt, settings: TaskSettings) -> str:
    """`data.jsonl line 3: ` to begin an error with; empty where prompts come from no file."""
    return f"{find_prompt_location(prompt, settings)}: " if settings.source == "file" else ""


def choose_verifier(settings: TaskSettings, *, problems: GymProblems | None) -> Verifier:
    """The grader that task.verifier names. None has started a process yet."""
    verifier = DEFAULT_VERIFIERS[settings.source] if settings.verifier == "auto" else settings.verifier
    workers = {"num_workers": settings.verify_workers, "timeout": settings.verify_timeout}
    if is_custom_verifier(verifier):
        return make_custom_verifier(verifier, **workers)
    if verifier == "reasoning_gym" and problems is not None:
        return make_gym_verifier(problems, **workers)
    if verifier == "math_verify":
        return make_math_verifier(**workers)
    if verifier in BUILTIN_VERIFIERS and (verifier in VERIFIER_NAMES or settings.source == "micro"):
        return BUILTIN_VERIFIERS[verifier]
    if verifier == "reasoning_gym":
        raise NpoError(
            f"task.verifier reasoning_gym judges its own data sets only, and task.source is {settings.source}",
            "set task.verifier=auto",
        )
    near = get_close_matches(verifier, VERIFIER_NAMES, n=1)
    raise NpoError(
        f"task.verifier {verifier!r} is not a verifier",
        f"did you mean {near[0]}?" if near else f"choose one of {', '.join(VERIFIER_NAMES)}, or file.py:function",
    )
