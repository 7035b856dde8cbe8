"""The README.md of an exported checkpoint: what it is and what was measured, nothing that is not on record."""

import os
from collections.abc import Iterator

from npo_cli.config import Recipe
from npo_cli.loading import diff_recipes, recipe_from_dict, dump_yaml
from npo_cli.records import EvalReport
from npo_cli.run_dir.checkpoints import Checkpoint
from npo_cli.run_dir.guides import load_guide
from npo_cli.run_dir.index import select_best_evals
from npo_cli.run_dir.lineage import find_first_segment, ancestry
from npo_cli.run_dir.paths import RunDir
from npo_cli.run_dir.steps import find_source_trainer

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
