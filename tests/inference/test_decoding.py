"""Continuous batching: responses that enter, leave and move among rows are those of each seed alone."""

import random
from dataclasses import replace

import pytest
import torch

from npo_cli.inference import kv_cache
from npo_cli.inference.base import SampleRequest
from npo_cli.inference.decoding import order_by_prompt
from npo_cli.inference.kv_cache import InPlaceRows, Window, open_rows
from npo_cli.inference.transformers_engine import TransformersEngine
from recipes import bench_sampling
from tests.inference.tiny_models import EOS, GROWING, IN_PLACE, compute_logps, make_requests, open_engine, qwen

MODELS = pytest.mark.parametrize("build", [*IN_PLACE, *GROWING], ids=lambda build: build.__name__)


def generate(engine: TransformersEngine, requests: list[SampleRequest], *, max_new_tokens: int = 40):
    return engine.generate(requests, temperature=1.0, max_new_tokens=max_new_tokens)


def response_ids(samples) -> list[tuple[int, ...]]:
    return [sample.response_ids for sample in samples]


@MODELS
def test_decoding_logprobs_equal_a_plain_pass(build):
    """24 responses in 10 rows, to prompts of 1 to 30 tokens."""
    engine, requests = open_engine(build, max_rows=10), make_requests()
    samples = generate(engine, requests)
    for sample, logps in zip(samples, compute_logps(engine, requests, samples), strict=True):
        assert sample.logps == pytest.approx(logps, abs=1e-5)


@MODELS
def test_decoding_gives_a_seed_the_same_response_in_any_batch_and_order(build):
    requests = make_requests()
    together = generate(open_engine(build), requests)
    assert len({len(sample.response_ids) for sample in together}) > 5
    alone = [generate(open_engine(build, max_rows=1), [request])[0] for request in requests[::7]]
    assert response_ids(alone) == response_ids(together)[::7]
    order = random.Random(1).sample(range(len(requests)), len(requests))
    mixed = generate(open_engine(build, max_rows=5), [requests[place] for place in order])
    assert response_ids(mixed) == [together[place].response_ids for place in order]


@pytest.mark.parametrize("build", [each for each in (*IN_PLACE, *GROWING[:2])], ids=lambda build: build.__name__)
@pytest.mark.parametrize("max_rows", [5, 512])
def test_decoding_samples_what_transformers_generates(build, max_rows):
    """The oracle: transformers' own `generate`, left padded, with a logits processor that chooses the same tokens."""
    engine, requests = open_engine(build, max_rows=max_rows), make_requests()
    oracle = bench_sampling.GenerateEngine(engine.settings, engine.handle)
    samples, expected = generate(engine, requests), generate(oracle, requests)
    assert response_ids(samples) == response_ids(expected)
    assert [(one.text, one.finished) for one in samples] == [(one.text, one.finished) for one in expected]
    for ours, theirs in zip(samples, expected, strict=True):
        assert ours.logps == pytest.approx(theirs.logps, abs=1e-5)
        assert ours.mean_entropy == pytest.approx(theirs.mean_entropy, abs=1e-5)


def test_decoding_of_one_batch_equals_transformers_generate_bit_for_bit():
    engine, requests = open_engine(qwen), make_requests()
    assert generate(engine, requests) == generate(
        bench_sampling.GenerateEngine(engine.settings, engine.handle), requests
    )


@pytest.mark.parametrize("build", [qwen, *GROWING], ids=lambda build: build.__name__)
@pytest.mark.parametrize("lengths", [(1,), (1, 1), (1, 30), (30, 1)])
@pytest.mark.parametrize("max_new_tokens", [1, 2])
def test_decoding_of_short_prompts_and_responses(build, lengths, max_new_tokens):
    """In more than one batch."""
    engine, requests = open_engine(build, max_rows=4), make_requests(lengths)
    samples = generate(engine, requests, max_new_tokens=max_new_tokens)
    assert {len(sample.response_ids) for sample in samples} <= {1, max_new_tokens}
    assert response_ids(samples) == [
        generate(engine, [each], max_new_tokens=max_new_tokens)[0].response_ids for each in requests
    ]
    for sample, logps in zip(samples, compute_logps(engine, requests, samples), strict=True):
        assert sample.logps == pytest.approx(logps, abs=1e-5)


