"""Packing: micro-batches by length, and prompts that several responses share, against a row per response."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from npo_cli.config.recipe import LoraSettings, ModelSettings
from npo_cli.policy.logprobs import token_scores
from npo_cli.policy.lora import adapter_tensors
from npo_cli.policy.model import Policy, load_policy
from npo_cli.policy.packing import (
    PASS_TOKENS,
    MicroBatch,
    PackedRows,
    PackingCosts,
    TokenRow,
    cut_by_length,
    pack_rows,
    packing_costs,
    plan_passes,
)
from tests.policy.models import gemma, qwen

CPU = torch.device("cpu")
ROWS = [
    TokenRow(prompt_ids=(1, 2, 3), response_ids=(4, 5)),
    TokenRow(prompt_ids=(6,), response_ids=(7, 8, 9)),
]
GROUP = [TokenRow(prompt_ids=(1, 2), response_ids=ids) for ids in ((3, 4, 5), (6,), (3, 7))]
"""Two of the responses begin with the same token, and one ends with its first."""


def pack(rows: Sequence[TokenRow], pack_sizes: Sequence[int] | None = None, **options) -> PackedRows:
    return pack_rows(rows, pad_id=0, device=CPU, pack_sizes=pack_sizes, **options)


def test_pack_rows_pads_on_the_right_and_reads_each_token_one_position_before_it():
    packed = pack(ROWS)
    # the last tokens, 5 and 9, predict nothing
    assert packed.input_ids_BL.tolist() == [[1, 2, 3, 4], [6, 7, 8, 0]]
    assert packed.row_U.tolist() == [0, 0, 1, 1, 1]
    assert packed.position_U.tolist() == [2, 3, 0, 1, 2]
    assert packed.target_M.tolist() == [4, 5, 7, 8, 9]
    assert packed.to_padded(packed.target_M).tolist() == [[4, 5, 0], [7, 8, 9]]
    assert "attention_mask" not in packed.model_inputs


def test_pack_rows_writes_a_shared_prompt_once_and_reads_its_last_position_once():
    packed = pack([*GROUP, ROWS[1]], [3, 1])
    # prompt 1 2, then 3 4 of the first response, nothing of the second, 3 of the third
    assert packed.input_ids_BL.tolist() == [[1, 2, 3, 4, 3], [6, 7, 8, 0, 0]]
    assert packed.position_ids_BL.tolist()[0] == [0, 1, 2, 3, 2]
    assert (packed.row_U.tolist(), packed.position_U.tolist()) == ([0, 0, 0, 0, 1, 1, 1], [1, 2, 3, 4, 0, 1, 2])
    # three first tokens from position 1; then 4, 5 of the first response and 7 of the third
    assert packed.unit_M.tolist() == [0, 0, 0, 1, 2, 3, 4, 5, 6]
    assert packed.first_token_of_unit == (0, 3, 4, 5, 6, 7, 8, 9)
    assert packed.to_padded(packed.target_M).tolist() == [[3, 4, 5], [6, 0, 0], [3, 7, 0], [7, 8, 9]]
    is_seen = (packed.attention_mask_B1LL[0, 0] == 0).int().tolist()
    assert is_seen == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 1]]


# Micro-batches


def of_lengths(*lengths: int) -> list[TokenRow]:
    """Rows of distinct prompts; the last token of a row is no input."""
    return [TokenRow(prompt_ids=(number,), response_ids=(2,) * length) for number, length in enumerate(lengths)]


def padded_tokens(lengths: Sequence[int], batches: Sequence[Sequence[int]]) -> int:
    return sum(len(batch) * max(lengths[place] for place in batch) for batch in batches)


def test_micro_batches_hold_every_row_once_the_longest_first_and_fill_the_limit():
    # 2 x 400 fill the limit; 3 x 400 would be above it. 300 beside the short rows would pad them by 294 and more.
    assert cut_by_length([3, 400, 4, 6, 300, 400], max_tokens=1000) == [[1, 5], [4], [3, 2, 0]]
    # what is above the limit stands alone; equal lengths keep their order
    assert cut_by_length([5, 5], max_tokens=4) == [[0], [1]]
    assert cut_by_length([], max_tokens=4) == []


def test_micro_batches_cut_only_where_it_saves_more_than_a_pass_costs():
    # one micro-batch pads the second row by the difference, a second one costs PASS_TOKENS
    for difference, count in ((PASS_TOKENS, 1), (PASS_TOKENS + 1, 2)):
        assert len(cut_by_length([1000, 1000 - difference], max_tokens=10_000)) == count


@pytest.mark.parametrize("num_rows", [128, 512])
def test_micro_batches_of_long_tailed_lengths_pad_at_most_five_percent(num_rows):
    # log-normal responses of mean 1,035, cut at 4,096, behind prompts of 50 tokens
    generator = np.random.default_rng(0)
    sampled = generator.lognormal(math.log(1035) - 0.9**2 / 2, 0.9, num_rows)
    lengths = (50 + np.clip(sampled, 1, 4096).astype(int)).tolist()
    batches = cut_by_length(lengths, max_tokens=16384)
    assert sorted(place for batch in batches for place in batch) == list(range(num_rows))
    assert max(padded_tokens(lengths, [batch]) for batch in batches) <= 16384
    assert padded_tokens(lengths, batches) / sum(lengths) <= 1.05


def test_plan_without_sharing_keeps_a_row_per_response():
    plan = plan_passes([*GROUP, *of_lengths(2)], max_tokens=100, costs=None)
    # inputs: 2 + 2, 2, 2 + 1, 1 + 1
    assert plan == [MicroBatch(indices=(0, 2, 1, 3), pack_sizes=(1, 1, 1, 1))]


def shared(costs: PackingCosts, *, max_tokens: int = 1000) -> list[int]:
    """Packed rows of four responses of 11 tokens behind a prompt of 10: 20 inputs alone, 50 together."""
    rows = [TokenRow(prompt_ids=(1,) * 10, response_ids=(number,) * 11) for number in range(4)]
    return sorted(size for batch in plan_passes(rows, max_tokens=max_tokens, costs=costs) for size in batch.pack_sizes)


def test_prompts_are_shared_where_tokens_cost_more_than_attention():
    # Per token 1, per pair c. All: 50 + 2500 c; pairs: 2 (30 + 900 c) = 60 + 1800 c; alone: 4 (20 + 200 c).
    # All below c = 10/700 = 0.0143, pairs up to 20/1000 = 0.02.
    assert shared(PackingCosts(per_token=1.0, per_pair=0.014)) == [4]
    assert shared(PackingCosts(per_token=1.0, per_pair=0.015)) == [2, 2]
    assert shared(PackingCosts(per_token=1.0, per_pair=0.019)) == [2, 2]
    assert shared(PackingCosts(per_token=1.0, per_pair=0.021)) == [1, 1, 1, 1]


def test_packed_rows_stay_within_the_micro_batch():
    # 50 inputs do not fit into 45, 40 = 10 + 3 x 10 would, but the parts are even: 2 and 2
    assert shared(PackingCosts(per_token=1.0, per_pair=0.0), max_tokens=45) == [2, 2]


def test_plan_keeps_packed_rows_with_a_mask_apart():
    plan = plan_passes([*GROUP, *of_lengths(3, 2)], max_tokens=100, costs=PackingCosts(per_token=1.0, per_pair=0.0))
    assert plan == [
        MicroBatch(indices=(0, 1, 2), pack_sizes=(3,)),
        MicroBatch(indices=(3, 4), pack_sizes=(1, 1)),
    ]


# Shared prompts against a row per response


def group(prompt: tuple[int, ...], *responses: tuple[int, ...]) -> list[TokenRow]:
    return [TokenRow(prompt_ids=prompt, response_ids=ids) for ids in responses]


CASES = {
    "one group": (group((1, 2, 3, 4, 5), (6, 7, 8), (9,), (6, 3, 2, 1, 11, 12), (13, 2)), [4]),
    "one response": (group((1, 2, 3), (4, 5, 6)), [1]),
    "a prompt of one token": (group((5,), (1,), (2,), (3,)), [3]),
    "mixed prompts": (
        [*group((1, 2, 3, 4), (5, 6), (7, 8, 9)), *group((8,), (1, 2, 3, 4, 5), (6,), (7, 8)), *group((3, 1), (2, 2))],
        [2, 3, 1],
    ),
    # a guide's response of another length stands among the others
    "a long response": (group((1, 2, 3), (4, 5), tuple(range(1, 15)) * 2, (6, 7, 8)), [3]),
    "the same response twice": (group((1, 2, 3), (4, 5, 6), (4, 5, 6)), [2]),
}


def scores_and_gradients(
    policy: Policy, rows: Sequence[TokenRow], pack_sizes: Sequence[int] | None, *, chunk_tokens: int
) -> tuple[Tensor, list[Tensor]]:
    """Log-probabilities, and the gradient of a sum in which each token has another weight."""
    policy.model.zero_grad()
    packed = pack(rows, pack_sizes, mask_dtype=policy.model.dtype)
    logps_NT = token_scores(
        policy.model, packed, temperature=0.7, chunk_tokens=chunk_tokens, plain_head=policy.plain_head
    ).logps_NT
    weights_NT = torch.linspace(-1, 2, logps_NT.numel(), dtype=logps_NT.dtype).view_as(logps_NT)
    (weights_NT * logps_NT).sum().backward()
    return logps_NT.detach(), [each.grad.clone() for each in policy.model.parameters() if each.grad is not None]


def to_float64(policy: Policy) -> Policy:
    """In place; transformers' own norm is in float32 whatever the weights are."""
    for layer in list(policy.model.modules()):
        for name, norm in list(layer.named_children()):
            if hasattr(norm, "variance_epsilon"):
                exact = torch.nn.RMSNorm(norm.weight.shape, eps=norm.variance_epsilon)
                exact.weight = norm.weight
                setattr(layer, name, exact)
    policy.model.double()
    return policy


