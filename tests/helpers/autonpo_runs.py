"""Real runs under AutoNPO whose settings make it step in early and often, and what of them must come out the same."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from npo_cli.autonpo.run import resume_autonpo, train_autonpo
from npo_cli.config.loading import load_recipe
from npo_cli.config.recipe import Recipe
from npo_cli.storage.autonpo_log import read_transitions
from npo_cli.storage.layout import open_run
from npo_cli.storage.rollout_log import RolloutLog
from npo_cli.training.train import train_run
from npo_cli.types.autonpo import Transition
from npo_cli.types.rollouts import Group, StepReport
from tests.helpers.runs import TINY, file_digests, steps_of

EAGER = (
    *TINY,
    *("train.num_steps=12", "train.lr=3e-4", "train.seed=7", "task.heldout_size=8"),
    *(
        "autonpo.trigger.warmup_steps=4",
        "autonpo.trigger.window=2",
        "autonpo.trigger.patience=1",
        "autonpo.trigger.max_reward_gain_se=1000",
        "autonpo.trigger.min_entropy_drop=0",
        "autonpo.trigger.min_entropy_drop_se=0",
    ),
    *(
        "autonpo.trigger.cooldown_steps=1",
        "autonpo.rollback.distances=[2,4]",
        "autonpo.probe.min_quality=0",
        "autonpo.rollback.min_value=0",
        "autonpo.rollback.selection_rule=argmax",
        "scoring.quality_baseline=none",
        "scoring.variance=group2",
        "autonpo.rollback.min_failed_prompts=2",
        "autonpo.max_interventions=2",
    ),
    *("autonpo.probe.num_prompts=8", "scoring.bootstrap_resamples=50", "guide.cache.min_yield=0"),
)
"""Every reward counts as standing still, so one step of falling entropy is a warning, and every probe is accepted: by
Q as published, which has no lower limit here. With V = group2 this seed triggers at step 6 (D* = 2) and on the replayed
branch at step 8 (D* = 4), and is capped from then on. Every prompt gets its samples, however few are correct."""

NEVER = ("autonpo.trigger.min_entropy_drop_se=1000000",)
"""Entropy never falls by that much noise."""

REJECTING = ("autonpo.probe.min_quality=0.99",)

DETERMINISTIC_FILES = {
    *("metrics.jsonl", "rollouts.jsonl", "optimizer.safetensors", "state.json"),
    *("model.safetensors", "adapter_model.safetensors", "adapter_config.json"),
    *("autonpo.jsonl", "settings.json"),
}
"""Names of files that seed and recipe alone decide."""


def eager_recipe(*overrides: str) -> Recipe:
    return load_recipe("micro", [*EAGER, *overrides])


def train_grpo(root: Path, *overrides: str) -> list[StepReport]:
    return steps_of(train_run(root, eager_recipe(*overrides)))


def start_autonpo(root: Path, *overrides: str) -> Iterator[Any]:
    """The generator itself: closing it is like a kill."""
    return train_autonpo(root, eager_recipe(*overrides))


def start_autonpo_resume(root: Path, *overrides: str, **options: Any) -> Iterator[Any]:
    arguments = {"at": None, "source_branch": None, "new_branch": None} | options
    return resume_autonpo(root, overrides=overrides, **arguments)


def transitions_of(root: Path) -> list[Transition]:
    return read_transitions(open_run(root))


def events_of(root: Path) -> list[str]:
    return [move.event for move in transitions_of(root)]


def find_transition(root: Path, event: str, number: int = 0) -> Transition:
    """The first (or a later) move of that event."""
    return [move for move in transitions_of(root) if move.event == event][number]


def deterministic_digests(root: Path) -> dict[str, str]:
    """Digests of everything that must not depend on what happened on the way, for all branches, guides and probes."""
    return {name: digest for name, digest in file_digests(root).items() if Path(name).name in DETERMINISTIC_FILES}


def digests_without_main(root: Path) -> dict[str, str]:
    """The same without the first branch, which plain training carries on where AutoNPO leaves it."""
    return {
        name: digest for name, digest in deterministic_digests(root).items() if not name.startswith("branches/main/")
    }


def check_equal_except_main(root: Path, straight: Path) -> None:
    """All branches, probes, guides and moves; of main what AutoNPO saw of it."""
    assert digests_without_main(root) == digests_without_main(straight)
    ours, theirs = deterministic_digests(root), deterministic_digests(straight)
    for name in [name for name in theirs if name.startswith("branches/main/")]:
        if name.endswith(".jsonl"):
            assert (root / name).read_bytes().startswith((straight / name).read_bytes())
        else:
            assert ours[name] == theirs[name]


def groups_of(root: Path, branch: str, step: int) -> tuple[Group, ...]:
    found = RolloutLog(open_run(root).rollouts_path(branch)).read_step(step)
    assert found is not None, f"step {step} of {branch} is on record"
    return found


def prompt_ids(root: Path, branch: str, step: int) -> list[str]:
    return [group.prompt.prompt_id for group in groups_of(root, branch, step)]


def on_policy_accuracy(group: Group) -> float:
    own = [rollout for rollout in group.rollouts if rollout.source == "own"]
    return sum(rollout.verdict == "correct" for rollout in own) / len(own)


def failed_prompts(root: Path, branch: str, steps: range, *, at_most: float) -> list[str]:
    """Distinct prompts of which at most this share was right, in the order in which they were first met."""
    return list(
        dict.fromkeys(
            group.prompt.prompt_id
            for step in steps
            for group in groups_of(root, branch, step)
            if on_policy_accuracy(group) <= at_most
        )
    )
