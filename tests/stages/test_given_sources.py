"""Guide caches that nothing is generated for: files of traces, and the run's own past; and those of an address."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from npo_cli.errors import NpoError, RunFailed
from npo_cli.records import Notice
from npo_cli.run_dir.files import sha256_of
from npo_cli.run_dir.guides import asked_path, load_guide, read_asked, trajectories_path
from npo_cli.run_dir.paths import open_run
from npo_cli.run_dir.rollouts import RolloutJournal
from npo_cli.stages import guide_cache
from npo_cli.stages.guide_plan import Ask
from npo_cli.stages.sample_guide import sample_run
from tests.engines.openai_server import serving
from tests.stages.running import copied, resume, sample, train, trajectories, world_at
from tests.stages.teachers import right_rows, right_text, traces_file

NAMED = {"guide_step": None, "name": "given"}
LUFFY = ("inject.ratio=unit", "inject.shape=soft", "inject.clip=false", "inject.gate=1")


@pytest.fixture(scope="module")
def lesson(scout):
    """The prompts of steps 3 and 4, and the learner's tokenizer."""
    world = world_at(scout, 2)
    return world.policy, world.prompts_between(8, 16)


@pytest.fixture
def root(scout, tmp_path):
    return copied(scout, tmp_path / "run")


def from_file(root: Path, path: Path, *overrides: str, name: str = "given"):
    """The records of a whole sampling: notices, then the cache."""
    ask = Ask(source="file", origin=str(path))
    asked = {"at": 2, "name": name, "branch": None, "steps": None, "allow_code": False}
    return list(sample_run(root, ask=ask, overrides=overrides, **asked))


def notices(records) -> list[str]:
    return [record.message for record in records if isinstance(record, Notice)]


# A file


def test_a_files_answers_are_verified_told_in_the_learners_tokens_and_cost_nothing(root, lesson, tmp_path):
    policy, prompts = lesson
    rows = right_rows(prompts)
    rows[3] = {"prompt_id": prompts[3].prompt_id, "response": "0_#0"}  # read, and wrong
    path = traces_file(tmp_path / "traces.jsonl", rows)
    *_, info = from_file(root, path)
    found = trajectories(root, "given")
    assert set(found) == {prompt.prompt_id for place, prompt in enumerate(prompts) if place != 3}
    for prompt in prompts[:3]:
        kept = found[prompt.prompt_id]
        assert kept.text == right_text(prompt)
        assert kept.response_ids == (*policy.tokenizer(kept.text).input_ids, *policy.eos_ids)
        assert (kept.source, kept.guide_step, kept.behavior_logps) == ("teacher", None, None)
    assert (info.num_prompts, info.num_found, info.num_samples, info.num_tokens) == (8, 7, 8, 0)
    assert info.given_tokens == sum(len(kept.response_ids) for kept in found.values())
    assert (info.source, info.origin, info.guide_digest) == ("file", str(path), sha256_of(path))
    assert (info.has_logps, info.guide_step) == (False, None)


def test_a_prompt_is_matched_by_its_text_too_and_several_rows_answer_one(root, lesson, tmp_path):
    prompt = next(prompt for prompt in lesson[1] if len(prompt.answer) < 5)
    right = right_text(prompt)
    # the same answer with a further digit sum written by somebody who is right in the end
    other = f"{right[:2]}{right}"
    rows = [{"prompt": prompt.text, "response": text} for text in (right, other, right)]
    *_, info = from_file(root, traces_file(tmp_path / "traces.jsonl", rows), "guide.per_prompt=4")
    kept = load_guide(open_run(root), "given")[1][prompt.prompt_id]
    assert Counter(each.text for each in kept) == {right: 1, other: 1}
    assert {(each.num_sampled, each.num_correct) for each in kept} == {(3, 3)}
    assert [each.number for each in kept] == [0, 1]
    assert info.num_trajectories == 2


def test_the_order_of_rows_decides_nothing(scout, lesson, tmp_path):
    _, prompts = lesson
    rows = [
        {"prompt_id": prompt.prompt_id, "response": f"{'0_' * extra}{right_text(prompt)}"}
        for prompt in prompts
        for extra in range(3)
    ]
    written = []
    for number in range(2):
        random.Random(number).shuffle(rows)
        root = copied(scout, tmp_path / f"run-{number}")
        from_file(root, traces_file(tmp_path / f"traces-{number}.jsonl", rows))
        written.append(trajectories_path(root / "guides" / "given").read_bytes())
    assert written[0] == written[1]
    assert len(written[0].splitlines()) == 8


