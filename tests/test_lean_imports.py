"""Placeholders for what one process does not use: they become the real thing when it is used."""

import contextlib
import decimal
import json
import os
import subprocess
import sys
import types
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from npo_cli import lean_imports
from npo_cli.cli.main import main
from npo_cli.lean_imports import CompilerMarks, Deferred, DeferredModule, PlainShapes
from tests.helpers.runs import TINY, reproducible_digests

ABSENT = "npo_absent_module"


def test_placeholder_is_called_subclassed_and_asked_like_the_real_thing():
    placeholder = DeferredModule("decimal").Decimal
    assert placeholder("1.5") == decimal.Decimal("1.5")
    assert placeholder.from_float(0.5) == decimal.Decimal("0.5")

    class Price(placeholder):
        pass

    assert Price.__mro__[1] is decimal.Decimal


def test_nothing_is_an_instance_while_the_module_is_not_loaded():
    absent = Deferred(ABSENT, "Tensor")
    assert not isinstance(1, absent)
    assert not isinstance(1, (str, absent))
    assert not issubclass(int, absent)
    assert (absent | None, None | absent) == (Any, Any)
    loaded = Deferred("decimal", "Decimal")
    assert isinstance(decimal.Decimal(1), loaded)
    assert not isinstance(1, loaded)
    with pytest.raises(ModuleNotFoundError):
        absent()


def test_call_while_a_module_of_transformers_is_imported_waits():
    """`TABLE = {"row": Shard(0)}` at the top of a module imports nothing; the table works when it is used."""
    module = types.ModuleType("transformers.table")
    module.Decimal = Deferred("decimal", "Decimal")
    exec("made = Decimal('2.5')", module.__dict__)
    assert not isinstance(module.made, decimal.Decimal)
    assert module.made.as_integer_ratio() == (5, 2)


def test_marks_for_the_compiler_leave_the_function():
    def function():
        return 1

    marks = CompilerMarks()
    assert marks.disable(function) is marks.allow_in_graph(function) is function
    assert marks.disable(recursive=False)(function) is function
    assert marks.graph_break() is None


def test_shapes_of_plain_numbers_are_answered_without_the_module_for_symbolic_ones():
    shapes = PlainShapes()
    assert shapes.guard_or_false(3 == 3) is True
    assert shapes.sym_and(True, False) is False
    assert shapes.sym_eq((2, 3), (2, 3)) is True
    assert shapes.is_nested_int(4) is False


def test_other_shapes_are_asked_of_the_real_module(monkeypatch):
    real = types.ModuleType("real")
    real.guard_or_false = lambda value: ("asked", value)
    monkeypatch.setitem(sys.modules, lean_imports.SYMBOLIC_SHAPES, real)
    assert PlainShapes().guard_or_false(Fraction(1, 2)) == ("asked", Fraction(1, 2))


def test_nothing_is_installed_where_transformers_is_loaded_already():
    import builtins

    before = builtins.__import__
    sys.modules.setdefault("transformers", types.ModuleType("transformers"))
    lean_imports.install()
    assert builtins.__import__ is before


WATCHED = """
import json, sys
from npo_cli.cli.main import main
try:
    main()
finally:
    names = ("torch", "torch._dynamo", "torch.distributed.tensor", "torch.distributed.fsdp", "scipy.optimize", "sympy")
    print(json.dumps([name for name in names if name in sys.modules]), file=sys.stderr)
"""
REAL_USE = """
from npo_cli import lean_imports
lean_imports.install()
import torch, transformers
from transformers import PreTrainedModel
assert "torch.distributed.tensor" not in __import__("sys").modules
from transformers.distributed import tensor_parallel
placeholder = tensor_parallel.DTensor
assert type(placeholder).__name__ == "Deferred"
from torch.distributed.tensor import DTensor
assert placeholder._load() is DTensor
assert torch.distributed.fsdp.fully_shard is not None  # as libraries use it that expect it to be imported
assert not hasattr(torch.distributed, "nothing")
import torch._dynamo
assert torch._dynamo.__name__ == "torch._dynamo"
assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)).item() == 2
"""


@pytest.mark.slow
@pytest.mark.parametrize("lora", [(), ("model.lora.rank=4",)])
def test_training_loads_no_compiler_and_computes_the_same_bytes(tmp_path, lora):
    args = ("train", "micro", *TINY, "train.num_steps=2", *lora, "--quiet")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", WATCHED, *args, "--run", str(tmp_path / "lean")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    expected = ["torch", "torch.distributed.tensor", "sympy"] if lora else ["torch"]  # peft asks for shards
    assert json.loads(done.stderr.splitlines()[-1]) == expected
    with contextlib.suppress(SystemExit):
        main([*args, "--run", str(tmp_path / "whole")])
    digests = [reproducible_digests(Path(tmp_path / name)) for name in ("lean", "whole")]
    assert digests[0]
    assert digests[0] == digests[1]


@pytest.mark.slow
def test_what_is_used_later_is_the_real_thing():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", REAL_USE], check=True, env=environment)
