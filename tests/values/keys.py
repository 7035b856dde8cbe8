"""Names of files, metrics, JSON keys and words as they are today: the place to edit after a rename of what is on disk.

A neutral name stands left, today's right. A key that is absent on disk is recorded as null, so a metric that a rename
lost shows up as a difference.
"""

METRICS_FILE = "branches/{branch}/metrics.jsonl"
ROLLOUTS_FILE = "branches/{branch}/rollouts.jsonl"
CHECKPOINT_FOLDER = "branches/{branch}/checkpoints/step_{step:06d}"
LINEAGE_FILE = "segments.jsonl"
EVALS_FILE = "evals.jsonl"
MOVES_FILE = "autonpo.jsonl"
GUIDE_FOLDER = "guides/{name}"
GUIDE_FILES = {"info": "guide.json", "samples": "rollouts.jsonl"}
SCORES_FILES = "scores/*/scores.json"
SCORE_SAMPLES_FILES = "scores/*/rollouts.jsonl"
PROBE_FILES = "probes/*/rollouts.jsonl"

STEP_KEYS = {
    "step": "step",
    "reward": "reward",
    "reward deviation": "reward_std",
    "share all wrong": "frac_all_wrong",
    "share all right": "frac_all_right",
    "entropy": "entropy",
    "loss": "loss",
    "gradient norm": "grad_norm",
    "learning rate": "lr",
    "tokens": "tokens",
    "tokens so far": "tokens_total",
    "rows trained": "rows_trained",
    "data position": "data_position",
    "clipped low": "clip_ratio/low",
    "clipped high": "clip_ratio/high",
    "mismatch weight": "mismatch/weight_mean",
    "smoothed reward": "reward_ema",
    "smoothed entropy": "entropy_ema",
}
"""Metrics of one step."""
GUIDED_STEP_KEYS = {
    "guided slots": "inject/slots",
    "eligible groups": "inject/eligible",
    "groups without a guide": "inject/no_guide",
    "groups above the gate": "inject/gate_closed",
    "guided ratio mean": "inject/ratio_mean",
    "guided ratio min": "inject/ratio_min",
    "guided ratio max": "inject/ratio_max",
    "guided share unclipped": "inject/tokens_with_gradient",
    "guided share pushed": "inject/gradient_l1_fraction",
    "guided share of the gradient": "inject/grad_norm_fraction",
    "stored answers": "experience/responses",
    "stored prompts": "experience/prompts",
}
"""Metrics of steps in which a guide or the replay memory took part; left out of the others."""

GUIDE_INFO_KEYS = {
    "learner step": "learner_step",
    "guide step": "guide_step",
    "steps": "num_steps",
    "prompts": "num_prompts",
    "prompts solved": "num_prompts_with_rollouts",
    "samples": "num_samples",
    "tokens": "num_tokens",
    "trajectories": "num_rollouts",
    "complete": "complete",
}
GUIDE_QUALITY_KEYS = {
    "distance": "distance",
    "Q": "quality",
    "Q low": "quality_low",
    "Q high": "quality_high",
    "V": "variance",
    "V low": "variance_low",
    "V high": "variance_high",
    "S": "signal",
    "S low": "signal_low",
    "S high": "signal_high",
    "probability of being best": "p_best",
    "chosen": "is_selected",
}
"""Q, V and S wherever they are reported."""
SCORE_KEYS = GUIDE_QUALITY_KEYS | {
    "step": "step",
    "pass@1": "pass_at_1",
    "Q of the learner": "quality_self",
    "prompts": "num_prompts",
    "samples": "num_samples",
    "KL per token": "kl_per_token",
    "KL per sequence": "kl_per_sequence",
    "effective sample size": "ess_fraction",
    "unreliable": "is_unreliable",
    "Q net": "quality_net",
    "Q net low": "quality_net_low",
    "Q net high": "quality_net_high",
    "steps saved": "steps_saved",
    "price": "price",
}
NO_GUIDE = "none"
NO_GUIDE_KEYS = {"Q": "quality", "S": "signal", "probability of being best": "p_best", "chosen": "is_selected"}
SOURCE_KEYS = GUIDE_QUALITY_KEYS | {
    "kind": "source",
    "pass@1": "pass_at_1",
    "prompts": "num_prompts",
    "samples": "num_samples",
}
DISTANCE_KEYS = GUIDE_QUALITY_KEYS | {
    "mistakes": "num_failed_prompts",
    "probed": "num_probed",
    "Q of the old policy": "quality_self",
    "Q net": "quality_net",
    "Q net low": "quality_net_low",
    "Q net high": "quality_net_high",
    "steps saved": "steps_saved",
    "price": "price",
    "V forward": "variance_forward",
    "V backward": "variance_backward",
}
MOVE_KEYS = {"step": "step", "event": "event", "before": "phase_before", "after": "phase"}
STATE_KEYS = {"step": "step", "interventions": "num_interventions", "distance": "distance", "until": "until_step"}
EVIDENCE_KEYS = {
    "verdict": "verdict",
    "gain": "reward_gain",
    "margin": "reward_margin",
    "entropy drop": "entropy_drop",
    "needed drop": "required_entropy_drop",
    "accepted": "is_accepted",
    "distance": "distance",
    "prompts": "num_prompts",
    "samples": "num_samples",
    "tokens": "num_tokens",
    "solved": "num_prompts_with_rollouts",
    "reused": "num_reused",
    "rolled back to": "to_step",
}
"""Evidence of a move; each has some of these."""
EVAL_KEYS = {
    "step": "step",
    "prompts": "num_prompts",
    "samples": "num_samples",
    "accuracy": "accuracy",
    "accuracy low": "accuracy_low",
    "accuracy high": "accuracy_high",
    "mean length": "mean_length",
    "tokens": "num_tokens",
}
ACCOUNT_KEYS = {
    "step": "step",
    "updates": "updates",
    "training tokens": "training_tokens",
    "probe tokens": "probe_tokens",
    "guide tokens": "guide_tokens",
    "judge tokens": "acceptance_test_tokens",
    "abandoned tokens": "abandoned_tokens",
    "interventions": "num_interventions",
    "rejections": "num_rejections",
}
CURVE_KEYS = {
    "step": "step",
    "accuracy": "accuracy",
    "steps in total": "total_steps",
    "tokens in total": "total_tokens",
    "forward passes in total": "total_forwards",
}
SUMMARY_KEYS = {
    "accuracy at the end": "final_accuracy.value",
    "low": "final_accuracy.low",
    "high": "final_accuracy.high",
}
LINE_KIND = "record"
LINES = {
    "run_costs": ("account", ACCOUNT_KEYS),
    "curve_point": ("point of a curve", CURVE_KEYS),
    "method_summary": ("summary", SUMMARY_KEYS),
    "method_difference": ("difference", SUMMARY_KEYS),
}
"""Lines of `--json` that are read: today's kind -> neutral kind and keys; a dot leads into an object."""
WORDS: dict[str, str] = {
    **{"probe_accepted": "accepted", "probe_rejected": "rejected", "prerequisite_missing": "missed"},
    **{"guide_built": "guided", "guide_empty": "unguided", "replay_done": "replayed", "limit_reached": "capped"},
    **{"replay_accepted": "kept", "replay_rejected": "reverted", "early_bootstrap": "early"},
    "ACCEPTANCE_TEST": "JUDGE",
}
"""Today's spelling of a recorded word -> that in the baseline, for renamed words (events, phases, sources, mixes)."""