def test_token_ids_are_kept_as_they_are_with_the_log_probabilities_that_come_with_them(root, lesson, tmp_path):
    policy, prompts = lesson
    ids = [[*policy.encode_response(right_text(prompt)), policy.end_id] for prompt in prompts]
    rows = [
        {"prompt_id": prompt.prompt_id, "response_ids": each, "logps": [-0.25] * len(each)}
        for prompt, each in zip(prompts, ids, strict=True)
    ]
    *_, info = from_file(root, traces_file(tmp_path / "traces.jsonl", rows))
    found = trajectories(root, "given")
    assert [list(found[prompt.prompt_id].response_ids) for prompt in prompts] == ids
    assert all(set(kept.behavior_logps) == {-0.25} for kept in found.values())
    assert info.has_logps
    assert len(resume(root, "inject.ratio=exact", at=2, guide="given")) == 2


def test_rows_that_cannot_be_used_are_named_and_counted(root, lesson, tmp_path):
    policy, prompts = lesson
    good = right_rows(prompts[:1])
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
    strangers = [{"prompt_id": "addh9/1+1", "response": "1"}, {"prompt": "what?", "response": "1"}]
    unasked = [{"prompt_id": world_at(root, 2).prompts_between(0, 1)[0].prompt_id, "response": "1"}]
    path = traces_file(tmp_path / "traces.jsonl", [*good, *bad, *strangers, *unasked])
    *records, info = from_file(root, path)
    unusable, unmatched, elsewhere = notices(records)
    assert unusable == (
        f"10 rows cannot be used: {path} line 2: response is a number; {path} line 3: it has neither prompt_id nor "
        f"prompt; {path} line 4: it has no response and 7 more"
    )
    assert unmatched == f"2 rows answer no prompt of this task: {path} line 12; {path} line 13"
    assert elsewhere == "1 rows answer prompts that the replay does not visit"
    assert info.num_found == 1


def test_a_response_that_does_not_end_by_itself_is_no_guide(root, lesson, tmp_path):
    policy, prompts = lesson
    rows = [
        {"prompt_id": prompts[0].prompt_id, "response_ids": list(policy.encode_response(right_text(prompts[0])))},
        *right_rows(prompts[1:2]),
    ]
    *_, info = from_file(root, traces_file(tmp_path / "traces.jsonl", rows))
    assert info.num_found == 1
    assert read_asked(root / "guides" / "given")[prompts[0].prompt_id].num_correct == 0


def test_parquet_is_read_like_lines(scout, lesson, tmp_path):
    import pyarrow
    import pyarrow.parquet

    _, prompts = lesson
    rows = right_rows(prompts)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "traces.parquet")
    written = []
    for path in (tmp_path / "traces.parquet", traces_file(tmp_path / "traces.jsonl", rows)):
        root = copied(scout, tmp_path / path.suffix[1:])
        from_file(root, path)
        written.append(trajectories_path(root / "guides" / "given").read_bytes())
    assert written[0] == written[1]


def test_a_luffy_like_training_runs_from_a_file(root, tmp_path):
    world = world_at(root, 0)
    path = traces_file(tmp_path / "traces.jsonl", right_rows(world.task.train))
    sample(root, source="file", origin=str(path), at=0, **NAMED)
    reports = resume(root, *LUFFY, at=0, guide="given")
    # 4 prompts a step, each with a slot for the teacher, and its right answer beside three of the policy's
    assert [report.metrics["inject/slots"] for report in reports] == [4.0] * 4
    assert all(report.metrics["inject/grad_share"] > 0 for report in reports)
    groups = RolloutJournal(open_run(root).rollouts_path("given")).read_step(1)
    assert [group.rollouts[-1].text for group in groups] == [right_text(group.prompt) for group in groups]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (b"", "is empty"),
        (b"{not json}\n", "line 1 is not valid JSON"),
        (b'["a"]\n', "line 1 is a JSON array, not an object"),
        (
            b'{"prompt_id": "x", "response": "1"}\n',
            "answers none of the 8 prompts of steps 3-4: 1 rows answer no prompt",
        ),
    ],
)
def test_a_file_that_answers_nothing_is_refused_and_nothing_is_written(root, tmp_path, rows, message):
    (tmp_path / "traces.jsonl").write_bytes(rows)
    before = sorted(root.rglob("*"))
    with pytest.raises(NpoError, match=message):
        from_file(root, tmp_path / "traces.jsonl")
    assert sorted(root.rglob("*")) == before


