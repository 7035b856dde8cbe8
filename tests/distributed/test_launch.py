"""Ranks of a process, read from the environment of its launcher."""

import pytest

from npo_cli.distributed.launch import LaunchInfo, read_launch_info, strip_launch_variables
from npo_cli.errors import NpoError

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
ADDRESS = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def clear_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*TORCHRUN, *ADDRESS):
        monkeypatch.delenv(name, raising=False)


def set_environment(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


def test_launch_without_a_launcher_is_one_process():
    assert read_launch_info() is None


@pytest.mark.parametrize("environment", [{"WORLD_SIZE": "1", "RANK": "0"}, {"WORLD_SIZE": "8"}, {"RANK": "3"}])
def test_launch_of_one_process_or_with_half_an_environment_is_one_process(monkeypatch, environment):
    set_environment(monkeypatch, environment)
    assert read_launch_info() is None


def test_launch_reads_ranks_and_sizes_of_torchrun(monkeypatch):
    set_environment(monkeypatch, TORCHRUN | ADDRESS)
    assert read_launch_info() == LaunchInfo(rank=5, world_size=8, local_rank=1, local_world_size=4)


def test_launch_without_local_rank_is_on_one_machine(monkeypatch):
    set_environment(monkeypatch, {"RANK": "1", "WORLD_SIZE": "2"} | ADDRESS)
    assert read_launch_info() == LaunchInfo(rank=1, world_size=2, local_rank=1, local_world_size=2)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"RANK": "8"}, "RANK=8 of WORLD_SIZE=8 is impossible"),
        ({"RANK": "first"}, "RANK='first' in the environment is not a whole number"),
        ({"LOCAL_RANK": "4"}, "RANK=5 of WORLD_SIZE=8 is impossible"),
    ],
)
def test_launch_refuses_an_impossible_environment(monkeypatch, wrong, message):
    set_environment(monkeypatch, TORCHRUN | ADDRESS | wrong)
    with pytest.raises(NpoError, match=message):
        read_launch_info()


def test_launch_without_an_address_is_refused(monkeypatch):
    set_environment(monkeypatch, TORCHRUN | {"MASTER_ADDR": "127.0.0.1"})
    with pytest.raises(NpoError, match="MASTER_PORT is missing"):
        read_launch_info()


def test_launch_variables_are_removed_for_a_server():
    elastic = {"TORCHELASTIC_RUN_ID": "7", "GROUP_RANK": "0"}
    assert strip_launch_variables({"PATH": "/bin"} | TORCHRUN | ADDRESS | elastic) == {"PATH": "/bin"}
