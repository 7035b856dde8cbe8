"""Verified groups without a policy."""

from npo_cli.types.rollouts import Group, Prompt, Rollout


def group(prompt_id: str, correct: int, *, size: int = 8) -> Group:
    """`size` rollouts of one token, the first `correct` of them correct."""
    rollouts = tuple(
        Rollout(
            prompt_id=prompt_id,
            slot=slot,
            response_ids=(1,),
            behavior_logps=(-1.0,),
            text="",
            finished=True,
            sampler_step=0,
            verdict="correct" if slot < correct else "wrong",
        )
        for slot in range(size)
    )
    return Group(prompt=Prompt(prompt_id=prompt_id, answer="", text=""), rollouts=rollouts)
