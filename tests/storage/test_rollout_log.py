import base64
import errno
import json
import math
import os
import struct
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npo_cli.errors import NpoError
from npo_cli.storage.log_head import read_head, seal_log
from npo_cli.storage.rollout_log import RolloutLog, decode_float32, encode_float32
from npo_cli.types.rollouts import Group, ImageRef, Message, Prompt, TokenSpan
from tests.storage.builders import group, rollout

FLOAT32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(st.lists(FLOAT32))
def test_float32_roundtrip(logps_T: list[float]):
    assert decode_float32(encode_float32(logps_T)) == tuple(logps_T)


def test_float32_column_is_base64_of_little_endian_bytes():
    numbers = [-1.2345677614212036, -0.0, math.nan]
    assert encode_float32(numbers) == base64.b64encode(struct.pack("<3f", *numbers)).decode()
    assert encode_float32([]) == ""
    assert math.isnan(decode_float32(encode_float32(numbers))[2])


@pytest.mark.parametrize("column", ["AAAA", "AAAAAA=", "AAA AAA==", "\u00e9"])
def test_float32_column_that_is_cut_or_changed_is_refused(column):
    with pytest.raises(ValueError):
        decode_float32(column)


def test_rollout_log_writes_in_a_thread_what_it_writes_without(tmp_path):
    log, plain = RolloutLog(tmp_path / "thread.jsonl"), RolloutLog(tmp_path / "plain.jsonl")
    for step in (1, 2, 3):
        log.start_writing(step, [group("a"), group("b")])
        plain.write_step(step, [group("a"), group("b")])
    assert log.steps() == (1, 2, 3)  # waits for the last one
    assert log.path.read_bytes() == plain.path.read_bytes()


