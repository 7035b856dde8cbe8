"""The base of every settings section: strict, frozen, with marks per field.

`on_resume` says when a field may change: `free` fields may change whenever a run is resumed, because nothing computed
so far depends on them; `fork` fields may change only where a new branch is forked; all others never. A command that
samples or scores and trains nothing may change `fork` fields too, except those that are `used_by` training alone.

`path` says that a field holds a path: of a `data` file (or the id of a data set), of a `model` (a folder, or a name),
or of `code` (`FILE.py:FUNCTION`). In a recipe file it is relative to that file's folder, on the command line to the
current one.

`applies_when` says which other settings a field needs to have an effect (`npo_cli.config.applies`).

`scout` says that a disposable scout may have a value of its own (`npo_cli.config.scout`).

`comparison` says what a difference means when runs are compared: `must_match` fields must be equal for a fair
comparison, `ignored` fields do not affect what a run learns, and every other difference is part of the method. A
section states it once for all its fields (`model_config`), or a field states it for itself.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

FREE = {"on_resume": "free"}
FORK = {"on_resume": "fork"}
FORK_TRAINING = {"on_resume": "fork", "used_by": "training"}
DATA_PATH = {"path": "data"}
MODEL_PATH = {"path": "model"}
CODE_PATH = {"path": "code"}
IS_SET = "set"
"""Needed value of a setting that may have any but null, 0, false and empty."""
MUST_MATCH = {"comparison": "must_match"}
IGNORED = {"comparison": "ignored"}
SCOUT = {"scout": True}

Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]


MARKS = ("on_resume", "used_by", "path", "comparison", "applies_when", "scout")


def applies_when(conditions: Mapping[str, Any]) -> dict[str, Any]:
    """The mark of a field without an effect unless each setting has one of the values, or is set (`IS_SET`)."""
    return {"applies_when": dict(conditions)}


DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
"""Of files that hold rows."""
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class Settings(BaseModel):
    """Unknown keys are errors at every level; a loaded recipe never changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


def find_window_place(step: int, start_step: int, num_steps: int | None) -> int | None:
    """Which step of the window (start_step, start_step + num_steps] a training step is, from 0; None outside of it."""
    place = step - start_step - 1
    return None if place < 0 or (num_steps is not None and place >= num_steps) else place


def is_hub_id(path: str) -> bool:
    """Whether a path reads as `OWNER/NAME` on a hub; a folder of that name is another matter."""
    return HUB_ID.fullmatch(path) is not None


def is_dataset_id(path: str) -> bool:
    """Whether a path is `OWNER/NAME` of a data set on the hub: it reads as one, and there is no such file or folder."""
    return is_hub_id(path) and Path(path).suffix not in DATA_SUFFIXES and not Path(path).exists()


def walk_fields(settings: Settings, *, prefix: str = "") -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Dotted key, value, and marks (`on_resume`, `comparison`) of every field, sections walked in order.

    A field's own mark overrides the mark of its section.
    """
    marks = {name: marks for name, _, marks in list_settings(type(settings))}
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if isinstance(value, Settings):
            yield from walk_fields(value, prefix=f"{prefix}{name}.")
        else:
            yield prefix + name, value, marks[name]


def list_settings(section: type[Settings]) -> Iterator[tuple[str, FieldInfo, dict[str, Any]]]:
    """Name, field and marks of a section's own settings, sections in it left out."""
    for name, field in section.model_fields.items():
        if not (isinstance(field.annotation, type) and issubclass(field.annotation, Settings)):
            yield name, field, _marks(section.model_config.get("json_schema_extra")) | _marks(field.json_schema_extra)


def _marks(extra: Any) -> dict[str, Any]:
    return dict(extra) if isinstance(extra, dict) else {}
