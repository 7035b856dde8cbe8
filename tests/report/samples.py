"""Records made by hand."""

from dataclasses import replace

from npo_cli.types.rollouts import Group, Prompt, Rollout
from npo_cli.types.scores import CandidateScore

SCORE = CandidateScore(
    candidate="checkpoint:100",
    source="checkpoint",
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
    quality_net_low=0.15,
    quality_net_high=0.25,
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
    quality_net_split=0.18,
    p_best_by_variance_kind={"group2": 0.75, "kl_exp": 0.25},
    best_for_variance_kinds=("group2",),
    selection_by_profile={"faithful": "checkpoint:140", "argmax": "checkpoint:100"},
)
FAR_SCORE = replace(
    SCORE,
    candidate="checkpoint:140",
    step=140,
    distance=60,
    p_best=0.25,
    best_for_variance_kinds=("kl_exp",),
    p_best_by_variance_kind={"group2": 0.25, "kl_exp": 0.75},
    variance=40.0,
    variance_high=90.0,
    is_selected=False,
    is_unreliable=True,
)
ITSELF = replace(SCORE, candidate="self", source="self", step=80, distance=0, quality_net=0.0, is_selected=False)
TEACHER_SCORE = CandidateScore(
    candidate="model:teach", source="model", step=None, distance=None, num_prompts=10, num_samples=80, pass_at_1=0.7,
    pass_at_k=0.9, quality_kind="pass@k", quality=0.9, quality_low=0.8, quality_high=1.0, quality_self=0.25,
    quality_net=0.65, variance_kind="group2", note="no V and S",
)  # fmt: skip


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
