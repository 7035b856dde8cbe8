"""Where a run's figures are shown as well, besides its own files."""

from typing import Literal

from pydantic import Field

from npo_cli.settings import FREE, Settings


class TrackSettings(Settings):
    """Trackers by name. The files of the run directory are always written, and are what everything reads."""

    to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = Field(
        (), description="`tensorboard`, `wandb`, `trackio`; empty is none.", json_schema_extra=FREE
    )
    project: str = Field(
        "npo", min_length=1, description="wandb, trackio: name of the project.", json_schema_extra=FREE
    )
