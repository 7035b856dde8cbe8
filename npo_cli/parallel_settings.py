"""Settings of multi-process training, explained in `policy/PARALLEL.md`."""

from pydantic import ConfigDict, Field

from npo_cli.settings import FREE, IGNORED, Settings


class DistributedSettings(Settings):
    """FSDP2-sharded training, when a launcher such as torchrun starts several processes; unused otherwise."""

    model_config = ConfigDict(json_schema_extra=IGNORED)

    reshard_after_forward: bool = Field(
        True,
        description="Free a layer's gathered weights after its forward pass (less memory, one more all-gather).",
        json_schema_extra=FREE,
    )
    timeout: float = Field(
        1800.0,
        gt=0,
        description="Timeout in seconds for a process waiting for the others; the job fails after it.",
        json_schema_extra=FREE,
    )
