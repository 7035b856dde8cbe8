"""Guide caches from files of traces: verified here, told in the learner's tokens, never believed."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from npo_cli.errors import NpoError
from npo_cli.guides.build_cache import build_guide_cache
from npo_cli.guides.source import parse_spec
from npo_cli.storage.files import hash_file
from npo_cli.storage.guide_cache import load_guide, read_guide_prompts
from npo_cli.storage.layout import open_run
from npo_cli.storage.rollout_log import RolloutLog
from npo_cli.types.rollouts import Notice
from tests.helpers.runs import copy_run, open_session_at, resume, sample, trajectories
from tests.helpers.teachers import correct_response, correct_rows, write_traces

NAMED = {"name": "given"}
LUFFY = (
    "guide.inject.ratio=unit",
    "guide.inject.ratio_shaping=soft",
    "guide.inject.clip_off_policy=false",
    "guide.inject.max_accuracy=1",
)


@pytest.fixture(scope="module")
def run_and_prompts(scout):
    """The prompts of steps 3 and 4, and the learner's tokenizer."""
    session = open_session_at(scout, 2)
    return session.policy, session.prompts_between(8, 16)


@pytest.fixture
def root(scout, tmp_path):
    return copy_run(scout, tmp_path / "run")


def from_file(root: Path, path: Path, *overrides: str, name: str = "given"):
    """The records of a whole sampling: notices, then the cache."""
    ask = parse_spec(f"file:{path}")
    arguments = {"at": 2, "name": name}
    return list(build_guide_cache(root, spec=ask, overrides=overrides, **arguments))


def notices(records) -> list[str]:
    return [record.message for record in records if isinstance(record, Notice)]


def test_trace_file_responses_are_verified_tokenized_and_free(root, run_and_prompts, tmp_path):
    policy, prompts = run_and_prompts
    rows = correct_rows(prompts)
    rows[3] = {"prompt_id": prompts[3].prompt_id, "response": "0_#0"}  # read, and wrong
    path = write_traces(tmp_path / "traces.jsonl", rows)
    *_, info = from_file(root, path)
    found = trajectories(root, "given")
    assert set(found) == {prompt.prompt_id for place, prompt in enumerate(prompts) if place != 3}
    for prompt in prompts[:3]:
        kept = found[prompt.prompt_id]
        assert kept.text == correct_response(prompt)
        assert kept.response_ids == (*policy.tokenizer(kept.text).input_ids, *policy.eos_ids)
        assert (kept.source, kept.sampler_step, kept.behavior_logps) == ("teacher", None, None)
    assert (info.num_prompts, info.num_prompts_with_rollouts, info.num_samples, info.num_tokens) == (8, 7, 8, 0)
    assert info.external_tokens == sum(len(kept.response_ids) for kept in found.values())
    assert (info.source.text, info.guide_digest) == (f"file:{path}", hash_file(path))
    assert (info.has_logps, info.guide_step) == (False, None)


def test_trace_file_matches_prompts_by_text_and_allows_several_rows(root, run_and_prompts, tmp_path):
    prompt = next(prompt for prompt in run_and_prompts[1] if len(prompt.answer) < 5)
    right = correct_response(prompt)
    # the same answer with a further digit sum written by somebody who is right in the end
    other = f"{right[:2]}{right}"
    rows = [{"prompt": prompt.text, "response": text} for text in (right, other, right)]
    *_, info = from_file(root, write_traces(tmp_path / "traces.jsonl", rows), "guide.cache.max_responses_per_prompt=4")
    kept = load_guide(open_run(root), "given")[1][prompt.prompt_id]
    assert Counter(each.text for each in kept.rollouts) == {right: 1, other: 1}
    assert (kept.num_sampled, kept.num_correct) == (3, 3)
    assert [each.slot for each in kept.rollouts] == [0, 1]
    assert info.num_rollouts == 2


