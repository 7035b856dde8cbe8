"""The registry of plug-ins: names without imports, entry points of other packages, errors that name the nearest."""

from collections import UserString
from importlib.metadata import EntryPoint
from statistics import StatisticsError, mean

import pytest

from npo_cli import registry
from npo_cli.errors import NpoError
from npo_cli.registry import REGISTRIES, Registry

ANIMALS = Registry(
    kind="animal",
    setting="zoo.animal",
    group="npo.animals",
    base="collections:UserString",
    built_in={"ordered": "collections:OrderedDict"},
)


class Ape(UserString):
    name = "ape"


def test_registry_loads_a_built_in_class_by_its_entry_point_form():
    assert ANIMALS.names() == ("ordered",)
    assert ANIMALS.get("ordered").__name__ == "OrderedDict"


def test_registry_holds_a_class_for_a_block():
    with ANIMALS.registered(Ape):
        assert ANIMALS.names() == ("ordered", "ape")
        assert ANIMALS.get("ape") is Ape
        assert ANIMALS.check("ape") == "ape"
    assert ANIMALS.names() == ("ordered",)


def declare(monkeypatch, name, value):
    """An entry point of another package, the only one."""
    point = EntryPoint(name=name, value=value, group="npo.animals")
    monkeypatch.setattr(registry, "entry_points", lambda **_: [point])


def test_registry_lists_and_loads_entry_points_of_other_packages(monkeypatch):
    declare(monkeypatch, "ape", f"{__name__}:Ape")
    assert ANIMALS.names() == ("ordered", "ape")
    assert ANIMALS.get("ape") is Ape


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("gnu", "no_such_module:Gnu", "ModuleNotFoundError"),
        ("gnu", f"{__name__}:Gnu", "AttributeError"),
        ("counter", "collections:Counter", "is no UserString"),
        ("gnu", f"{__name__}:Ape", "has the name 'ape'"),
    ],
)
def test_registry_says_what_is_wrong_with_an_entry_point(monkeypatch, name, value, message):
    declare(monkeypatch, name, value)
    with pytest.raises(NpoError, match=message) as caught:
        ANIMALS.get(name)
    assert f"zoo.animal={name}: {value}" in caught.value.message
    assert caught.value.hint


def test_error_of_a_plug_in_is_located_in_its_own_module(monkeypatch):
    declare(monkeypatch, "mean", "statistics:mean")
    with pytest.raises(StatisticsError) as caught:
        mean([])
    assert registry.find_plug_in_line(caught.value).startswith("statistics, line ")
    with pytest.raises(NpoError) as caught:
        ANIMALS.get("orderd")
    assert registry.find_plug_in_line(caught.value) is None


def test_registry_answers_an_unknown_name_with_the_nearest_or_with_all():
    with pytest.raises(NpoError, match=r"zoo\.animal=orderd is not a known animal") as caught:
        ANIMALS.get("orderd")
    assert caught.value.hint == "did you mean ordered?"
    with pytest.raises(ValueError, match=r"zoo\.animal=xyz is not a known animal: choose one of ordered"):
        ANIMALS.check("xyz")


@pytest.mark.parametrize(
    "plugins",
    REGISTRIES,
    ids=lambda plugins: plugins.kind,
)
def test_registry_groups_are_named_alike(plugins):
    assert plugins.group == f"npo.{plugins.kind.replace(' ', '_')}s".replace("ys", "ies")
    assert plugins.names()[: len(plugins.built_in)] == tuple(plugins.built_in)