@pytest.mark.parametrize(("name", "message"), [("no.jsonl", "there is no file of traces"), ("x.csv", "neither .jsonl")])
def test_a_file_that_is_none_is_refused(root, tmp_path, name, message):
    (tmp_path / "x.csv").write_text("prompt_id,response\n")
    with pytest.raises(NpoError, match=message):
        from_file(root, tmp_path / name)


def test_a_file_that_changed_makes_another_cache(root, lesson, tmp_path):
    _, prompts = lesson
    path = traces_file(tmp_path / "traces.jsonl", right_rows(prompts))
    asked = {"at": 2, "name": "given", "branch": None, "steps": None, "overrides": (), "allow_code": False}
    records = sample_run(root, ask=Ask(source="file", origin=str(path)), **asked)
    next(records)
    records.close()
    traces_file(path, right_rows(prompts[:4]))
    with pytest.raises(NpoError, match="an unfinished guide 'given' with another guide_digest"):
        from_file(root, path)


# The past


@pytest.fixture(scope="module")
def veteran(tmp_path_factory):
    """8 steps that see a pool of 16 twice: steps 5 to 8 meet what steps 1 to 4 answered."""
    root = tmp_path_factory.mktemp("veteran") / "run"
    train(root, "train.num_steps=8")
    return root


def recorded(root: Path, steps: range) -> dict[str, list]:
    journal = RolloutJournal(open_run(root).rollouts_path("main"))
    found: dict[str, list] = {}
    for step in steps:
        for group in journal.read_step(step):
            found.setdefault(group.prompt.prompt_id, []).extend((step, rollout) for rollout in group.rollouts)
    return found


def test_the_past_is_what_the_line_got_right_with_the_log_probabilities_of_its_day(veteran, tmp_path):
    root = copied(veteran, tmp_path / "run")
    info = sample(root, source="past", at=4, **NAMED)
    history, found = recorded(root, range(1, 5)), trajectories(root, "given")
    solved = {
        prompt_id
        for prompt_id, each in history.items()
        if any(rollout.verdict == "correct" and rollout.finished for _, rollout in each)
    }
    assert found.keys() == solved
    assert solved
    for prompt_id, kept in found.items():
        same = [(step, rollout) for step, rollout in history[prompt_id] if rollout.response_ids == kept.response_ids]
        step, rollout = max(same, key=lambda pair: pair[0])
        assert (kept.source, kept.guide_step) == ("past", rollout.sampler_step)
        assert rollout.sampler_step == step - 1
        newest = [rollout.behavior_logps for at, rollout in same if at == step]
        assert kept.behavior_logps in newest
        assert kept.num_sampled == len(history[prompt_id]) == 4
    assert (info.num_tokens, info.given_tokens, info.has_logps, info.origin) == (0, 0, True, "")
    # each of the 16 prompts was visited once in steps 1 to 4
    assert info.num_samples == 16 * 4


def test_a_replay_from_the_past_is_charged_to_its_day(veteran, tmp_path):
    root = copied(veteran, tmp_path / "run")
    sample(root, source="past", at=4, **NAMED)
    reports = resume(root, "inject.ratio=exact", "inject.gate=1", at=4, guide="given")
    assert sum(report.metrics["inject/slots"] for report in reports) == len(trajectories(root, "given"))
    assert len(reports) == 4


def test_equal_answers_of_the_past_are_kept_once_the_newest(tmp_path):
    root = tmp_path / "run"
    train(root, "train.num_steps=12", "task.pool_size=4", "train.save_every=4")
    sample(root, "guide.per_prompt=8", "guide.k=8", source="past", at=8, **NAMED)
    history = recorded(root, range(1, 9))
    for prompt_id, several in load_guide(open_run(root), "given")[1].items():
        texts = [kept.text for kept in several]
        assert len(texts) == len(set(texts))
        right = [rollout for _, rollout in history[prompt_id] if rollout.verdict == "correct"]
        assert {kept.num_correct for kept in several} == {len(right)}
        for kept in several:
            assert kept.guide_step == max(each.sampler_step for each in right if each.text == kept.text)


