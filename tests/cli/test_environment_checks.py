import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from npo_cli.cli import environment_checks as doctor
from npo_cli.types.views import DoctorCheck


def named(checks: list[DoctorCheck]) -> dict[str, DoctorCheck]:
    return {check.name: check for check in checks}


def test_this_machine_can_run_what_its_tests_run():
    checks = named(doctor.run_checks())
    for name in ("python", "torch", "transformers", "import", "memory", "disk", "micro-base", "recipes"):
        assert checks[name].is_ok, checks[name]
    assert "micro" in checks["recipes"].detail
    assert checks["engine transformers"].is_ok
    assert "engine vllm" in checks


def test_a_version_out_of_range_is_a_fault_with_the_command_that_mends_it():
    check = doctor.package_check(Requirement("typer<0.1"))
    assert not check.is_ok
    assert check.is_required
    assert check.detail.endswith(", but <0.1 is wanted")
    assert check.hint == "pip install 'typer<0.1'"


def test_an_absent_extra_is_no_fault_and_an_absent_core_part_is():
    extra = doctor.package_check(Requirement("npo-no-such-thing>=1; extra == 'more'"))
    assert (extra.is_ok, extra.is_required, extra.detail) == (False, False, "not installed (extra more)")
    core = doctor.package_check(Requirement("npo-no-such-thing>=1"))
    assert (core.is_ok, core.is_required, core.hint) == (False, True, "pip install 'npo-no-such-thing>=1'")


def test_the_requirements_are_the_packages_own():
    wanted = doctor.read_requirements()
    assert "torch" in {requirement.name for requirement in wanted.requirements}
    assert wanted.python.startswith(">=3.")


def test_a_python_out_of_range_is_a_fault():
    assert not doctor.python_check(">=4.0").is_ok


@pytest.mark.parametrize(("free", "ok"), [(999_999_999, False), (1_000_000_000, True)])
def test_a_disk_that_is_nearly_full_is_a_fault(monkeypatch, free, ok):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": free}))
    assert doctor.disk_check(Path()).is_ok is ok


def test_a_transformers_that_does_not_import_is_told_with_its_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    (check,) = doctor.torch_checks()
    assert not check.is_ok
    assert "transformers" in check.detail
    assert check.hint.startswith("pip uninstall torchvision")
