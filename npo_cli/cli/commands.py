"""The table of commands. A command's module is imported when the command is run or its help is shown.

`npo --help` and errors before a command begin as fast as typer does; each command pays for its own imports only.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from npo_cli.cli.terminal import VERBOSITY


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """One command."""

    target: str
    """`module:function` in this package."""
    group: str
    summary: str
    """First line of the function's docstring, which `npo --help` shows without importing it."""
    example: str
    """The last line of its help page."""


START, WORKFLOW, AUTONPO, INSPECT = "Start a project", "Workflow", "AutoNPO", "Inspect a run"
COMPARE, TOOLS = "Compare", "Tools"
GROUPS = (START, WORKFLOW, AUTONPO, INSPECT, COMPARE, TOOLS)
COMMANDS = {
    "init": Command(
        target="init:init",
        group=START,
        summary="Start a project: a recipe, a verifier and ten rows of data that train at once.",
        example="npo init my-project",
    ),
    "check": Command(
        target="check:check",
        group=START,
        summary="Check a recipe, its data, verifier and model before training.",
        example="npo check recipe.yaml",
    ),
    "config": Command(
        target="config_command:config",
        group=START,
        summary="Explain the settings of a recipe.",
        example="npo config train.lr",
    ),
    "train": Command(
        target="train:train",
        group=WORKFLOW,
        summary="Train a GRPO baseline from a recipe.",
        example="npo train micro runs/first train.num_steps=200",
    ),
    "index": Command(
        target="index:index",
        group=WORKFLOW,
        summary="List checkpoints, or import those of another trainer.",
        example="npo index runs/first",
    ),
    "score-checkpoints": Command(
        target="score_checkpoints:score_checkpoints",
        group=WORKFLOW,
        summary="Rank guide candidates for a learner by S = Q_net/V.",
        example="npo score-checkpoints runs/first --at 40 --candidates 60,80",
    ),
    "sample-guide": Command(
        target="sample_guide:sample_guide",
        group=WORKFLOW,
        summary="Build a guide cache: sample a guide on the prompts of a replay.",
        example="npo sample-guide runs/first --at 40 --source 80 --name late",
    ),
    "resume": Command(
        target="resume:resume",
        group=WORKFLOW,
        summary="Resume training, or fork from an earlier step.",
        example="npo resume runs/first --at 40 --guide late --new-branch late",
    ),
    "replay": Command(
        target="replay:replay",
        group=WORKFLOW,
        summary="Score guide candidates, sample the chosen one, and train a branch with it.",
        example="npo replay runs/first --at 40 --candidates 60,80",
    ),
    "scout": Command(
        target="scout:scout",
        group=WORKFLOW,
        summary="Train a disposable scout: a branch that is only a guide and a teacher.",
        example="npo scout runs/first --at 40 --steps 40 scout.num_updates=2",
    ),
    "autonpo": Command(
        target="autonpo:autonpo",
        group=AUTONPO,
        summary="Show what AutoNPO did in a run, or would have done.",
        example="npo autonpo runs/first --explain",
    ),
    "show": Command(
        target="show:show",
        group=INSPECT,
        summary="Print metrics, rollouts, guides, lineage or costs.",
        example="npo show runs/first rollouts --step 40",
    ),
    "watch": Command(
        target="watch:watch",
        group=INSPECT,
        summary="Draw the curves of a run in the terminal while it trains.",
        example="npo watch runs/first",
    ),
    "eval": Command(
        target="evaluate:evaluate",
        group=INSPECT,
        summary="Evaluate checkpoints on the held-out prompts.",
        example="npo eval runs/first --all",
    ),
    "report": Command(
        target="report:report",
        group=INSPECT,
        summary="Write a report of one or several runs.",
        example="npo report runs/first --out report.html",
    ),
    "ls": Command(
        target="ls:list_run_directories",
        group=INSPECT,
        summary="List the runs below a folder.",
        example="npo ls runs",
    ),
    "rm": Command(
        target="rm:remove",
        group=INSPECT,
        summary="Delete a branch. Without --yes: what would be deleted, and its size.",
        example="npo rm runs/first:late",
    ),
    "verify": Command(
        target="verify:verify",
        group=INSPECT,
        summary="Check every file of a run, and say what can be restored.",
        example="npo verify runs/first",
    ),
    "bench": Command(
        target="bench:bench",
        group=COMPARE,
        summary="Train several methods with several seeds.",
        example="npo bench micro --methods grpo,npo --seeds 3 --out runs/bench",
    ),
    "calibrate": Command(
        target="calibrate:calibrate",
        group=COMPARE,
        summary="Measure the gain of guide candidates, and how well each score predicts it.",
        example="npo calibrate runs/first --at 0,40 --candidates self,+20,+40,+100",
    ),
    "compare": Command(
        target="compare:compare",
        group=COMPARE,
        summary="Compare methods by held-out accuracy and by cost.",
        example="npo compare runs/bench --threshold 0.8",
    ),
    "recipes": Command(
        target="recipes:recipes",
        group=TOOLS,
        summary="List the shipped recipes and methods, or print a recipe.",
        example="npo recipes micro",
    ),
    "plan": Command(
        target="plan:plan",
        group=TOOLS,
        summary="Estimate GPU memory, host memory and disk space of a run.",
        example="npo plan smollm2-135m --gpus 2 --gpu-mem 24",
    ),
    "export": Command(
        target="export:export",
        group=TOOLS,
        summary="Export a guide cache or a checkpoint for other programs.",
        example="npo export runs/first --step 40 --out step-40",
    ),
    "doctor": Command(
        target="doctor:doctor",
        group=TOOLS,
        summary="Check what this machine can run.",
        example="npo doctor",
    ),
    "demo": Command(
        target="demo:demo",
        group=TOOLS,
        summary="Run the whole workflow on a small task.",
        example="npo demo --out npo-demo",
    ),
    "docs": Command(
        target="docs:docs",
        group=TOOLS,
        summary="Print a page of the documentation, or list the pages.",
        example="npo docs glossary",
    ),
}
DISTRIBUTED_COMMANDS = ("train", "score-checkpoints", "sample-guide", "resume", "scout", "eval")
"""Commands that several processes run together; rank 0 runs any other one alone."""
COMMAND_WIDTH = 17
QUIET_HELP = "Show results, warnings and errors only."
VERBOSE_HELP = "Also show each step, and how long loading and saving took."
HELP_OPTIONS = {"help_option_names": ["-h", "--help"]}


