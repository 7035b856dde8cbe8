"""A run directory that was harmed: every command names the file (the line, the tensor) and changes nothing."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from npo_cli.storage.checkpoints import write_manifests
from tests.helpers.cli_errors import assert_refused, copy_run, damage_file, edit_file, json_rows, npo, set_fields

UP = "model.layers.0.mlp.up_proj.weight"
ROLES = {
    "evaluated": ["eval", "--branch", "main", "--step", "4"],
    "learner": ["score-checkpoints", "--branch", "main", "--at", "4"],
    "candidate": ["score-checkpoints", "--branch", "main", "--at", "0", "--candidates", "2,4"],
    "guide": ["sample-guide", "--branch", "main", "--at", "2", "--source", "4"],
    "rollback": ["resume", "--branch", "main", "--at", "4", "--no-guide", "train.num_steps=8"],
    "resume point": ["resume", "--branch", "main", "train.num_steps=8"],
}
Change = Callable[[dict[str, Tensor]], object]
TENSORS: dict[str, Change] = {
    "missing": lambda tensors: tensors.pop(UP),
    "extra": lambda tensors: tensors.update({UP + ".more": torch.zeros(2)}),
    "of another shape": lambda tensors: tensors.update({UP: torch.zeros(3, 5)}),
    "not finite": lambda tensors: tensors[UP][0, 0].fill_(torch.nan),
}


@pytest.fixture
def run(circle: Path, tmp_path: Path) -> Path:
    return copy_run(circle, tmp_path, "harmed run")


def checkpoint(run: Path, step: int = 4) -> Path:
    return run / "branches" / "main" / "checkpoints" / f"step_{step:06d}"


def with_tensors(path: Path, change: Change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def longer(circle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps more on main: step 4 can be a learner, which needs a later checkpoint."""
    root = copy_run(circle, tmp_path_factory.mktemp("longer"))
    assert npo("resume", root, "--branch", "main", "train.num_steps=6").code == 0
    return root


def words(run: Path, args: list[str]) -> str:
    result = assert_refused(args[0], run, *args[1:], beside=run.parent)
    return f"{result.message} | {result.hint}"


# Checkpoints


@pytest.mark.parametrize("kind", TENSORS)
def test_checkpoint_with_wrong_tensor_is_refused_in_every_role(longer, tmp_path, kind):
    run = copy_run(longer, tmp_path)
    with_tensors(checkpoint(run) / "model.safetensors", TENSORS[kind])
    write_manifests(checkpoint(run), branch="main", step=4)
    name = UP + ".more" if kind == "extra" else UP
    for role, args in ROLES.items():
        if role != "resume point":  # that is step 6 by now
            assert words(run, args).startswith(f"{checkpoint(run)}: tensor {kind}: {name} | choose another step"), role


@pytest.mark.parametrize("kind", TENSORS)
def test_resume_refuses_newest_checkpoint_with_wrong_tensor(run, kind):
    with_tensors(checkpoint(run) / "model.safetensors", TENSORS[kind])
    result = words(run, ROLES["resume point"])
    file = checkpoint(run) / "model.safetensors"
    # of another size: known before a tensor is read
    assert result.startswith(f"{checkpoint(run)}: tensor not finite: {UP}" if kind == "not finite" else f"{file} has ")


@pytest.mark.parametrize("role", [role for role in ROLES if role != "learner"])
def test_truncated_checkpoint_is_refused_in_every_role(run, role):
    file = checkpoint(run) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    moved = f"mv {shlex.quote(str(checkpoint(run)))} {shlex.quote(f'{checkpoint(run)}.damaged')}"
    result = words(run, ROLES[role])
    assert result.startswith(f"{file} has 1,000 bytes, but 1,119,504 were saved | choose another step")
    assert result.endswith(moved)


def test_checkpoint_that_was_moved_away_is_ignored(run):
    checkpoint(run).joinpath("config.json").unlink()
    result = assert_refused("resume", run, "--branch", "main", "train.num_steps=6", beside=run.parent)
    _, source, target = shlex.split(result.hint[result.hint.index("mv ") :])
    Path(source).rename(target)
    assert npo("resume", run, "--branch", "main", "train.num_steps=6").code == 0
    assert checkpoint(run).is_dir()  # made again on the way
    assert checkpoint(run, 6).is_dir()


