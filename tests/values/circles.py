"""The circles: small runs of the real commands, each a function from an empty folder to a record of values.

A circle names commands, settings and keys neutrally (see `commands.py` and `keys.py`). Branches and guides whose
names a user chooses are named here; seeds depend on them.
"""

import shutil
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from tests.values import reading, running

Circle = Callable[["Place"], dict[str, Any]]
CIRCLES: dict[str, Circle] = {}

MAIN = "main"
"""Name that the program gives a run's first branch."""
TINY = {
    "steps": 8,
    "save every": 2,
    "prompts per step": 4,
    "group size": 4,
    "pool size": 16,
    "held-out size": 8,
    "evaluate every": 4,
    "threads": 1,
    "learning rate": 3e-4,
}
EVERY_GROUP = {"largest accuracy of a guided group": 1.0}
"""Every group is guided and every prompt counts as hard, so that a small run exercises the guide."""
EAGER = TINY | {
    "steps": 12,
    "seed": 7,
    "evaluate every": 0,
    "trigger warmup": 4,
    "trigger window": 2,
    "trigger patience": 1,
    "trigger reward factor": 1000,
    "trigger entropy drop": 0,
    "trigger entropy factor": 0,
    "cooldown": 1,
    "rollback distances": [2, 4],
    "least quality": 0,
    "least value": 0,
    "distance rule": "argmax",
    "subtracted from Q": "nothing",
    "least mistakes": 2,
    "most interventions": 2,
    "probe prompts": 8,
    "score resamples": 50,
}
"""AutoNPO triggers after every dip of entropy: two interventions in 12 steps."""
EXGRPO = TINY | {
    "replayed share": 0.5,
    "replay start": 0.0,
    "importance ratio": "exact",
    "shape of the ratio": "soft",
    "clip guided rows": False,
    "kind of task": "any addition",
    "learning rate": 1e-4,
}
WHOLE_REPLAY = {
    "guided prompts": "all",
    "guided part of the replay": 1,
    "guide samples per round": 2,
    "least yield": 0,
}
"""A guide on every prompt that the replay visits, so that a small run has enough of them."""
SCORING = EVERY_GROUP | {"score samples": 4, "score resamples": 50}


class Place:
    """The folder of one circle: its run directory, its logs, and the run of 8 steps that several circles start from."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.folder.mkdir()
        self.num_logs = 0

    @property
    def run_dir(self) -> Path:
        """The circle's own run directory."""
        return self.folder / "run"

    def new_log(self) -> Path:
        """A file for the talk of the next command."""
        self.num_logs += 1
        return self.folder / f"{self.num_logs}.log"

    def do(self, command: str, settings: Mapping[str, object] | None = None, /, **blanks: object) -> list[Any]:
        """Run a command of the table on the circle's run."""
        return running.run(command, settings, log=self.new_log(), **({"run": self.run_dir} | blanks))

    def copy_trained(self) -> None:
        """Start from the run of the circle `train`, made once per process."""
        shutil.copytree(_trained(self.folder.parent / "trained"), self.run_dir)

    def fork(self, branch: str, *, at: int, settings: Mapping[str, object]) -> None:
        """Roll back to `at` and replay with the guide `near`, as `branch`."""
        self.do("fork", settings, at=at, name="near", branch=branch)

    def sample_guide(self, *, guide_step: int, at: int, settings: Mapping[str, object] | None = None) -> None:
        """Ask the checkpoint `guide_step` what the replay from `at` will visit; kept as the guide `near`."""
        settings = WHOLE_REPLAY if settings is None else settings
        self.do("sample a guide", settings, guide_step=guide_step, at=at, name="near")


def circle(name: str) -> Callable[[Circle], Circle]:
    """Register a circle under a name."""

    def register(function: Circle) -> Circle:
        CIRCLES[name] = function
        return function

    return register


@circle("train")
def _train(place: Place) -> dict[str, Any]:
    place.copy_trained()
    return _branch_values(place, MAIN, last=8) | _common(place)


@circle("fork-exact")
def _fork_exact(place: Place) -> dict[str, Any]:
    place.copy_trained()
    place.sample_guide(guide_step=8, at=4, settings={})
    place.fork("near", at=4, settings=EVERY_GROUP | {"importance ratio": "exact"})
    compared = reading.read_printed(place.do("compare", branch="near"))
    guide = reading.read_guide(place.run_dir, "near")
    return _branch_values(place, "near", last=8) | _common(place) | {"guide": guide, "compared": compared}


@circle("fork-other-ratios")
def _fork_other_ratios(place: Place) -> dict[str, Any]:
    place.copy_trained()
    place.sample_guide(guide_step=8, at=4)
    values = {}
    for number, ratio in enumerate(("proximal", "no ratio", "decoupled")):
        branch = f"fork{number}"
        settings = EVERY_GROUP | {"importance ratio": ratio, "steps": 6, "evaluate every": 0}
        place.fork(branch, at=4, settings=settings)
        values[ratio] = _branch_values(place, branch, last=6)
    return values | _common(place)


