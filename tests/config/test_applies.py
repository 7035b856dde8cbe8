"""A setting without an effect is refused where the user wrote it, and only there."""

from pathlib import Path

import pytest

from npo_cli.config.applies import describe_conditions
from npo_cli.config.base import IS_SET, walk_fields
from npo_cli.config.loading import apply_overrides, load_recipe, recipe_from_dict, recipe_to_dict, recipe_to_yaml
from npo_cli.config.locate import list_method_names, list_recipe_names
from npo_cli.config.recipe import Recipe
from npo_cli.errors import NpoError
from npo_cli.registry import TASKS
from npo_cli.tasks.micro import MicroTask

FILE = ("task.source=file", "task.path=d.jsonl")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([*FILE, "task.kind=any"], "task.kind has no effect with task.source=file (command line)"),
        (["task.chat=true"], "task.chat has no effect with task.source=micro (command line)"),
        (["task.image_column=i"], "task.image_column has no effect with task.source=micro (command line)"),
        ([*FILE, "task.max_image_pixels=9"], "task.max_image_pixels has no effect without task.image_column"),
        (["engine.vllm.timeout=9"], "engine.vllm.timeout has no effect with engine.kind=transformers"),
        (["engine.kind=vllm", "engine.vllm.devices='1'"], "engine.vllm.devices has no effect with engine.kind=vllm ("),
        (
            ["engine.kind=vllm", "engine.vllm.max_loras=2"],
            "engine.vllm.max_loras has no effect without model.lora.rank",
        ),
        (["extrapolation.a=2"], "extrapolation.a has no effect with guide.source=cache"),
        (["guide.experience.select=nll"], "guide.experience.select has no effect without guide.experience.replay_frac"),
        (["loss.kind=cispo", "loss.clip_high=0.3"], "loss.clip_high has no effect with loss.kind=cispo"),
        (["loss.cispo_cap=4"], "loss.cispo_cap has no effect with loss.kind=grpo"),
        (["loss.divide_by_std=false", "loss.adv_eps=0"], "loss.adv_eps has no effect with loss.divide_by_std=false"),
        (["train.optimizer=adafactor", "train.betas=[0.1, 0.2]"], "train.betas has no effect with train.optimizer=ada"),
        (["train.min_lr_ratio=0"], "train.min_lr_ratio has no effect with train.schedule=constant"),
        (["mismatch.mode=off", "mismatch.cap=3.0"], "mismatch.cap has no effect with mismatch.mode=off"),
        (["model.lora.alpha=8"], "model.lora.alpha has no effect without model.lora.rank"),
        (["sampling.max_gen_batches=2"], "sampling.max_gen_batches has no effect with sampling.dynamic=false"),
        (["sampling.overlong_penalty=2"], "sampling.overlong_penalty has no effect without sampling.overlong_buffer"),
        (["tracking.report_to=[tensorboard]", "tracking.project=x"], "tracking.project has no effect with tracking"),
        (["task={kind: any, source: shapes}"], "task.kind has no effect with task.source=shapes (command line)"),
    ],
    ids=str,
)
def test_setting_without_effect_is_refused(overrides, message):
    with pytest.raises(NpoError) as caught:
        load_recipe("micro", overrides)
    assert caught.value.message.startswith(message)
    assert caught.value.hint.startswith("remove ")


def test_hint_to_set_a_list_is_a_list():
    with pytest.raises(NpoError) as caught:
        load_recipe("micro", ["autonpo.rungs.scout_steps=4"])
    assert caught.value.hint == "remove autonpo.rungs.scout_steps, or set autonpo.ladder=[scout]"