def test_index_verify_finds_a_flipped_bit(run):
    file = checkpoint(run) / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(data)
    for role in ("evaluated", "candidate", "guide", "rollback", "resume point"):
        assert words(run, ROLES[role]).startswith(f"{file} does not have the sha256 that was saved"), role


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("npo.json", "npo.json is damaged: "),
        ("config.json", "config.json has 3 bytes, but "),
        ("tokenizer.json", "tokenizer.json has 3 bytes, but "),
    ],
)
def test_checkpoint_with_a_missing_file_is_refused(run, file, message):
    (checkpoint(run) / file).write_text("{x\n")
    assert message in words(run, ROLES["evaluated"])
    entries = json_rows(npo("index", run, "--json").out)
    assert [entry["complete"] for entry in entries if entry["branch"] == "main"] == [True, True, False]


def test_damaged_config_of_a_checkpoint_is_found_by_its_digest_before_a_model_is_built(run):
    file = checkpoint(run) / "config.json"
    edit_file(file, lambda text: text.replace('"num_hidden_layers": ', '"num_hidden_levels": '))
    for role in ("evaluated", "candidate", "guide", "rollback", "resume point"):
        assert words(run, ROLES[role]).startswith(f"{file} does not have the sha256 that was saved"), role


@pytest.mark.parametrize("kind", ["missing", "of another shape", "not finite"])
@pytest.mark.parametrize("signed", [True, False])
def test_damaged_training_state_is_refused(run, kind, signed):
    file = checkpoint(run) / "training_state" / "optimizer.safetensors"
    moments = {f"{UP}.exp_avg": UP}
    with_tensors(file, lambda tensors: TENSORS[kind](Renamed(tensors, moments)))
    if signed:
        write_manifests(checkpoint(run), branch="main", step=4)
    result = words(run, ROLES["rollback"])
    assert result.startswith(f"{file.parent}: optimizer state of {UP}" if signed else f"{file} ")


class Renamed(dict):
    """Tensors whose momentum of UP goes by the name UP: what is done to that is done to it."""

    def __init__(self, tensors: dict[str, Tensor], names: dict[str, str]) -> None:
        self.tensors, self.names = tensors, {short: name for name, short in names.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[self.names[name]]

    def pop(self, name: str) -> Tensor:
        return self.tensors.pop(self.names[name])

    def update(self, changed: dict[str, Tensor]) -> None:
        self.tensors.update({self.names[name]: tensor for name, tensor in changed.items()})


def test_eval_refuses_a_branch_without_checkpoints(circle, tmp_path):
    run = copy_run(circle, tmp_path)
    for folder in (run / "branches").glob("*/checkpoints"):
        folder.rename(folder.with_name("gone"))
    result = assert_refused("eval", run, beside=tmp_path)
    assert (result.message, result.hint) == (f"{run} has no complete checkpoint yet", f"train first: npo resume {run}")


# Logs and documents


def with_damaged_second_line(text: str) -> str:
    """The second line of a log, no JSON any more."""
    first, _, rest = text.split("\n", 2)
    return f"{first}\noops\n{rest}"


SHOW = {"metrics": ["show"], "rollouts": ["show", "rollouts"], "timings": ["show"]}


@pytest.mark.parametrize("log_name", SHOW)
def test_damaged_log_line_is_named(run, log_name):
    path = run / "branches" / "main" / f"{log_name}.jsonl"
    damage_file(path, with_damaged_second_line)
    assert words(run, SHOW[log_name]).startswith(f"{path} is damaged: line 2 of ")


def test_damaged_lineage_line_stops_every_command(run):
    path = run / "segments.jsonl"
    damage_file(path, lambda text: "oops\n" + text)
    for args in (["index"], ["show"], ["show", "lineage"], *ROLES.values()):
        assert words(run, args).startswith(f"{path} is damaged: line 1 of 2 is not a JSON object | restore it from"), (
            args
        )


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('"fork_step":0,', "", "it has no field 'fork_step'"),
        ('"fork_step":0,', '"fork_step":"x",', "fork_step is 'x'"),
        ('"branch":"again"', '"branch":7', "branch is 7"),
        ('"branch":"again"', '"branch":"../../x"', "no branch can be named '../../x'"),
    ],
)
def test_inconsistent_lineage_is_refused_by_line(run, before, after, message):
    edit_file(run / "segments.jsonl", lambda text: text.replace(before, after))
    for args in (["index"], ["show", "lineage"], ["eval"]):
        assert f"segments.jsonl, line {'2' if 'again' in before else '1'} is damaged: {message}" in words(run, args)


