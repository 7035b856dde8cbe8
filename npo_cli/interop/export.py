"""`npo export`: a guide cache as a table for other trainers, a checkpoint as a folder with a model card.

The model card (README.md) states what the checkpoint is and what was measured, only from recorded data.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from npo_cli.config.loading import diff_recipes, dump_yaml, recipe_from_dict
from npo_cli.config.recipe import Recipe
from npo_cli.errors import NpoError, quote_path
from npo_cli.session.session import open_task
from npo_cli.storage.checkpoints import Checkpoint, find_checkpoint, read_manifest, verify_checkpoint
from npo_cli.storage.files import explain_write_error, write_bytes_atomic
from npo_cli.storage.guide_cache import describe_guide_source, load_guide
from npo_cli.storage.index import select_best_evals
from npo_cli.storage.layout import RunDir, open_run
from npo_cli.storage.lineage import ancestry, find_first_segment, find_main_branch
from npo_cli.storage.lock import atomic_directory
from npo_cli.storage.metrics import find_source_trainer
from npo_cli.tasks.table_io import ExportedResponse, TableFormat, encode_table, validate_table_path
from npo_cli.types.rollouts import EvalReport, Notice
from npo_cli.types.views import WrittenFile

PAPER = "2604.20733"


def render_model_card(run: RunDir, checkpoint: Checkpoint, *, branch: str) -> str:
    """Metadata for the hub, then text. Absolute paths are reduced to their last component."""
    recipe = recipe_from_dict(run.read_recipe(branch), source=str(run.recipe_path(branch)))
    adapters = recipe.model.lora.rank is not None
    base = _strip_folders(recipe.model.path)
    head = {"library_name": "peft" if adapters else "transformers", "pipeline_tag": "text-generation"}
    # Only names on the hub are valid here.
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
            *_settings(recipe, is_own=not _is_imported(run, checkpoint.branch)),
        ]
    )


def _is_imported(run: RunDir, branch: str) -> bool:
    """Whether another trainer produced the branch."""
    return find_first_segment(run, branch).parent is None and find_source_trainer(run) is not None


def _method(run: RunDir, checkpoint: Checkpoint) -> Iterator[str]:
    """Each span of the checkpoint's ancestry: how it was trained, and with which guide."""
    for span in ancestry(run, checkpoint.branch):
        last = checkpoint.step if span.to_step is None else min(span.to_step, checkpoint.step)
        segment = find_first_segment(run, span.branch)
        npo = f"[npo](https://arxiv.org/abs/{PAPER}) {run.info.npo_version}"
        by = f"reinforcement learning with verifiable rewards, by {npo}"
        if _is_imported(run, span.branch):
            by = f"by another trainer ({find_source_trainer(run)}), imported; its settings are not recorded"
        if segment.guide_cache is not None:
            guide = _describe_guide(run, segment.guide_cache)
            by += f"; with responses of a guide ({guide}) injected until step {segment.guide_until}"
        yield f"- `{span.branch}`, steps {span.from_step} to {last}: {by}"


def _describe_guide(run: RunDir, name: str) -> str:
    info, _ = load_guide(run, name)
    return describe_guide_source(info)


def _accuracy(report: EvalReport | None) -> str:
    if report is None:
        return "Not measured."
    return (
        f"{report.accuracy:.3f} [{report.accuracy_low:.3f}, {report.accuracy_high:.3f}] (avg@{report.num_samples}, "
        f"{report.num_prompts} prompts, 95 % interval over prompts); pass@{report.num_samples} {report.pass_at_k:.3f} "
        f"[{report.pass_at_k_low:.3f}, {report.pass_at_k_high:.3f}]."
    )


def _settings(recipe: Recipe, *, is_own: bool) -> Iterator[str]:
    """Settings that differ from the defaults; nothing for an imported branch, which they did not train."""
    if not is_own:
        return
    plain = recipe.model_dump(mode="json")
    changed: dict[str, object] = {}
    for key, _, _ in diff_recipes(Recipe(), recipe):
        value: object = plain
        for part in key.split("."):
            value = value[part]  # type: ignore[index]
        changed[key] = _strip_folders(value) if isinstance(value, str) else value
    yield from ("## Settings", "", "Settings that differ from npo's defaults:", "", "```yaml")
    yield from (dump_yaml(changed, width=100).rstrip(), "```", "")


def _strip_folders(text: str) -> str:
    """The last component of an absolute path; other text unchanged."""
    return os.path.basename(text.rstrip("/")) if text.startswith(("/", "~")) else text


BASE_PATH_FILE = "npo_base.json"
"""Local path of the base of LoRA adapters: not exported."""


def export_guide(root: Path, name: str, *, out: Path, form: TableFormat) -> Iterator[Notice | WrittenFile]:
    """Write every response of the cache with its prompt, in the task's order of prompts."""
    validate_table_path(out)
    run = open_run(root)
    info, guide = load_guide(run, name)
    recipe = recipe_from_dict(run.read_recipe(info.branch), source=str(run.recipe_path(info.branch)))
    task = open_task(recipe, run=run)
    task.close()
    responses = [
        ExportedResponse(prompt=prompt, samples=samples, rollout=rollout, data_source=recipe.name)
        for prompt in task.train
        if (samples := guide.get(prompt.prompt_id))
        for rollout in samples.rollouts
    ]
    if len(responses) < info.num_rollouts:
        raise NpoError(
            f"guide {name} has responses to prompts that the task no longer has", "restore the data file of the recipe"
        )
    for each in responses:
        if [image.sha256 for image in each.prompt.images] != [image.sha256 for image in each.samples.images]:
            raise NpoError(
                f"guide {name} was sampled with other images for prompt {each.prompt.prompt_id} than the task has now",
                "restore the images of the data file",
            )
    data, converted = encode_table(out, responses, table_format=form)
    write_bytes_atomic(out, data)
    yield Notice(message=f"wrote {len(responses)} responses to {len(guide)} prompts to {out}")
    yield WrittenFile(path=str(out), content="guide cache")
    if converted:
        yield Notice(
            message="plain prompts were converted to chats of one user message; token ids and log-probabilities belong "
            "to the plain prompt, and a trainer that applies its chat template gets other tokens",
            level="warning",
        )


def export_checkpoint(root: Path, *, step: int, branch: str | None, out: Path) -> Iterator[Notice | WrittenFile]:
    """Copy the files that `from_pretrained` (or peft) loads, after verifying their digests; add a README.md."""
    run = open_run(root)
    branch = branch or find_main_branch(run)
    checkpoint = find_checkpoint(run, branch, step)
    verify_checkpoint(checkpoint)
    card = render_model_card(run, checkpoint, branch=branch)
    with explain_write_error(out), atomic_directory(out, flag="--out") as folder:
        for name in read_manifest(checkpoint.path)["files"]:
            if name != BASE_PATH_FILE:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(checkpoint.path / name, folder / name)
        (folder / "README.md").write_text(card, encoding="utf-8")
    yield Notice(
        message=f"wrote step {step} of {checkpoint.branch} to {out}; model card: {quote_path(out / 'README.md')}"
    )
    yield WrittenFile(path=str(out), content="checkpoint")
