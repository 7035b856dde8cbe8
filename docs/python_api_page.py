"""The text of docs/reference/python-api.md, from the signatures and docstrings of the code."""

import dataclasses
import inspect
import re
from collections.abc import Iterator
from typing import Any

import npo_cli as npo
from npo_cli.registry import REGISTRIES, Registry

STAGES = ("train", "resume", "scout", "score", "sample_guide", "evaluate", "compare")
RESULTS = ("TrainingResult", "ScoreResult", "CompareResult")
RECORDS = ("StepReport", "EvalReport", "CheckpointSaved", "CandidateScore", "GuideChoice", "GuideCacheInfo", "Notice")
ERRORS = ("NpoError", "RunFailed", "CallbackError", "StoppedEarly")
INTRODUCTION = """\
`import npo_cli as npo` loads no library: each name below is imported when it is first used, torch when something is
computed. The [tutorial](../tutorial/04-python-api.md) shows it at work. The commands `train`, `resume`, `scout`,
`score-checkpoints`, `sample-guide`, `eval` and `compare` call these functions, so a program and a command leave the
same files. The package is typed (`py.typed`).

Runs in several processes are started with a launcher and the command ([several GPUs](../how-to/multi-gpu.md))."""
CALLING = """\
Each function runs to its end and returns a result: nothing has to be iterated. The same function has `.stream(...)`,
with the same arguments, which checks them and returns a `RecordStream`: its records are those that the command
prints, made while the loop runs.

```python
result = npo.train("micro", "runs/a", until=1)
for record in npo.train.stream("micro", "runs/b", until=1):
    ...
```

A call logs notices to the logger `npo_cli`, warnings with level WARNING. In the main thread SIGINT (the interrupt of
a notebook) and SIGTERM end the step, save it and raise `StoppedEarly`; in another thread only the program can stop
it. `overrides` are a list of `KEY=VALUE` texts or a dict by [setting](settings.md) or section. `allow_code=True` is
`--allow-code`."""
TABLES = """\
The tables are pandas DataFrames where pandas is installed (`pip install "npo-cli[pandas]"`), else lists of dicts;
`as_list=True` always gives lists. Their columns are the keys of `--json` ([metrics](metrics.md)). Without `branch`
all branches are listed, except where a default is given."""
PLUG_INS = """\
What can be added from another package, without a change here: one class, declared as an entry point in that package's
pyproject.toml. Its name is then a value of the setting, checked, listed and suggested like the built-in ones.

```toml
[project.entry-points."npo.verifiers"]
rubric = "my_package.rubric:RubricVerifier"
```

The class has its name as the attribute `name`. How-to pages: [a guide source](../how-to/add-a-guide-source.md), [an
engine](../how-to/add-an-engine.md), [a method](../how-to/add-a-method.md). In a program or a notebook,
`REGISTRY.registered(cls)` adds a class for a block without an entry point:

```python
from npo_cli.registry import VERIFIERS
from npo_cli.tasks.base import Verifier
from npo_cli.types.rollouts import VerifierResult


class ShortVerifier(Verifier):
    name = "short"

    def grade(self, prompts, responses):
        return [VerifierResult(verdict="correct" if len(one) < 4 else "wrong") for one in responses]


with VERIFIERS.registered(ShortVerifier):
    npo.train(npo.Recipe.load("micro", {"task.verifier": "short"}), "runs/short", until=1)
```"""


def render_python_api(marker: str) -> str:
    """The whole page."""
    lines = ["# Python API", "", marker, "", INTRODUCTION, "", "## Run a stage", "", CALLING, ""]
    for name in STAGES:
        stage = getattr(npo, name)
        lines += [f"### npo.{name}", "", *_describe(f"npo.{name}", inspect.signature(stage), stage.__doc__)]
    lines += ["### npo.RecordStream", "", *_describe_class("RecordStream", hides=("send", "throw"))]
    lines += [
        "## Recipe",
        "",
        *_describe("npo.Recipe.load", inspect.signature(npo.Recipe.load), npo.Recipe.load.__doc__),
    ]
    lines += ["The sections are attributes (`recipe.train.lr`); a recipe is frozen.", ""]
    lines += ["## npo.Run", "", *_describe_class("Run"), TABLES, ""]
    lines += ["## npo.Callback", "", *_describe_class("Callback")]
    lines += ["## Results", ""]
    for name in RESULTS:
        lines += [f"### npo.{name}", "", *_describe_class(name)]
    lines += ["## Records", "", "Frozen dataclasses; absent is `None`.", ""]
    lines += ["| record | meaning | fields |", "|---|---|---|", *map(_describe_record, RECORDS), ""]
    lines += ["## Errors", "", "`NpoError` is the base of all: `message` says what is wrong, `hint` what to do.", ""]
    lines += [f"- `npo.{name}`: {_summary(getattr(npo, name).__doc__)}" for name in ERRORS]
    lines += ["", "## Plug-ins", "", PLUG_INS, ""]
    for found in REGISTRIES:
        lines += _describe_plug_in(found)
    return "\n".join(lines).rstrip() + "\n"


