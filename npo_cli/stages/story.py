"""One prompt through training: every visit along a branch's line of descent, and how it first came to be solved."""

from collections.abc import Container, Iterator, Sequence

from npo_cli.records import IMAGE_MARK, Group, ImageRef, Prompt
from npo_cli.report.lines import PromptStory, Visit
from npo_cli.run_dir.lineage import descent
from npo_cli.run_dir.paths import RunDir
from npo_cli.run_dir.rollouts import RolloutJournal


def visits(
    run: RunDir, branch: str, *, prompt_id: str | None = None, steps: Container[int] | None = None
) -> Iterator[Visit]:
    """Every group on the branch's line of descent, or those of one prompt, or of some steps, oldest first."""
    for stretch in descent(run, branch):
        journal = RolloutJournal(run.rollouts_path(stretch.branch))
        for step in journal.steps():
            if stretch.owns(step) and (steps is None or step in steps):
                yield from (_visit(stretch.branch, at, group) for at, group in journal.iter_groups(step, prompt_id))


def _visit(branch: str, step: int, group: Group) -> Visit:
    """Counts its own answers: the journal keeps those whose slot another took as well."""
    own = [rollout for rollout in group.rollouts if not rollout.foreign]
    num_correct = sum(rollout.verdict == "correct" for rollout in own)
    return Visit(branch=branch, step=step, num_asked=len(own), num_correct=num_correct, group=group)


def story(branch: str, seen: Sequence[Visit]) -> PromptStory:
    """What all visits of one prompt amount to."""
    prompt = seen[0].group.prompt
    return PromptStory(
        prompt_id=prompt.prompt_id,
        branch=branch,
        question=question(prompt),
        answer=prompt.answer,
        num_visits=len(seen),
        solved_at=next((one.step for one in seen if one.num_correct), None),
        mostly_solved_at=next((one.step for one in seen if 2 * one.num_correct > one.num_asked), None),
        seated_at=tuple(one.step for one in seen if one.guests),
    )


def question(prompt: Prompt) -> str:
    """A prompt as text; chat turns as `role: content`, pictures by reference."""
    turns = (f"{message.role}: {message.content}" for message in prompt.messages)
    text = "\n".join(turns) if prompt.text is None else prompt.text
    for number, image in enumerate(prompt.images, start=1):
        text = text.replace(IMAGE_MARK, reference(image, number), 1)
    return text


def reference(image: ImageRef, number: int) -> str:
    """`[image 1: cat.png, 64x64, sha256 ab12cd34ef56]`."""
    name = image.place.rpartition("/")[2] if "#" not in image.place else image.place
    return f"[image {number}: {name}, {image.width}x{image.height}, sha256 {image.sha256[:12]}]"