def test_there_is_no_past_at_step_0_nor_where_nothing_was_visited_before(scout, tmp_path):
    root = copied(scout, tmp_path / "run")
    with pytest.raises(NpoError, match="the learner at step 0 has no past"):
        sample(root, source="past", at=0, **NAMED)
    with pytest.raises(NpoError, match=r"none of the 8 prompts of steps 3-4 was solved in steps 1-2"):
        sample(root, source="past", at=2, **NAMED)


# An address


def right_to(prompts):
    """A server's teacher: the right scratchpad of whatever it is asked."""
    by_text = {prompt.text: prompt for prompt in prompts}

    def say(body: dict) -> dict:
        text = right_text(by_text[body["prompt"]])
        return {"text": text, "finish_reason": "stop", "usage": {"completion_tokens": 7}}

    return say


def test_an_addresses_answers_are_told_in_the_learners_tokens_and_counted_in_its_own(root, lesson):
    _, prompts = lesson
    with serving(right_to(prompts)) as served:
        asked = {"source": "endpoint", "origin": served.url, "model": "teacher", **NAMED}
        info = sample(root, **asked)
        seeds = [body["seed"] for body in served.bodies]
    found = trajectories(root, "given")
    assert {prompt.prompt_id: right_text(prompt) for prompt in prompts} == {
        prompt_id: kept.text for prompt_id, kept in found.items()
    }
    # 8 prompts, solved in the first round of 2, 7 tokens by the server's count
    assert (info.num_samples, info.num_tokens) == (16, 16 * 7)
    assert len(set(seeds)) == 16
    assert (info.origin, info.guide_digest, info.has_logps) == (f"{served.url} model teacher", "", False)
    assert {kept.source for kept in found.values()} == {"teacher"}


def test_an_address_is_asked_again_only_what_a_kill_lost(scout, lesson, tmp_path, monkeypatch):
    monkeypatch.setattr(guide_cache, "CHUNK_PROMPTS", 3)
    _, prompts = lesson
    straight, broken = (copied(scout, tmp_path / name) for name in ("straight", "broken"))
    with serving(right_to(prompts)) as served:
        asked = {"source": "endpoint", "origin": served.url, "model": "teacher", **NAMED}
        sample(straight, **asked)
        whole = len(served.bodies)
        # The first chunk of three is heard; then the server is gone for good.
        say = served.say
        served.bodies.clear()

        def say_a_little(body: dict) -> dict:
            if len(served.bodies) > 6:
                served.failures.append((400, {}, b"out of order"))
            return say(body)

        served.say = say_a_little
        with pytest.raises(RunFailed, match="answered 400: out of order"):
            sample(broken, **asked)
        served.say, first = say, len(read_asked(broken / "guides" / "given"))
        served.failures.clear()
        served.bodies.clear()
        sample(broken, **asked)
        assert (whole, first, len(served.bodies)) == (16, 3, 10)
    for path in (asked_path, trajectories_path):
        one, other = (path(root / "guides" / "given").read_bytes() for root in (straight, broken))
        assert one == other


def test_an_address_without_the_model_is_refused_and_nothing_is_written(root, lesson):
    before = sorted(root.rglob("*"))
    with serving(right_to(lesson[1])) as served:
        asked = {"source": "endpoint", "origin": served.url, "model": "oracle", **NAMED}
        with pytest.raises(NpoError, match="has no model 'oracle'; it has: teacher"):
            sample(root, **asked)
    assert sorted(root.rglob("*")) == before


def test_no_engine_is_started_for_what_needs_none(root, lesson, tmp_path):
    """engine.kind=vllm where vllm may not even be installed."""
    path = traces_file(tmp_path / "traces.jsonl", right_rows(lesson[1]))
    *_, info = from_file(root, path, "engine.kind=vllm")
    assert info.complete


def test_the_command_that_mends_an_unfinished_cache_names_its_source(root, lesson, tmp_path):
    path = traces_file(tmp_path / "my traces.jsonl", right_rows(lesson[1]))
    from_file(root, path)
    document = root / "guides" / "given" / "guide.json"
    document.write_text(json.dumps(json.loads(document.read_text()) | {"complete": False}))
    with pytest.raises(NpoError, match="is unfinished") as caught:
        load_guide(open_run(root), "given")
    assert f"--source file --from '{path}' --at 2 --name given" in caught.value.hint
