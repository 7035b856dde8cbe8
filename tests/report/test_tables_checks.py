from npo_cli.report.tables_checks import TEXT_WIDTH, doctor_tables
from npo_cli.types.views import DoctorCheck


def test_doctor_table_marks_an_absent_optional_part_as_no_fault_and_a_fault_with_its_fix():
    checks = [
        DoctorCheck(name="torch", is_ok=True, detail="2.13"),
        DoctorCheck(name="vllm", is_ok=False, detail="not installed", is_required=False),
        DoctorCheck(name="disk", is_ok=False, detail="0 B", hint="free some"),
    ]
    (table,) = doctor_tables(checks)
    assert [row[0] for row in table.rows] == ["ok", "-", "BAD", ""]
    assert table.rows[-1] == ("", "", "try: free some")


def test_doctor_table_shows_packages_that_passed_in_one_wrapped_part():
    checks = [DoctorCheck(name=f"package{i}", is_ok=True, detail="1.2.3", group="packages") for i in range(9)]
    (table,) = doctor_tables(checks)
    assert [row[1] for row in table.rows] == ["packages", "", ""]
    assert all(len(row[2]) <= TEXT_WIDTH for row in table.rows)
    assert " ".join(row[2] for row in table.rows) == ", ".join(f"package{i} 1.2.3" for i in range(9))
