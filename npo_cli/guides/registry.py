"""The one grammar of `--source SPEC`: NAME[:ARGUMENT], or a bare STEP for `checkpoint:STEP`.

The sources are those of the registry `npo_cli.registry.GUIDE_SOURCES`; each class parses its own argument.
"""

from collections.abc import Mapping

from npo_cli.errors import NpoError
from npo_cli.guides.source import GuideSource, OptionValue, ReplayTarget
from npo_cli.registry import GUIDE_SOURCES
from npo_cli.types.guides import SourceSpec


def parse_spec(text: str) -> SourceSpec:
    """The source and options of a SPEC such as `100`, `self`, `run:DIR@100` or `extrapolated:logits,k=20,a=1`."""
    name, _, argument = ("checkpoint", "", text) if text.isdecimal() else text.partition(":")
    return make_spec(name, GUIDE_SOURCES.get(name).parse(argument))


def make_spec(name: str, options: Mapping[str, OptionValue]) -> SourceSpec:
    """A source with its options by name; NpoError if an option is unknown or missing."""
    source: type[GuideSource] = GUIDE_SOURCES.get(name)
    unknown = [option for option in options if option not in source.options]
    if unknown:
        known = ", ".join(source.options) or "none"
        raise NpoError(f"source {name!r} has no option {', '.join(unknown)} (options: {known})", f"use {source.usage}")
    missing = [option for option in source.options if option not in options and option not in source.optional]
    if missing:
        raise NpoError(f"source {name!r} needs {', '.join(missing)}", f"use {source.usage}, such as {source.example}")
    argument = source.format(options)
    return SourceSpec(name=name, options=dict(options), text=f"{name}:{argument}" if argument else name)


def create_source(spec: SourceSpec, target: ReplayTarget) -> GuideSource:
    """The source for a learner, validated against the run; its `spec` then has every option."""
    source: GuideSource = GUIDE_SOURCES.get(spec.name)(spec, target)
    source.validate()
    return source


def describe_sources() -> str:
    """One line per registered source: its usage and summary."""
    sources = [GUIDE_SOURCES.get(name) for name in GUIDE_SOURCES.names()]
    width = max(len(source.usage) for source in sources)
    return "\n".join(f"{source.usage:<{width}}  {source.summary}" for source in sources)
