"""What every section of a recipe is made of: strict, frozen, and each field with its right to change.

A field marked `free` may change when a run goes on, because nothing already computed depends on it. Every
other field is fixed at the run's birth. `fork` fields may also change where a replay branches off.
"""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

FREE = {"on_resume": "free"}
FORK = {"on_resume": "fork"}

Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]


class Settings(BaseModel):
    """Unknown keys are errors at every level; a loaded recipe never changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)
