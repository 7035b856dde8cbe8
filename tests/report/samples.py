"""Records made by hand."""

from dataclasses import replace

from npo_cli.types.rollouts import CheckpointScore, Group, Prompt, Rollout

SCORE = CheckpointScore(
    step=100,
    distance=20,
    quality=0.25,
    quality_low=0.2,
    quality_high=0.3,
    quality_kind="pass@k",
    pass_at_1=0.1,
    pass_at_k=0.25,
    quality_self=0.05,
    quality_net=0.2,
    variance=2.0,
    variance_low=1.5,
    variance_high=2.5,
    variance_kind="group2",
    variances={"kl_exp": 1.1, "seq2": 30.0},
    signal=0.125,
    signal_low=0.1,
    signal_high=0.15,
    p_best=0.75,
    num_prompts=96,
    num_samples=768,
    kl_per_token=0.02,
    kl_per_sequence=0.3,
    mean_length=15.0,
    ess_fraction=0.4,
    is_unreliable=False,
    is_selected=True,
    selection_by_profile={"group2/pass@1": 140, "kl_exp/pass@k": 140},
)
FAR_SCORE = replace(
    SCORE, step=140, distance=60, variance=40.0, variance_high=90.0, is_selected=False, is_unreliable=True
)


def rollout(slot: int, *, reward: float, text: str = "42", source: str = "own") -> Rollout:
    return Rollout(
        prompt_id="p1",
        slot=slot,
        response_ids=(1, 2),
        behavior_logps=(-0.5, -0.25),
        text=text,
        finished=True,
        sampler_step=40 if source == "guide" else 10,
        source=source,
        verdict="correct" if reward else "wrong",
        reward=reward,
    )


def group(*rollouts: Rollout, mix: str = "off", own_accuracy: float | None = None) -> Group:
    prompt = Prompt(prompt_id="p1", answer="42", text="6*7=")
    return Group(prompt=prompt, rollouts=rollouts, injection_status=mix, on_policy_accuracy=own_accuracy)
