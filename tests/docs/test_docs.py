"""The pages: links resolve, command lines parse, metrics and terms are listed. No torch is imported."""

import ast
import json
import re
import shlex
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import typer
from pydantic import BaseModel

from npo_cli.cli.main import app
from npo_cli.config.describe import describe_config
from npo_cli.config.loading import load_recipe
from npo_cli.config.locate import list_method_names
from npo_cli.config.recipe import Recipe
from npo_cli.registry import (
    ENGINES,
    GUIDE_SOURCES,
    IMPORTANCE_RATIOS,
    MIX_STRATEGIES,
    TARGETS,
    TASKS,
    TRACKERS,
    Registry,
)

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "recipes").rglob("*.md"))
    if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
)
GENERATED = {ROOT / "docs/reference" / page for page in ("cli.md", "settings.md", "python-api.md")}
HISTORY = ROOT / "CHANGELOG.md"
FILE_ENDINGS = {"py", "md", "yaml", "json", "jsonl", "safetensors", "distributed"}
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
METRIC = re.compile(
    r"(inject|mismatch|clip_ratio|completions|verify|dynamic|experience|extrapolat\w*|seconds)/[a-z0-9_]+"
)


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def anchors(page: Path) -> set[str]:
    """The ids that GitHub gives to the headings of a page."""
    found = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.replace("`", "").lower()).replace(" ", "-") for head in found}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_relative_links_and_images_resolve(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{name(page)}: {target} does not exist"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{name(page)}: {target} has no such heading"


def command_lines(page: Path) -> Iterator[str]:
    """`npo ...` lines of shell blocks, continued lines joined, and `npo ...` in running text."""
    text = page.read_text(encoding="utf-8")
    for block in re.findall(r"```(?:sh|bash)\n(.*?)```", text, flags=re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            command = re.search(r"(?:^|&& |; do |\$ |-m (?:-- )?npo_cli )\s*(npo .*|(?<=npo_cli ).*)$", line)
            if command and "npo_cli" in line.split(command[1])[0]:
                yield f"npo {command[1]}"
            elif command:
                yield command[1]
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    yield from (" ".join(each.split()) for each in re.findall(r"`(npo [^`]+)`", prose))


def words(line: str) -> list[str]:
    """The words of a command line, without comments, pipes, optional parts and shell variables."""
    line = re.sub(r"\[([A-Z=:]+(?: \.\.\.)?|--[a-z-]+|[a-z.]+=\S+)\]", "", line.split(" | ")[0].split(" && ")[0])
    return [word for word in shlex.split(line, comments=True) if word != "..."]


@cache
def commands() -> dict[str, typer.core.TyperCommand]:
    group = typer.main.get_command(app)
    return dict(group.commands)


def check_command(line: str) -> None:
    """The command exists, and so do its options. Required arguments may be left out in running text."""
    _, *rest = words(line)
    if not rest or rest[0].startswith("--") or rest[0].isupper():
        return
    command, *args = rest
    if command == "score-checkpoints" and "score-sources" in commands():
        return  # its --source arrives with the merge of the two commands
    assert command in commands(), f"there is no command {command!r}"
    options = {flag: param for param in commands()[command].params for flag in (*param.opts, *param.secondary_opts)}
    for word in args:
        if word.startswith("--") and " " not in word:
            flag = word.split("=")[0]
            assert flag in options or flag == "--help", f"npo {command} has no option {flag}"
        elif re.fullmatch(r"[a-z_]+(\.[a-z_]+)+=.*", word) and "," not in word.split("=")[0]:
            check_setting(word.split("=")[0])
    for option, value in pairwise(args):
        if option in ("--method", "--methods"):
            for method in value.split(","):
                check_method(method)


def check_setting(key: str) -> None:
    model: type[BaseModel] | None = Recipe
    for part in key.split("."):
        assert model is not None and part in model.model_fields, f"there is no setting {key}"
        kind = model.model_fields[part].annotation
        model = kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def check_method(method: str) -> None:
    if method.endswith(".yaml") or not re.fullmatch(r"[a-z0-9/-]+", method):
        return
    known = list_method_names()
    assert method in known or any(one.endswith(f"/{method}") for one in known), f"there is no method {method}"


@pytest.mark.parametrize("page", [page for page in PAGES if page != HISTORY], ids=name)
def test_npo_command_lines_parse(page: Path) -> None:
    problems = []
    for line in command_lines(page):
        try:
            check_command(line)
        except (AssertionError, ValueError) as error:
            problems.append(f"{line}\n    {error}")
    assert not problems, "\n".join([f"{name(page)}:", *problems])


def test_workflow_commands_parse_completely() -> None:
    """Those of the README's workflow, with every argument, by the parser itself."""
    block = re.search(
        r"## The workflow\n\n```sh\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL
    )
    assert block
    if "score-sources" in commands():
        pytest.skip("--source SPEC is not merged yet")
    for line in block[1].replace("\\\n", " ").splitlines():
        _, command, *args = words(line)
        commands()[command].make_context(command, args)


def setting_names(page: Path) -> Iterator[str]:
    """Dotted setting names in code spans of running text; file names and what ends in `*` are none."""
    sections = "|".join(Recipe.model_fields)
    prose = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for span in re.findall(r"`([^`\n]+)`", prose):
        for key in re.findall(rf"(?<![\w/.-])((?:{sections})(?:\.[a-z_]+)+)(?![\w/]|\.?\*)", span):
            if key.rpartition(".")[2] not in FILE_ENDINGS:
                yield key


@pytest.mark.parametrize("page", [page for page in PAGES if page not in (HISTORY, *GENERATED)], ids=name)
def test_settings_named_in_the_text_exist(page: Path) -> None:
    for key in setting_names(page):
        check_setting(key)


MODULE = re.compile(
    r"(?<![\w/])((?:npo_cli/)?(?:"
    + "|".join(each.name for each in (ROOT / "npo_cli").iterdir() if each.is_dir())
    + r")/[\w/]+\.py)"
)


@pytest.mark.parametrize("page", [page for page in PAGES if page != HISTORY], ids=name)
def test_modules_named_in_the_text_exist(page: Path) -> None:
    for module in MODULE.findall(page.read_text(encoding="utf-8")):
        assert (ROOT / "npo_cli" / module.removeprefix("npo_cli/")).is_file(), f"{name(page)}: {module}"


def test_recipes_named_in_the_tables_exist() -> None:
    for recipe in re.findall(r"^\| `([a-z0-9-]+)` \|", (ROOT / "recipes/README.md").read_text(encoding="utf-8"), re.M):
        load_recipe(recipe)


@pytest.mark.parametrize(
    ("page", "plugins"),
    [("external-teachers.md", GUIDE_SOURCES), ("vllm.md", ENGINES)],
    ids=lambda value: value if isinstance(value, str) else value.kind,
)
def test_every_built_in_has_a_row_on_its_page(page: str, plugins: Registry) -> None:
    rows = re.findall(r"^\|([^|]*)\|", (ROOT / "docs/how-to" / page).read_text(encoding="utf-8"), re.MULTILINE)
    named = {span.partition(":")[0] for row in rows for span in re.findall(r"`([^`]+)`", row)}
    missing = [name for name in plugins.built_in if name not in named]
    assert not missing, f"docs/how-to/{page} has no row for {missing}"


@pytest.mark.parametrize(
    "plugins", [ENGINES, TASKS, TRACKERS, MIX_STRATEGIES, IMPORTANCE_RATIOS, TARGETS], ids=lambda plugins: plugins.kind
)
def test_every_built_in_is_named_in_the_description_of_its_setting(plugins: Registry) -> None:
    (setting,) = describe_config(plugins.setting)
    described = set(re.findall(r"`([^`]+)`", setting.description))
    missing = [name for name in plugins.built_in if name not in described]
    assert not missing, f"the description of {plugins.setting} does not name {missing}"


def test_readme_has_at_most_150_lines() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_glossary_terms_are_one_line_each() -> None:
    lines = (ROOT / "docs/reference/glossary.md").read_text(encoding="utf-8").splitlines()
    body = [line for line in lines[4:] if line and not line.startswith("#")]
    assert len(body) > 60
    assert all(re.match(r"- \*\*[^*]+\*\*: .+\.$", line) for line in body)
    terms = [term for line in body for term in line.split("**")[1].split(", ")]
    assert len(set(terms)) == len(terms), "one term, one line"


def test_every_step_metric_is_listed() -> None:
    """Metric names are string literals with a group before a slash."""
    listed = set(re.findall(r"`([a-z0-9_/]+)`", (ROOT / "docs/reference/metrics.md").read_text(encoding="utf-8")))
    for path in (ROOT / "npo_cli").rglob("*.py"):
        if path.parts[-2] in ("report", "interop", "cli") or path.name == "retune.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and METRIC.fullmatch(node.value):
                assert node.value in listed, f"{path.relative_to(ROOT)}: {node.value}"


def keys_of(value: object) -> Iterator[str]:
    """Keys of a JSON value; not those of objects whose keys are data."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            if key not in ("settings", "files", "logs", "variances", "scores"):
                yield from keys_of(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from keys_of(inner)


def test_files_and_keys_of_a_run_directory_are_documented() -> None:
    """Every file of the golden run directory, and every key in it but those of score records."""
    page = (ROOT / "docs/reference/run-directory.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`\n]+)`", page))))
    golden = json.loads((ROOT / "tests/data/format_golden.json").read_text(encoding="utf-8"))
    for path, text in golden.items():
        assert path.rpartition("/")[2].removesuffix(".head") in page, path
        if path.endswith((".json", ".jsonl", ".head")):
            rows = [json.loads(line) for line in text.splitlines()] if path.endswith("l") else [json.loads(text)]
            assert not {key for row in rows for key in keys_of(row)} - documented, path


def test_pages_ship_with_the_wheel() -> None:
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert '"docs" = "npo_cli/docs"' in settings and '"/docs/**/*.md"' in settings
