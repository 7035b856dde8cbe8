"""From task settings to a task: where its prompts come from and who verifies them."""

from difflib import get_close_matches

from npo_cli.config import TaskSettings
from npo_cli.errors import NpoError
from npo_cli.records import Prompt
from npo_cli.tasks.files import file_problems, place_of
from npo_cli.tasks.gym import GymProblems, gym_grader, gym_problems
from npo_cli.tasks.math_pool import math_grader
from npo_cli.tasks.micro import micro_prompts
from npo_cli.tasks.prompts import Task
from npo_cli.tasks.shape import refuse_idle_settings
from npo_cli.tasks.shapes import shapes_prompts
from npo_cli.tasks.user_code import is_user_code, user_grader
from npo_cli.tasks.verify import JUDGES, Grader, UnusableAnswer

AUTO = {"micro": "micro", "reasoning_gym": "reasoning_gym", "file": "math_verify", "shapes": "exact"}
"""What task.verifier `auto` means for each source. It never depends on what is installed: a missing package is an
error, as the same recipe must not be graded in two ways."""
NAMES = ("auto", "exact", "number", "last_number", "reasoning_gym", "math_verify")


def load_task(settings: TaskSettings, *, seed: int, allow_code: bool = False) -> Task:
    """The task of a run. `seed` is the run's, used unless task.seed is set; the same settings give the same task."""
    refuse_idle_settings(settings)
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
        train, heldout = file_problems(settings, seed=pool_seed)
    else:
        problems = gym_problems(settings, seed=pool_seed)
        train, heldout = problems.train, problems.heldout
    grader = choose_grader(settings, problems=problems, allow_code=allow_code)
    try:
        grader.check_answers((*train, *heldout))
    except BaseException as error:
        grader.close()
        if isinstance(error, UnusableAnswer):
            raise NpoError(f"{where(error.prompt, settings)}{error.message}", error.hint) from error
        raise
    return Task(train=train, heldout=heldout, grader=grader)


def where(prompt: Prompt, settings: TaskSettings) -> str:
    """`data.jsonl line 3: ` to begin an error with; empty where prompts come from no file."""
    return f"{place_of(prompt, settings)}: " if settings.source == "file" else ""


def choose_grader(settings: TaskSettings, *, problems: GymProblems | None, allow_code: bool) -> Grader:
    """The grader that task.verifier names. None has started a process yet."""
    verifier = AUTO[settings.source] if settings.verifier == "auto" else settings.verifier
    workers = {"num_workers": settings.verify_workers, "timeout": settings.verify_timeout}
    if is_user_code(verifier):
        return user_grader(verifier, allow_code=allow_code, **workers)
    if verifier == "reasoning_gym" and problems is not None:
        return gym_grader(problems, **workers)
    if verifier == "math_verify":
        return math_grader(**workers)
    if verifier in JUDGES and (verifier in NAMES or settings.source == "micro"):
        return JUDGES[verifier]
    if verifier == "reasoning_gym":
        raise NpoError(
            f"task.verifier reasoning_gym judges its own data sets only, and task.source is {settings.source}",
            "set task.verifier=auto",
        )
    near = get_close_matches(verifier, NAMES, n=1)
    raise NpoError(
        f"task.verifier {verifier!r} is not a verifier",
        f"did you mean {near[0]}?" if near else f"choose one of {', '.join(NAMES)}, or file.py:function",
    )
