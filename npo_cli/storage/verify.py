"""`npo verify`: every file of a run directory against what was recorded of it, and what can be restored."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from npo_cli.errors import NpoError, damaged_checkpoint_hint, quote_path
from npo_cli.storage.autonpo_log import read_transitions
from npo_cli.storage.calibrations import Calibration
from npo_cli.storage.checkpoints import (
    MANIFEST,
    TRAINING_STATE_FOLDER,
    Checkpoint,
    find_damage,
    is_complete,
    list_checkpoints,
    list_step_folders,
    read_manifest,
    read_recorded_logs,
)
from npo_cli.storage.costs import read_cost_lines
from npo_cli.storage.evals import read_evals, read_prompt_results
from npo_cli.storage.files import damaged_file_error
from npo_cli.storage.guide_cache import (
    format_source_option,
    read_cache_info,
    read_finished_prompts,
    read_guide_prompts,
)
from npo_cli.storage.jsonl import JsonlLog
from npo_cli.storage.layout import RunDir, head_path, list_folders, open_run, parse_step
from npo_cli.storage.lineage import list_recorded_branches, read_segments
from npo_cli.storage.lock import lock_run
from npo_cli.storage.log_head import (
    LogHead,
    check_log,
    damaged_log_error,
    parse_line,
    read_head,
    rewrite_head,
)
from npo_cli.storage.metrics import read_events, read_metrics, read_timings
from npo_cli.storage.rollout_log import RolloutLog
from npo_cli.storage.sample_store import SampleStore, read_scores
from npo_cli.types.views import Damage, VerifiedRun

INDISPENSABLE = ("segments", "autonpo", "metrics", "rollouts")
"""Logs that training continues from."""
Check = tuple[Callable[[], str] | None, Callable[[], object]]
"""What can be restored if the reader fails (None: what its error says), and the reader."""


def verify_run(root: Path) -> Iterator[Damage | VerifiedRun]:
    """Everything that is damaged, then one record of what was read."""
    run, messages = open_run(root), set()
    for restore, read in list_checks(run):
        try:
            result = read()
            for _ in result if isinstance(result, Iterator) else ():
                pass
        except NpoError as error:
            # Several readers meet the same damage.
            if error.message not in messages:
                messages.add(error.message)
                yield Damage(message=error.message, restore=restore() if restore else error.hint)
    yield VerifiedRun(
        run=str(root),
        num_damages=len(messages),
        num_logs=len(run.list_logs()),
        num_checkpoints=sum(len(list_step_folders(run, folder.name)) for folder in list_folders(run.branches_folder)),
    )


def list_checks(run: RunDir) -> Iterator[Check]:
    """Logs before their records, and both before what is made of them."""
    for path in run.list_logs():
        yield partial(describe_restore, run, path), partial(check_log, path)
        yield None, JsonlLog(path).iter_rows
    for read in (read_segments, read_evals, read_prompt_results, read_cost_lines, read_transitions, read_events):
        yield None, partial(read, run)
    for branch in (folder.name for folder in list_folders(run.branches_folder)):
        yield None, partial(check_listed, run, branch)
        yield None, partial(run.read_recipe, branch)
        for read in (read_metrics, read_timings):
            yield None, partial(read, run, branch)
        yield None, RolloutLog(run.rollouts_path(branch)).iter_groups
        yield from list_checkpoint_checks(run, branch)
    yield None, run.read_recipe
    yield from list_store_checks(run, run)
    for folder in list_folders(run.calibrations_folder):
        yield None, partial(check_settings, folder)
        yield None, Calibration(folder).read_replays
        yield from list_store_checks(run, RunDir(folder))


def check_listed(run: RunDir, branch: str) -> None:
    """Refuse a branch with checkpoints that no line of the lineage creates."""
    if list_step_folders(run, branch) and branch not in list_recorded_branches(run):
        raise damaged_log_error(run.segments_path, f"it has no line of branch {branch}, which has checkpoints")


def list_checkpoint_checks(run: RunDir, branch: str) -> Iterator[Check]:
    """Every byte of the branch's checkpoints, and of the logs as they were when each was saved."""
    for folder in list_step_folders(run, branch):
        restore = partial(describe_checkpoint_restore, run, branch, folder)
        yield restore, partial(check_checkpoint, branch, folder)
    for folder in filter(is_complete, list_step_folders(run, branch)):
        for name, head in read_recorded_logs(folder).items():
            yield partial(describe_restore, run, run.root / name), partial(check_log, run.root / name, head)


def check_checkpoint(branch: str, folder: Path) -> None:
    """Refuse a checkpoint whose weights, training state or manifest are not as saved."""
    damage = find_damage(folder)
    if damage is None and (folder / TRAINING_STATE_FOLDER).exists():
        damage = find_damage(folder, training_state=True)
    if damage is not None:
        raise NpoError(damage, damaged_checkpoint_hint(folder))
    manifest = read_manifest(folder)
    if (manifest.get("branch"), manifest.get("step")) != (branch, parse_step(folder.name)):
        raise damaged_file_error(folder / MANIFEST, "it is of another branch or step")


def list_store_checks(run: RunDir, artifacts: RunDir) -> Iterator[Check]:
    """Guide caches, scorings and probes of the run, or of one of its calibrations."""
    for folder in list_folders(artifacts.guides_folder):
        yield partial(describe_restore, run, folder / "rollouts.jsonl"), partial(check_guide, folder)
    for parent in (artifacts.scores_folder, artifacts.probes_folder):
        for folder in list_folders(parent):
            store, restore = SampleStore(folder), partial(describe_restore, run, folder / "rollouts.jsonl")
            yield None, partial(check_settings, folder)
            yield restore, partial(store.iter_samples)
            if store.is_finished:
                yield None, partial(read_scores, store)


