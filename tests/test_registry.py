"""The registry of plug-ins: names without imports, entry points of other packages, errors that name the nearest."""

from importlib.metadata import EntryPoint

import pytest

from npo_cli import registry
from npo_cli.errors import NpoError
from npo_cli.registry import (
    ENGINES,
    GUIDE_SOURCES,
    IMPORTANCE_RATIOS,
    MIX_STRATEGIES,
    TASKS,
    TRACKERS,
    VERIFIERS,
    Registry,
)

ANIMALS = Registry(
    kind="animal", setting="zoo.animal", group="npo.animals", built_in={"ordered": "collections:OrderedDict"}
)


class Ape:
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


def test_registry_lists_and_loads_entry_points_of_other_packages(monkeypatch):
    points = [EntryPoint(name="counter", value="collections:Counter", group="npo.animals")]
    monkeypatch.setattr(registry, "entry_points", lambda **_: points)
    assert ANIMALS.names() == ("ordered", "counter")
    assert ANIMALS.get("counter").__name__ == "Counter"


def test_registry_answers_an_unknown_name_with_the_nearest_or_with_all():
    with pytest.raises(NpoError, match=r"zoo\.animal=orderd is not a known animal") as caught:
        ANIMALS.get("orderd")
    assert caught.value.hint == "did you mean ordered?"
    with pytest.raises(ValueError, match=r"zoo\.animal=xyz is not a known animal: choose one of ordered"):
        ANIMALS.check("xyz")


@pytest.mark.parametrize(
    "plugins",
    [ENGINES, TASKS, VERIFIERS, TRACKERS, GUIDE_SOURCES, MIX_STRATEGIES, IMPORTANCE_RATIOS],
    ids=lambda plugins: plugins.kind,
)
def test_registry_groups_are_named_alike(plugins):
    assert plugins.group == f"npo.{plugins.kind.replace(' ', '_')}s".replace("ys", "ies")
    assert plugins.names()[: len(plugins.built_in)] == tuple(plugins.built_in)
