from npo_cli.report.tables_costs import cost_to_threshold_tables
from npo_cli.types.costs import CostToThreshold


def test_speedup_table_has_every_axis_and_marks_unreached_thresholds():
    crossings = [
        CostToThreshold(name="GRPO", threshold=0.6, step=200, total_steps=200, total_tokens=400_000),
        CostToThreshold(name="NPO", threshold=0.6, step=100, total_steps=250, total_tokens=500_000),
        CostToThreshold(name="GRPO", threshold=0.9, step=None, total_steps=None, total_tokens=None),
        CostToThreshold(name="NPO", threshold=0.9, step=180, total_steps=330, total_tokens=700_000),
    ]
    (table,) = cost_to_threshold_tables(crossings)
    # 200/100 = 2 by step, yet 200/250 = 0.8 by total steps and 400/500 = 0.8 by tokens
    assert table.rows == (
        ("GRPO", "0.60", "200", "200", "400,000", "1.00x", "1.00x", "1.00x"),
        ("NPO", "0.60", "100", "250", "500,000", "2.00x", "0.80x", "0.80x"),
        ("GRPO", "0.90", "not reached", "not reached", "not reached", "-", "-", "-"),
        ("NPO", "0.90", "180", "330", "700,000", "-", "-", "-"),
    )


def test_speedup_table_has_a_time_axis_if_times_are_known():
    crossings = [
        CostToThreshold(name="GRPO", threshold=0.6, step=200, total_steps=200, total_tokens=400, total_seconds=1500.0),
        CostToThreshold(name="NPO", threshold=0.6, step=100, total_steps=250, total_tokens=500, total_seconds=1250.0),
        CostToThreshold(name="GRPO", threshold=0.9, step=400, total_steps=400, total_tokens=800, total_seconds=3000.0),
        CostToThreshold(name="NPO", threshold=0.9, step=None, total_steps=None, total_tokens=None),
    ]
    (table,) = cost_to_threshold_tables(crossings)
    assert (table.header[5], table.header[9]) == ("total seconds", "by wall time")
    # 1500/1250 = 1.2, though more steps and more tokens were paid for: 200/250 = 400/500 = 0.8
    assert [(row[5], row[7:]) for row in table.rows] == [
        ("1,500.0", ("1.00x", "1.00x", "1.00x")),
        ("1,250.0", ("0.80x", "0.80x", "1.20x")),
        ("3,000.0", ("1.00x", "1.00x", "1.00x")),
        ("not reached", ("-", "-", "-")),
    ]


def test_speedup_table_omits_time_for_a_method_without_it():
    crossings = [
        CostToThreshold(name="GRPO", threshold=0.6, step=200, total_steps=200, total_tokens=400, total_seconds=0.0),
        CostToThreshold(name="NPO", threshold=0.6, step=100, total_steps=250, total_tokens=500, total_seconds=12.0),
    ]
    (table,) = cost_to_threshold_tables(crossings)
    assert [row[-1] for row in table.rows] == ["-", "-"]


def test_forward_passes_are_an_axis_where_an_older_copy_read_along():
    crossings = [
        CostToThreshold(name="GRPO", threshold=0.6, step=200, total_steps=200, total_tokens=400, total_forwards=400),
        CostToThreshold(name="L", threshold=0.6, step=100, total_steps=100, total_tokens=400, total_forwards=500),
    ]
    (table,) = cost_to_threshold_tables(crossings)
    assert (table.header[5], table.header[9]) == ("total forwards", "by forwards")
    # 400/500 = 0.8, though no token more was generated
    assert [(row[5], row[-2:]) for row in table.rows] == [("400", ("1.00x", "1.00x")), ("500", ("1.00x", "0.80x"))]


def test_best_held_rows_have_totals_and_no_ratio_by_step():
    costs = [
        CostToThreshold(name="GRPO", threshold=0.6, step=80, total_steps=80, total_tokens=400),
        CostToThreshold(name="NPO", threshold=0.6, step=60, total_steps=120, total_tokens=800),
        CostToThreshold(name="NPO", threshold=0.6, step=80, total_steps=80, total_tokens=400, is_best_held=True),
    ]
    (table,) = cost_to_threshold_tables(costs)
    assert table.rows[2] == ("NPO, best held", "0.60", "80", "80", "400", "-", "1.00x", "1.00x")


def test_teacher_tokens_are_a_column_where_a_teacher_read():
    crossings = [
        CostToThreshold(name="GRPO", threshold=0.6, step=200, total_steps=200, total_tokens=400),
        CostToThreshold(
            name="dense", threshold=0.6, step=100, total_steps=250, total_tokens=500, total_teacher_tokens=1200
        ),
    ]
    (table,) = cost_to_threshold_tables(crossings)
    assert [(table.header[-1], row[-1]) for row in table.rows] == [("teacher tokens", "-"), ("teacher tokens", "1,200")]
    assert "teacher tokens" not in cost_to_threshold_tables(crossings[:1])[0].header