def test_decoding_ends_at_an_end_token_in_first_position():
    """With 30 of 40 tokens as end tokens most responses have one token."""
    engine, requests = open_engine(qwen, max_rows=4, eos_ids=tuple(range(10, 40))), make_requests()
    samples = generate(engine, requests)
    lengths = [len(sample.response_ids) for sample in samples]
    assert lengths.count(1) > len(lengths) / 2
    for sample in samples:
        assert [token >= 10 for token in sample.response_ids] == [False] * (len(sample.response_ids) - 1) + [True]
        assert sample.finished
    assert response_ids(samples) == response_ids(generate(open_engine(qwen, eos_ids=engine.handle.eos_ids), requests))


def test_decoding_of_no_requests_is_empty():
    assert generate(open_engine(qwen), []) == []


def test_cost_counts_rows_passes_and_prefills_by_hand():
    """No end token: 5 responses of 4 tokens in 2 rows are 2 + 2 + 1 rows of 4 passes, and 20 tokens.

    Prompts of 3 and 5 tokens: the first two responses enter with a prefill of the 3-token prompt (2 tokens without the
    last). The third takes it from there, as it enters with the first to the other prompt: only that prompt is prefilled
    (4 tokens), and its second response needs no prefill.
    """
    requests = [each for each in make_requests((3, 5), num_slots=3) if (each.prompt_id, each.slot) != ("1", 2)]
    engine = open_engine(qwen, max_rows=2, eos_ids=())
    generate(engine, requests, max_new_tokens=4)
    cost = engine.cost
    assert (cost.tokens, cost.passes, cost.row_steps) == (20, 12, 20)
    assert (cost.prefills, cost.prefilled_tokens) == (2, 2 + 4)


def test_ended_rows_are_computed_for_half_a_pass_at_most():
    """Of 24 responses in one batch, whose lengths say how many rows each pass has."""
    engine = open_engine(qwen)
    lengths = [len(sample.response_ids) for sample in generate(engine, make_requests())]
    computed, rows, wasted = 0, len(lengths), 0
    for place in range(max(lengths)):
        num_alive = sum(length > place for length in lengths)
        if wasted > rows / 2:
            rows, wasted = num_alive, 0
        computed, wasted = computed + rows, wasted + rows - num_alive
    assert engine.cost.row_steps == computed
    assert sum(lengths) < computed < 1.2 * sum(lengths)


def test_long_tailed_lengths_cost_at_most_1_3_rows_per_token(monkeypatch):
    """Log-normal lengths (mean 40, at most 160), four times as many responses as rows."""
    monkeypatch.setattr(bench_sampling, "MEAN_LENGTH", 40)
    monkeypatch.setattr(bench_sampling, "LONGEST", 160)
    handle, requests, max_rows, limit = bench_sampling.make_case("long", "cpu")
    costs = {}
    for name in ("generate", "loop"):
        engine = bench_sampling.ENGINES[name](open_engine(qwen, max_rows=max_rows).settings, handle)
        samples = generate(engine, requests, max_new_tokens=limit)
        costs[name] = engine.cost
    lengths = [len(sample.response_ids) for sample in samples]
    assert len(requests) == 4 * max_rows
    assert max(lengths) > 3 * sum(lengths) / len(lengths)
    assert costs["loop"].tokens == costs["generate"].tokens == sum(lengths)
    assert costs["loop"].row_steps <= 1.3 * sum(lengths)
    assert costs["generate"].row_steps > 2 * sum(lengths)


def test_request_with_a_limit_of_its_own_gets_the_beginning_of_the_same_response():
    engine, requests = open_engine(qwen, max_rows=3), make_requests((1, 30, 2, 17), num_slots=2)
    whole = generate(engine, requests, max_new_tokens=20)
    limits = [1 + place for place in range(len(requests))]
    limited = [replace(one, max_new_tokens=limit) for one, limit in zip(requests, limits, strict=True)]
    for sample, found, limit in zip(whole, generate(engine, limited, max_new_tokens=20), limits, strict=True):
        assert found.response_ids == sample.response_ids[:limit]
        assert found.logps == pytest.approx(sample.logps[:limit], abs=1e-5)
        assert found.finished is (sample.finished and len(sample.response_ids) <= limit)


