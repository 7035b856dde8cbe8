"""Hand-written transitions of AutoNPO."""

from typing import Any

from npo_cli.types.autonpo import AutoNPOState, Phase, Transition, TriggerReading

SIGNALS = {"reward_gain": 0.004, "reward_margin": 0.011, "entropy_drop": 0.091, "required_entropy_drop": 0.05}
SCORE = {
    **{
        "distance": 20,
        "num_failed_prompts": 170,
        "num_probed": 19,
        "num_backward_samples": 72,
        "is_selected": False,
        "p_best": 0.25,
    },
    **{"quality": 0.25, "quality_low": 0.2, "quality_high": 0.3, "variance": 2.0, "variance_low": 1.5},
    **{"variance_high": 2.5, "signal": 0.125, "signal_low": 0.1, "signal_high": 0.15, "variance_kind": "group2"},
    **{"variances": {"kl_exp": 1.1}, "variance_forward": 2.0, "variance_backward": 1.9, "variances_agree": True},
    **{"has_heavy_tail": True, "kl_per_token": 0.0468, "kl_per_sequence": 0.82},
}
NEAR_SCORE = SCORE | {
    "distance": 10,
    "num_failed_prompts": 90,
    "is_selected": True,
    "p_best": 0.75,
    "has_heavy_tail": None,
}
STRATUM = {
    **{"min_age": 0, "max_age": 10, "num_failed_prompts": 90, "num_probed": 10, "num_samples": 40, "num_correct": 10},
    **{"quality": 0.25, "quality_low": 0.1, "quality_high": 0.4},
}
PROBE_RESULT = {
    **{"is_accepted": True, "reason": "", "distance": 10, "strata": [STRATUM], "scores": [SCORE, NEAR_SCORE]},
    **{"selection_by_profile": {"seq_kl": 10, "argmax": 10, "one_se": 20}, "num_prompts": 48, "num_samples": 192},
    "num_tokens": 3225,
}


BUILT = {"num_prompts": 30, "num_prompts_with_rollouts": 20, "num_reused": 5}


def make_transition(
    step: int, event: str, phase: Phase = "TRAIN", *, before: Phase = "TRAIN", to: int | None = None, **evidence: Any
) -> Transition:
    """A transition into `phase`; a cooldown lasts 40 steps, a replay from `to` until the step itself."""
    until = {"COOLDOWN": step + 40, "REPLAY": step}.get(phase)
    state = AutoNPOState(branch="main", step=step if to is None else to, phase=phase, until_step=until)
    return Transition(step=step, event=event, phase_before=before, state=state, evidence=evidence)


def intervention_transitions(step: int, *, to: int) -> list[Transition]:
    """From the warning to the cooldown."""
    return [
        make_transition(step - 2, "warning", **SIGNALS),
        make_transition(step, "trigger", "PROBE", **SIGNALS),
        make_transition(step, "probe_accepted", "GUIDE_GEN", before="PROBE", **PROBE_RESULT),
        make_transition(
            step,
            "guide_built",
            "ROLLBACK",
            before="GUIDE_GEN",
            num_prompts=30,
            num_prompts_with_rollouts=20,
            num_reused=5,
        ),
        make_transition(step, "rolled_back", "REPLAY", before="ROLLBACK", to=to, to_step=to),
        make_transition(step, "replay_done", "COOLDOWN", before="REPLAY", distance=step - to),
    ]


def make_readings(num_steps: int) -> list[TriggerReading]:
    """A rising reward, a falling entropy and exact averages; step 3 recorded neither."""
    found = []
    for step in range(1, num_steps + 1):
        seen = {"reward": step / num_steps, "entropy": 1 - step / num_steps} if step != 3 else {}
        averages = {f"{name}_ema": value for name, value in seen.items()}
        found.append(
            TriggerReading(step=step, verdict="rising", **{"reward": None, "entropy": None} | seen, **averages)
        )
    return found
