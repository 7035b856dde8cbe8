"""The settings of several processes. What they do is told in `policy/PARALLEL.md`."""

from pydantic import Field

from npo_cli.settings import FREE, Settings


class ParallelSettings(Settings):
    """Weights in shards (FSDP2) where a launcher starts several processes; without one nothing here is read."""

    reshard_after_forward: bool = Field(
        True,
        description="Give a layer's gathered weights back after its forward pass: less memory, one more gather.",
        json_schema_extra=FREE,
    )
    deadline: float = Field(
        1800.0,
        gt=0,
        description="Seconds that a process waits for the others in common work before the job ends.",
        json_schema_extra=FREE,
    )
