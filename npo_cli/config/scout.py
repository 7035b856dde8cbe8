"""Settings of disposable scouts: which of the run's settings a scout may have otherwise, and when it ends.

See `docs/explanation/disposable-scouts.md`. No field is declared twice: a setting with the mark `scout`
(`npo_cli.config.base`) becomes `scout.NAME`, null by default, with the type and bounds of the original.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any

from pydantic import ConfigDict, Field, create_model

from npo_cli.config.base import FORK_TRAINING, FREE, Count, Settings, applies_when, list_settings


class ScoutRules(Settings):
    """Disposable scouts (`npo scout`): how long they train, and what they have otherwise than the run."""

    model_config = ConfigDict(json_schema_extra=FORK_TRAINING)

    num_steps: Count | None = Field(None, description="Maximum number of steps of a scout (`npo scout --steps`).")
    stop_reward: float | None = Field(
        None,
        description="A scout ends once its mean training reward over the last scout.stop_window steps is at least this "
        "(null: after its last step).",
    )
    stop_window: Count = Field(5, description="Steps of a scout that the mean of scout.stop_reward is taken over.")
    keep: bool = Field(
        False,
        description="Keep a scout's checkpoints when nothing needs them any more, until `npo rm` (false: drop them).",
        json_schema_extra=FREE,
    )


LORA = "lora"


def derive_scout_settings(sections: Mapping[str, type[Settings]], *, module: str) -> type[ScoutRules]:
    """The section `scout` of a recipe, of the marked settings of other sections (by their keys).

    Those of `model.lora` become `scout.lora.NAME`, all others `scout.NAME`. `module`: where the class is found as
    `ScoutSettings`.
    """
    fields: dict[str, Any] = {}
    for key, section in sections.items():
        own = dict(_list_overrides(key, section))
        if key.endswith(f".{LORA}"):
            adapters = create_model("ScoutLoraSettings", __base__=Settings, __module__=module, **own)
            adapters.__doc__ = "Adapters that a scout trains on the frozen policy of the step that it starts from."
            own = {LORA: (adapters, adapters())}
        assert not fields.keys() & own.keys(), "two settings of a scout have one name"
        fields |= own
    settings = create_model("ScoutSettings", __base__=ScoutRules, __module__=module, **fields)
    settings.__doc__ = ScoutRules.__doc__
    return settings


def _list_overrides(section_key: str, section: type[Settings]) -> Iterator[tuple[str, Any]]:
    """Name and definition of each marked setting of a section: null, or what the section admits."""
    for name, field, marks in list_settings(section):
        if marks.get("scout"):
            kind = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
            conditions = {
                key.replace(f"model.{LORA}", f"scout.{LORA}"): needed
                for key, needed in marks.get("applies_when", {}).items()
            }
            extra = FORK_TRAINING | applies_when(conditions)
            text = f"{section_key}.{name} of a scout (null: as in the run)."
            yield name, (kind | None, Field(None, description=text, json_schema_extra=extra))


def list_scout_overrides(sections: Iterable[tuple[str, type[Settings]]]) -> dict[str, str]:
    """`{"lr": "train.lr", "lora.rank": "model.lora.rank", ...}`: keys of `scout`, and what each is for."""
    return {
        (f"{LORA}.{name}" if key.endswith(f".{LORA}") else name): f"{key}.{name}"
        for key, section in sections
        for name, _, marks in list_settings(section)
        if marks.get("scout")
    }