def assert_sharing_changes_nothing(policy: Policy, case: str, *, tolerance: float, chunk_tokens: int = 3) -> None:
    rows, pack_sizes = CASES[case]
    logps_NT, gradients = scores_and_gradients(policy, rows, None, chunk_tokens=1000)
    shared_NT, shared_gradients = scores_and_gradients(policy, rows, pack_sizes, chunk_tokens=chunk_tokens)
    # Unlikely tokens have log-probabilities of -20 and rounding errors in proportion.
    assert torch.allclose(shared_NT, logps_NT, atol=tolerance * float(logps_NT.abs().max()), rtol=0)
    assert len(gradients) == len(shared_gradients) > 5
    largest = max(each.abs().max() for each in gradients)
    for one, other in zip(gradients, shared_gradients, strict=True):
        assert torch.allclose(one, other, atol=tolerance * largest, rtol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", CASES)
def test_shared_prompts_give_the_same_logprobs_and_gradients(case, attention):
    policy = load_policy(ModelSettings(threads=1, attention=attention))
    assert policy.packing is not None
    assert_sharing_changes_nothing(policy, case, tolerance=1e-5)
    if attention == "sdpa":  # eager attention's softmax is in float32
        assert_sharing_changes_nothing(to_float64(policy), case, tolerance=1e-12)


def test_shared_prompts_with_recomputed_activations_give_the_same_gradients():
    policy = load_policy(ModelSettings(threads=1, gradient_checkpointing=True))
    to_float64(policy).model.train()
    assert_sharing_changes_nothing(policy, "mixed prompts", tolerance=1e-12)


def test_shared_prompts_with_lora_give_the_same_gradients():
    policy = load_policy(ModelSettings(threads=1, lora=LoraSettings(rank=4)))
    with torch.no_grad():
        for tensor in adapter_tensors(policy.model).values():
            tensor.add_(0.05)
    assert_sharing_changes_nothing(to_float64(policy), "mixed prompts", tolerance=1e-12)


# Which models share prompts

TINY = {"vocab_size": 17, "num_hidden_layers": 2}
WIDTHS = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}


