import sys
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npo_cli.config.recipe import TaskSettings
from npo_cli.errors import NpoError, RunFailed
from npo_cli.tasks.reasoning_gym import allocate_counts
from npo_cli.tasks.task import Task, load_task
from npo_cli.types.rollouts import Message, Prompt

pytest.importorskip("reasoning_gym")

EASY_GCD = {"name": "gcd", "config": {"min_value": 2, "max_value": 20}}
SMALL_SUM = {
    "name": "chain_sum",
    "weight": 3,
    "config": {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2},
}


def gym_task(datasets: Sequence[dict[str, object]], *, seed: int = 0, **settings: object) -> Task:
    sizes = {"pool_size": 40, "heldout_size": 20} | settings
    return load_task(TaskSettings(source="reasoning_gym", datasets=datasets, verify_timeout=0.5, **sizes), seed=seed)


def question(prompt: Prompt) -> str:
    assert prompt.text is not None
    return prompt.text


def test_reasoning_gym_mixture_has_its_weights_in_both_splits():
    task = gym_task([EASY_GCD, SMALL_SUM])
    # weights 1 and 3: a quarter of 40 and of 20
    assert Counter(prompt.dataset for prompt in task.train) == {"gcd": 10, "chain_sum": 30}
    assert Counter(prompt.dataset for prompt in task.heldout) == {"gcd": 5, "chain_sum": 15}
    questions = [question(prompt) for prompt in (*task.train, *task.heldout)]
    assert len(set(questions)) == 60
    one = next(prompt for prompt in task.train if prompt.dataset == "gcd")
    assert one.prompt_id == f"gcd/{one.row:06d}"
    assert question(one).startswith("Find the Greatest Common Divisor")


@pytest.mark.slow
def test_reasoning_gym_pool_depends_on_the_seed_only():
    first, again, other = (gym_task([SMALL_SUM], seed=seed) for seed in (0, 0, 1))
    assert (first.train, first.heldout) == (again.train, again.heldout)
    # problem i is made from seed + i, so without scattering 59 of the 60 would be shared
    shared = {question(prompt) for prompt in first.train} & {question(prompt) for prompt in other.train}
    assert len(shared) < 5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["word_ladder", "list_functions"])
def test_reasoning_gym_ignores_hash_seed_and_global_random_state(name: str):
    sizes = {"pool_size": 6, "heldout_size": 2}
    assert gym_task([{"name": name}], **sizes).train == gym_task([{"name": name}], **sizes).train


def test_reasoning_gym_verifier_reads_the_last_number():
    task = gym_task([EASY_GCD, SMALL_SUM])
    prompts = task.train[:6]
    said = [f"First 1, then 2, so it is {prompt.answer}." for prompt in prompts]
    assert [one.verdict for one in task.grade(prompts, said)] == ["correct"] * 6
    assert [one.extracted for one in task.grade(prompts, said)] == [prompt.answer for prompt in prompts]
    wrong = task.grade(prompts[:3], [f"{int(prompts[0].answer) + 1}", "no idea", ""])
    assert [one.verdict for one in wrong] == ["wrong", "unparseable", "unparseable"]


def test_reasoning_gym_verifier_scores_texts_with_a_timeout():
    task = gym_task([{"name": "countdown"}], pool_size=4, heldout_size=1)
    prompt = task.train[0]
    backwards = f"0*0 + {prompt.answer}"
    found = task.grade([prompt] * 5, [f" {prompt.answer}\n", f"({prompt.answer})", "9**9**9**9**9", backwards, "1 + 1"])
    assert [one.verdict for one in found] == ["correct", "correct", "timeout", "wrong", "wrong"]
    task.close()


@pytest.mark.slow
def test_reasoning_gym_verifier_scores_problems_without_a_single_answer():
    task = gym_task([{"name": "graph_color"}], pool_size=2, heldout_size=1)
    assert task.train[0].answer == ""
    assert task.grade(task.train[:1], ["{}"])[0].verdict == "wrong"
    task.close()


def test_reasoning_gym_prompts_have_suffix_chat_and_system():
    task = gym_task([SMALL_SUM], pool_size=2, heldout_size=1, chat=True, system="Be brief.", suffix="Only the number.")
    system, user = task.train[0].messages
    assert system == Message(role="system", content="Be brief.")
    assert user.role == "user"
    assert user.content.endswith("=\nOnly the number.")
    assert task.train[0].text is None


def test_reasoning_gym_repeated_data_set_has_unique_ids():
    hard = {"name": "gcd", "config": {"min_value": 500, "max_value": 900}}
    task = gym_task([EASY_GCD, hard], pool_size=8, heldout_size=2)
    assert Counter(prompt.dataset for prompt in task.train) == {"gcd": 4, "gcd.2": 4}
    prompt = next(prompt for prompt in task.train if prompt.dataset == "gcd.2")
    assert task.grade([prompt], [prompt.answer])[0].verdict == "correct"


def test_reasoning_gym_exhausted_data_set_is_an_error():
    # two different numbers of 2 and 3 in order: 2, 2 / 2, 3 / 3, 2 / 3, 3
    tiny = {"name": "gcd", "config": {"min_value": 2, "max_value": 3}}
    with pytest.raises(NpoError, match=r"gcd has only 4 distinct questions in \d+ problems, but 60 are needed"):
        gym_task([tiny])


def test_reasoning_gym_unknown_data_set_gets_the_nearest_name():
    with pytest.raises(NpoError, match="'chain_sums'") as caught:
        gym_task([{"name": "chain_sums"}])
    assert caught.value.hint == "did you mean chain_sum?"


@pytest.mark.parametrize("config", [{"max_valu": 3}, {"max_value": "many"}])
def test_reasoning_gym_invalid_config_is_named(config: dict[str, object]):
    with pytest.raises(NpoError, match="gcd") as caught:
        gym_task([{"name": "gcd", "config": config}])
    assert next(iter(config)) in caught.value.message


def test_reasoning_gym_worker_that_dies_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RunFailed, match="generating problems with reasoning-gym failed with exit code 1"):
        gym_task([EASY_GCD])


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=5), st.integers(0, 500))
def test_allocate_counts_add_up(weights: list[float], total: int):
    counts = allocate_counts(weights, total)
    assert sum(counts) == total
    for weight, count in zip(weights, counts, strict=True):
        assert abs(count - total * weight / sum(weights)) < 1 + 1e-6