def test_rollout_log_error_in_the_thread_is_raised_by_the_next_call(tmp_path, monkeypatch):
    log = RolloutLog(tmp_path / "r.jsonl")
    log.write_step(1, [group("a")])
    before = log.path.read_bytes()

    def fail(handle: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", fail)
        log.start_writing(2, [group("a")])
        with pytest.raises(NpoError, match="no room left to write"):
            log.wait()
    assert log.path.read_bytes() == before
    assert log.write_step(2, [group("a")]) == "written"
    assert log.steps() == (1, 2)


def test_rollout_log_roundtrip(tmp_path):
    chat = Prompt(
        prompt_id="chat:1",
        answer="é",
        messages=(Message(role="system", content="be brief"), Message(role="user", content="\ud83d\n")),
        dataset="gcd",
        row=3,
        images=(ImageRef(location="a.png", sha256="ab", width=4, height=3),),
    )
    seated = replace(
        rollout(1, prompt_id="chat:1"), source="guide", sampler_step=40, mean_entropy=0.1, verdict="wrong", reward=0.0
    )
    written = (
        group("p0"),
        Group(prompt=chat, rollouts=(rollout(0, prompt_id="chat:1"), seated), injection_status="injected"),
    )
    log = RolloutLog(tmp_path / "r.jsonl")
    assert log.write_step(3, written) == "written"
    assert RolloutLog(tmp_path / "r.jsonl").read_step(3) == written
    assert written[1].rollouts[1].guide_step == 40


def test_rollout_log_missing_step_is_none(tmp_path):
    log = RolloutLog(tmp_path / "r.jsonl")
    assert log.read_step(1) is None
    assert log.steps() == ()
    assert list(log.iter_groups()) == []


def test_rollout_log_rewritten_step_is_compared(tmp_path):
    log = RolloutLog(tmp_path / "r.jsonl")
    log.write_step(1, [group("a"), group("b")])
    before = log.path.read_bytes()
    assert log.write_step(1, [group("a"), group("b")]) == "same"
    assert RolloutLog(log.path).write_step(1, [group("b"), group("a")]) == "differs"
    assert log.path.read_bytes() == before


def test_rollout_log_groups_by_step_and_prompt(tmp_path):
    log = RolloutLog(tmp_path / "r.jsonl")
    log.write_step(1, [group("a"), group("b")])
    log.write_step(2, [group("b")])
    assert [(step, found.prompt.prompt_id) for step, found in log.iter_groups()] == [(1, "a"), (1, "b"), (2, "b")]
    assert [step for step, _ in log.iter_groups(prompt_id="b")] == [1, 2]
    assert [found.prompt.prompt_id for _, found in log.iter_groups(step=1)] == ["a", "b"]


@pytest.mark.parametrize("num_lost", [1, 30, 700])
def test_rollout_log_incomplete_step_is_ignored_and_removed(tmp_path, num_lost: int):
    path = tmp_path / "r.jsonl"
    RolloutLog(path).write_step(1, [group("a")])
    whole = path.read_bytes()
    RolloutLog(path).write_step(2, [group("a"), group("b")])
    both = path.read_bytes()
    assert len(both) - len(whole) > 700
    path.write_bytes(both[:-num_lost])
    assert RolloutLog(path).steps() == (1,)
    assert RolloutLog(path).read_step(2) is None
    assert RolloutLog(path).write_step(2, [group("a"), group("b")]) == "written"
    assert path.read_bytes() == both


def test_rollout_log_complete_line_of_an_incomplete_step_is_removed(tmp_path):
    path = tmp_path / "r.jsonl"
    RolloutLog(path).write_step(1, [group("a"), group("b")])
    first_line = path.read_bytes().splitlines(keepends=True)[0]
    path.write_bytes(first_line)
    assert RolloutLog(path).repair() == len(first_line)
    assert path.read_bytes() == b""


def test_rollout_log_incomplete_step_that_a_later_command_sealed_is_removed_from_the_head_too(tmp_path):
    path = tmp_path / "r.jsonl"
    RolloutLog(path).write_step(1, [group("a")])
    whole = path.read_bytes()
    RolloutLog(path).write_step(2, [group("a"), group("b")])
    both = path.read_bytes()
    path.write_bytes(both[:-20])
    assert path.read_bytes().count(b"\n") == 2  # killed after the first of two groups
    assert seal_log(path).lines == 2
    assert RolloutLog(path).repair() > 0
    assert (path.read_bytes(), read_head(path).lines) == (whole, 1)
    assert RolloutLog(path).write_step(2, [group("a"), group("b")]) == "written"
    assert path.read_bytes() == both


def test_rollout_log_that_was_cut_or_changed_is_damage(tmp_path):
    path = tmp_path / "r.jsonl"
    for step in (1, 2):
        RolloutLog(path).write_step(step, [group("a")])
    seal_log(path)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for data in (lines[0], b"", whole.replace(b"AAAAv", b"AAAAw"), lines[0] + whole):
        path.write_bytes(data)
        for use in (lambda log: log.steps(), lambda log: log.repair(), lambda log: log.write_step(3, [group("a")])):
            with pytest.raises(NpoError, match="is damaged"):
                use(RolloutLog(path))
        assert path.read_bytes() == data
    path.unlink()
    with pytest.raises(NpoError, match="it is missing, and 2 lines were written"):
        RolloutLog(path).steps()


def test_rollout_log_reader_sees_later_steps(tmp_path):
    path = tmp_path / "r.jsonl"
    reader, writer = RolloutLog(path), RolloutLog(path)
    writer.write_step(1, [group("a")])
    assert reader.steps() == (1,)
    writer.write_step(2, [group("a")])
    assert reader.steps() == (1, 2)


def test_rollout_log_field_order_is_free(tmp_path):
    path = tmp_path / "r.jsonl"
    RolloutLog(path).write_step(1, [group("a")])
    path.write_bytes(path.read_bytes().replace(b'{"step":1,"num_groups":1,', b'{"note":"new","num_groups":1,"step":1,'))
    assert RolloutLog(path).read_step(1) == (group("a"),)


def test_rollout_log_damage_is_an_error(tmp_path):
    path = tmp_path / "r.jsonl"
    RolloutLog(path).write_step(1, [group("a"), group("b")])
    line = path.read_bytes().splitlines(keepends=True)[0]
    path.write_bytes(line + line.replace(b'"step":1', b'"step":2'))
    with pytest.raises(NpoError, match="the groups of step 2 are not together"):
        RolloutLog(path).steps()
    path.write_bytes(b"oops\n" + line)
    with pytest.raises(NpoError, match="a line is not a group"):
        RolloutLog(path).steps()
    path.write_bytes(b'{"step":1,"num_groups":1,"prompt":{}}\n')
    with pytest.raises(NpoError, match="a line is not a group"):
        RolloutLog(path).read_step(1)


def test_rollout_spans_are_recorded_only_where_provenance_differs(tmp_path):
    plain = rollout(0)
    spans = (
        TokenSpan(start=0, end=1, source="guide", sampler_step=9, has_logprobs=False),
        TokenSpan(start=1, end=plain.num_tokens, sampler_step=0, is_trained=False),
    )
    mixed = replace(plain, slot=1, spans=spans, source="guide")
    log = RolloutLog(tmp_path / "rollouts.jsonl")
    recorded = replace(group("p0"), rollouts=(plain, mixed))
    log.write_step(1, [recorded])
    assert log.read_step(1) == (recorded,)
    rows = json.loads(log.path.read_text())["rollouts"]
    assert "spans" not in rows[0]
    shown = [{name: value for name, value in span.items() if name != "weight"} for span in rows[1]["spans"]]
    assert [span["weight"] for span in rows[1]["spans"]] == [1.0, 1.0]
    assert shown == [
        {"start": 0, "end": 1, "source": "guide", "sampler_step": 9, "has_logprobs": False, "is_trained": True},
        {"start": 1, "end": 2, "source": "own", "sampler_step": 0, "has_logprobs": True, "is_trained": False},
    ]


def test_rollout_spans_that_do_not_cover_the_response_are_damage(tmp_path):
    log = RolloutLog(tmp_path / "rollouts.jsonl")
    spans = (TokenSpan(start=0, end=2),)
    log.write_step(1, [replace(group("p0"), rollouts=(replace(rollout(0), spans=spans),))])
    log.path.write_text(log.path.read_text().replace('"end":2', '"end":1'))
    with pytest.raises(NpoError, match="is damaged"):
        RolloutLog(log.path).read_step(1)


def test_rollout_log_outcomes_are_those_of_the_decoded_groups(tmp_path):
    # A response that spells what the reader skips; a guide's, one with a guide's prefix, a wrong and a truncated one.
    quoting = replace(rollout(0), text='"response_ids":[1,2],"source":"guide","behavior_logps":[')
    spans = (TokenSpan(start=0, end=1, source="guide"), TokenSpan(start=1, end=2))
    off_policy = (
        replace(rollout(1), source="guide", sampler_step=40),
        replace(rollout(2), spans=spans, source="guide"),
    )
    failed = (replace(rollout(3), verdict="wrong", reward=0.0), replace(rollout(4), finished=False))
    plain = (quoting, *failed)
    log = RolloutLog(tmp_path / "r.jsonl")
    groups = [
        replace(group(name), rollouts=rollouts)
        for name, rollouts in (("a", (*plain, *off_policy)), ("b", plain), ("c", off_policy))
    ]
    log.write_step(1, groups)
    found = [(one.prompt_id, one.step, one.num_correct, one.has_guide) for one in log.iter_outcomes(1)]
    assert found == [("a", 1, 1, True), ("b", 1, 1, False), ("c", 1, 0, True)]
    assert [row[2] for row in found] == [one.on_policy.num_correct for one in log.read_step(1)]


def test_rollout_log_outcome_without_a_verdict_is_damage(tmp_path):
    log = RolloutLog(tmp_path / "r.jsonl")
    log.write_step(1, [group("a")])
    log.path.write_bytes(log.path.read_bytes().replace(b'"verdict"', b'"verdikt"'))
    with pytest.raises(NpoError, match="line 1"):
        list(log.iter_outcomes(1))
