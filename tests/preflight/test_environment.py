import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from npo_cli.preflight import environment as doctor
from npo_cli.types.views import DoctorCheck


def named(checks: list[DoctorCheck]) -> dict[str, DoctorCheck]:
    return {check.name: check for check in checks}


def test_doctor_passes_on_this_machine():
    checks = named(doctor.run_checks(full=True))
    for name in ("python", "torch", "transformers", "import", "memory", "disk", "micro-base", "recipes"):
        assert checks[name].is_ok, checks[name]
    assert checks["engine transformers"].is_ok
    assert "engine vllm" in checks


def test_doctor_without_full_answers_the_same_from_metadata_alone():
    code = (
        "import sys; from npo_cli.preflight.environment import run_checks\n"
        "print(*(f'{one.name}={one.is_ok}' for one in run_checks()), sep='\\n')\n"
        "assert not {'torch', 'transformers', 'vllm', 'numpy', 'matplotlib'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    full = {f"{one.name}={one.is_ok}" for one in doctor.run_checks(full=True)}
    assert full - set(result.stdout.splitlines()) == {"import=True"}


def test_doctor_lists_the_driver_s_gpus_and_warns_of_a_cpu_build_of_torch(tmp_path, monkeypatch):
    (none,) = doctor.driver_checks(tmp_path)
    assert (none.is_ok, none.is_required) == (False, False)
    card = tmp_path / "gpus" / "0000:01:00.0"
    card.mkdir(parents=True)
    (card / "information").write_text("Model: \t\t NVIDIA H200\nIRQ: 1\n")
    monkeypatch.setattr(doctor, "installed_version", lambda name: "2.13.0+cpu")
    (check,) = doctor.driver_checks(tmp_path)
    assert (check.name, check.is_ok, check.detail) == ("gpu 0", False, "NVIDIA H200, but torch is a CPU build")
    monkeypatch.setattr(doctor, "installed_version", lambda name: "2.13.0")
    assert [each.detail for each in doctor.driver_checks(tmp_path)] == ["NVIDIA H200"]


def test_doctor_package_version_out_of_range_fails_with_the_fix():
    check = doctor.package_check(Requirement("typer<0.1"))
    assert not check.is_ok
    assert check.is_required
    assert check.detail.endswith(", but <0.1 is required")
    assert check.hint == "pip install 'typer<0.1'"


def test_doctor_missing_extra_is_optional_and_missing_dependency_fails():
    extra = doctor.package_check(Requirement("npo-no-such-thing>=1; extra == 'more'"))
    assert (extra.is_ok, extra.is_required, extra.detail) == (False, False, "not installed (extra more)")
    core = doctor.package_check(Requirement("npo-no-such-thing>=1"))
    assert (core.is_ok, core.is_required, core.hint) == (False, True, "pip install 'npo-no-such-thing>=1'")


def test_doctor_reads_the_packages_requirements():
    wanted = doctor.read_requirements()
    assert "torch" in {requirement.name for requirement in wanted.requirements}
    assert wanted.python.startswith(">=3.")


def test_doctor_python_out_of_range_fails():
    assert not doctor.python_check(">=4.0").is_ok


@pytest.mark.parametrize(("free", "ok"), [(999_999_999, False), (1_000_000_000, True)])
def test_doctor_full_disk_fails(monkeypatch, free, ok):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": free}))
    assert doctor.disk_check(Path()).is_ok is ok


def test_doctor_reports_why_transformers_does_not_import(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    (check,) = doctor.torch_checks()
    assert not check.is_ok
    assert "transformers" in check.detail
    assert check.hint.startswith("pip uninstall torchvision")
