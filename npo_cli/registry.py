"""What can be added to the package from outside, by name: engines, verifiers, tasks, trackers, guide sources, mix
strategies, importance ratios, dense targets, rungs of AutoNPO's ladder.

One `Registry` per kind. The package's own classes are listed in it as `module:Class`, the form of an entry point; those
of other packages are declared as entry points of its group, in their pyproject.toml:

    [project.entry-points."npo.engines"]
    sglang = "my_package.engine:SglangEngine"

Listing and checking names imports none of the classes; `get` imports the one that is requested.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from npo_cli.errors import NpoError, first_line


@dataclass(frozen=True, kw_only=True, slots=True)
class Registry:
    """Classes of one kind by name (importance ratios, targets, rungs: objects), each with its name as `name`."""

    kind: str
    """In errors: `engine`."""
    setting: str
    """The setting that chooses among them: `engine.kind`."""
    group: str
    """Entry-point group: `npo.engines`."""
    base: str
    """What a plug-in derives from, or is an instance of, as `module:Class`."""
    built_in: Mapping[str, str]
    """The package's own, as `module:Class`."""
    _registered: dict[str, Any] = field(default_factory=dict)
    """Classes registered while the program runs."""

    def names(self) -> tuple[str, ...]:
        """All names: the package's own, in the order of the table, then the others."""
        installed = sorted(point.name for point in entry_points(group=self.group))
        return tuple(dict.fromkeys([*self.built_in, *self._registered, *installed]))

    def get(self, name: str) -> Any:
        """The class of that name. An unknown name is an error that shows the nearest one."""
        if name in self._registered:
            return self._registered[name]
        if name in self.built_in:
            return EntryPoint(name=name, value=self.built_in[name], group=self.group).load()
        for point in entry_points(group=self.group, name=name):
            return self._load_plug_in(point)
        raise NpoError(f"{self.setting}={name} is not a known {self.kind}", self.suggest(name))

    def _load_plug_in(self, point: EntryPoint) -> Any:
        """What another package's entry point names; NpoError if it cannot be imported, or is not what it must be."""
        start = f"{self.setting}={point.name}: {point.value}"
        owner = f"the package {point.dist.name}" if point.dist else "the package that declares it"
        try:
            found = point.load()
        except Exception as error:
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise NpoError(f"{start} cannot be imported: {reason}", f"fix or uninstall {owner}") from error
        base = self.load_base()
        if not isinstance(found, base) and not (isinstance(found, type) and issubclass(found, base)):
            raise NpoError(f"{start} is no {base.__name__} (entry points {self.group})", f"fix {owner}")
        name = getattr(found, "name", None)
        if name != point.name:
            raise NpoError(f"{start} has the name {name!r}", f"declare it under its own name in {owner}")
        return found

    def load_base(self) -> type:
        """The class that plug-ins derive from, or are instances of."""
        base: type = EntryPoint(name=self.kind, value=self.base, group=self.group).load()
        return base

    def check(self, name: str) -> str:
        """The name itself, for a settings field; ValueError if it is unknown."""
        if name not in self.built_in and name not in self.names():
            raise ValueError(f"{self.setting}={name[:60]} is not a known {self.kind}: {self.suggest(name)}")
        return name

    def suggest(self, name: str) -> str:
        """The nearest name, or all of them."""
        names = self.names()
        near = get_close_matches(name[:60], names, n=1)
        return f"did you mean {near[0]}?" if near else f"choose one of {', '.join(names)}"

    @contextmanager
    def registered(self, added: Any) -> Iterator[None]:
        """Register a class for the block, under its attribute `name`."""
        name: str = added.name
        self._registered[name] = added
        try:
            yield
        finally:
            del self._registered[name]


