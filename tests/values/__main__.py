"""Values that a rename must not change: small runs of the real commands, recorded or checked.

    python -m tests.values record tests/values/baseline.json
    python -m tests.values check tests/values/baseline.json
    python -m tests.values check tests/values/baseline.json --only train --only fork-exact

Run it from the root of the repository. `record` with `--only` replaces these circles in the file and keeps the others.
`check` exits with 1 on a difference. Token ids, counts and decisions are compared exactly, floats to 1e-5.

After a rename edit `commands.py` (commands, settings) and `keys.py` (files, keys, metrics, words; their shape is in
`reading.py`). Circles and baseline stay as they are.

Floats, and with them the tokens sampled, may differ on another type of processor or with another version of torch:
record the baseline again there, from a commit that is known to be right. Random seeds depend on names: of branches
(also those that AutoNPO gives), of prompts, and on the labels given to `derive_seed`. If one of those is renamed,
values do change.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.values.circles import CIRCLES, Place
from tests.values.comparing import differences, rounded
from tests.values.running import import_heavy_libraries

MOST_LINES = 20
"""Differences shown per circle."""


def main() -> int:
    """Run the requested circles, then record them or compare them with the file."""
    args = _arguments()
    names = args.only or list(CIRCLES)
    recorded = json.loads(args.file.read_text()) if args.file.exists() else {}
    if args.action == "check" and (unrecorded := [name for name in names if name not in recorded]):
        print(f"not in {args.file}: {', '.join(unrecorded)}", file=sys.stderr)
        return 1
    found = _run(names, recorded if args.action == "check" else None, keep=args.keep)
    if args.action == "record":
        merged = {name: (recorded | found)[name] for name in CIRCLES if name in recorded | found}
        args.file.write_text(_as_text(merged))
        return 0
    wrong = [name for name in names if list(differences(recorded[name], found[name]))]
    print(f"{len(names) - len(wrong)} of {len(names)} circles have the recorded values")
    return int(bool(wrong))


def _run(names: list[str], recorded: dict[str, Any] | None, *, keep: Path | None) -> dict[str, Any]:
    import_heavy_libraries()
    found = {}
    with tempfile.TemporaryDirectory(prefix="values-") as scratch:
        home = keep or Path(scratch)
        home.mkdir(parents=True, exist_ok=True)
        for name in names:
            begun = time.monotonic()
            found[name] = rounded(CIRCLES[name](Place(home / name)))
            unlike = [] if recorded is None else list(differences(recorded[name], found[name]))
            verdict = "recorded" if recorded is None else f"{len(unlike)} differences" if unlike else "equal"
            print(f"{name}: {verdict} ({time.monotonic() - begun:.0f} s)", flush=True)
            for line in unlike[:MOST_LINES]:
                print(f"  {line}")
            if len(unlike) > MOST_LINES:
                print(f"  ... and {len(unlike) - MOST_LINES} more")
    return found


def _as_text(circles: dict[str, Any]) -> str:
    """JSON with one line per part of a circle, so that a change of the baseline can be read in a diff."""
    parts = [
        f"{json.dumps(name)}:{{\n"
        + ",\n".join(f"{json.dumps(key)}:{json.dumps(value, separators=(',', ':'))}" for key, value in values.items())
        + "\n}"
        for name, values in circles.items()
    ]
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.values", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["record", "check"])
    parser.add_argument("file", type=Path, help="JSON file of recorded values")
    parser.add_argument("--only", action="append", choices=list(CIRCLES), help="this circle only; may be repeated")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep run directories and logs in this new folder")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
