"""The verifiers on three rows: the reference answer has to be correct, a wrong response must not be."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Literal

from npo_cli.config.recipe import TaskSettings
from npo_cli.errors import NpoError
from npo_cli.tasks.base import LoadedPrompts, UnusableAnswer, Verifier
from npo_cli.tasks.custom_verifier import check_verifier_file, is_code_allowed, is_custom_verifier
from npo_cli.tasks.task import Task, open_verifiers
from npo_cli.types.rollouts import Prompt
from npo_cli.types.views import ProjectCheck

NUM_ROWS = 3
MAX_ANSWERS = 5
"""Unusable reference answers that are named."""
FORMS = ("{}", "#{}", "#### {}", "\\boxed{{{}}}", "<answer>{}</answer>", "Answer: {}")
"""Forms in which a reference answer is tried as a response."""
WRONG_RESPONSE = "(no answer)"


def check_verifier(
    settings: TaskSettings, loaded: LoadedPrompts, *, places: Mapping[str, str]
) -> Iterator[ProjectCheck]:
    """Whether the verifiers open, read the reference answers, and tell right from wrong.

    `places`: prompt id -> where in a file it is.
    """
    own = [name for name in settings.verifiers if is_custom_verifier(name)]
    faults: list[NpoError] = []
    for name in own:
        try:
            check_verifier_file(name)
        except NpoError as error:
            faults.append(error)
    if not faults and not all(map(is_code_allowed, own)):
        yield ProjectCheck(
            part="verifier",
            state="note",
            message=f"{', '.join(own)} is user code and was not run",
            hint="read the file, then repeat with --allow-code",
        )
        return
    task = None
    try:
        if not faults:
            task = Task(train=loaded.train, heldout=loaded.heldout, verifiers=open_verifiers(settings, loaded))
            for term in task.verifiers:
                prompts = sorted((*loaded.train, *loaded.heldout), key=lambda prompt: prompt.row)
                faults += _find_unusable_answers(term.verifier, prompts, places)
            if not faults:
                yield from _grade_rows(task, settings)
    except NpoError as error:
        faults.append(error)
    finally:
        if task is not None:
            task.close()
    yield from (ProjectCheck(part="verifier", state="fault", message=one.message, hint=one.hint) for one in faults)


def _find_unusable_answers(
    verifier: Verifier, prompts: Sequence[Prompt], places: Mapping[str, str]
) -> Iterator[NpoError]:
    """The first reference answers that no response could match."""
    rest, count = list(prompts), 0
    while rest and count < MAX_ANSWERS:
        try:
            verifier.check_answers(rest)
            return
        except UnusableAnswer as error:
            count += 1
            place = places.get(error.prompt.prompt_id)
            yield NpoError(f"{place}: {error.message}" if place else error.message, error.hint)
            rest = rest[next(at for at, each in enumerate(rest) if each.prompt_id == error.prompt.prompt_id) + 1 :]


def _grade_rows(task: Task, settings: TaskSettings) -> Iterator[ProjectCheck]:
    """Verdicts of the reference answers, in several forms, and of a wrong response."""
    prompts = task.train[:NUM_ROWS]
    has_answers = all(prompt.answer for prompt in prompts)
    forms = FORMS if has_answers else ()
    verdicts = {form: _verdicts(task, prompts, [form.format(each.answer) for each in prompts]) for form in forms}
    wrong = _verdicts(task, prompts, [WRONG_RESPONSE] * len(prompts))
    form = next((form for form in forms if verdicts[form] == ["correct"] * len(prompts)), None)
    name, answer = ", ".join(term.name for term in task.verifiers), prompts[0].answer
    state: Literal["ok", "note", "fault"] = "fault"
    if "timeout" in [*wrong, *chain.from_iterable(verdicts.values())]:
        message = f"{name}: a call takes longer than task.verify_timeout={settings.verify_timeout:g} seconds"
        hint = "make it faster, or raise task.verify_timeout"
    elif wrong == ["correct"] * len(prompts):
        message = f"{name} grades the response {WRONG_RESPONSE!r} as correct, on {len(prompts)} of {len(prompts)} rows"
        hint = "every response would be correct: fix the verifier"
    elif not has_answers:
        state, hint = "ok", ""
        message = f"{name}: {WRONG_RESPONSE!r} is {wrong[0]}; tried on {len(prompts)} rows without a reference answer"
    elif form is None:
        state, tried = "note", " or ".join(repr(form.format(answer)) for form in FORMS)
        message = f"{name} grades the reference answer as correct in none of the forms {tried}"
        hint = "make sure that some response is correct, or nothing can be learned"
    else:
        state, hint = "ok", ""
        right = f"{form.format(answer)!r} is correct"
        message = f"{name}: {right}, {WRONG_RESPONSE!r} is {wrong[0]}; tried on {len(prompts)} rows"
    yield ProjectCheck(part="verifier", state=state, message=message, hint=hint)


def _verdicts(task: Task, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[str]:
    return [result.verdict for result in task.grade(prompts, responses)]