def build(config: PreTrainedConfig, attention: str = "sdpa") -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**TINY, **WIDTHS),
        Qwen3Config(**TINY, **WIDTHS, head_dim=8),
        GPT2Config(vocab_size=17, n_layer=2, n_embd=16, n_head=2),
    ],
    ids=lambda config: config.model_type,
)
def test_prompts_are_shared_in_models_of_full_attention(config):
    model = build(config)
    costs = packing_costs(model)
    layers = sum(each.numel() for each in model.base_model.parameters() if each.dim() == 2)
    layers -= model.get_input_embeddings().weight.numel()
    # 2 layers, 2 heads of 8: q.k and the sum of v are 2 x 8 products and sums each
    assert costs == PackingCosts(per_token=2.0 * layers, per_pair=2 * 2 * 8 * 4.0)
    policy = Policy(model=model, tokenizer=None, plain_head=True, adapters=None, compute_dtype=model.dtype)
    assert_sharing_changes_nothing(to_float64(policy), "mixed prompts", tolerance=1e-12)


@pytest.mark.parametrize(
    "config",
    [
        # a state instead of attention, positions by distance in the row, experts, a window
        MambaConfig(vocab_size=17, hidden_size=16, num_hidden_layers=2),
        BloomConfig(vocab_size=17, hidden_size=16, n_layer=2, n_head=2),
        MixtralConfig(**TINY, **WIDTHS, num_local_experts=2, num_experts_per_tok=1),
        Qwen3Config(**TINY, **WIDTHS, head_dim=8, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    ],
    ids=lambda config: config.model_type,
)
def test_prompts_are_not_shared_in_other_models(config):
    assert packing_costs(build(config, "eager")) is None


def test_prompts_are_not_shared_without_a_mask_of_queries_by_keys():
    model = qwen()
    assert packing_costs(model) is not None
    model.config._attn_implementation = "flash_attention_2"
    assert packing_costs(model) is None
    assert packing_costs(gemma(cap=None)) is None
