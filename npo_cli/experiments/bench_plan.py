"""A method's plan as commands: what `npo bench` runs for one method, one setting and one seed, and what is left of it.

The commands are those a person would type. Each is looked at before it runs: what is done is skipped, what a kill cut
short is gone on with.
"""

import re
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from npo_cli.config.loading import apply_overrides, load_recipe
from npo_cli.config.recipe import Recipe
from npo_cli.errors import NpoError
from npo_cli.storage.checkpoints import list_checkpoints
from npo_cli.storage.guide_cache import cache_info_path, read_cache_info
from npo_cli.storage.layout import RUN_INFO_FILE, RunDir, open_run
from npo_cli.storage.lineage import list_branches
from npo_cli.storage.scouts import has_ended

Command = tuple[str, ...]
SETTING = re.compile(r"[a-z_]+(\.[a-z_]+)+=")
"""Begins a word of a command that is a setting."""
MAIN = "main"
NO_SUBSTITUTIONS: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchRun:
    """One run of a comparison."""

    recipe: str
    method: str
    settings: tuple[str, ...]
    """KEY=VALUE on top of recipe and method."""
    seed: int
    folder: Path
    teacher: str
    """Options of npo sample-guide that name an outside teacher; `{seed}` stands for the seed."""

    @property
    def run(self) -> Path:
        """The run directory."""
        return self.folder / "run"

    @property
    def overrides(self) -> tuple[str, ...]:
        """Every setting at the run's creation."""
        return (*self.settings, f"train.seed={self.seed}")

    def resolve_recipe(self) -> Recipe:
        """The recipe that the run will have."""
        return load_recipe(self.recipe, self.overrides, method=self.method)


def build_commands(cell: BenchRun) -> list[Command]:
    """The method's plan for this cell, span by span where it repeats itself."""
    recipe = cell.resolve_recipe()
    first, *rest = recipe.method.commands
    steps, span = recipe.train.num_steps, recipe.method.repeat_every
    found = [(*_filled(first, cell, recipe), *cell.overrides)]
    if span is None:
        return found + [_filled(line, cell, recipe) for line in rest]
    branch = MAIN
    for at in range(0, steps, span):
        end = min(at + span, steps)
        moving = {"at": str(at), "next": str(end), "repeat_every": str(end - at), "branch": branch}
        found += [_filled(line, cell, recipe, moving=moving) for line in rest]
        branch = next((name for words in reversed(found) if (name := _options(words).get("--new-branch"))), branch)
    return found


def _filled(line: str, cell: BenchRun, recipe: Recipe, *, moving: Mapping[str, str] = NO_SUBSTITUTIONS) -> Command:
    """One line of the plan with its braces filled; the words of `{teacher}` stay words."""
    at, guide, count = recipe.guide.replay.at_step, recipe.guide.replay.guide_step, recipe.guide.cache.count_covered
    known = {
        "recipe": cell.recipe,
        "method": cell.method,
        "run": str(cell.run),
        "at": at,
        "guide": guide,
        "segment": None if at is None or guide is None else count(guide - at),
        "scout": recipe.autonpo.early.scout_steps,
        "window": count(recipe.autonpo.early.replay_steps),
        "steps": recipe.train.num_steps,
        **moving,
    }
    words: list[str] = []
    for word in shlex.split(line):
        name = word[1:-1] if word.startswith("{") and word.endswith("}") else ""
        if name == "teacher":
            words += shlex.split(_teacher(cell))
        else:
            words.append(_worded(word, known, method=cell.method))
    return tuple(words)


def _worded(word: str, known: Mapping[str, object], *, method: str) -> str:
    for name, value in known.items():
        if f"{{{name}}}" in word and value is None:
            key = f"guide.replay.{'at_step' if name == 'at' else 'guide_step'}"
            raise NpoError(f"method {method} needs {key}", f"add {key}=STEP")
        word = word.replace(f"{{{name}}}", str(value))
    return word


def _teacher(cell: BenchRun) -> str:
    if not cell.teacher:
        raise NpoError(
            f"method {cell.method} needs a teacher: options of npo sample-guide that name it",
            "--teacher '--source file:traces-{seed}.jsonl'   # or model:FOLDER, endpoint:URL#MODEL, ...",
        )
    return cell.teacher.replace("{seed}", str(cell.seed))


@dataclass(frozen=True, kw_only=True, slots=True)
class CommandSpan:
    """One command of a plan, and the steps that it is about."""

    command: Command
    options: Mapping[str, str]
    branch: str
    """That it reads or continues."""
    first: int
    """Training, a scout's too: the last step before it. A guide: the learner's step."""
    last: int
    """Training: its last step. A guide: the last step with it."""
    saved: frozenset[int] | None
    """Steps of which the branch has a checkpoint by then; None of the run's first command."""
    recipe: Recipe
    """With the command's own settings, and those that its branch inherits."""
    fork_step: int
    """Training: where the branch was forked."""


