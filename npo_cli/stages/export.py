"""`npo export`: a guide cache as a table that other trainers read, a checkpoint as a folder with a model card."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from npo_cli.errors import NpoError, quote_path
from npo_cli.loading import recipe_from_dict
from npo_cli.records import Notice
from npo_cli.run_dir.aside import atomic_directory
from npo_cli.run_dir.checkpoints import find_checkpoint, verify_checkpoint
from npo_cli.run_dir.files import explain_full_disk
from npo_cli.run_dir.guides import load_guide
from npo_cli.run_dir.lineage import find_newest_branch
from npo_cli.run_dir.manifests import read_manifest
from npo_cli.run_dir.paths import open_run
from npo_cli.stages.model_card import render_model_card
from npo_cli.stages.world import open_task
from npo_cli.tasks.exported import ExportedResponse, TableFormat, validate_table_path, write_table

BASE_PATH_FILE = "npo_base.json"
"""Beside adapters: where this machine has the base."""


def export_guide(root: Path, name: str, *, out: Path, form: TableFormat, allow_code: bool) -> Iterator[Notice]:
    """Every kept answer with its prompt, in the order of the prompts in the task."""
    validate_table_path(out)
    run = open_run(root)
    info, trajectories = load_guide(run, name)
    recipe = recipe_from_dict(run.read_recipe(info.branch), source=str(run.recipe_path(info.branch)))
    task = open_task(recipe, allow_code=allow_code)
    task.close()
    answers = [
        ExportedResponse(prompt=prompt, trajectory=kept, data_source=recipe.name)
        for prompt in task.train
        for kept in trajectories.get(prompt.prompt_id, ())
    ]
    if len(answers) < info.num_rollouts:
        raise NpoError(
            f"guide {name} answers prompts that this task does not have any more", "restore the data file of the recipe"
        )
    for each in answers:
        if [image.sha256 for image in each.prompt.images] != [image.sha256 for image in each.trajectory.images]:
            raise NpoError(
                f"guide {name} was shown other pictures for prompt {each.prompt.prompt_id} than this task has",
                "bring the old ones back",
            )
    with explain_full_disk(out):
        turned = write_table(out, answers, table_format=form)
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
    branch = branch or find_newest_branch(run)
    checkpoint = find_checkpoint(run, branch, step)
    verify_checkpoint(checkpoint)
    card = render_model_card(run, checkpoint, branch=branch)
    with explain_full_disk(out), atomic_directory(out, flag="--out") as hidden:
        for name in read_manifest(checkpoint.path)["files"]:
            if name != BASE_PATH_FILE:
                (hidden / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(checkpoint.path / name, hidden / name)
        (hidden / "README.md").write_text(card, encoding="utf-8")
    yield Notice(message=f"step {step} of {checkpoint.branch} is in {out}; its card is {quote_path(out / 'README.md')}")