def test_trace_file_row_order_does_not_matter(scout, run_and_prompts, tmp_path):
    _, prompts = run_and_prompts
    rows = [
        {"prompt_id": prompt.prompt_id, "response": f"{'0_' * extra}{correct_response(prompt)}"}
        for prompt in prompts
        for extra in range(3)
    ]
    written = []
    for number in range(2):
        random.Random(number).shuffle(rows)
        root = copy_run(scout, tmp_path / f"run-{number}")
        from_file(root, write_traces(tmp_path / f"traces-{number}.jsonl", rows))
        written.append(load_guide(open_run(root), "given")[1])
    assert written[0] == written[1]
    assert len(load_guide(open_run(root), "given")[1]) == 8


def test_token_ids_are_kept_as_they_are_with_the_log_probabilities_that_come_with_them(root, run_and_prompts, tmp_path):
    policy, prompts = run_and_prompts
    ids = [[*policy.encode_response(correct_response(prompt)), policy.end_id] for prompt in prompts]
    rows = [
        {"prompt_id": prompt.prompt_id, "response_ids": each, "logps": [-0.25] * len(each)}
        for prompt, each in zip(prompts, ids, strict=True)
    ]
    *_, info = from_file(root, write_traces(tmp_path / "traces.jsonl", rows))
    found = trajectories(root, "given")
    assert [list(found[prompt.prompt_id].response_ids) for prompt in prompts] == ids
    assert all(set(kept.behavior_logps) == {-0.25} for kept in found.values())
    assert info.has_logps
    assert len(resume(root, "guide.inject.ratio=exact", at=2, guide="given")) == 2


def test_rows_that_cannot_be_used_are_named_and_counted(root, run_and_prompts, tmp_path):
    policy, prompts = run_and_prompts
    good = correct_rows(prompts[:1])
    bad = [
        {"prompt_id": prompts[1].prompt_id, "response": 7},
        {"response": "1_#1"},
        {"prompt_id": prompts[1].prompt_id},
        {"prompt_id": prompts[1].prompt_id, "response_ids": [1, 99]},
        {"prompt_id": prompts[1].prompt_id, "response_ids": [policy.end_id, 1]},
        {"prompt_id": prompts[1].prompt_id, "response_ids": [1, 2], "logps": [-1.0]},
        {"prompt_id": prompts[1].prompt_id, "response_ids": [1, 2], "logps": [-1.0, 3.0]},
        {"prompt_id": prompts[1].prompt_id, "response": "1_#1", "logps": [-1.0]},
        {"prompt_id": prompts[1].prompt_id, "response": "\ud800"},
        {"prompt": [{"role": "user"}], "response": "1"},
    ]
    unknown_prompts = [{"prompt_id": "addh9/1+1", "response": "1"}, {"prompt": "what?", "response": "1"}]
    unasked = [{"prompt_id": open_session_at(root, 2).prompts_between(0, 1)[0].prompt_id, "response": "1"}]
    path = write_traces(tmp_path / "traces.jsonl", [*good, *bad, *unknown_prompts, *unasked])
    *records, info = from_file(root, path)
    unusable, unmatched, elsewhere = notices(records)
    assert unusable == (
        f"10 rows cannot be used: {path} line 2: response is a number; {path} line 3: it has neither prompt_id nor "
        f"prompt; {path} line 4: it has no response and 7 more"
    )
    assert unmatched == f"2 rows match no prompt of this task: {path} line 12; {path} line 13"
    assert elsewhere == "1 rows belong to prompts that the replay does not visit"
    assert info.num_prompts_with_rollouts == 1


def test_trace_file_skips_unfinished_responses(root, run_and_prompts, tmp_path):
    policy, prompts = run_and_prompts
    rows = [
        {"prompt_id": prompts[0].prompt_id, "response_ids": list(policy.encode_response(correct_response(prompts[0])))},
        *correct_rows(prompts[1:2]),
    ]
    *_, info = from_file(root, write_traces(tmp_path / "traces.jsonl", rows))
    assert info.num_prompts_with_rollouts == 1
    assert read_guide_prompts(root / "guides" / "given")[prompts[0].prompt_id].num_correct == 0


