"""`npo bench`: a comparison of methods, made run by run: seeds for every method, each with its own best setting.

First every method is trained with every setting of a small grid on tuning seeds; its best setting then gets the
table's seeds. A run is made with the commands of the method's plan, in processes of their own, as many side by side as
fit. What is done is not done again; what was cut short is gone on with.
"""

import os
import statistics
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from npo_cli.autonpo.preflight import validate_autonpo_settings
from npo_cli.config.loading import find_replaced_settings
from npo_cli.config.locate import find_method
from npo_cli.config.recipe import Recipe
from npo_cli.distributed.launch import strip_launch_variables
from npo_cli.errors import NpoError, RunFailed, StoppedEarly, quote_path
from npo_cli.experiments.bench_plan import BenchRun, Command, build_commands, check_plan, find_remaining_command
from npo_cli.experiments.bench_process import start_command
from npo_cli.experiments.bootstrap import area_weights, common_range
from npo_cli.session.session import open_task
from npo_cli.session.stop_signal import StopFlag, stop_between_steps
from npo_cli.storage.bench_dir import DONE_FILE, hold_bench, load_commands, save_bench_index, save_commands
from npo_cli.storage.cost_sums import learning_curve
from npo_cli.storage.files import write_json_atomic
from npo_cli.storage.layout import RUN_INFO_FILE, open_run, used_directory_error
from npo_cli.storage.lineage import find_newest_branch
from npo_cli.tasks.code_permission import is_permitted, read_permissions, record_permissions, recorded_permissions
from npo_cli.tasks.custom_verifier import has_allow_code, is_shipped_file
from npo_cli.tasks.task import list_code_files
from npo_cli.types.rollouts import Notice, Progress
from npo_cli.types.views import TunedSetting

LOG_FILE, TUNING_FILE = "log.txt", "tuning.json"
POLL_SECONDS = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchSpec:
    """What is compared."""

    recipe: str
    methods: tuple[str, ...]
    settings: tuple[str, ...]
    """KEY=VALUE for every run."""
    seeds: tuple[int, ...]
    grid: tuple[str, ...]
    """Settings to choose from, each one or several KEY=VALUE separated by spaces; empty without tuning."""
    tuning_seeds: tuple[int, ...]
    teacher: str
    out: Path
    jobs: int


def run_bench(question: BenchSpec) -> Iterator[Progress | Notice | TunedSetting]:
    """Tune, then train the table's seeds; ends with the commands that set them side by side."""
    with (
        keep_permissions(question),
        hold_bench(question.out) as lock,
        stop_between_steps() as stop,
    ):
        yield from describe_replaced_settings(question)
        chosen = yield from tune_methods(question, lock, stop)
        cells = [
            make_bench_run(question, method, chosen[method], seed=seed, subfolder="runs")
            for seed in question.seeds
            for method in question.methods
        ]
        try:
            yield from execute_runs(cells, question.jobs, lock, stop)
        except (RunFailed, StoppedEarly):
            finished = [cell for cell in cells if is_done(cell)]
            if finished:
                _save_index(question, finished)
            if len(finished) > 1:
                yield Notice(
                    message=f"{len(finished)} of {len(cells)} runs are finished; they can be compared: "
                    f"npo compare {quote_path(question.out)}"
                )
            raise
        _save_index(question, cells)
    out = quote_path(question.out)
    yield Notice(message=f"as a page: npo report {out} --out {quote_path(question.out / 'report.html')}")
    if len(cells) > 1:
        yield Notice(message=f"side by side: npo compare {out} --figure {quote_path(question.out / 'compare.png')}")


def _save_index(question: BenchSpec, cells: Iterable[BenchRun]) -> None:
    save_bench_index(question.out, [(format_method_name(cell.method), cell.run) for cell in cells])


@contextmanager
def keep_permissions(question: BenchSpec, *, is_dry: bool = False) -> Iterator[None]:
    """Check the question; user code that --allow-code allowed for this folder, now or before, runs within the block.

    What is allowed is kept as for a run, by the folder's path. `is_dry`: nothing is kept.
    """
    name = f"bench {question.out.resolve()}"
    with recorded_permissions(read_permissions(name)):
        validate_spec(question)
    if has_allow_code() and not is_dry:
        runs = (
            make_bench_run(question, method, "", seed=question.seeds[0], subfolder="runs")
            for method in question.methods
        )
        record_permissions(name, {file for run in runs for file in list_code_files(run.resolve_recipe().task)})
    with recorded_permissions(read_permissions(name)):
        yield


