"""`npo index RUN --import FOLDER`: a run directory from the checkpoints of another trainer.

Weights come from the folder; task, batch size and sampling from the recipe. The run is created atomically, and the
folder is not changed. Optimizer state is not imported, because it is pickled: training continues with a new one
(`npo resume --fresh-optimizer`).
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from npo_cli import __version__
from npo_cli.autonpo.log_files import read_rows
from npo_cli.autonpo.trainer_logs import LogColumns, collect_metrics_by_step, find_columns
from npo_cli.config.loading import load_recipe, recipe_to_dict
from npo_cli.config.recipe import Recipe
from npo_cli.errors import NpoError, quote_path
from npo_cli.interop.peft_import import import_adapters, read_lora_settings
from npo_cli.interop.trainer_checkpoints import (
    TrainerCheckpoint,
    copy_model_settings,
    find_trainer_checkpoints,
    find_trainer_metrics,
    link_model_files,
)
from npo_cli.policy.model import Policy, load_policy
from npo_cli.policy.weights_io import check_tensors, copy_tensors, tied_names
from npo_cli.session.session import check_task_prompts, open_task, record_code_permissions
from npo_cli.storage.checkpoints import create_checkpoint
from npo_cli.storage.costs import CostLine, costs_path, encode_cost
from npo_cli.storage.index import build_index
from npo_cli.storage.jsonl import JsonlLog
from npo_cli.storage.layout import RunDir, check_unused, create_run, open_run
from npo_cli.storage.lineage import append_segment
from npo_cli.storage.lock import atomic_directory, lock_run
from npo_cli.storage.metrics import append_event
from npo_cli.training.train import MAIN, settle_recipe
from npo_cli.types.rollouts import CheckpointEntry, Notice, Progress, Segment

DATA_ORDER_NOTE = (
    "the other trainer's order of prompts is not recorded: 'prompts after step N' are those of npo's data order with "
    "this recipe"
)
MAX_STEP = 999_999
COST_NOTE = "the costs of imported steps are not recorded: they count as 0 tokens and 0 seconds"


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportSpec:
    """Options of an import."""

    source_folder: Path
    """The other trainer's output folder."""
    recipe: str
    overrides: tuple[str, ...]
    metrics: Path | None
    """File with its metrics; None searches beside the checkpoints."""
    saves_base: bool
    """Whether the recipe's model is saved as step 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerLog:
    """Metrics recorded by the other trainer."""

    source: Path | None
    by_step: Mapping[int, Mapping[str, float]]
    missing_signals: tuple[str, ...]
    """Inputs of AutoNPO's trigger that it lacks."""


def import_run(root: Path, spec: ImportSpec) -> Iterator[Notice | Progress | CheckpointEntry]:
    """Validate everything, build the run in a temporary folder, rename it, list its checkpoints."""
    check_unused(root)
    checkpoints, unusable = find_trainer_checkpoints(spec.source_folder)
    if not checkpoints:
        raise NpoError(f"{unusable[-1].path}: {unusable[-1].reason}", unusable[-1].fix)
    recipe = settle_recipe(build_import_recipe(checkpoints, spec))
    log = load_trainer_log(checkpoints, spec)
    task = open_task(recipe)
    task.close()
    is_model_folder = checkpoints[-1].format == "model folder"
    policy = load_policy(recipe.model, checkpoints[-1].path if is_model_folder else None)
    check_task_prompts(policy, task, recipe)
    yield from (Notice(message=f"skipped {bad.path}: {bad.reason}; {bad.fix}", level="warning") for bad in unusable)
    with atomic_directory(root) as folder:
        run = create_run(
            folder, recipe=recipe_to_dict(recipe), npo_version=__version__, prompts_sha256=task.compute_digest()
        )
        record_code_permissions(run, recipe)
        with lock_run(run):
            append_segment(run, Segment(branch=MAIN, parent=None, fork_step=0, guide_cache=None, guide_until=None))
            details = {"trainer": checkpoints[-1].trainer, "folder": str(spec.source_folder.absolute())}
            append_event(run, "imported", details | {"steps": [each.step for each in checkpoints]})
            write_metrics(run, log, recipe, steps=[each.step for each in checkpoints])
            yield from import_checkpoints(run, checkpoints, policy, recipe, saves_base=spec.saves_base)
    if any(each.is_bare for each in checkpoints):
        yield Notice(message=f"where a checkpoint has no config and tokenizer, those of {recipe.model.path} are used")
    yield from summarize_import(root, checkpoints, log)
    yield from build_index(open_run(root))


def build_import_recipe(checkpoints: Sequence[TrainerCheckpoint], spec: ImportSpec) -> Recipe:
    """The recipe, overridden by what the folder states, overridden by the command line."""
    if len({each.is_adapter for each in checkpoints}) > 1:
        other = next(each.path for each in checkpoints if each.is_adapter != checkpoints[-1].is_adapter)
        raise NpoError(
            f"{other} and {checkpoints[-1].path}: one holds adapters, the other a full model", "import them separately"
        )
    steps = [each.step for each in checkpoints if each.step]
    settings = [f"train.num_steps={max(steps, default=1)}", f"train.save_every={infer_save_interval(steps)}"]
    settings += read_lora_settings(checkpoints[-1].path) if checkpoints[-1].is_adapter else ["model.lora.rank=null"]
    return load_recipe(spec.recipe, [*settings, *spec.overrides])


