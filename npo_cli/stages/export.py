"""`npo export`: a guide cache as a table that other trainers read, a checkpoint as a folder with a model card."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from npo_cli.errors import NpoError, as_typed
from npo_cli.loading import from_dict
from npo_cli.records import Notice
from npo_cli.run_dir.aside import built_aside
from npo_cli.run_dir.checkpoints import find_checkpoint, require_whole
from npo_cli.run_dir.files import full_disk_explained
from npo_cli.run_dir.guides import load_guide
from npo_cli.run_dir.lineage import newest_branch
from npo_cli.run_dir.manifests import read_manifest
from npo_cli.run_dir.paths import open_run
from npo_cli.stages.model_card import model_card
from npo_cli.stages.world import open_task
from npo_cli.tasks.exported import Answered, Form, refuse_table, write_table

OURS = "npo_base.json"
"""Beside adapters: where this machine has the base."""


def export_guide(root: Path, name: str, *, out: Path, form: Form, allow_code: bool) -> Iterator[Notice]:
    """Every kept answer with its prompt, in the order of the prompts in the task."""
    refuse_table(out)
    run = open_run(root)
    info, trajectories = load_guide(run, name)
    recipe = from_dict(run.recipe(info.branch), source=str(run.recipe_path(info.branch)))
    task = open_task(recipe, allow_code=allow_code)
    task.close()
    answers = [
        Answered(prompt=prompt, trajectory=kept, data_source=recipe.name)
        for prompt in task.train
        for kept in trajectories.get(prompt.prompt_id, ())
    ]
    if len(answers) < info.num_trajectories:
        raise NpoError(
            f"guide {name} answers prompts that this task does not have any more", "restore the data file of the recipe"
        )
    for each in answers:
        if [image.sha256 for image in each.prompt.images] != [image.sha256 for image in each.trajectory.images]:
            raise NpoError(
                f"guide {name} was shown other pictures for prompt {each.prompt.prompt_id} than this task has",
                "bring the old ones back",
            )
    with full_disk_explained(out):
        turned = write_table(out, answers, form=form)
    yield Notice(message=f"{len(answers)} answers to {len(trajectories)} prompts are in {out}")
    if turned:
        yield Notice(
            message="plain prompts became chats of one user message: a trainer puts them through its chat template, "
            "and the token ids and log-probabilities are those of the plain prompt",
            level="warning",
        )


def export_checkpoint(root: Path, *, step: int, branch: str | None, out: Path) -> Iterator[Notice]:
    """The files that `from_pretrained` (or peft) opens, compared with their digests, and a README.md."""
    run = open_run(root)
    branch = branch or newest_branch(run)
    checkpoint = find_checkpoint(run, branch, step)
    require_whole(checkpoint)
    card = model_card(run, checkpoint, branch=branch)
    with full_disk_explained(out), built_aside(out, flag="--out") as hidden:
        for name in read_manifest(checkpoint.path)["files"]:
            if name != OURS:
                (hidden / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(checkpoint.path / name, hidden / name)
        (hidden / "README.md").write_text(card, encoding="utf-8")
    yield Notice(message=f"step {step} of {checkpoint.branch} is in {out}; its card is {as_typed(out / 'README.md')}")
