"""`npo index RUN --import FOLDER`: a run directory around the checkpoints that another trainer left.

The folder says which weights there are; task, batch and sampling are the recipe's to say. The run appears whole or
not at all, and nothing changes in the folder. No training state comes over: the optimiser's is pickled, so training
goes on only with fresh moments (`npo resume --fresh-optimizer`).
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from npo_cli import __version__
from npo_cli.autonpo.trainer_logs import LogColumns, collect_metrics_by_step, find_columns, read_rows
from npo_cli.config.loading import load_recipe, recipe_to_dict
from npo_cli.config.recipe import Recipe
from npo_cli.errors import NpoError, quote_path
from npo_cli.interop.peft_import import import_adapters, read_lora_settings
from npo_cli.policy.model import Policy, load_policy
from npo_cli.session.session import check_task_prompts, open_task
from npo_cli.storage.checkpoints import create_checkpoint
from npo_cli.storage.costs import CostLine, costs_path, encode_cost
from npo_cli.storage.foreign import ForeignCheckpoint, find_foreign_checkpoints, find_trainer_metrics, link_model_files
from npo_cli.storage.index import build_index
from npo_cli.storage.jsonl import JsonlLog
from npo_cli.storage.layout import RunDir, check_unused, create_run, open_run
from npo_cli.storage.lineage import append_segment
from npo_cli.storage.lock import atomic_directory, lock_run
from npo_cli.storage.metrics import append_event
from npo_cli.training.train import MAIN, make_paths_absolute
from npo_cli.types.rollouts import CheckpointEntry, Notice, Progress, Segment

DATA_ORDER_NOTE = (
    "which prompts that trainer had visited is not on record: npo's own data order under this recipe stands in for it, "
    "so what is scored and sampled 'after step N' are prompts of that order"
)
MAX_STEP = 999_999
COST_NOTE = "what its steps had cost is not on record: tables of costs count no tokens and no seconds for them"


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportSpec:
    """What was asked."""

    source_folder: Path
    """The other trainer's output folder."""
    recipe: str
    overrides: tuple[str, ...]
    metrics: Path | None
    """A file of its records; None looks for one beside the checkpoints."""
    saves_base: bool
    """Save the recipe's model as step 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerLog:
    """What the other trainer had measured."""

    source: Path | None
    by_step: Mapping[int, Mapping[str, float]]
    missing_signals: tuple[str, ...]
    """Signals of AutoNPO's trigger that are not among it."""


def import_run(root: Path, asked: ImportSpec) -> Iterator[Notice | Progress | CheckpointEntry]:
    """Check everything, build the run aside, give it its name, list it."""
    check_unused(root)
    found, unusable = find_foreign_checkpoints(asked.source_folder)
    if not found:
        raise NpoError(f"{unusable[-1].path}: {unusable[-1].reason}", unusable[-1].fix)
    recipe = make_paths_absolute(build_import_recipe(found, asked))
    records = load_trainer_log(found, asked)
    task = open_task(recipe)
    task.close()
    policy = load_policy(recipe.model, None if found[-1].is_adapter else found[-1].path)
    check_task_prompts(policy, task, recipe)
    yield from (Notice(message=f"left out {bad.path}: {bad.reason}; {bad.fix}", level="warning") for bad in unusable)
    with atomic_directory(root) as hidden:
        run = create_run(hidden, recipe=recipe_to_dict(recipe), npo_version=__version__)
        with lock_run(run):
            append_segment(run, Segment(branch=MAIN, parent=None, fork_step=0, guide_cache=None, guide_until=None))
            details = {"trainer": found[-1].trainer, "folder": str(asked.source_folder.absolute())}
            append_event(run, "imported", details | {"steps": [each.step for each in found]})
            write_metrics(run, records, recipe, steps=[each.step for each in found])
            yield from import_checkpoints(run, found, policy, base_recipe=recipe if asked.saves_base else None)
    yield from summarize_import(root, found, records)
    yield from build_index(open_run(root))


