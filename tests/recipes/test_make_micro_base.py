"""recipes/make_micro_base.py: the base model of the micro tasks."""

import subprocess
import sys
from pathlib import Path

import pytest

from npo_cli.config.loading import load_recipe
from npo_cli.policy.model import load_policy
from npo_cli.policy.model_folder import MICRO_BASE_FOLDER

SCRIPT = Path(__file__).parents[2] / "recipes" / "make_micro_base.py"


@pytest.mark.slow
def test_make_micro_base_has_the_shipped_shapes_and_tokens(tmp_path):
    out = tmp_path / "base"
    done = subprocess.run([sys.executable, SCRIPT, out, "--steps", "2"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("step 2/2  loss ")
    new, shipped = (
        load_policy(load_recipe("micro", [f"model.path={path}"]).model) for path in (out, MICRO_BASE_FOLDER)
    )
    assert {name: each.shape for name, each in new.model.named_parameters()} == {
        name: each.shape for name, each in shipped.model.named_parameters()
    }
    assert new.tokenizer.get_vocab() == shipped.tokenizer.get_vocab()


@pytest.mark.slow
def test_make_micro_base_does_not_overwrite_a_folder(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    done = subprocess.run([sys.executable, SCRIPT, tmp_path, "--steps", "1"], capture_output=True, text=True)
    assert done.returncode != 0
    assert "is not empty" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
