"""The checks of `npo check`: every fault of a project at once, before a run is made.

What needs no torch comes first: recipe, data, packages, model folder, engine, verifier. Then the tokenizer (lengths of
the prompts, the chat template), and memory and disk. Nothing is written.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from npo_cli.config.loading import load_usable_recipe
from npo_cli.config.recipe import Recipe, TaskSettings
from npo_cli.errors import NpoError, first_line
from npo_cli.policy.model_folder import decide_chat
from npo_cli.preflight.environment import (
    driver_checks,
    installed_engine_checks,
    installed_version,
    package_check,
    read_requirements,
    usable_memory,
)
from npo_cli.preflight.verifier import check_verifier
from npo_cli.registry import TASKS
from npo_cli.tasks.base import LoadedPrompts
from npo_cli.tasks.custom_verifier import is_code_allowed
from npo_cli.tasks.data_sets import heldout_part, training_part
from npo_cli.tasks.scan_file import MAX_LISTED, scan_file, scan_split
from npo_cli.types.rollouts import Prompt
from npo_cli.types.views import CheckedPart, ProjectCheck


def check_project(
    name: str, overrides: Sequence[str] = (), *, method: str | None = None, run_folder: Path | None = None
) -> Iterator[ProjectCheck]:
    """Everything that was looked at, faults with their fix. Raises only if the recipe cannot be read at all."""
    recipe, faults = load_usable_recipe(name, overrides, method=method)
    yield from _faults("recipe", faults)
    if not faults:
        yield _ok("recipe", f"{name}: {recipe.train.num_steps} steps of {recipe.train.prompts_per_step} prompts")
    with suppress(NpoError):  # a model that is missing is reported below
        recipe = decide_chat(recipe)
    loaded, places = None, {}
    if any("task.source" in fault.message for fault in faults):
        yield _note("data", "data and verifier are not checked: they depend on task.source")
    else:
        data_checks, loaded, places = _check_data(recipe)
        yield from data_checks
    if loaded is not None and not any("train" in fault.message for fault in faults):
        yield from _check_batch(recipe, loaded)
    yield from _check_packages(recipe)
    model_checks = list(_check_model(recipe))
    yield from model_checks
    yield from _check_engine(recipe)
    if loaded is not None:
        yield from check_verifier(recipe.task, loaded, places=places)
    if any(check.state == "fault" for check in model_checks):
        yield _note("prompts", "lengths, memory and disk are not checked: they need the model")
        return
    # From here on torch is imported.
    if loaded is not None:
        yield from _check_prompts(recipe, loaded, places)
    yield from _check_resources(recipe, run_folder or Path.cwd())


DataReport = tuple[list[ProjectCheck], LoadedPrompts | None, dict[str, str]]
"""What was found, the prompts that could be loaded, and where in a file each of them is."""


def _check_data(recipe: Recipe) -> DataReport:
    """What the data is like."""
    task, seed = recipe.task, recipe.train.seed if recipe.task.seed is None else recipe.task.seed
    source = TASKS.get(task.source)
    code = [name for name in source.list_code(task) if not is_code_allowed(name)]
    if code:
        text = f"{', '.join(code)} is user code and was not run: data and verifier are not checked"
        return [_note("data", text, "read the file, then repeat with --allow-code")], None, {}
    faults = _collect(lambda: source.validate(task))
    if task.source == "file" and task.path:
        return _check_file(task, seed, faults)
    loaded: list[LoadedPrompts] = []
    faults += [] if faults else _collect(lambda: loaded.append(source.load(task, seed=seed)))
    return list(_faults("data", faults)), next(iter(loaded), None), {}


def _check_file(task: TaskSettings, seed: int, faults: list[NpoError]) -> DataReport:
    """The same for a data file, row by row."""
    part = heldout_part(task)
    scan = scan_file(training_part(task), task, "rows")
    heldout = None if part is None else scan_file(part, task, "heldout")
    faults += scan.faults + (heldout.faults if heldout else [])
    loaded = None
    if scan.located:
        loaded, split_faults = scan_split(scan, heldout, task, seed)
        faults += split_faults
    checks = list(_faults("data", faults))
    if scan.num_rows:
        columns = ", ".join(map(str, scan.columns))
        checks.append(_ok("data", f"{task.path}: {scan.num_rows} rows with the columns {columns}"))
    if scan.repeated:
        rows = ", ".join(each.rpartition(" ")[2] for each in scan.repeated[:MAX_LISTED])
        more = ", ..." if len(scan.repeated) > MAX_LISTED else ""
        checks.append(
            _note(
                "data",
                f"rows with the prompt of an earlier row: {rows}{more} ({len(scan.repeated)} in all)",
                "remove them, unless these prompts shall weigh more",
            )
        )
    located = [*scan.located, *(heldout.located if heldout else ())]
    if task.image_column is not None:
        checks += _count_images(task, [prompt for prompt, _ in located])
    return checks, loaded, {prompt.prompt_id: place for prompt, place in located}


def _count_images(task: TaskSettings, prompts: Sequence[Prompt]) -> Iterator[ProjectCheck]:
    """How many images the usable rows have, and the largest of them; the others are faults."""
    images = [image for prompt in prompts for image in prompt.images]
    if not images:
        yield _note("data", f"no usable row has an image in {task.image_column!r} (task.image_column)")
        return
    largest = max(images, key=lambda image: image.width * image.height)
    num_rows = sum(bool(prompt.images) for prompt in prompts)
    yield _ok(
        "data",
        f"{len(images)} images in {num_rows} rows, the largest {largest.width} x {largest.height} = "
        f"{largest.width * largest.height:,} pixels, of at most {task.max_image_pixels:,}",
    )


def _check_batch(recipe: Recipe, loaded: LoadedPrompts) -> Iterator[ProjectCheck]:
    """Whether there are enough prompts for a step."""
    wanted, found = recipe.train.prompts_per_step, len(loaded.train)
    if wanted > found > 0:
        yield _fault(
            "data",
            f"the task has {found} training prompts, but train.prompts_per_step is {wanted}",
            f"set train.prompts_per_step={found} or less, or bring more prompts",
        )
    else:
        yield _ok("data", f"{found} training prompts, {len(loaded.heldout)} held out")


def _check_packages(recipe: Recipe) -> Iterator[ProjectCheck]:
    """The packages beyond the core that these settings need."""
    task = recipe.task
    needed = {
        "pyarrow": ("parquet", any(str(path).endswith(".parquet") for path in (task.path, task.heldout_path))),
        "reasoning-gym": ("gym", task.source == "reasoning_gym"),
        "verifiers": ("verifiers", task.source == "verifiers"),
        "pillow": ("images", task.image_column is not None or task.source == "shapes"),
        "peft": ("lora", recipe.model.lora.rank is not None),
        "liger-kernel": ("liger", recipe.model.liger),
        "gguf": ("gguf", recipe.model.path == "smollm2-135m"),
        **{each: (each, each in recipe.tracking.report_to) for each in ("tensorboard", "wandb", "trackio")},
    }
    ranges = {each.name: each for each in read_requirements().requirements}
    for name, (extra, is_needed) in needed.items():
        if not is_needed:
            continue
        if name in ranges:
            check = package_check(ranges[name])
            if not check.is_ok:
                yield _fault("packages", f"{name} is needed by these settings: {check.detail}", check.hint)
        elif installed_version(name) is None:
            yield _fault("packages", f"{name} is needed by these settings and not installed", f"pip install {extra}")


def _check_model(recipe: Recipe) -> Iterator[ProjectCheck]:
    from npo_cli.policy.model_folder import find_folder_faults, find_model, is_packaged, packaged_file, read_max_tokens

    path = recipe.model.path
    if is_packaged(path):
        faults = _collect(lambda: packaged_file(path))
        yield from _faults("model", faults)
        if not faults:
            yield _ok("model", path)
        return
    found: list[str | Path] = []
    faults = _collect(lambda: found.append(find_model(path)))
    if found and isinstance(found[0], Path):
        faults += list(find_folder_faults(found[0]))
        limit = read_max_tokens(found[0])
        if limit is not None and recipe.sampling.max_new_tokens >= limit:
            faults.append(
                NpoError(
                    f"sampling.max_new_tokens={recipe.sampling.max_new_tokens} leaves no room for a prompt: {path} "
                    f"supports {limit} tokens",
                    "lower sampling.max_new_tokens, or choose another model.path",
                )
            )
    yield from _faults("model", faults)
    if found and isinstance(found[0], str):
        yield _note("model", f"{path} is an id on the hub: it is loaded from there or from the local cache")
    elif not faults:
        yield _ok("model", f"{path}: config, weights and tokenizer")
    yield from _check_device(recipe)


def _check_device(recipe: Recipe) -> Iterator[ProjectCheck]:
    gpus = [check for check in driver_checks() if check.is_ok]
    if recipe.model.device.startswith("cuda") and not gpus:
        yield _fault(
            "model",
            f"model.device={recipe.model.device}, but there is no GPU that torch can use",
            "set model.device=auto",
        )
    if recipe.model.liger and not gpus:
        yield _fault("model", "model.liger=true needs a GPU (Triton kernels)", "remove it")


def _check_engine(recipe: Recipe) -> Iterator[ProjectCheck]:
    kind = recipe.engine.kind
    check = next(each for each in installed_engine_checks(read_requirements()) if each.name == f"engine {kind}")
    if check.is_ok:
        yield _ok("engine", f"{kind}: {check.detail}")
    else:
        yield _fault("engine", f"engine.kind={kind}: {check.detail}", f"{check.hint}, or set engine.kind=transformers")


def _check_prompts(recipe: Recipe, loaded: LoadedPrompts, places: Mapping[str, str]) -> Iterator[ProjectCheck]:
    """Lengths against the limits, and one prompt as the model reads it."""
    from npo_cli.preflight.prompt_lengths import check_prompts

    prompts = (*loaded.train, *loaded.heldout)
    if any(prompt.images for prompt in prompts):
        yield _note("prompts", "prompts with images are not counted: their tokens depend on the model's processor")
        return
    try:
        yield from check_prompts(recipe, prompts, places=places)
    except NpoError as error:
        yield from _faults("prompts", [error])


def _check_resources(recipe: Recipe, folder: Path) -> Iterator[ProjectCheck]:
    """Memory of this machine and disk of the folder against the estimate of `npo plan`."""
    from npo_cli.memory.planner import estimate_needs
    from npo_cli.report.table import format_bytes

    try:
        needs = estimate_needs(recipe, folder, usable_memory=usable_memory())
    except NpoError as error:
        yield from _faults("memory", [error])
        return
    except Exception as error:  # a model that only this check builds, without weights
        yield _note("memory", f"memory cannot be estimated: {first_line(error)}")
        return
    for need in needs:
        part: CheckedPart = "disk" if need.location == "disk" else "memory"
        limit = "" if need.limit_bytes is None else f" of {format_bytes(need.limit_bytes)}"
        where = f"{need.name}: " if need.location == "gpu" and need.name != "memory" else ""
        text = f"{where}{format_bytes(need.num_bytes)}{limit}"
        yield _ok(part, text) if need.fits else _fault(part, f"{text}: it does not fit", need.hint)


def _collect(action: Callable[[], object]) -> list[NpoError]:
    """The error of an action, if it raises one."""
    try:
        action()
    except NpoError as error:
        return [error]
    return []


def _faults(part: CheckedPart, errors: Sequence[NpoError]) -> Iterator[ProjectCheck]:
    return (_fault(part, error.message, error.hint) for error in errors)


def _fault(part: CheckedPart, message: str, hint: str) -> ProjectCheck:
    return ProjectCheck(part=part, state="fault", message=message, hint=hint)


def _note(part: CheckedPart, message: str, hint: str = "") -> ProjectCheck:
    return ProjectCheck(part=part, state="note", message=message, hint=hint)


def _ok(part: CheckedPart, message: str) -> ProjectCheck:
    return ProjectCheck(part=part, state="ok", message=message)
