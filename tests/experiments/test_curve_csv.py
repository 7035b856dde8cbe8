"""Points of curves for other programs."""

from npo_cli.experiments.compare import write_points
from npo_cli.types.comparison import SeedPoint


def test_curve_csv_has_one_row_per_point_and_empty_unknown_cells(tmp_path):
    point = SeedPoint(
        method='a, "b"',
        seed=1,
        run="r",
        branch="main",
        step=5,
        updates=10,
        tokens=99,
        forwards=120,
        seconds=None,
        accuracy=0.5,
        entropy=None,
    )
    path = tmp_path / "new" / "points.csv"
    write_points([point], path)
    assert path.read_text() == (
        "method,seed,run,branch,step,updates,tokens,forwards,seconds,accuracy,entropy,curve\n"
        '"a, ""b""",1,r,main,5,10,99,120,,0.5,,own\n'
    )
