"""The pages that docs/generate.py writes."""

import subprocess
import sys
from pathlib import Path

from npo_cli.cli.main import COMMANDS
from npo_cli.config.loading import recipe_to_dict
from npo_cli.config.recipe import Recipe

DOCS = Path(__file__).parents[2] / "docs"


def test_generated_pages_are_up_to_date():
    result = subprocess.run([sys.executable, DOCS / "generate.py", "--check"], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_settings_page_lists_every_setting():
    page = (DOCS / "reference" / "settings.md").read_text(encoding="utf-8")

    def list_keys(values: dict, prefix: str = "") -> list[str]:
        nested = [(f"{prefix}{name}", value) for name, value in values.items()]
        return [
            key
            for name, value in nested
            for key in (list_keys(value, f"{name}.") if isinstance(value, dict) else [name])
        ]

    missing = [key for key in list_keys(recipe_to_dict(Recipe())) if f"| `{key}` |" not in page]
    assert missing == []


def test_cli_page_lists_every_command():
    page = (DOCS / "reference" / "cli.md").read_text(encoding="utf-8")
    assert [name for name in COMMANDS if f"### npo {name}\n" not in page] == []