def test_requests_enter_in_the_order_of_their_prompts():
    one, two, three = ((number,) for number in (1, 2, 3))
    ids = [two, one, two, three, one]
    requests = [
        SampleRequest(prompt_id=str(place), prompt_ids=each, slot=0, seed=place) for place, each in enumerate(ids)
    ]
    assert order_by_prompt(requests) == [0, 2, 1, 4, 3]


def test_window_grows_by_half_and_keeps_room_that_lies_left(monkeypatch):
    monkeypatch.setattr(kv_cache, "SMALLEST_CAPACITY", 8)
    window = Window(max_columns=100)
    assert window.make_room(3)
    assert (window.first, window.end, window.capacity) == (0, 3, 8)
    assert not window.make_room(3)
    window.end = 8  # full, with rows of 7 tokens: 7 + 7 // 2 + 1 = 11 columns
    assert window.make_room(7)
    assert (window.end, window.capacity) == (7, 11)
    window.end = 11  # full, but no row has more than 6 tokens: 4 columns at the left are free
    assert window.make_room(6)
    assert (window.end, window.capacity) == (6, 11)
    window.end = 11
    assert window.make_room(90)
    assert (window.end, window.capacity) == (90, 100)


@pytest.mark.parametrize("smallest", [1, 8])
def test_decoding_with_columns_that_move_and_grow(monkeypatch, smallest):
    """From the smallest buffers on: responses of 1 to 100 tokens enter in turn while the columns move left or grow."""
    monkeypatch.setattr(kv_cache, "SMALLEST_CAPACITY", smallest)
    moved = []
    relocate = InPlaceRows.relocate
    monkeypatch.setattr(
        InPlaceRows, "relocate", lambda rows, held, end: (moved.append((held, end)), relocate(rows, held, end))
    )
    engine, requests = open_engine(qwen, max_rows=3), make_requests((1, 30, 2, 17), num_slots=4)
    samples = generate(engine, requests, max_new_tokens=100)
    for sample, logps in zip(samples, compute_logps(engine, requests, samples), strict=True):
        assert sample.logps == pytest.approx(logps, abs=1e-5)
    assert len([held for held, end in moved if 0 < held < end]) >= 3


def test_rows_that_entered_late_ignore_a_thousand_columns_of_others():
    """Whole blocks of the attention's columns are masked for them."""
    engine = open_engine(qwen, max_rows=2, eos_ids=())
    long = SampleRequest(prompt_id="long", prompt_ids=tuple(1 + place % 38 for place in range(1200)), slot=0, seed=1)
    short = make_requests((1, 2), num_slots=1)
    samples = generate(engine, [long, *short], max_new_tokens=12)
    for sample, logps in zip(samples, compute_logps(engine, [long, *short], samples), strict=True):
        assert sample.logps == pytest.approx(logps, abs=1e-5)


@MODELS
def test_only_plain_attention_is_cached_in_place(build):
    engine = open_engine(build)
    rows = open_rows(engine.model.config, Window(max_columns=8), num_rows=2)
    assert rows.accepts_new_rows == (build in IN_PLACE)


def test_cache_is_no_larger_than_the_rows_can_get():
    """3 rows, prompts of up to 30 tokens without the last, and 10 tokens: 39 columns."""
    engine = open_engine(qwen, max_rows=3, eos_ids=())
    opened, open_models = [], engine._open_models
    engine._open_models = lambda window, num_rows: opened.append(open_models(window, num_rows)) or opened[0]
    generate(engine, make_requests(), max_new_tokens=10)
    for layer in opened[0][0].rows.layers:
        assert layer.keys.shape == layer.values.shape == (3, 1, 39, 8)


def test_decoding_leaves_no_mark_on_the_model():
    engine = open_engine(qwen)
    before = {name: tensor.clone() for name, tensor in engine.model.state_dict().items()}
    generate(engine, make_requests())
    assert all(torch.equal(tensor, before[name]) for name, tensor in engine.model.state_dict().items())
    assert EOS in engine.handle.eos_ids