def may_run_code(recipe: Recipe) -> bool:
    """Whether a recipe has user code, all of which was allowed as it is now."""
    files = [file for file in list_code_files(recipe.task) if not is_shipped_file(file)]
    return bool(files) and all(has_allow_code() or is_permitted(file) for file in files)


def validate_spec(question: BenchSpec) -> None:
    """Every method's recipe, task and plan are checked before the first run is made."""
    if (question.out / RUN_INFO_FILE).exists():
        raise used_directory_error(question.out, flag="--out")
    if set(question.seeds) & set(question.tuning_seeds) and question.grid:
        both = min(set(question.seeds) & set(question.tuning_seeds))
        raise NpoError(f"seed {both} would both choose a setting and be in the table", "--tuning-seeds 100,101")
    for method in question.methods:
        for setting in question.grid or ("",):
            cell = make_bench_run(question, method, setting, seed=question.seeds[0], subfolder="runs")
            try:
                _validate_run(cell, is_tuned=bool(question.grid))
            except NpoError as error:
                is_named = f"method {method} " in error.message
                named = error.message if is_named else f"method {method}: {error.message}"
                raise NpoError(named, error.hint) from error


def _validate_run(cell: BenchRun, *, is_tuned: bool) -> None:
    """The recipe, plan and task of a method's run."""
    recipe = cell.resolve_recipe()
    check_plan(cell)
    if not recipe.eval.every:
        raise NpoError("without held-out evaluations there is nothing to compare", "add eval.every=10")
    if is_tuned and recipe.task.source == "file":
        raise NpoError(
            "the held-out file would be looked at while tuning, and then reported on",
            "tune on another file first, then leave --grid out: npo bench RECIPE train.lr=...",
        )
    with closing(open_task(recipe)) as task:
        if uses_autonpo(recipe):
            validate_autonpo_settings(recipe, len(task.train))


def describe_replaced_settings(question: BenchSpec) -> Iterator[Notice]:
    """A notice for each setting of the command line, and of the grid, that replaces a method's own."""
    for method in question.methods:
        given = dict.fromkeys((*question.settings, *(word for setting in question.grid for word in setting.split())))
        for key, (own, value) in find_replaced_settings(method, tuple(given)).items():
            yield Notice(message=f"{format_method_name(method)}: {key}={value} replaces the method's own {own}")


def uses_autonpo(recipe: Recipe) -> bool:
    """Whether the recipe's method trains under AutoNPO."""
    return "--autonpo" in recipe.method.commands[0].split()


def make_bench_run(question: BenchSpec, method: str, setting: str, *, seed: int, subfolder: str) -> BenchRun:
    """`OUT/runs/matched-luffy/train.lr=3e-4/seed-0`; several settings of a grid are joined by `+`."""
    name = (setting or "as-it-is").replace("/", "_").replace(" ", "+")
    return BenchRun(
        recipe=question.recipe,
        method=method,
        settings=(*question.settings, *setting.split()),
        seed=seed,
        folder=question.out / subfolder / format_method_name(method) / name / f"seed-{seed}",
        teacher=question.teacher,
    )


def format_method_name(method: str) -> str:
    """A method's name as a folder and in tables: `matched-luffy`; of a file its stem."""
    path = find_method(method)
    return path.stem if method.endswith((".yaml", ".yml", ".json")) else f"{path.parent.name}-{path.stem}"


def tune_methods(
    question: BenchSpec, lock: int, stop: StopFlag
) -> Generator[Progress | Notice | TunedSetting, None, dict[str, str]]:
    """Each method's best setting of the grid: largest area of the held-out curve at equal tokens, mean over seeds."""
    if not question.grid:
        return dict.fromkeys(question.methods, "")
    cells = [
        make_bench_run(question, method, setting, seed=seed, subfolder="tuning")
        for seed in question.tuning_seeds
        for method in question.methods
        for setting in question.grid
    ]
    yield from execute_runs(cells, question.jobs, lock, stop)
    chosen: dict[str, str] = {}
    for method in question.methods:
        found = [
            compute_curve_areas(
                make_bench_run(question, method, setting, seed=seed, subfolder="tuning") for setting in question.grid
            )
            for seed in question.tuning_seeds
        ]
        areas = dict(zip(question.grid, map(statistics.fmean, zip(*found, strict=True)), strict=True))
        chosen[method] = max(areas, key=areas.__getitem__)
        yield TunedSetting(method=format_method_name(method), setting=chosen[method], areas=areas)
    write_json_atomic(
        question.out / TUNING_FILE, {format_method_name(method): setting for method, setting in chosen.items()}
    )
    return chosen