def infer_save_interval(steps: Sequence[int]) -> int:
    """The most frequent distance between checkpoints; the last one may be irregular."""
    gaps = Counter(after - before for before, after in pairwise([0, *steps]))
    return gaps.most_common(1)[0][0] if gaps else 1


def load_trainer_log(checkpoints: Sequence[TrainerCheckpoint], spec: ImportSpec) -> TrainerLog:
    """The trainer's metrics by step; empty if there is no file."""
    source = spec.metrics or find_trainer_metrics(list(checkpoints), spec.source_folder)
    if source is None:
        return TrainerLog(source=None, by_step={}, missing_signals=("reward", "entropy"))
    rows = read_rows(source)
    names = find_columns(rows, LogColumns())
    if "step" not in names:
        raise NpoError(
            f"{source} has no column with a known name for the step", "--metrics FILE   # one JSON object per step"
        )
    by_step = collect_metrics_by_step(rows, names)
    if max(by_step, default=0) > MAX_STEP:
        raise NpoError(f"{source} has step {max(by_step)}; the maximum is {MAX_STEP:,}", "--metrics FILE")
    missing = tuple(signal for signal in ("reward", "entropy") if signal not in names)
    return TrainerLog(source=source, by_step=by_step, missing_signals=missing)


def write_metrics(run: RunDir, log: TrainerLog, recipe: Recipe, *, steps: Sequence[int]) -> None:
    """One line per step, with the position in npo's data order; the number of tokens is unknown and 0."""
    last = max(*steps, *log.by_step, 0)
    lines = [
        {
            "step": step,
            "branch": MAIN,
            **log.by_step.get(step, {}),
            "tokens": 0,
            "data_position": step * recipe.train.prompts_per_step,
        }
        for step in range(1, last + 1)
    ]
    if lines:
        JsonlLog(run.metrics_path(MAIN)).extend(lines)
        updates = recipe.train.num_updates
        costs = [CostLine(kind="train", branch=MAIN, step=line["step"], updates=updates) for line in lines]
        JsonlLog(costs_path(run)).extend([encode_cost(cost) for cost in costs])


def import_checkpoints(
    run: RunDir, checkpoints: Sequence[TrainerCheckpoint], policy: Policy, recipe: Recipe, *, saves_base: bool
) -> Iterator[Progress]:
    """Load each checkpoint, so that every tensor is checked, and save it with a manifest."""
    if saves_base:
        with create_checkpoint(run, MAIN, 0) as folder:
            first = policy if policy.adapters is not None else load_policy(recipe.model)
            first.save(folder)
            policy.load(folder)
    for number, each in enumerate(checkpoints):
        yield Progress(description="import", done=number, total=len(checkpoints), note=f"step {each.step}")
        if each.is_adapter:
            import_adapters(policy, each.path)
        elif each.is_bare:
            load_bare_weights(policy, each, recipe.model.path)
        else:
            policy.load(each.path)
        if each.step == 0 and saves_base:
            continue
        with create_checkpoint(run, MAIN, each.step) as folder:
            if each.is_adapter or each.is_bare:
                policy.save(folder)
                copy_model_settings(each.path / "huggingface", folder)  # verl keeps them beside its shards
            else:
                link_model_files(each.path, folder)
    yield Progress(description="import", done=len(checkpoints), total=len(checkpoints))


def load_bare_weights(policy: Policy, checkpoint: TrainerCheckpoint, model_path: str) -> None:
    """Copy tensors that have no config into the policy, after a check that they are those of such a model."""
    tensors, own = checkpoint.read_bare_weights(), policy.model.state_dict()
    try:
        check_tensors(own, tensors, checkpoint.path, tied=tied_names(policy.model))
    except NpoError as error:
        raise NpoError(
            f"{error.message}, compared with model.path={model_path}", "model.path=...   # the base model of that run"
        ) from error
    copy_tensors(own, tensors)
    policy.mark_weights_changed()


def summarize_import(root: Path, checkpoints: Sequence[TrainerCheckpoint], log: TrainerLog) -> Iterator[Notice]:
    """Report what was imported, what is missing, and what to do next."""
    steps = ", ".join(str(each.step) for each in checkpoints)
    yield Notice(message=f"{root}: {checkpoints[-1].trainer}, steps {steps}; weights only, no training state")
    yield Notice(message=DATA_ORDER_NOTE, level="warning")
    yield Notice(message=COST_NOTE, level="warning")
    if log.source is not None:
        yield Notice(message=f"{len(log.by_step)} steps of metrics from {log.source}")
    if log.missing_signals:
        where = log.source or "files beside the checkpoints"
        yield Notice(
            message=f"no column with a known name for {' or '.join(log.missing_signals)} in {where}: AutoNPO's trigger "
            "needs reward and entropy; --metrics FILE names another file",
            level="warning",
        )
    else:
        yield Notice(message=f"npo autonpo {quote_path(root)} --explain shows when AutoNPO would have triggered")
