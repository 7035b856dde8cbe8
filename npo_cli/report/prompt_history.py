"""Prompts through training: every visit along a lineage, when it was solved, when a guide was injected.

A report shows a few of them; the same run always shows the same ones.
"""

from collections.abc import Container, Iterator, Sequence
from itertools import pairwise
from typing import TypeVar

from npo_cli.registry import TASKS
from npo_cli.report.html import PromptSample
from npo_cli.report.table import Table, format_count
from npo_cli.storage.layout import RunDir
from npo_cli.storage.lineage import ancestry
from npo_cli.storage.metrics import iter_outcomes, list_trained_steps
from npo_cli.storage.rollout_log import open_rollouts
from npo_cli.types.rollouts import IMAGE_PLACEHOLDER, Group, GroupOutcome, ImageRef, Prompt
from npo_cli.types.views import PromptHistory, PromptVisit


def iter_visits(
    run: RunDir, branch: str, *, prompt_id: str | None = None, steps: Container[int] | None = None
) -> Iterator[PromptVisit]:
    """Every group on the branch's line of descent, or those of one prompt, or of some steps, oldest first."""
    for span in ancestry(run, branch):
        log = open_rollouts(run.rollouts_path(span.branch))
        for step in list_trained_steps(run, span.branch, log):
            if span.contains(step) and (steps is None or step in steps):
                yield from (_visit(span.branch, at, group) for at, group in log.iter_groups(step, prompt_id))


def _visit(branch: str, step: int, group: Group) -> PromptVisit:
    """Counts on-policy rollouts: the log also keeps those whose slot a guide took."""
    own = group.on_policy
    return PromptVisit(
        branch=branch, step=step, num_on_policy=len(own.rollouts), num_correct=own.num_correct, group=group
    )


def build_prompt_history(branch: str, seen: Sequence[PromptVisit]) -> PromptHistory:
    """Summary of all visits of one prompt."""
    prompt = seen[0].group.prompt
    return PromptHistory(
        prompt_id=prompt.prompt_id,
        branch=branch,
        prompt_text=render_prompt_text(prompt),
        reference_answer=prompt.answer,
        num_visits=len(seen),
        first_solved_step=next((one.step for one in seen if one.num_correct), None),
        first_mostly_solved_step=next((one.step for one in seen if 2 * one.num_correct > one.num_on_policy), None),
        injection_steps=tuple(one.step for one in seen if one.off_policy_rollouts),
    )


def render_prompt_text(prompt: Prompt) -> str:
    """A prompt as text; chat turns as `role: content`, images by reference."""
    return "\n".join(f"{role}: {text}" if role else text for role, text in render_prompt_turns(prompt))


def render_prompt_turns(prompt: Prompt) -> tuple[tuple[str, str], ...]:
    """Role and content of each chat message, images by reference; a prompt of plain text is one turn without a role."""
    turns = [("", prompt.text)] if prompt.text is not None else [(one.role, one.content) for one in prompt.messages]
    references = [format_image_reference(image, number) for number, image in enumerate(prompt.images, start=1)]
    found = []
    for role, text in turns:
        while references and IMAGE_PLACEHOLDER in text:
            text = text.replace(IMAGE_PLACEHOLDER, references.pop(0), 1)
        found.append((role, text))
    return tuple(found)


def explain_prompt(prompt: Prompt, source: str) -> str:
    """What the prompt asks, in the words of its task source; empty where it explains itself or is not installed."""
    if source not in TASKS.names():
        return ""
    explanation: str = TASKS.get(source).explain(prompt)
    return explanation


def format_image_reference(image: ImageRef, number: int) -> str:
    """`[image 1: cat.png, 64x64, sha256 ab12cd34ef56]`."""
    name = image.location.rpartition("/")[2] if "#" not in image.location else image.location
    return f"[image {number}: {name}, {image.width}x{image.height}, sha256 {image.sha256[:12]}]"


