"""`npo config`: every setting is explained, and the JSON schema accepts what the recipe accepts."""

import json
from typing import Any

import pytest

from npo_cli.config.describe import build_schema, describe_config
from npo_cli.config.loading import dump_yaml, load_recipe, parse_yaml, recipe_to_dict
from npo_cli.config.locate import find_recipe, list_recipe_names
from npo_cli.config.messages import list_known_keys
from npo_cli.errors import NpoError
from npo_cli.registry import ENGINES
from npo_cli.types.views import SectionView, SettingView
from tests.helpers.cli_errors import npo

SCHEMA = build_schema()
KINDS = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "null": type(None)}


def is_valid(value: Any, schema: dict[str, Any]) -> bool:
    """The part of JSON Schema that the schema of a recipe uses, apart from bounds."""
    if "$ref" in schema:
        return is_valid(value, SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]])
    if "anyOf" in schema and not any(is_valid(value, each) for each in schema["anyOf"]):
        return False
    if value not in schema.get("enum", [value]) or not has_type(value, schema.get("type")):
        return False
    if isinstance(value, dict) and "properties" in schema:
        known = schema["properties"]
        return set(value) <= set(known) and all(is_valid(inner, known[name]) for name, inner in value.items())
    return not isinstance(value, list) or all(is_valid(item, schema.get("items", {})) for item in value)


def has_type(value: Any, kind: str | None) -> bool:
    if kind == "number":
        return isinstance(value, int | float) and not isinstance(value, bool)
    return kind is None or (isinstance(value, KINDS[kind]) and not (kind == "integer" and isinstance(value, bool)))


def test_every_setting_is_explained():
    known = set(list_known_keys())
    for section in {key.rpartition(".")[0] for key in known} - {""}:
        for view in describe_config(section):
            assert (view.section if isinstance(view, SectionView) else view.key) in known
            assert view.description


def test_without_key_the_sections_are_listed_with_one_line_each():
    views = describe_config(None)
    assert {type(view) for view in views} == {SectionView}
    assert {"train", "guide.inject", "task.datasets"} <= {view.section for view in views}
    assert all(view.description.endswith((".", "?")) for view in views)


def test_section_lists_its_settings_and_subsections():
    keys = [view.section if isinstance(view, SectionView) else view.key for view in describe_config("engine")]
    names = ("kind", "max_num_seqs", "compile", "reuse_logprobs", "sync_tolerance", "producer", "vllm")
    assert keys == [f"engine.{name}" for name in names]


def test_setting_names_the_recipes_and_methods_that_differ():
    (lr,) = describe_config("train.lr")
    assert isinstance(lr, SettingView)
    assert (lr.type, lr.default, lr.allowed) == ("number", 1e-4, "a number above 0")
    differing = {name for name in list_recipe_names() if load_recipe(name).train.lr != 1e-4}
    assert {name for name in lr.recipes if not name.startswith("--method")} == differing
    (mode,) = describe_config("guide.inject.mode")
    assert mode.recipes["--method reference/rlep"] == "append"


def test_item_of_a_list_has_the_marks_of_the_list():
    (name,) = describe_config("task.datasets.name")
    assert (name.is_required, name.comparison) == (True, "must be equal in all methods")


def test_values_that_a_plug_in_may_add_are_the_registered_names():
    (kind,) = describe_config("engine.kind")
    assert kind.allowed == ", ".join(ENGINES.names())
    assert kind.change == "at a fork (npo resume --at STEP)"


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("train.lrr", "npo config train.lr"),
        ("lr", "npo config train.lr"),
        ("guide.injct", "npo config guide.inject"),
        ("auto.c_r", "npo config autonpo.trigger.max_reward_gain_se"),
        ("qqqqqq", "npo config   # lists the sections"),
    ],
)
def test_unknown_key_is_answered_with_the_nearest(key, hint):
    with pytest.raises(NpoError) as caught:
        describe_config(key)
    assert caught.value.hint == hint


@pytest.mark.parametrize("name", list_recipe_names())
def test_schema_accepts_the_shipped_recipes_as_written_and_in_full(name):
    _, written = parse_yaml(find_recipe(name).read_text(encoding="utf-8"), source=name)
    assert is_valid(written, SCHEMA)
    assert is_valid(recipe_to_dict(load_recipe(name)), SCHEMA)


@pytest.mark.parametrize("wrong", ["train: {lrr: 1}", "train: {lr: fast}", "loss: {kind: ppo}", "eval: 3"])
def test_schema_refuses_what_a_recipe_refuses(wrong, tmp_path):
    _, values = parse_yaml(wrong, source="wrong")
    assert not is_valid(values, SCHEMA)
    (tmp_path / "wrong.yaml").write_text(dump_yaml(values, width=100))
    with pytest.raises(NpoError):
        load_recipe(str(tmp_path / "wrong.yaml"))


def test_config_command_fits_80_columns_and_prints_json():
    for args in ((), ("train",), ("guide.inject",), ("train.lr",), ("engine.vllm",), ("autonpo.rollback.distances",)):
        result = npo("config", *args)
        assert result.code == 0
        assert max(map(len, result.out.splitlines())) <= 80
    (line,) = npo("config", "train.lr", "--json").out.splitlines()
    assert json.loads(line)["record"] == "setting_view"
    assert json.loads(npo("config", "--schema").out) == SCHEMA
    assert npo("config", "train", "--schema").code == 2