def build_import_recipe(found: Sequence[ForeignCheckpoint], asked: ImportSpec) -> Recipe:
    """The recipe, what the folder itself says on top, and the command line above both."""
    if len({each.is_adapter for each in found}) > 1:
        other = next(each.path for each in found if each.is_adapter != found[-1].is_adapter)
        raise NpoError(
            f"{other} and {found[-1].path}: one holds adapters, the other a whole model", "import them apart"
        )
    steps = [each.step for each in found if each.step]
    told = [f"train.num_steps={max(steps, default=1)}", f"train.save_every={infer_save_interval(steps)}"]
    told += read_lora_settings(found[-1].path) if found[-1].is_adapter else ["model.lora.rank=null"]
    return load_recipe(asked.recipe, [*told, *asked.overrides])


def infer_save_interval(steps: Sequence[int]) -> int:
    """Steps from one checkpoint to the next, as it mostly was: a last one may come out of turn."""
    gaps = Counter(after - before for before, after in pairwise([0, *steps]))
    return gaps.most_common(1)[0][0] if gaps else 1


def load_trainer_log(found: Sequence[ForeignCheckpoint], asked: ImportSpec) -> TrainerLog:
    """The trainer's own records, where there are any with steps."""
    source = asked.metrics or find_trainer_metrics(list(found), asked.source_folder)
    if source is None:
        return TrainerLog(source=None, by_step={}, missing_signals=("reward", "entropy"))
    rows = read_rows(source)
    names = find_columns(rows, LogColumns())
    if "step" not in names:
        raise NpoError(f"{source} has no step by any name known here", "--metrics FILE: one JSON object a step")
    by_step = collect_metrics_by_step(rows, names)
    if max(by_step, default=0) > MAX_STEP:
        raise NpoError(f"{source} has a step {max(by_step)}, and npo counts to {MAX_STEP:,}", "--metrics FILE")
    missing = tuple(signal for signal in ("reward", "entropy") if signal not in names)
    return TrainerLog(source=source, by_step=by_step, missing_signals=missing)


def write_metrics(run: RunDir, records: TrainerLog, recipe: Recipe, *, steps: Sequence[int]) -> None:
    """A line for every step, with the data cursor of npo's own order; no tokens, as nobody says how many there were."""
    last = max(*steps, *records.by_step, 0)
    lines = [
        {
            "step": step,
            "branch": MAIN,
            **records.by_step.get(step, {}),
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
    run: RunDir, found: Sequence[ForeignCheckpoint], policy: Policy, *, base_recipe: Recipe | None
) -> Iterator[Progress]:
    """Each one is loaded, so that every tensor is accounted for, and signed under its step's name."""
    if base_recipe is not None:
        with create_checkpoint(run, MAIN, 0) as folder:
            first = policy if policy.adapters is not None else load_policy(base_recipe.model)
            first.save(folder)
            policy.load(folder)
    for number, each in enumerate(found):
        yield Progress(description="import", done=number, total=len(found), note=f"step {each.step}")
        if each.is_adapter:
            import_adapters(policy, each.path)
        else:
            policy.load(each.path)
        if each.step == 0 and base_recipe is not None:
            continue
        with create_checkpoint(run, MAIN, each.step) as folder:
            if each.is_adapter:
                policy.save(folder)
            else:
                link_model_files(each.path, folder)
    yield Progress(description="import", done=len(found), total=len(found))


def summarize_import(root: Path, found: Sequence[ForeignCheckpoint], records: TrainerLog) -> Iterator[Notice]:
    """What came over, what did not, and what can be done with it."""
    steps = ", ".join(str(each.step) for each in found)
    yield Notice(message=f"{root}: {found[-1].trainer}, steps {steps}; weights only, no training state")
    yield Notice(message=DATA_ORDER_NOTE, level="warning")
    yield Notice(message=COST_NOTE, level="warning")
    if records.source is not None:
        yield Notice(message=f"{len(records.by_step)} recorded steps from {records.source}")
    if records.missing_signals:
        where = records.source or "beside the checkpoints"
        yield Notice(
            message=f"no {' and no '.join(records.missing_signals)} by any name known here in {where}: AutoNPO's trigger needs "  # noqa: E501
            "both; --metrics FILE names another record",
            level="warning",
        )
    else:
        yield Notice(message=f"npo autonpo {quote_path(root)} --explain tells when AutoNPO would have stepped in")