@cache
def load_command(name: str) -> Any:
    """The command with its options."""
    command = COMMANDS[name]
    module, _, function = command.target.partition(":")
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    declare = app.command(name, epilog=f"Example: {command.example}", context_settings=HELP_OPTIONS)
    declare(getattr(import_module(f"npo_cli.cli.{module}"), function))
    loaded = typer.main.get_command(app)
    loaded.params += _verbosity_options()
    return loaded


def _verbosity_options() -> list[Any]:
    """--quiet and --verbose, which every command has, before its --help."""

    def declare(
        quiet: Annotated[bool, typer.Option("--quiet", "-q", help=QUIET_HELP)] = False,
        verbose: Annotated[bool, typer.Option("--verbose", "-v", help=VERBOSE_HELP)] = False,
    ) -> None: ...

    app = typer.Typer(add_completion=False)
    app.command()(declare)
    options = [option for option in typer.main.get_command(app).params if option.name in ("quiet", "verbose")]
    for option in options:
        option.expose_value, option.callback = False, _set_verbosity
    return options


def _set_verbosity(ctx: Any, option: Any, is_given: bool) -> None:
    if is_given:
        if VERBOSITY.get() != "normal":
            raise typer.BadParameter("--quiet and --verbose exclude each other")
        VERBOSITY.set(option.name)


class LazyCommands(Mapping[str, Any]):
    """Commands by name, loaded when they are looked up."""

    def __getitem__(self, name: str) -> Any:
        if name not in COMMANDS:
            raise KeyError(name)
        return load_command(name)

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


class GroupedCommands(TyperGroup):
    """`npo` itself: lists its commands by group."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = LazyCommands()  # type: ignore[assignment]

    def list_commands(self, ctx: Any) -> list[str]:
        """Every name, without loading a command."""
        return list(COMMANDS)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """One section per group, with aligned columns."""
        for group in GROUPS:
            with formatter.section(group):
                rows = [(name, command.summary) for name, command in COMMANDS.items() if command.group == group]
                formatter.write_dl([(name.ljust(COMMAND_WIDTH), summary) for name, summary in rows])