ENGINES = Registry(
    kind="engine",
    setting="engine.kind",
    group="npo.engines",
    base="npo_cli.inference.base:Engine",
    built_in={
        "transformers": "npo_cli.inference.transformers_engine:TransformersEngine",
        "vllm": "npo_cli.inference.vllm_local:VllmEngine",
        "vllm_server": "npo_cli.inference.vllm_server:VllmServer",
    },
)
TASKS = Registry(
    kind="task",
    setting="task.source",
    group="npo.tasks",
    base="npo_cli.tasks.base:TaskSource",
    built_in={
        "micro": "npo_cli.tasks.micro:MicroTask",
        "reasoning_gym": "npo_cli.tasks.reasoning_gym:ReasoningGymTask",
        "file": "npo_cli.tasks.file_dataset:FileTask",
        "custom": "npo_cli.tasks.custom_task:CustomTask",
        "verifiers": "npo_cli.tasks.verifiers_environment:VerifiersTask",
        "shapes": "npo_cli.tasks.shapes:ShapesTask",
    },
)
VERIFIERS = Registry(
    kind="verifier",
    setting="task.verifier",
    group="npo.verifiers",
    base="npo_cli.tasks.base:Verifier",
    built_in={
        "exact": "npo_cli.tasks.verifiers:ExactVerifier",
        "number": "npo_cli.tasks.verifiers:NumberVerifier",
        "last_number": "npo_cli.tasks.verifiers:LastNumberVerifier",
        "micro": "npo_cli.tasks.micro:MicroVerifier",
        "custom": "npo_cli.tasks.custom_task:TaskVerifier",
        "verifiers": "npo_cli.tasks.verifiers_environment:EnvironmentVerifier",
        "math_verify": "npo_cli.tasks.math_verify:MathVerifier",
        "reasoning_gym": "npo_cli.tasks.reasoning_gym:GymVerifier",
    },
)
TRACKERS = Registry(
    kind="tracker",
    setting="tracking.report_to",
    group="npo.trackers",
    base="npo_cli.training.tracking:Tracker",
    built_in={
        "tensorboard": "npo_cli.training.tracking:TensorboardTracker",
        "wandb": "npo_cli.training.tracking:WandbTracker",
        "trackio": "npo_cli.training.tracking:TrackioTracker",
    },
)
GUIDE_SOURCES = Registry(
    kind="guide source",
    setting="--source",
    group="npo.guide_sources",
    base="npo_cli.guides.source:GuideSource",
    built_in={
        "checkpoint": "npo_cli.guides.sources.checkpoint:CheckpointSource",
        "self": "npo_cli.guides.sources.checkpoint:SelfSource",
        "earlier": "npo_cli.guides.sources.checkpoint:EarlierSource",
        "base": "npo_cli.guides.sources.checkpoint:BaseSource",
        "scout": "npo_cli.guides.sources.scout:ScoutSource",
        "past": "npo_cli.guides.sources.own_history:OwnHistorySource",
        "run": "npo_cli.guides.sources.external_model:OtherRunSource",
        "model": "npo_cli.guides.sources.external_model:ExternalModelSource",
        "endpoint": "npo_cli.guides.sources.openai_endpoint:EndpointSource",
        "file": "npo_cli.guides.sources.trace_file:TraceFileSource",
        "extrapolated": "npo_cli.guides.sources.extrapolated:ExtrapolatedSource",
    },
)
MIX_STRATEGIES = Registry(
    kind="mix strategy",
    setting="guide.inject.mode",
    group="npo.mix_strategies",
    base="npo_cli.rollout.mixing:MixStrategy",
    built_in={
        "replace": "npo_cli.rollout.mixing:ReplaceLastSlots",
        "append": "npo_cli.rollout.mixing:AppendSlots",
        "none": "npo_cli.rollout.mixing:NoSlots",
    },
)
IMPORTANCE_RATIOS = Registry(
    kind="importance ratio",
    setting="guide.inject.ratio",
    group="npo.importance_ratios",
    base="npo_cli.losses.importance_ratio:ImportanceRatio",
    built_in={
        "exact": "npo_cli.losses.importance_ratio:exact_ratio",
        "proximal": "npo_cli.losses.importance_ratio:proximal_ratio",
        "decoupled": "npo_cli.losses.importance_ratio:decoupled_ratio",
        "unit": "npo_cli.losses.importance_ratio:unit_ratio",
        "none": "npo_cli.losses.importance_ratio:no_ratio",
    },
)
TARGETS = Registry(
    kind="target",
    setting="target.kind",
    group="npo.targets",
    base="npo_cli.losses.target:Target",
    built_in={
        "none": "npo_cli.losses.target:no_target",
        "token_weight": "npo_cli.losses.target:token_weight",
        "distribution": "npo_cli.losses.target:distribution",
    },
)
RUNGS = Registry(
    kind="rung",
    setting="autonpo.ladder",
    group="npo.rungs",
    base="npo_cli.autonpo.rungs:Rung",
    built_in={
        "mistakes": "npo_cli.autonpo.rungs:mistakes",
        "token_weight": "npo_cli.autonpo.rungs:token_weight",
        "guide": "npo_cli.autonpo.rungs:guide",
        "scout": "npo_cli.autonpo.rungs:scout",
        "dense": "npo_cli.autonpo.rungs:dense",
        "rollback": "npo_cli.autonpo.rungs:rollback",
    },
)
REGISTRIES = (GUIDE_SOURCES, TASKS, VERIFIERS, ENGINES, TRACKERS, MIX_STRATEGIES, IMPORTANCE_RATIOS, TARGETS, RUNGS)
"""Every kind of plug-in."""


def find_plug_in_line(error: BaseException) -> str | None:
    """`MODULE, line N`, the innermost line of a plug-in in an error's traceback; None if no plug-in took part."""
    points = [point for each in REGISTRIES for point in entry_points(group=each.group)]
    packages = {point.module.partition(".")[0] for point in points}
    found, place = None, error.__traceback__
    while place is not None:
        module = str(place.tb_frame.f_globals.get("__name__", ""))
        if module.partition(".")[0] in packages:
            found = f"{module}, line {place.tb_lineno}"
        place = place.tb_next
    return found