def list_spans(cell: BenchRun) -> list[CommandSpan]:
    """The commands of the plan with their steps, from the settings alone; no command runs."""
    recipe = cell.resolve_recipe()
    every, num_steps = recipe.train.save_every, recipe.train.num_steps
    saved: dict[str, frozenset[int]] = {}
    scouts: dict[str, int] = {}
    recipes: dict[str, Recipe] = {}
    forks: dict[str, int] = {MAIN: 0}
    spans: list[CommandSpan] = []
    for command in build_commands(cell):
        options = _options(command)
        branch, source = options.get("--branch", MAIN), options.get("--source", "")
        before = saved.get(branch, frozenset())
        first, last = int(options.get("--at", max(before, default=0))), int(options.get("--until", num_steps))
        if command[0] == "scout":
            scouts[options["--name"]] = length = int(options.get("--steps", _scout_length(cell, recipe)))
            last = first + length
        elif command[0] == "sample-guide":
            scout = source.removeprefix("scout:").partition("@")[0]
            ahead = int(source) - first if source.isdecimal() else scouts.get(scout, 0)
            covered = recipe.guide.cache.count_covered(ahead) if ahead > 0 else num_steps - first
            last = first + int(options.get("--steps", recipe.guide.replay.num_steps or covered))
        own = recipes.get(branch, recipe)
        if spans:
            own = apply_overrides(own, list(filter(SETTING.match, command)))
        trained = options.get("--new-branch", branch)
        spans.append(
            CommandSpan(
                command=command,
                options=options,
                branch=branch,
                first=first,
                last=last,
                saved=before if saved else None,
                recipe=own,
                fork_step=first if trained != branch else forks.get(branch, 0),
            )
        )
        if command[0] in ("train", "resume"):
            recipes[trained], forks[trained] = own, spans[-1].fork_step
            kept = {step for step in before if step <= first}
            saved[trained] = frozenset({*kept, first, last, *range(first - first % every + every, last + 1, every)})
    return spans


def _scout_length(cell: BenchRun, recipe: Recipe) -> int:
    if recipe.scout.num_steps is None:
        raise NpoError(f"method {cell.method} needs scout.num_steps", "add scout.num_steps=N")
    return recipe.scout.num_steps


def check_plan(cell: BenchRun) -> None:
    """Refuse a plan with a step that will have no checkpoint when a command needs it; no command runs."""
    recipe = cell.resolve_recipe()
    every, num_steps = recipe.train.save_every, recipe.train.num_steps
    for span in list_spans(cell):
        source = span.options.get("--source", "")
        for step in (span.first, *([int(source)] if source.isdecimal() else [])):
            if span.saved is not None and step not in span.saved:
                raise NpoError(
                    f"method {cell.method} needs a checkpoint of step {step} for `npo {shlex.join(span.command)}`, and "
                    f"branch {span.branch} will have one every {every} steps up to {max(span.saved, default=0)} only",
                    f"choose guide.replay.at_step, guide.replay.guide_step and autonpo.early.scout_steps among those, "
                    f"or another train.save_every (now {every})",
                )
        if span.command[0] not in ("train", "resume"):
            continue
        if span.last > num_steps or (span.last <= span.first and span.command[0] == "resume"):
            raise NpoError(
                f"method {cell.method} trains from step {span.first} to {span.last}, and train.num_steps is "
                f"{num_steps}",
                f"choose steps of the plan between 0 and {num_steps}, or a larger train.num_steps",
            )


def find_remaining_command(command: Command, cell: BenchRun) -> Command | None:
    """The command as it has to be run now; None where it is done."""
    options = _options(command)
    steps = int(options.get("--until", cell.resolve_recipe().train.num_steps))
    if command[0] == "sample-guide":
        path = cache_info_path(open_run(cell.run).guide_folder(options["--name"]))
        return None if path.exists() and read_cache_info(path.parent).complete else command
    if command[0] == "train" and not _begun(cell.run, until=steps):
        return command
    if "--autonpo" in command:
        return ("resume", str(cell.run), "--autonpo")
    run, branch = open_run(cell.run), options.get("--new-branch", MAIN)
    if command[0] == "scout":
        name = options["--name"]
        return None if name in list_branches(run) and has_ended(run, name) else command
    if command[0] == "resume" and branch not in list_branches(run):
        return command
    if _newest(run, branch) >= steps:
        return None
    return ("resume", str(cell.run), "--branch", branch, "--until", str(steps))


def _options(command: Sequence[str]) -> dict[str, str]:
    """Options with their values; a flag has the word after it."""
    return {word: after for word, after in _pairs(command) if word.startswith("--")}


def _pairs(command: Sequence[str]) -> Iterator[tuple[str, str]]:
    return zip(command, (*command[1:], ""), strict=True)


def _begun(root: Path, *, until: int) -> bool:
    """Whether there is something to go on from; what a kill left before that is removed."""
    if (root / RUN_INFO_FILE).exists() and (until > 0 or _newest(open_run(root), MAIN) >= 0):
        return True
    shutil.rmtree(root, ignore_errors=True)
    return False


def _newest(run: RunDir, branch: str) -> int:
    """Step of the branch's newest checkpoint; -1 without one."""
    return max((found.step for found in list_checkpoints(run, branch)), default=-1)
