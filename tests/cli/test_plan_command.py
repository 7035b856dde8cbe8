"""`npo plan` as it is typed."""

from tests.helpers.cli_errors import assert_refused, json_rows, npo

SMALL = ("--gpu-mem", "1.85", "--disk", "100")


def test_plan_lists_allocations_that_sum_to_the_peaks():
    result = npo("plan", "micro", "--disk", "1", "--json")
    assert result.code == 0
    lines = json_rows(result.out)
    assert {line["record"] for line in lines} == {"allocation", "peak_usage"}
    peaks = {line["location"]: line for line in lines if line["record"] == "peak_usage"}
    assert set(peaks) == {"gpu", "host", "disk"}
    for location, peak in peaks.items():
        phases = ("always", peak["peak_phase"])
        here = [line for line in lines if line["record"] == "allocation" and line["location"] == location]
        assert sum(line["num_bytes"] for line in here if line["phase"] in phases) == peak["num_bytes"]


def test_plan_ends_in_the_peaks_and_fits_80_columns():
    result = npo("plan", "micro", "--gpu-mem", "8", "--host-mem", "64", "--disk", "1")
    sentence, *tables, last = result.out.split("\n\n")
    assert max(map(len, result.out.splitlines())) <= 80
    peaks = [line for line in tables[-1].splitlines() if line.startswith(("gpu", "host", "disk"))]
    for line in peaks:
        place, size, unit, *_ = line.split()
        assert f"{place} {size} {unit} of " in " ".join(sentence.split())
    assert (len(peaks), last) == (3, "next: npo train micro\n")
    assert tables[0].splitlines()[1].split() == ["where", "phase", "what", "size"]
    assert npo("plan", "micro", "--disk", "1", "--full").out.split("\n\n")[1].splitlines()[1].split()[-1] == "formula"


def test_plan_that_does_not_fit_names_a_setting_that_helps():
    result = npo("plan", "micro", *SMALL)
    assert result.code == 2
    assert "gpu: 1.99 GB are needed, there are 1.85 GB" in result.err
    setting = result.err.partition("try: add ")[2].strip()
    assert f"{setting} " in result.out.partition("Settings that reduce it")[2]
    assert npo("plan", "micro", setting, *SMALL).code == 0


def test_plan_names_more_gpus_if_no_setting_is_enough():
    result = npo("plan", "micro", "--gpu-mem", "1.2", "--disk", "100")
    assert (result.code, "--gpus 2" in result.err) == (2, True)


def test_plan_refuses_a_disk_that_is_too_small():
    result = npo("plan", "micro", "--disk", "0.04")
    assert result.code == 2
    assert "disk: 0.06 GB are needed, there are 0.04 GB" in result.err


def test_plan_refuses_a_server_without_training_gpus_and_a_shared_vllm(tmp_path):
    server = ("engine.kind=vllm_server", "engine.vllm.tensor_parallel_size=2")
    assert "none is left" in assert_refused("plan", "micro", *server, "--gpus", "2", beside=tmp_path).err
    result = assert_refused("plan", "micro", "engine.kind=vllm", "--gpus", "2", beside=tmp_path)
    assert "engine.kind=vllm samples in one process, and there are 2" in result.err


def test_plan_refuses_settings_that_several_processes_do_not_support(tmp_path):
    result = assert_refused("plan", "micro", "train.optimizer=adafactor", "--gpus", "2", beside=tmp_path)
    assert "not supported with sharded weights" in result.err
    short = npo("plan", "micro", "--gpus", "2", "--gpu-mem", "1.6", "--disk", "100")
    assert (short.code, "adafactor" in short.out) == (2, False)
    assert "adafactor" in npo("plan", "micro", "--gpu-mem", "1.6", "--disk", "100").out


def test_plan_refuses_autonpo_without_rollback_checkpoints(tmp_path):
    result = assert_refused("plan", "micro", "train.keep_full_checkpoints=1", "--autonpo", beside=tmp_path)
    assert "train.keep_full_checkpoints is 1" in result.err
