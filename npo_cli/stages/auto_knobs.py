"""A recipe's settings as the knobs of the trigger and of the controller: the same on line and in a rehearsal."""

from typing import Any

from npo_cli.config import Recipe
from npo_cli.guide.controller import ControllerKnobs
from npo_cli.guide.trigger import TriggerKnobs

SECTIONS = ("auto", "pool", "probe", "rollback", "replay", "early", "score", "guide", "inject", "extrapolate")
"""Settings that decide what AutoNPO does."""


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """The sections that decide, as plain data."""
    plain = recipe.model_dump(mode="json")
    return {name: plain[name] for name in SECTIONS}


def trigger_knobs(recipe: Recipe) -> TriggerKnobs:
    """The auto settings that decide what counts as stagnation."""
    auto = recipe.auto
    return TriggerKnobs(
        ema=auto.ema,
        window=auto.window,
        c_r=auto.c_r,
        d_H=auto.d_H,
        c_H=auto.c_H,
    )


def controller_knobs(recipe: Recipe) -> ControllerKnobs:
    """The settings that decide when the controller moves."""
    return ControllerKnobs(
        patience=recipe.auto.patience,
        warmup=recipe.auto.warmup,
        cooldown=recipe.auto.cooldown,
        max_interventions=recipe.auto.max,
        early=recipe.auto.early,
        early_scout=recipe.early.scout,
        accept_test=recipe.replay.accept_test,
        push_steps=recipe.auto.extrapolate,
    )
