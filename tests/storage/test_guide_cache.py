import math
from dataclasses import replace

import pytest

from npo_cli.errors import NpoError
from npo_cli.storage.guide_cache import (
    finish_guide_cache,
    list_guide_caches,
    load_guide,
    open_guide_cache,
    read_guide_prompts,
)
from npo_cli.storage.log_head import rewrite_head
from npo_cli.storage.rollout_log import encode_float32
from tests.storage.builders import guide_info, guide_samples, new_run


def test_a_finished_cache_comes_back_whole_with_its_counts(tmp_path):
    run = new_run(tmp_path)
    store = open_guide_cache(run, guide_info(run))
    store.append("checkpoint:40", [guide_samples("a"), guide_samples("b", num_correct=0)])
    finish_guide_cache(run, guide_info(run))
    info, prompts = load_guide(run, "g")
    assert prompts == {"a": guide_samples("a")}
    # two prompts, 4 samples and 12 tokens each, one solved
    counts = {"num_prompts": 2, "num_prompts_with_rollouts": 1, "num_rollouts": 1, "num_samples": 8, "num_tokens": 24}
    assert info == guide_info(run, **counts, complete=True)
    assert list_guide_caches(run) == [info]


def test_interrupted_sampling_goes_on_where_it_stopped(tmp_path):
    run = new_run(tmp_path)
    store = open_guide_cache(run, guide_info(run))
    store.append("checkpoint:40", [guide_samples("a")])
    store.append("checkpoint:40", [guide_samples("b"), guide_samples("c", num_correct=0)])
    store.path.write_bytes(store.path.read_bytes()[:-1])  # killed while the second round was written
    again = open_guide_cache(run, guide_info(run, num_prompts=99))
    assert read_guide_prompts(again.folder) == {"a": guide_samples("a")}
    again.append("checkpoint:40", [guide_samples("b")])
    assert read_guide_prompts(again.folder) == {"a": guide_samples("a"), "b": guide_samples("b")}


COLUMN = encode_float32([-0.1, -1.2345678])


@pytest.mark.parametrize(
    ("before", "after", "problem"),
    [
        ('"num_correct":1', '"num_correct":0', "the rollouts of prompt b are no verified responses"),
        (COLUMN, encode_float32([-0.1]), "1 log-probabilities for 2 tokens"),
        (COLUMN, COLUMN[:-1], "behavior_logps is not a column of float32 numbers"),
        (f'"{COLUMN}"', "[-0.1,-1.25]", "behavior_logps is not a column of float32 numbers"),
        (COLUMN, encode_float32([-0.1, 1.2]), "a log-probability is 1.2"),
        (COLUMN, encode_float32([math.nan, -1.2345678]), "a rollout of prompt b lacks tokens or log-prob"),
        (f'"response_ids":[7,1],"behavior_logps":"{COLUMN}"', '"response_ids":[],"behavior_logps":""', "b lacks"),
        ('"groups":', '"group":', "it is not a chunk of groups"),
        ('"rollouts":[{', '"rollouts":[7,{', "it is not a chunk of groups"),
        ('"num_tokens":12', '"num_tokens":"12"', "num_tokens is '12'"),
    ],
)  # fmt: skip
def test_damaged_rollouts_of_a_cache_are_named_by_line(tmp_path, before, after, problem):
    run = new_run(tmp_path)
    store = open_guide_cache(run, guide_info(run))
    store.append("checkpoint:40", [guide_samples("a")])
    store.append("checkpoint:40", [guide_samples("b")])
    finish_guide_cache(run, guide_info(run))
    first, second = store.path.read_text().splitlines(keepends=True)
    assert before in second
    store.path.write_text(first + second.replace(before, after))
    rewrite_head(store.path, is_accepted=True)
    with pytest.raises(NpoError) as caught:
        load_guide(run, "g")
    assert caught.value.message.startswith(f"{store.path}, line 2 is damaged: ")
    assert problem in caught.value.message


def test_an_unfinished_cache_is_listed_but_never_loaded(tmp_path):
    run = new_run(tmp_path)
    open_guide_cache(run, guide_info(run))
    assert [info.complete for info in list_guide_caches(run)] == [False]
    with pytest.raises(NpoError, match=r"guide 'g' of .* is incomplete") as caught:
        load_guide(run, "g")
    assert caught.value.hint.endswith("--source checkpoint:40 --at 20 --name g")


def test_a_name_taken_by_a_finished_cache_is_refused(tmp_path):
    run = new_run(tmp_path)
    open_guide_cache(run, guide_info(run))
    finish_guide_cache(run, guide_info(run))
    with pytest.raises(NpoError, match=r"already has a complete guide 'g' \(step 40 for step 20\)") as caught:
        open_guide_cache(run, guide_info(run))
    assert "--name" in caught.value.hint


def test_a_name_taken_by_another_unfinished_cache_is_refused(tmp_path):
    run = new_run(tmp_path)
    open_guide_cache(run, guide_info(run))
    with pytest.raises(NpoError, match="an incomplete guide 'g' with another guide_step, num_steps"):
        open_guide_cache(run, guide_info(run, guide_step=60, num_steps=40))


def test_a_guide_that_is_not_there_is_answered_with_those_that_are(tmp_path):
    run = new_run(tmp_path)
    assert list_guide_caches(run) == []
    with pytest.raises(NpoError, match="has no guide 'x'; it has: none"):
        load_guide(run, "x")
    open_guide_cache(run, guide_info(run))
    with pytest.raises(NpoError, match="it has: g"):
        load_guide(run, "x")
    with pytest.raises(NpoError, match="cannot name"):
        load_guide(run, "../main")


def test_a_guide_of_another_run_is_refused(tmp_path):
    run = new_run(tmp_path)
    of_other_run = replace(guide_info(run), run_id="f" * 32)
    open_guide_cache(run, of_other_run)
    finish_guide_cache(run, of_other_run)
    with pytest.raises(NpoError, match="was made in another run"):
        load_guide(run, "g")


def test_a_guide_file_with_a_field_lost_is_damage(tmp_path):
    run = new_run(tmp_path)
    open_guide_cache(run, guide_info(run))
    (run.guide_folder("g") / "guide.json").write_text('{"name": "g"}')
    with pytest.raises(NpoError, match=r"guide\.json is damaged: it has no field 'run_id'"):
        list_guide_caches(run)
