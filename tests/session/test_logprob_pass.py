"""Log-probability passes: every row once, in the caller's order, whatever is computed together."""

from dataclasses import replace

import pytest
import torch

from npo_cli.config.loading import load_recipe
from npo_cli.policy.extrapolated import ExtrapolatedPolicy
from npo_cli.policy.model import load_policy
from npo_cli.policy.packing import TokenRow
from npo_cli.session.logprob_pass import plan_policy_passes, run_logprob_pass

ROWS = [
    TokenRow(prompt_ids=prompt_ids, response_ids=response_ids)
    for response_ids in ((4, 5), (6, 7, 8, 9, 10, 11, 12, 13), (3,))
    for prompt_ids in ((1, 2, 3), (8,), (5, 6, 7, 8, 9, 10))
]


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("max_tokens", [10, 30, 16384])
def test_logprob_pass_returns_rows_in_the_order_given(share, max_tokens):
    settings = (f"train.share_prompts={share}", f"train.micro_batch_tokens={max_tokens}", "train.logit_chunk_tokens=4")
    recipe = load_recipe("micro", settings)
    policy = load_policy(recipe.model)
    plan = plan_policy_passes(policy, recipe.train, ROWS)
    assert sorted(index for batch in plan for index in batch.indices) == list(range(len(ROWS)))
    assert any(size > 1 for batch in plan for size in batch.pack_sizes) is share
    found = run_logprob_pass(policy, recipe, ROWS, temperature=0.8, columns=["entropies", "collisions"])
    for row, scores in zip(ROWS, found, strict=True):
        with torch.no_grad():
            logits_LW = policy.model(torch.tensor([[*row.prompt_ids, *row.response_ids]])).logits[0]
        law_TW = torch.softmax(logits_LW[len(row.prompt_ids) - 1 : -1] / 0.8, -1)
        expected_T = law_TW[range(len(row.response_ids)), list(row.response_ids)].log()
        assert torch.allclose(scores.logps_T, expected_T, atol=1e-4)
        assert torch.allclose(scores.entropies_T, -(law_TW * law_TW.log()).sum(-1), atol=1e-5)
        assert torch.allclose(scores.collisions_T, law_TW.square().sum(-1), atol=1e-5)


def test_logprob_pass_shares_prompts_under_an_extrapolated_policy():
    recipe = load_recipe("micro")
    newer, older = load_policy(recipe.model), load_policy(recipe.model)
    with torch.no_grad():
        for parameter in newer.model.parameters():
            parameter.mul_(1.01)
    pair = ExtrapolatedPolicy(newer=newer, older=older, strength=1.0)
    assert any(size > 1 for batch in plan_policy_passes(pair, recipe.train, ROWS) for size in batch.pack_sizes)
    apart = recipe.model_copy(update={"train": recipe.train.model_copy(update={"share_prompts": False})})
    for one, other in zip(run_logprob_pass(pair, recipe, ROWS), run_logprob_pass(pair, apart, ROWS), strict=True):
        assert torch.allclose(one.logps_T, other.logps_T, atol=1e-4)


def test_rows_do_not_share_prompts_in_a_model_that_cannot():
    recipe = load_recipe("micro")
    policy = replace(load_policy(recipe.model), packing=None)
    assert {size for batch in plan_policy_passes(policy, recipe.train, ROWS) for size in batch.pack_sizes} == {1}