def _describe(name: str, signature: inspect.Signature, doc: str | None) -> Iterator[str]:
    yield from ("```text", _format_signature(name, signature), "```", "", *_paragraphs(doc))


def _describe_class(name: str, *, hides: tuple[str, ...] = ()) -> Iterator[str]:
    """A class, then its public properties and methods, one line each."""
    kind = getattr(npo, name)
    yield from _paragraphs(kind.__doc__)
    if dataclasses.is_dataclass(kind):
        yield from (f"- `{one.name}: {_format_type(one.type)}`" for one in dataclasses.fields(kind))
    for member, value in vars(kind).items():
        if member.startswith("_") or member in hides:
            continue
        if isinstance(value, property):
            yield f"- `{member}`: {_summary(value.fget.__doc__)}"
        elif inspect.isfunction(value):
            yield f"- `{_format_signature(member, inspect.signature(value), width=0)}`: {_summary(value.__doc__)}"
    yield ""


def _describe_record(name: str) -> str:
    kind = getattr(npo, name)
    names = ", ".join(f"`{field.name}`" for field in dataclasses.fields(kind))
    return f"| `npo.{name}` | {_summary(kind.__doc__)} | {names} |"


def _describe_plug_in(found: Registry) -> Iterator[str]:
    base = found.load_base()
    yield from (f"### {found.kind}", "")
    yield f"Entry points `{found.group}`; chosen by `{found.setting}`; base `{found.base}`."
    yield from (f"Built in: {', '.join(f'`{name}`' for name in found.built_in)}.", "", _summary(base.__doc__), "")
    for member, value in vars(base).items():
        function = value.__func__ if isinstance(value, classmethod) else value
        if inspect.isfunction(function) and not member.startswith("_"):
            text = _format_signature(member, inspect.signature(function), width=0)
            yield f"- `{text}`: {_summary(function.__doc__)}"
    yield ""


def _format_signature(name: str, signature: inspect.Signature, *, width: int = 100) -> str:
    """`name(a, *, b: int = 1) -> Result`, one parameter per line where it is longer than `width`; 0: never."""
    parameters = [each for each in signature.parameters.values() if each.name not in ("self", "cls")]
    texts, is_keyword_only = [], False
    for index, each in enumerate(parameters):
        if each.kind is inspect.Parameter.KEYWORD_ONLY and not is_keyword_only:
            texts, is_keyword_only = [*texts, "*"], True
        text = {inspect.Parameter.VAR_KEYWORD: "**", inspect.Parameter.VAR_POSITIONAL: "*"}.get(
            each.kind, ""
        ) + each.name
        if each.annotation is not inspect.Parameter.empty:
            text += f": {_format_type(each.annotation)}"
        if each.default is not inspect.Parameter.empty:
            text += f" = {each.default!r}" if ":" in text else f"={each.default!r}"
        texts.append(text)
        following = parameters[index + 1].kind if index + 1 < len(parameters) else None
        if each.kind is inspect.Parameter.POSITIONAL_ONLY and following is not inspect.Parameter.POSITIONAL_ONLY:
            texts.append("/")
    returned = signature.return_annotation
    end = "" if returned is inspect.Signature.empty else f" -> {_format_type(returned)}"
    line = f"{name}({', '.join(texts)}){end}"
    if not width or len(line) <= width:
        return line
    return "\n".join([f"{name}(", *(f"    {text}," for text in texts), f"){end}"])


def _format_type(annotation: Any) -> str:
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    text = re.sub(r"\b(?:[a-z_]+\.)+(?=[A-Za-z])", "", text)
    return text.replace("'", "").replace("ForwardRef", "").replace("Union[str, PathLike[str]]", "str | PathLike[str]")


def _paragraphs(doc: str | None) -> Iterator[str]:
    for paragraph in inspect.cleandoc(doc or "").split("\n\n"):
        yield from (" ".join(paragraph.split()), "")


def _summary(doc: str | None) -> str:
    """The first paragraph of a docstring in one line."""
    return " ".join(inspect.cleandoc(doc or "").split("\n\n")[0].split()).replace("|", "\\|")