@pytest.mark.parametrize(
    ("file", "args"),
    [
        ("npo_run.json", ["index"]),
        ("guides/near/guide.json", ["show", "guides"]),
        ("guides/near/guide.json", ["resume", "--at", "0", "--guide", "near"]),
        ("scores/*/scores.json", ["index"]),
        ("scores/*/settings.json", ["index"]),
        ("branches/main/recipe.yaml", ["eval"]),
    ],
)
@pytest.mark.parametrize("text", ["{", "[]", "{}\n{}\n"])
def test_damaged_json_document_is_named(run, file, args, text):
    (path,) = run.glob(file)
    path.write_text(text)
    result = words(run, args)
    assert result.startswith(f"{path} is damaged: ")
    assert result.endswith("restore it from a copy of the run directory")


def test_evaluation_with_missing_fields_is_named_by_line(run):
    edit_file(run / "evals.jsonl", lambda text: "{}\n{}\n")
    result = words(run, ["index"])
    assert result.startswith(f"{run / 'evals.jsonl'}, line 1 is damaged: it has no field 'branch'")


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('"response_ids":[', '"response_ids":[1,', "log-probabilities for"),
        ('"response_ids":[', '"ids":[', "line 1 is damaged: it has no field 'response_ids'"),
        ('"verdict":"correct"', '"verdict":"wrong"', "are no verified responses"),
        ('"verdict":"correct"', '"verdict":"fine"', "line 1 is damaged: verdict is 'fine'"),
        ('"prompt_id":"mix3/', '"prompt_id":"other/', "guide near has prompts that this task does not have: oth"),
        ('"response_ids":[', '"response_ids":["1",', "log-probabilities for"),
    ],
)  # fmt: skip
def test_damaged_guide_cache_is_refused_before_forking(run, before, after, message):
    edit_file(run / "guides" / "near" / "rollouts.jsonl", lambda text: text.replace(before, after))
    assert message in words(run, ["resume", "--at", "0", "--guide", "near"])


def test_guide_cache_with_unknown_token_is_refused(run):
    path = run / "guides" / "near" / "rollouts.jsonl"
    (row,) = [json.loads(line) for line in path.read_text().splitlines()]
    next(group for group in row["groups"] if group["rollouts"])["rollouts"][0]["response_ids"][0] = 99999
    edit_file(path, lambda text: json.dumps(row) + "\n")
    result = words(run, ["resume", "--at", "0", "--guide", "near"])
    assert result.startswith(f"{path} is damaged: the model has no token 99999")


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("lr: 0.0003", "lrr: 0.0003", "train.lrr is not a setting"),
        ("group_size: 4", "group_size: x", 'train.group_size must be a whole number at least 2, got "x"'),
        ("group_size: 4", "group_size: 2020-01-01", "train.group_size must be a whole number at least 2"),
    ],
)
def test_invalid_saved_recipe_is_named(run, before, after, message):
    path = run / "branches" / "main" / "recipe.yaml"
    edit_file(path, lambda text: text.replace(before, after))
    for command in ("resume", "eval"):
        assert words(run, [command]).startswith(f"{message}")
        assert f"({path})" in words(run, [command])


def test_saved_recipe_with_aliases_is_refused(run):
    # read with aliases, these lines are 10^9 items
    path = run / "branches" / "main" / "recipe.yaml"
    lines = [f"x{n}: &x{n} [{', '.join(10 * [f'*x{n - 1}'])}]" for n in range(1, 9)]
    path.write_text("\n".join(["x0: &x0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]", *lines]))
    for command in ("resume", "eval"):
        message = f"{path} is damaged: recipe.yaml:2: aliases are not part of a recipe"
        assert words(run, [command]).startswith(message)


def test_run_json_of_another_kind_is_refused(run):
    set_fields(run / "npo_run.json", format="1")
    assert words(run, ["index"]).startswith(f"{run / 'npo_run.json'} is damaged: format is '1'")
