"""Where a process stands among others, read from its environment."""

import pytest

from npo_cli.distributed.launch import LaunchInfo, read_launch_info, strip_launch_variables
from npo_cli.errors import NpoError

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
ADDRESS = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*TORCHRUN, *ADDRESS):
        monkeypatch.delenv(name, raising=False)


def told(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


def test_without_a_launcher_there_is_one_process():
    assert read_launch_info() is None


@pytest.mark.parametrize("environment", [{"WORLD_SIZE": "1", "RANK": "0"}, {"WORLD_SIZE": "8"}, {"RANK": "3"}])
def test_a_job_of_one_and_half_an_environment_are_one_process_too(monkeypatch, environment):
    told(monkeypatch, environment)
    assert read_launch_info() is None


def test_torchrun_tells_rank_and_size_on_all_machines_and_on_this_one(monkeypatch):
    told(monkeypatch, TORCHRUN | ADDRESS)
    assert read_launch_info() == LaunchInfo(rank=5, world_size=8, local_rank=1, local_world_size=4)


def test_a_launcher_that_counts_no_machines_has_one(monkeypatch):
    told(monkeypatch, {"RANK": "1", "WORLD_SIZE": "2"} | ADDRESS)
    assert read_launch_info() == LaunchInfo(rank=1, world_size=2, local_rank=1, local_world_size=2)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"RANK": "8"}, "RANK=8 of WORLD_SIZE=8 cannot be"),
        ({"RANK": "first"}, "RANK='first' in the environment is no whole number"),
        ({"LOCAL_RANK": "4"}, "RANK=5 of WORLD_SIZE=8 cannot be"),
    ],
)
def test_an_environment_that_cannot_be_is_refused(monkeypatch, wrong, words):
    told(monkeypatch, TORCHRUN | ADDRESS | wrong)
    with pytest.raises(NpoError, match=words):
        read_launch_info()


def test_a_job_without_an_address_is_refused(monkeypatch):
    told(monkeypatch, TORCHRUN | {"MASTER_ADDR": "127.0.0.1"})
    with pytest.raises(NpoError, match="MASTER_PORT is missing"):
        read_launch_info()


def test_a_server_is_told_nothing_of_the_job():
    elastic = {"TORCHELASTIC_RUN_ID": "7", "GROUP_RANK": "0"}
    assert strip_launch_variables({"PATH": "/bin"} | TORCHRUN | ADDRESS | elastic) == {"PATH": "/bin"}
