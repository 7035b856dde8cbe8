"""One prompt through training: every visit along a branch's line of descent, and how it first came to be solved."""

from collections.abc import Container, Iterator, Sequence

from npo_cli.records import IMAGE_PLACEHOLDER, Group, ImageRef, Prompt
from npo_cli.report.lines import PromptHistory, PromptVisit
from npo_cli.run_dir.lineage import ancestry
from npo_cli.run_dir.paths import RunDir
from npo_cli.run_dir.rollouts import RolloutLog


def iter_visits(
    run: RunDir, branch: str, *, prompt_id: str | None = None, steps: Container[int] | None = None
) -> Iterator[PromptVisit]:
    """Every group on the branch's line of descent, or those of one prompt, or of some steps, oldest first."""
    for stretch in ancestry(run, branch):
        journal = RolloutLog(run.rollouts_path(stretch.branch))
        for step in journal.steps():
            if stretch.contains(step) and (steps is None or step in steps):
                yield from (_visit(stretch.branch, at, group) for at, group in journal.iter_groups(step, prompt_id))


def _visit(branch: str, step: int, group: Group) -> PromptVisit:
    """Counts its own answers: the journal keeps those whose slot another took as well."""
    own = [rollout for rollout in group.rollouts if not rollout.is_off_policy]
    num_correct = sum(rollout.verdict == "correct" for rollout in own)
    return PromptVisit(branch=branch, step=step, num_on_policy=len(own), num_correct=num_correct, group=group)


def build_prompt_history(branch: str, seen: Sequence[PromptVisit]) -> PromptHistory:
    """What all visits of one prompt amount to."""
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
    """A prompt as text; chat turns as `role: content`, pictures by reference."""
    turns = (f"{message.role}: {message.content}" for message in prompt.messages)
    text = "\n".join(turns) if prompt.text is None else prompt.text
    for number, image in enumerate(prompt.images, start=1):
        text = text.replace(IMAGE_PLACEHOLDER, format_image_reference(image, number), 1)
    return text


def format_image_reference(image: ImageRef, number: int) -> str:
    """`[image 1: cat.png, 64x64, sha256 ab12cd34ef56]`."""
    name = image.location.rpartition("/")[2] if "#" not in image.location else image.location
    return f"[image {number}: {name}, {image.width}x{image.height}, sha256 {image.sha256[:12]}]"