T = TypeVar("T")
NUM_SAMPLES = 4


def read_outcomes(run: RunDir, branch: str) -> dict[str, list[GroupOutcome]]:
    """Every group on the line of descent, by prompt, in the order of first visits."""
    found: dict[str, list[GroupOutcome]] = {}
    for outcome in iter_outcomes(run, branch):
        found.setdefault(outcome.prompt_id, []).append(outcome)
    return found


def select_samples(run: RunDir, branch: str, marks: dict[str, list[GroupOutcome]]) -> Iterator[PromptSample]:
    """Histories of the selected prompts, each with the visit at which a guide was first injected, or the last one."""
    source = str(dict(run.read_recipe(branch).get("task") or {}).get("source", ""))
    for prompt_id in select_prompts(marks):
        steps = {mark.step for mark in marks[prompt_id]}
        seen = tuple(iter_visits(run, branch, prompt_id=prompt_id, steps=steps))
        shown = next((one for one in seen if one.off_policy_rollouts), seen[-1])
        prompt = shown.group.prompt
        yield PromptSample(
            history=build_prompt_history(branch, seen),
            turns=render_prompt_turns(prompt),
            explanation=explain_prompt(prompt, source),
            visits=seen,
            shown_visit=shown,
        )


def select_prompts(marks: dict[str, list[GroupOutcome]]) -> list[str]:
    """Evenly spaced ones of the prompts with an injected guide, in the order of those steps.

    Without any: of the prompts of the newest step.
    """
    firsts = {prompt_id: next((one.step for one in some if one.has_guide), None) for prompt_id, some in marks.items()}
    injected = sorted((step, prompt_id) for prompt_id, step in firsts.items() if step is not None)
    if injected:
        return [prompt_id for _, prompt_id in pick_evenly_spaced(injected)]
    newest = max((some[-1].step for some in marks.values()), default=0)
    return pick_evenly_spaced([prompt_id for prompt_id, some in marks.items() if some[-1].step == newest])


def pick_evenly_spaced(some: Sequence[T]) -> list[T]:
    """The first, the last and evenly spaced ones between them: `NUM_SAMPLES`, or all."""
    if len(some) <= NUM_SAMPLES:
        return list(some)
    return [some[round(index * (len(some) - 1) / (NUM_SAMPLES - 1))] for index in range(NUM_SAMPLES)]


def prompt_outcomes_table(branch: str, marks: dict[str, list[GroupOutcome]]) -> Table:
    """How many prompts were solved on-policy, how many all-correct ones were not all correct at the next visit, and
    what followed where a guide was injected."""
    after = [_split_at_injection(some) for some in marks.values() if any(one.has_guide for one in some)]
    again = [later for _, later in after if later]
    next_visits = [
        following for some in marks.values() for one, following in pairwise(some) if one.num_correct == one.num_rollouts
    ]
    rows = (
        ("visited", len(marks)),
        ("solved on-policy at some visit", sum(any(one.num_correct for one in m) for m in marks.values())),
        ("visits after an all-correct one", len(next_visits)),
        ("  not all correct any more", sum(one.num_correct < one.num_rollouts for one in next_visits)),
        ("a guide was injected", len(after)),
        (
            "  not solved on-policy before",
            sum(not any(one.num_correct for one in before) for before, _ in after),
        ),
        ("  visited again afterwards", len(again)),
        ("  and then solved on-policy", sum(any(one.num_correct for one in later) for later in again)),
    )
    cells = tuple((what, format_count(number)) for what, number in rows)
    return Table(title=f"Prompts in the lineage of {branch}", header=("prompts", "number"), rows=cells)


def _split_at_injection(some: Sequence[GroupOutcome]) -> tuple[Sequence[GroupOutcome], Sequence[GroupOutcome]]:
    """Visits up to the first with a guide, and those after it."""
    end = next(index for index, one in enumerate(some) if one.has_guide) + 1
    return some[:end], some[end:]
