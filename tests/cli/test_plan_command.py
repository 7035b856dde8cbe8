"""`npo plan` as it is typed."""

import json

from tests.helpers.cli_errors import assert_refused, npo

SMALL = ("--gpu-mem", "1.85", "--disk", "100")


def test_what_fits_is_said_with_every_need():
    said = npo("plan", "micro", "--disk", "1", "--json")
    assert said.code == 0
    lines = [json.loads(line) for line in said.out.splitlines()]
    assert {line["record"] for line in lines} == {"allocation", "peak_usage"}
    peaks = {line["location"]: line for line in lines if line["record"] == "peak_usage"}
    assert set(peaks) == {"gpu", "host", "disk"}
    for location, peak in peaks.items():
        phases = ("always", peak["peak_phase"])
        here = [line for line in lines if line["record"] == "allocation" and line["location"] == location]
        assert sum(line["num_bytes"] for line in here if line["phase"] in phases) == peak["num_bytes"]


def test_what_does_not_fit_is_refused_with_the_setting_that_mends_it():
    said = npo("plan", "micro", *SMALL)
    assert said.code == 2
    assert "gpu: 1.99 GB are needed, there are 1.85 GB" in said.err
    setting = said.err.partition("try: add ")[2].strip()
    assert f"{setting} " in said.out.partition("What would help, alone")[2]
    assert npo("plan", "micro", setting, *SMALL).code == 0


def test_where_no_setting_is_enough_more_gpus_are_named():
    said = npo("plan", "micro", "--gpu-mem", "1.2", "--disk", "100")
    assert (said.code, "--gpus 2" in said.err) == (2, True)


def test_a_disk_that_is_too_small_names_retention():
    said = npo("plan", "micro", "--disk", "0.04")
    assert said.code == 2
    assert "disk: 0.07 GB are needed, there are 0.04 GB" in said.err


def test_a_server_that_leaves_no_gpu_and_an_engine_that_cannot_be_shared(tmp_path):
    server = ("engine.kind=vllm_server", "engine.vllm.tensor_parallel_size=2")
    assert "none is left" in assert_refused("plan", "micro", *server, "--gpus", "2", beside=tmp_path).err
    said = assert_refused("plan", "micro", "engine.kind=vllm", "--gpus", "2", beside=tmp_path)
    assert "engine.kind=vllm samples in this process, and there are 2" in said.err


def test_a_setting_that_several_processes_refuse_is_no_plan_for_them(tmp_path):
    said = assert_refused("plan", "micro", "train.optimizer=adafactor", "--gpus", "2", beside=tmp_path)
    assert "here they are in shards" in said.err
    short = npo("plan", "micro", "--gpus", "2", "--gpu-mem", "1.6", "--disk", "100")
    assert (short.code, "adafactor" in short.out) == (2, False)
    assert "adafactor" in npo("plan", "micro", "--gpu-mem", "1.6", "--disk", "100").out


def test_autonpo_is_refused_where_it_could_never_go_back(tmp_path):
    said = assert_refused("plan", "micro", "train.keep_full_checkpoints=1", "--autonpo", beside=tmp_path)
    assert "train.keep_full_checkpoints is 1" in said.err