@circle("lora")
def _lora(place: Place) -> dict[str, Any]:
    place.do("train", TINY | {"LoRA rank": 4, "learning rate": 1e-3, "steps": 4, "evaluate every": 0}, recipe="micro")
    place.sample_guide(guide_step=4, at=2)
    place.fork("near", at=2, settings=EVERY_GROUP | {"importance ratio": "exact"})
    return {
        "before": _branch_values(place, MAIN, last=4),
        "after": _branch_values(place, "near", last=4),
        "guide": reading.read_guide(place.run_dir, "near"),
    }


@circle("images")
def _images(place: Place) -> dict[str, Any]:
    model = place.folder / "tiny-vl"
    running.make_tiny_vl(model, log=place.new_log())
    settings = TINY | {"steps": 4, "group size": 8, "evaluate every": 0, "guide samples per prompt": 16}
    place.do("train", settings | {"model": str(model)}, recipe="shapes")
    place.sample_guide(guide_step=4, at=2)
    place.fork("near", at=2, settings=EVERY_GROUP | {"importance ratio": "exact"})
    return {
        "before": _branch_values(place, MAIN, last=4),
        "after": _branch_values(place, "near", last=4),
        "guide": reading.read_guide(place.run_dir, "near"),
    }


@circle("autonpo-accepted")
def _autonpo_accepted(place: Place) -> dict[str, Any]:
    return _autonpo(place, {})


@circle("autonpo-rejected")
def _autonpo_rejected(place: Place) -> dict[str, Any]:
    return _autonpo(place, {"least quality": 0.99})


@circle("autonpo-tested")
def _autonpo_tested(place: Place) -> dict[str, Any]:
    return _autonpo(place, {"test the replay": True})


@circle("autonpo-early")
def _autonpo_early(place: Place) -> dict[str, Any]:
    return _autonpo(place, {"early intervention": True, "scout steps": 4, "early window": 4})


@circle("exgrpo")
def _exgrpo(place: Place) -> dict[str, Any]:
    place.do("train", EXGRPO, recipe="micro")
    return _branch_values(place, MAIN, last=8) | _common(place)


@circle("score")
def _score(place: Place) -> dict[str, Any]:
    place.copy_trained()
    place.do("score checkpoints", SCORING, at=0)
    return {"scores": reading.read_scores(place.run_dir)} | _common(place)


@circle("score-budget")
def _score_budget(place: Place) -> dict[str, Any]:
    place.copy_trained()
    place.do("score checkpoints", SCORING | {"score budget": 64}, at=0)
    return {"scores": reading.read_scores(place.run_dir)} | _common(place)


@circle("score-sources")
def _score_sources(place: Place) -> dict[str, Any]:
    place.copy_trained()
    place.do("score sources", SCORING, at=4)
    return {"scores": reading.read_scores(place.run_dir)} | _common(place)


@circle("kill-resume")
def _kill_resume(place: Place) -> dict[str, Any]:
    settings = TINY | {"save every": 4}
    argv = running.arguments("train", settings, recipe="micro", run=place.run_dir)
    running.run_and_kill(argv, when=lambda: reading.count_steps(place.run_dir, MAIN) >= 6, log=place.new_log())
    place.do("resume")
    killed = _branch_values(place, MAIN, last=8)
    whole = _trained(place.folder.parent / "trained")
    unkilled = {"steps": reading.read_steps(whole, MAIN), "weights": reading.read_weights(whole, MAIN, 8)}
    return killed | {"equal to a run that was not killed": killed == unkilled}


@circle("two-processes")
def _two_processes(place: Place) -> dict[str, Any]:
    running.run_in_two_processes("train", TINY, recipe="micro", run=place.run_dir, log=place.new_log())
    return _branch_values(place, MAIN, last=8) | _common(place)


def _autonpo(place: Place, settings: Mapping[str, object]) -> dict[str, Any]:
    place.do("train with AutoNPO", EAGER | settings, recipe="micro")
    names = reading.branch_names(place.run_dir)
    return {
        "moves": reading.read_moves(place.run_dir),
        "probes": reading.read_probes(place.run_dir),
        "branches": [reading.read_steps(place.run_dir, name) for name in names],
        "guides": [reading.read_guide(place.run_dir, name) for name in names[1:]],
    } | _common(place)


def _branch_values(place: Place, branch: str, *, last: int) -> dict[str, Any]:
    return {
        "steps": reading.read_steps(place.run_dir, branch),
        "weights": reading.read_weights(place.run_dir, branch, last),
    }


def _common(place: Place) -> dict[str, Any]:
    return {
        "lineage": reading.read_lineage(place.run_dir),
        "evaluations": reading.read_evals(place.run_dir),
        "costs": reading.read_printed(place.do("show costs")),
    }


@cache
def _trained(folder: Path) -> Path:
    place = Place(folder)
    place.do("train", TINY, recipe="micro")
    return place.run_dir