def test_parquet_is_read_like_lines(scout, run_and_prompts, tmp_path):
    import pyarrow
    import pyarrow.parquet

    _, prompts = run_and_prompts
    rows = correct_rows(prompts)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "traces.parquet")
    written = []
    for path in (tmp_path / "traces.parquet", write_traces(tmp_path / "traces.jsonl", rows)):
        root = copy_run(scout, tmp_path / path.suffix[1:])
        from_file(root, path)
        written.append(load_guide(open_run(root), "given")[1])
    assert written[0] == written[1]


def test_trace_file_guide_cache_trains_with_luffy(root, tmp_path):
    session = open_session_at(root, 0)
    path = write_traces(tmp_path / "traces.jsonl", correct_rows(session.task.train))
    sample(root, source=f"file:{path}", at=0, **NAMED)
    reports = resume(root, *LUFFY, at=0, guide="given")
    # 4 prompts a step, each with a slot for the teacher, and its right answer beside three of the policy's
    assert [report.metrics["inject/slots"] for report in reports] == [4.0] * 4
    assert all(report.metrics["inject/grad_norm_fraction"] > 0 for report in reports)
    groups = RolloutLog(open_run(root).rollouts_path("given")).read_step(1)
    assert [group.rollouts[-1].text for group in groups] == [correct_response(group.prompt) for group in groups]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (b"", "is empty"),
        (b"{not json}\n", "line 1 is not valid JSON"),
        (b'["a"]\n', "line 1 is a JSON array, not an object"),
        (
            b'{"prompt_id": "x", "response": "1"}\n',
            "has no response to the 8 prompts of steps 3-4: 1 rows match no prompt",
        ),
    ],
)
def test_trace_file_without_matching_prompts_is_refused(root, tmp_path, rows, message):
    (tmp_path / "traces.jsonl").write_bytes(rows)
    before = sorted(root.rglob("*"))
    with pytest.raises(NpoError, match=message):
        from_file(root, tmp_path / "traces.jsonl")
    assert sorted(root.rglob("*")) == before


@pytest.mark.parametrize(("name", "message"), [("no.jsonl", "there is no file of traces"), ("x.csv", "neither .jsonl")])
def test_trace_file_that_cannot_be_read_is_refused(root, tmp_path, name, message):
    (tmp_path / "x.csv").write_text("prompt_id,response\n")
    with pytest.raises(NpoError, match=message):
        from_file(root, tmp_path / name)


def test_trace_file_that_changed_is_another_guide_cache(root, run_and_prompts, tmp_path):
    _, prompts = run_and_prompts
    path = write_traces(tmp_path / "traces.jsonl", correct_rows(prompts))
    arguments = {"at": 2, "name": "given"}
    records = build_guide_cache(root, spec=parse_spec(f"file:{path}"), **arguments)
    next(records)
    records.close()
    write_traces(path, correct_rows(prompts[:4]))
    with pytest.raises(NpoError, match="an incomplete guide 'given' with another guide_digest"):
        from_file(root, path)


def test_trace_file_source_starts_no_engine(root, run_and_prompts, tmp_path):
    """engine.kind=vllm where vllm may not even be installed."""
    path = write_traces(tmp_path / "traces.jsonl", correct_rows(run_and_prompts[1]))
    *_, info = from_file(root, path, "engine.kind=vllm")
    assert info.complete


def test_trace_file_unfinished_cache_hint_names_its_source(root, run_and_prompts, tmp_path):
    path = write_traces(tmp_path / "my traces.jsonl", correct_rows(run_and_prompts[1]))
    from_file(root, path)
    document = root / "guides" / "given" / "guide.json"
    document.write_text(json.dumps(json.loads(document.read_text()) | {"complete": False}))
    with pytest.raises(NpoError, match="is incomplete") as caught:
        load_guide(open_run(root), "given")
    assert f"--source 'file:{path}' --at 2 --name given" in caught.value.hint