def check_settings(folder: Path) -> None:
    """Refuse a store whose settings.json is damaged; one without it was killed before it was made."""
    store = SampleStore(folder)
    if (folder / "settings.json").exists():
        _ = store.spec
    elif store.is_finished or store.path.exists():
        raise NpoError(f"{folder / 'settings.json'} is missing", "restore it from a copy of the run directory")


def check_guide(folder: Path) -> None:
    """Refuse a guide cache whose samples are not as sampled, or, once complete, as counted."""
    info = read_cache_info(folder)
    if info.complete:
        read_finished_prompts(folder, info)
    else:
        read_guide_prompts(folder)


# What can be restored


def describe_checkpoint_restore(run: RunDir, branch: str, folder: Path) -> str:
    """Set a damaged checkpoint aside, and continue from one that is whole."""
    hint = damaged_checkpoint_hint(folder)
    full = [one.step for one in list_checkpoints(run, branch) if one.tier == "full" and one.path != folder]
    if not full:
        return hint
    again = f"npo resume {_quote(run)} --branch {branch} --at {full[-1]} --no-guide"
    return f"{hint}; step {full[-1]} can be continued: {again}"


def describe_restore(run: RunDir, path: Path) -> str:
    """What brings back a damaged log besides a copy of the run directory."""
    parts = path.relative_to(run.root).parts
    folder = run.root.joinpath(*parts[:2])
    ways = {
        "guides": lambda: f"rm -r {quote_path(folder)}; {_describe_sampling(run, folder)}",
        "scores": lambda: f"rm -r {quote_path(folder)}, then npo score-checkpoints as before",
        "probes": lambda: f"rm -r {quote_path(folder)}: AutoNPO probes again if it needs to",
        "calibrations": lambda: f"rm -r {quote_path(folder)}, then npo calibrate as before",
        "evals.jsonl": lambda: _describe_evaluation(run, path),
        "prompt_results.jsonl": lambda: _describe_evaluation(run, path),
    }
    copy = "restore it from a copy of the run directory"
    if parts[0] in ways:
        return f"{copy}, or make it again: {ways[parts[0]]()}"
    try:
        check_acceptable(run, path)
    except NpoError:
        return f"{copy}{_describe_whole_part(run, path)}"
    return f"{copy}, or take it as it is: npo verify {_quote(run)} --accept {quote_path(path)}"


def _describe_evaluation(run: RunDir, path: Path) -> str:
    remove = f"rm -f {quote_path(path)} {quote_path(head_path(path))}"
    branches = [folder.name for folder in list_folders(run.branches_folder)]
    return "; ".join([remove, *(f"npo eval {_quote(run)} --all --branch {branch}" for branch in branches)])


def _describe_sampling(run: RunDir, folder: Path) -> str:
    try:
        info = read_cache_info(folder)
    except NpoError:
        return "npo sample-guide as before"
    return (
        f"npo sample-guide {_quote(run)} --branch {info.branch} {format_source_option(info)} --at {info.learner_step} "
        f"--name {info.name}, with the settings as before"
    )


def _describe_whole_part(run: RunDir, path: Path) -> str:
    """Up to which checkpoint the log is as it was written; empty where no checkpoint says."""
    for saved, head in sorted(_list_records(run, path), key=lambda record: -record[0].step):
        with suppress(NpoError):
            check_log(path, head)
            return f"; its first {head.lines:,} lines, up to step {saved.step} of {saved.branch}, are whole"
    return ""


def _list_records(run: RunDir, path: Path) -> Iterator[tuple[Checkpoint, LogHead]]:
    """What checkpoints recorded of a log."""
    for folder in list_folders(run.branches_folder):
        for saved in list_checkpoints(run, folder.name):
            head = read_recorded_logs(saved.path).get(path.resolve().relative_to(run.root.resolve()).as_posix())
            if head is not None:
                yield saved, head


def _quote(run: RunDir) -> str:
    return quote_path(run.root)


# Logs taken as they are


def check_acceptable(run: RunDir, path: Path) -> None:
    """Refuse a log with a line that is no object, or with too few lines where a run needs all that were written."""
    if path.resolve() not in (log.resolve() for log in run.list_logs()) or not path.exists():
        raise NpoError(f"{path} is not a log of {run.root}", f"npo verify {_quote(run)} lists what is damaged")
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        if line.endswith(b"\n") and parse_line(line) is None:
            raise NpoError(f"{path}, line {number}: not a JSON object", "remove the line, or restore the file")
    if path.stem in INDISPENSABLE:
        own = [read_head(path)] if head_path(path).exists() else []
        needed = max((head.lines for head in (*own, *(head for _, head in _list_records(run, path)))), default=0)
        if len(lines) < needed:
            raise NpoError(
                f"{path} has {len(lines):,} lines, and {needed:,} were written: the run needs all of them",
                "restore it from a copy of the run directory",
            )


def accept_logs(root: Path, paths: Sequence[Path]) -> None:
    """Take logs as they are: their heads count what is there, and what was recorded of them holds no more."""
    run = open_run(root)
    with lock_run(run, checks_logs=False):
        for path in paths:
            check_acceptable(run, path)
        for path in paths:
            rewrite_head(path, is_accepted=True)
