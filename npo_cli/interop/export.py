"""The README.md of an exported checkpoint: what it is and what was measured, nothing that is not on record.

`npo export`: a guide cache as a table that other trainers read, a checkpoint as a folder with a model card.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from npo_cli.config.loading import diff_recipes, dump_yaml, recipe_from_dict
from npo_cli.config.recipe import Recipe
from npo_cli.errors import NpoError, quote_path
from npo_cli.session.session import open_task
from npo_cli.storage.checkpoints import Checkpoint, find_checkpoint, verify_checkpoint
from npo_cli.storage.files import explain_full_disk
from npo_cli.storage.guide_cache import load_guide
from npo_cli.storage.index import select_best_evals
from npo_cli.storage.layout import RunDir, open_run
from npo_cli.storage.lineage import ancestry, find_first_segment, find_newest_branch
from npo_cli.storage.lock import atomic_directory
from npo_cli.storage.manifests import read_manifest
from npo_cli.storage.metrics import find_source_trainer
from npo_cli.tasks.table_io import ExportedResponse, TableFormat, validate_table_path, write_table
from npo_cli.types.rollouts import EvalReport, Notice

PAPER = "2604.20733"


def render_model_card(run: RunDir, checkpoint: Checkpoint, *, branch: str) -> str:
    """Metadata for the hub, then words for people. Paths of the machine are cut down to their last name."""
    recipe = recipe_from_dict(run.read_recipe(branch), source=str(run.recipe_path(branch)))
    adapters = recipe.model.lora.rank is not None
    base = _named(recipe.model.path)
    head = {"library_name": "peft" if adapters else "transformers", "pipeline_tag": "text-generation"}
    # Only the hub's own names mean something there.
    head |= {"base_model": base} if base.count("/") == 1 else {}
    head |= {"tags": ["npo", "grpo", "reinforcement-learning", f"arxiv:{PAPER}", *(["lora"] if adapters else [])]}
    return "\n".join(
        [
            *("---", dump_yaml(head, width=100).rstrip(), "---"),
            *(f"# {recipe.name}, step {checkpoint.step} of {checkpoint.branch}", ""),
            *(f"Base model: `{base}`{'; this folder holds LoRA adapters for it' if adapters else ''}.", ""),
            *(f"Digest of the weights (sha256): `{checkpoint.digest}`.", "", "## Method", ""),
            *(*_method(run, checkpoint), "", "## Held-out accuracy", ""),
            *(_accuracy(select_best_evals(run).get((checkpoint.branch, checkpoint.step))), ""),
            *_settings(recipe, ours=not _foreign(run, checkpoint.branch)),
        ]
    )


def _foreign(run: RunDir, branch: str) -> bool:
    """Whether another trainer made the branch."""
    return find_first_segment(run, branch).parent is None and find_source_trainer(run) is not None


def _method(run: RunDir, checkpoint: Checkpoint) -> Iterator[str]:
    """Each stretch of the line of descent up to the checkpoint, and who guided it."""
    for stretch in ancestry(run, checkpoint.branch):
        last = checkpoint.step if stretch.to_step is None else min(stretch.to_step, checkpoint.step)
        born = find_first_segment(run, stretch.branch)
        npo = f"[npo](https://arxiv.org/abs/{PAPER}) {run.info.npo_version}"
        by = f"reinforcement learning with verifiable rewards, by {npo}"
        if _foreign(run, stretch.branch):
            by = f"by another program ({find_source_trainer(run)}), imported; how is not on record"
        if born.guide_cache is not None:
            by += f"; until step {born.guide_until} guided by {_guide(run, born.guide_cache)}"
        yield f"- `{stretch.branch}`, steps {stretch.from_step} to {last}: {by}"


def _guide(run: RunDir, name: str) -> str:
    info, _ = load_guide(run, name)
    return f"step {info.guide_step}" if info.source == "checkpoint" else f"a guide of another kind ({info.source})"


def _accuracy(report: EvalReport | None) -> str:
    if report is None:
        return "Not measured."
    return (
        f"{report.accuracy:.3f} [{report.accuracy_low:.3f}, {report.accuracy_high:.3f}] (avg@{report.num_samples}, "
        f"{report.num_prompts} prompts, 95 % interval over prompts); pass@{report.num_samples} {report.pass_at_k:.3f} "
        f"[{report.pass_at_k_low:.3f}, {report.pass_at_k_high:.3f}]."
    )


def _settings(recipe: Recipe, *, ours: bool) -> Iterator[str]:
    """Dotted keys to values, as they are typed; none of a branch that was not trained under them."""
    if not ours:
        return
    plain = recipe.model_dump(mode="json")
    found: dict[str, object] = {}
    for key, _, _ in diff_recipes(Recipe(), recipe):
        value: object = plain
        for part in key.split("."):
            value = value[part]  # type: ignore[index]
        found[key] = _named(value) if isinstance(value, str) else value
    yield from ("## Settings", "", "Everything that differs from npo's defaults:", "", "```yaml")
    yield from (dump_yaml(found, width=100).rstrip(), "```", "")


def _named(text: str) -> str:
    """A path from the root of this machine as its last name; everything else as it is."""
    return os.path.basename(text.rstrip("/")) if text.startswith(("/", "~")) else text


BASE_PATH_FILE = "npo_base.json"
"""Beside adapters: where this machine has the base."""


def export_guide(root: Path, name: str, *, out: Path, form: TableFormat) -> Iterator[Notice]:
    """Every kept answer with its prompt, in the order of the prompts in the task."""
    validate_table_path(out)
    run = open_run(root)
    info, trajectories = load_guide(run, name)
    recipe = recipe_from_dict(run.read_recipe(info.branch), source=str(run.recipe_path(info.branch)))
    task = open_task(recipe)
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
