"""Packing rows and cutting a batch into micro-batches."""

import torch

from npo_cli.policy.logprobs import TokenRow, micro_batches, pack_rows

ROWS = [
    TokenRow(prompt_ids=(1, 2, 3), response_ids=(4, 5)),
    TokenRow(prompt_ids=(6,), response_ids=(7, 8, 9)),
]


def test_rows_are_packed_on_the_right_and_each_token_is_predicted_from_the_one_before():
    packed = pack_rows(ROWS, pad_id=0, device=torch.device("cpu"))
    assert packed.input_ids_NL.tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 0]]
    assert packed.row_M.tolist() == [0, 0, 1, 1, 1]
    assert packed.position_M.tolist() == [2, 3, 0, 1, 2]
    assert packed.target_M.tolist() == [4, 5, 7, 8, 9]
    assert packed.to_padded(packed.target_M).tolist() == [[4, 5, 0], [7, 8, 9]]


def of_lengths(*lengths: int) -> list[TokenRow]:
    return [TokenRow(prompt_ids=(1,), response_ids=(2,) * (length - 1)) for length in lengths]


def test_a_micro_batch_holds_rows_in_order_within_its_padded_size():
    # 3 rows of at most 4 tokens make 12; the row of 6 would make 4 x 6 = 24
    assert micro_batches(of_lengths(3, 4, 4, 6, 2), max_tokens=12) == [[0, 1, 2], [3, 4]]
    assert micro_batches(of_lengths(5, 5), max_tokens=4) == [[0], [1]]
    assert micro_batches([], max_tokens=4) == []
