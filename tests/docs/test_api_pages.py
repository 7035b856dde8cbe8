"""The pages about the Python API: their code runs, block by block as a reader would, and the plug-ins are all there."""

import re
from pathlib import Path

import pytest

import npo_cli as npo
from npo_cli.registry import REGISTRIES

DOCS = Path(__file__).parents[2] / "docs"


def run_blocks(page: Path, scope: dict[str, object]) -> None:
    """Every Python block of a page, in one scope; an error names the line of the page."""
    text = page.read_text(encoding="utf-8")
    for block in re.finditer(r"```python\n(.*?)```", text, re.DOTALL):
        line = text[: block.start(1)].count("\n")
        exec(compile("\n" * line + block[1], str(page), "exec"), scope)


def test_the_tutorial_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_blocks(DOCS / "tutorial/04-python-api.md", {"__name__": "tutorial"})
    out = capsys.readouterr().out
    assert "TrainingResult(run=Run('runs/a'), branch='main', step=8, stopped_by=None)" in out
    assert "step 5: reward" in out
    assert "step 6: reward" not in out
    assert "callback StopAtAccuracy (accuracy 0." in out
    assert "saved branches/main/checkpoints/step_000000" in out
    assert "('main', 'late')" in out
    assert "--until 999 is not between step 0 and 240" in out
    assert npo.Run("runs/a").metrics("late", as_list=True)[-1]["step"] == 8
    assert sorted(path.name for path in Path("runs").iterdir()) == ["a", "b", "c"]


def test_the_code_of_the_reference_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = {"num_steps": 1, "prompts_per_step": 2, "group_size": 2}
    load = npo.Recipe.load

    def load_small(name, overrides=(), **settings):
        return load(name, overrides, train=small, eval={"every": 0}, **settings)

    monkeypatch.setattr(npo.Recipe, "load", load_small)
    train = npo.train

    class Small:
        """`npo.train` with fewer rollouts: a step of the whole recipe takes a second."""

        def __call__(self, recipe, run, **options):
            return train(load_small(recipe) if isinstance(recipe, str) else recipe, run, **options)

        def stream(self, recipe, run, **options):
            return train.stream(load_small(recipe), run, **options)

    monkeypatch.setattr(npo, "train", Small())
    run_blocks(DOCS / "reference/python-api.md", {"__name__": "reference", "npo": npo})
    assert [npo.Run(f"runs/{name}").metrics(as_list=True)[-1]["step"] for name in ("a", "b", "short")] == [1, 1, 1]


@pytest.mark.parametrize("found", REGISTRIES, ids=lambda found: found.kind)
def test_built_in_plug_ins_are_what_the_page_says(found):
    base = found.load_base()
    for name in found.built_in:
        plug_in = found.get(name)
        assert issubclass(plug_in, base) if isinstance(plug_in, type) else isinstance(plug_in, base)
        assert plug_in.name == name
