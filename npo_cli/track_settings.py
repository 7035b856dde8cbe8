"""Settings of experiment trackers, which log metrics besides the run directory's own files."""

from typing import Literal

from pydantic import ConfigDict, Field

from npo_cli.settings import FREE, IGNORED, Settings


class TrackingSettings(Settings):
    """Experiment trackers. The files of the run directory are always written; npo reads only those."""

    model_config = ConfigDict(json_schema_extra=IGNORED)

    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = Field(
        (),
        description="Trackers to log to: `tensorboard`, `wandb`, `trackio` (empty: none).",
        json_schema_extra=FREE,
    )
    project: str = Field("npo", min_length=1, description="wandb, trackio: project name.", json_schema_extra=FREE)
