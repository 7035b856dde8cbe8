"""Points of curves as comma-separated values, one evaluation a line: for other programs to draw and to count."""

import csv
from collections.abc import Sequence
from dataclasses import astuple, fields
from pathlib import Path

from npo_cli.compare_records import SeedPoint


def write_points(points: Sequence[SeedPoint], path: Path) -> None:
    """Every field under its name; one that is not known is left empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in fields(SeedPoint))
        writer.writerows(astuple(point) for point in points)
