"""The sentences that `npo demo` ends with."""

from npo_cli.experiments.demo import describe_demo
from npo_cli.types.costs import CostToThreshold


def cost(name: str, threshold: float, step: int | None, tokens: int | None) -> CostToThreshold:
    return CostToThreshold(name=name, threshold=threshold, step=step, total_steps=step, total_tokens=tokens)


def test_demo_tells_gain_and_cost_at_the_middle_accuracy_that_both_reached():
    reached = [
        (cost("GRPO", 0.2, 30, 300), cost("NPO", 0.2, 10, 900)),
        (cost("GRPO", 0.6, 60, 600), cost("NPO", 0.6, 40, 1_200)),
        (cost("GRPO", 0.9, 90, 900), cost("NPO", 0.9, 60, 1_500)),
    ]
    seen, paid = describe_demo(reached)
    assert "0.60 at step 40, GRPO at step 60: 1.50x by step" in seen
    assert "1,200 tokens" in paid
    assert "600 for GRPO: 0.50x by total tokens" in paid


def test_demo_without_a_common_accuracy_says_so():
    (sentence,) = describe_demo([(cost("GRPO", 0.2, 30, 300), cost("NPO", 0.2, None, None))])
    assert "no accuracy of 0.20 was reached by both" in sentence
