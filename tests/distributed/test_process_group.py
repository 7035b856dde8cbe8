"""Collectives: alone they are local, and two ranks agree on results, errors and files."""

import json

import pytest

from npo_cli.distributed.process_group import ProcessGroup, current_group, describe_fault, on_main_rank
from npo_cli.errors import NpoError, RunFailed
from tests.helpers.torchrun import launch_job, run


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list]:
    """What each of two ranks saw, by rank."""
    folder = tmp_path_factory.mktemp("ranks")
    run(str(folder), log=folder / "log", module="tests.helpers.group_worker")
    return json.loads(next(line for line in (folder / "log").read_text().splitlines() if line.startswith("{")))


def test_process_group_of_one_process_is_local():
    group = current_group()
    assert (group.rank, group.world_size, group.is_main) == (0, 1, True)
    assert group.split([1, 2, 3]) == [1, 2, 3]
    assert group.gather("a", phase="test") == ["a"]
    assert group.map(lambda items: [-item for item in items], [1, 2], phase="test") == [-1, -2]
    assert group.run_on_main(lambda: 7, phase="test") == group.broadcast(7, phase="test") == 7


def test_process_group_splits_into_contiguous_parts_that_differ_by_one_at_most():
    def parts(items: list[int], world_size: int) -> list:
        group = ProcessGroup()
        group.world_size = world_size
        split = []
        for group.rank in range(world_size):
            split.append(group.split(items))
        return split

    assert parts([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4, 5]]
    assert parts([1], 2) == [[], [1]]


def test_process_group_map_keeps_the_order_of_items(outcomes):
    assert outcomes["split"] == [[0, 1], [2, 3, 4]]
    assert outcomes["map"] == [[2, 4, 6]] * 2


def test_process_group_map_error_of_one_rank_is_raised_by_all(outcomes):
    of_rank_0, of_rank_1 = outcomes["map error"]
    assert of_rank_0 == "rank 1 failed in `fail`: ValueError: unlucky"
    assert of_rank_1 == "unlucky"


def test_process_group_reports_a_rank_that_fails_alone(tmp_path):
    log = tmp_path / "log"
    with launch_job("fail", log=log, module="tests.helpers.group_worker") as job:
        assert job.wait(60) == 1
    assert "RunFailed: rank 1 failed in `work` of step 3: ValueError: unlucky" in log.read_text()


def test_on_main_rank_raises_the_error_on_all_ranks(outcomes):
    assert outcomes["main error"] == ["the disk is full"] * 2


def test_on_main_rank_writes_once(outcomes):
    assert outcomes["steps"] == [[1, 2]] * 2
    assert outcomes["text"] == ["rank 0"] * 2


def test_process_group_broadcast_gives_the_value_of_rank_0(outcomes):
    assert outcomes["broadcast"] == [0, 0]


def test_thread_of_rank_0_works_alone_while_the_ranks_meet(outcomes):
    of_rank_0, of_rank_1 = outcomes["thread"]
    assert of_rank_0["alone"] == [each for number in range(100) for each in (number, -number, 7)]
    assert of_rank_1["alone"] == []
    assert of_rank_0["together"] == of_rank_1["together"] == [2 * number for number in range(100)]


def test_on_main_rank_of_one_process_calls_the_function():
    @on_main_rank
    def add(first: int, *, second: int) -> int:
        return first + second

    assert add(1, second=2) == 3


def test_fault_names_the_rank_and_keeps_the_hint():
    fault = describe_fault(NpoError("no such prompt", "check the file"), "rank 1 failed in `verify`")
    assert (fault["is_mistake"], fault["hint"]) == (True, "check the file")
    assert fault["message"] == "rank 1 failed in `verify`: no such prompt"
    assert not describe_fault(RunFailed("engine died"), "rank 1")["is_mistake"]