def test_setting_without_effect_in_a_file_is_refused_with_its_line(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("task:\n  source: file\n  path: d.jsonl\n  kind: any\nmodel: {lora: {alpha: 8}}\n")
    with pytest.raises(NpoError) as caught:
        load_recipe(str(path))
    assert caught.value.message == (
        "model.lora.alpha has no effect without model.lora.rank (r.yaml:5); "
        "task.kind has no effect with task.source=file (r.yaml:4)"
    )
    assert caught.value.hint == "remove model.lora.alpha, or set model.lora.rank"


@pytest.mark.parametrize(
    "overrides",
    [
        [*FILE, "task.prompt_column=q", "task.chat=true"],
        ["task.kind=any"],
        ["model.lora.rank=4", "model.lora.alpha=8"],
        ["mismatch.cap=3.0"],
        ["train.schedule=linear", "train.min_lr_ratio=0"],
        ["guide.source=extrapolated", "extrapolation.mode=sample", "extrapolation.slots=1"],
        ["tracking.report_to=[tensorboard, wandb]", "tracking.project=x"],
    ],
    ids=str,
)
def test_setting_with_an_effect_is_admitted(overrides):
    load_recipe("micro", overrides)


def test_what_a_later_file_or_the_command_line_switched_off_is_admitted(tmp_path):
    (tmp_path / "r.yaml").write_text("task: {source: file, path: d.jsonl, suffix: Think.}\nmismatch: {cap: 3.0}\n")
    (tmp_path / "s.yaml").write_text("extends: ./r.yaml\ntask: {source: micro}\n")
    load_recipe(str(tmp_path / "s.yaml"))
    load_recipe(str(tmp_path / "r.yaml"), ["task.source=micro", "mismatch.mode=off"])
    with pytest.raises(NpoError, match=r"task\.suffix has no effect with task\.source=micro"):
        load_recipe(str(tmp_path / "s.yaml"), ["task.suffix=Now."])


def test_what_is_inherited_from_a_shipped_or_saved_recipe_is_admitted():
    load_recipe("smollm2-135m", FILE)  # it has task.datasets and task.suffix
    saved = recipe_from_dict(recipe_to_dict(load_recipe("smollm2-135m")))
    apply_overrides(saved, FILE)
    with pytest.raises(NpoError, match=r"task\.kind has no effect with task\.source=reasoning_gym"):
        apply_overrides(saved, ["task.kind=any"])


def test_recipe_printed_in_full_is_a_recipe(tmp_path):
    for name in list_recipe_names():
        (tmp_path / "full.yaml").write_text(recipe_to_yaml(load_recipe(name)))
        load_recipe(str(tmp_path / "full.yaml"))


def test_no_shipped_recipe_or_method_has_a_setting_without_effect(tmp_path):
    for name in ("micro", "qwen3-vl-8b-mmfinereason"):
        for method in (None, *list_method_names()):
            (tmp_path / "full.yaml").write_text(recipe_to_yaml(load_recipe(name, method=method)))
            load_recipe(str(tmp_path / "full.yaml"))


def test_setting_may_belong_to_a_task_of_a_plug_in():
    class PlugIn(MicroTask):
        name = "plug_in"

    with TASKS.registered(PlugIn):
        assert load_recipe("micro", ["task.source=plug_in", "task.path=x", "task.kind=any"]).task.path == "x"


LISTS = ("tracking.report_to", "autonpo.ladder")


def test_conditions_name_settings_and_values_that_exist():
    fields = {key: marks for key, _, marks in walk_fields(Recipe())}
    conditions = [marks["applies_when"] for marks in fields.values() if "applies_when" in marks]
    assert len(conditions) > 50
    for each in conditions:
        for key, needed in each.items():
            assert key in fields
            for value in () if needed == IS_SET else needed:
                section, _, name = key.rpartition(".")
                beside = {"teacher": "self"} if key == "target.kind" else {}
                nested = {name: [value] if key in LISTS else value} | beside
                for part in reversed(section.split(".")):
                    nested = {part: nested}
                recipe_from_dict({"train": {"save_every": 5}} | nested)
    assert describe_conditions({"task.source": ["micro", "file"], "model.lora.rank": IS_SET}) == (
        "task.source=micro or file and model.lora.rank set"
    )


def test_page_of_settings_shows_when_a_setting_applies():
    page = (Path(__file__).parents[2] / "docs" / "reference" / "settings.md").read_text()
    (line,) = (line for line in page.splitlines() if line.startswith("| `task.kind` "))
    assert line.endswith("| task.source=micro |")
