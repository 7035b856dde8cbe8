"""A recipe's settings as the knobs of the trigger and of the controller: the same on line and in a rehearsal."""

from typing import Any

from npo_cli.config import Recipe
from npo_cli.guide.controller import ControllerKnobs
from npo_cli.guide.trigger import TriggerKnobs

DECIDING_SECTIONS = ("autonpo", "scoring", "guide", "extrapolation")
"""Settings that decide what AutoNPO does."""


def dump_autonpo_settings(recipe: Recipe) -> dict[str, Any]:
    """The sections that decide, as plain data."""
    plain = recipe.model_dump(mode="json")
    return {name: plain[name] for name in DECIDING_SECTIONS}


def trigger_knobs(recipe: Recipe) -> TriggerKnobs:
    """The auto settings that decide what counts as stagnation."""
    auto = recipe.autonpo
    return TriggerKnobs(
        ema=auto.trigger.ema_decay,
        window=auto.trigger.window,
        c_r=auto.trigger.max_reward_gain_se,
        d_H=auto.trigger.min_entropy_drop,
        c_H=auto.trigger.min_entropy_drop_se,
    )


def controller_knobs(recipe: Recipe) -> ControllerKnobs:
    """The settings that decide when the controller moves."""
    return ControllerKnobs(
        patience=recipe.autonpo.trigger.patience,
        warmup=recipe.autonpo.trigger.warmup_steps,
        cooldown=recipe.autonpo.trigger.cooldown_steps,
        max_interventions=recipe.autonpo.max_interventions,
        early=recipe.autonpo.early.enabled,
        early_scout=recipe.autonpo.early.scout_steps,
        accept_test=recipe.autonpo.replay.acceptance_test,
        push_steps=recipe.autonpo.extrapolate,
    )