def compute_curve_areas(cells: Iterable[BenchRun]) -> list[float]:
    """Held-out accuracy of each run's last branch, averaged over the tokens generated for it, as `npo compare` does.

    The range is the one that all of them cover: settings may differ in tokens per step.
    """
    runs = [open_run(cell.run) for cell in cells]
    curves = [learning_curve(run, find_newest_branch(run), name="") for run in runs]
    tokens = [[float(point.total_tokens) for point in points] for points in curves]
    low, high = common_range(tokens) or (0.0, 0.0)
    if low >= high:
        raise NpoError("the settings of the grid share no range of tokens", "add train.num_steps or eval.every")
    return [
        float(area_weights(costs_E, low=low, high=high) @ [point.accuracy for point in points])
        for costs_E, points in zip(tokens, curves, strict=True)
    ]


# Working off


@dataclass(slots=True)
class Job:
    """A cell at work."""

    bench_run: BenchRun
    pending_commands: list[Command]
    process: BaseProcess | None = None


def execute_runs(cells: Sequence[BenchRun], jobs: int, lock: int, stop: StopFlag) -> Iterator[Progress | Notice]:
    """Run every cell that is not done, `jobs` at a time, until all are done or a signal asks to stop."""
    todo = [Job(bench_run=cell, pending_commands=build_commands(cell)) for cell in cells if not is_done(cell)]
    total, running, failed = len(cells), [], []
    try:
        while todo or running:
            if stop:
                raise StoppedEarly(f"stopped by {stop.reason}; what is done is kept", "repeat the command to continue")
            while todo and len(running) < jobs:
                running.append(todo.pop(0))
            for job in list(running):
                state = _advanced(job, lock)
                if state == "running":
                    continue
                running.remove(job)
                if state == "failed":
                    failed.append(job.bench_run)
                    error = _read_error(job.bench_run.folder / LOG_FILE)
                    yield Notice(message=f"{job.bench_run.folder} failed: {error}", level="warning")
                done = total - len(todo) - len(running)
                yield Progress(description="bench", done=done, total=total, note=str(job.bench_run.folder))
            time.sleep(POLL_SECONDS if running else 0)
    finally:
        _stop_all(running)
    yield Progress(description="bench", done=total, total=total)
    if failed:
        first = failed[0].folder / LOG_FILE
        raise RunFailed(f"{len(failed)} of {total} runs failed; the first: {_read_error(first)}", f"less {first}")


def is_done(cell: BenchRun) -> bool:
    """Whether the cell was worked off, with these very commands."""
    before = load_commands(cell.folder)
    if before is None:
        return False
    if before != build_commands(cell):
        made_by = cell.folder / DONE_FILE
        raise NpoError(f"{cell.folder} was made with other commands: {made_by}", "choose another --out")
    return True


def _advanced(job: Job, lock: int) -> str:
    """Look at the cell's process; start the next command when it has ended."""
    if job.process is not None:
        code = job.process.exitcode
        if code is None:
            return "running"
        job.process = None
        if code != 0:
            return "failed"
        job.pending_commands.pop(0)
    while job.pending_commands:
        command = find_remaining_command(job.pending_commands[0], job.bench_run)
        if command is not None:
            job.process = _started(job.bench_run, command, lock)
            return "running"
        job.pending_commands.pop(0)
    save_commands(job.bench_run.folder, build_commands(job.bench_run))
    return "done"


def _started(cell: BenchRun, command: Command, lock: int) -> BaseProcess:
    """One npo command; its talk goes to a log."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    recipe = cell.resolve_recipe()
    command = (*command, *(["--allow-code"] if may_run_code(recipe) else []))
    environment = {**strip_launch_variables(os.environ), "OMP_NUM_THREADS": str(recipe.model.threads or 1)}
    return start_command(command, log=cell.folder / LOG_FILE, environment=environment, lock=lock)


def _stop_all(running: Sequence[Job]) -> None:
    """Every process finishes its step, saves and ends; at a second Ctrl-C it ends at once."""
    alive = [job.process for job in running if job.process is not None]
    for process in alive:
        process.terminate()
    try:
        for process in alive:
            process.join()
    except KeyboardInterrupt:
        for process in alive:
            process.terminate()
        raise


def _read_error(path: Path) -> str:
    """The last error in a log, or else its last line."""
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1])
