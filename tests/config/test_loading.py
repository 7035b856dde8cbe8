import json
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from npo_cli.config import messages
from npo_cli.config.loading import (
    apply_overrides,
    check_frozen_settings,
    diff_recipes,
    load_recipe,
    recipe_from_dict,
    recipe_to_dict,
    recipe_to_yaml,
)
from npo_cli.config.locate import find_recipe, find_recipe_folder, list_recipe_names
from npo_cli.config.messages import OLD_KEYS, find_nearest_key, list_known_keys
from npo_cli.config.recipe import Recipe
from npo_cli.errors import NpoError


def written(folder: Path, text: str, name: str = "mine.yaml") -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def refusal(folder: Path, text: str, *overrides: str) -> NpoError:
    with pytest.raises(NpoError) as caught:
        load_recipe(written(folder, text), overrides)
    return caught.value


# Reading


def test_override_in_scientific_notation_is_a_number():
    # YAML 1.1 would read 3e-4 (no dot) as text
    assert load_recipe("micro", ["train.lr=3e-4"]).train.lr == 0.0003


@pytest.mark.parametrize(
    ("text", "value"),
    [("3e-4", 0.0003), ("1E+2", 100.0), ("1.e-3", 0.001), (".5", 0.5), ("+2.5", 2.5), ("1", 1.0), ("1e-05", 1e-5)],
)
def test_yaml_number_formats(tmp_path, text, value):
    assert load_recipe(written(tmp_path, f"train: {{lr: {text}}}")).train.lr == value


@pytest.mark.parametrize("text", ["yes", "on", "010", "1_000", "1:30", "2020-01-01", "0x10"])
def test_yaml_1_1_conversions_stay_text(tmp_path, text):
    assert load_recipe(written(tmp_path, f"task: {{source: file, suffix: {text}}}")).task.suffix == text


def test_later_override_wins_over_earlier_and_file(tmp_path):
    path = written(tmp_path, "train: {seed: 1, lr: 2e-4}")
    recipe = load_recipe(path, ["train.seed=2", "train.seed=3"])
    assert (recipe.train.seed, recipe.train.lr) == (3, 0.0002)


def test_override_may_be_a_list_or_a_section():
    recipe = load_recipe("micro", ["train.betas=[0.8, 0.9]", "loss={kind: gspo, clip_high: 0.28}"])
    assert recipe.train.betas == (0.8, 0.9)
    assert (recipe.loss.kind, recipe.loss.clip_high, recipe.loss.clip_low) == ("gspo", 0.28, 0.2)


def test_extends_merges_sections_and_replaces_lists(tmp_path):
    written(tmp_path, "train: {seed: 5, lr: 1e-3}\ntask: {source: file, suffix: old}", "grand.yaml")
    written(tmp_path, "extends: grand.yaml\ntrain: {seed: 6, betas: [0.1, 0.2]}", "parent.yaml")
    recipe = load_recipe(written(tmp_path, "extends: ./parent.yaml\ntrain: {betas: [0.3, 0.4]}"))
    assert (recipe.train.seed, recipe.train.lr, recipe.train.betas, recipe.task.suffix) == (6, 0.001, (0.3, 0.4), "old")


def test_extends_a_shipped_recipe(tmp_path):
    recipe = load_recipe(written(tmp_path, "extends: micro-sparse\ntrain: {seed: 9}"))
    assert diff_recipes(load_recipe("micro-sparse"), recipe) == [("train.seed", 0, 9)]


def test_shipped_recipes_load_and_have_descriptions():
    assert "micro" in list_recipe_names()
    for name in list_recipe_names():
        recipe = load_recipe(name)
        assert recipe.name == name
        assert recipe.description


def test_recipe_round_trip_through_yaml_and_json(tmp_path):
    recipe = load_recipe(
        "micro", ["train.lr=3e-5", "task.source=file", "task.suffix='a: #b'", "train.keep_full_checkpoints=2"]
    )
    assert load_recipe(written(tmp_path, recipe_to_yaml(recipe))) == recipe
    assert recipe_from_dict(json.loads(json.dumps(recipe_to_dict(recipe)))) == recipe


@settings(deadline=None, max_examples=8)
@given(lr=st.floats(1e-12, 1e12), seed=st.integers(-(10**9), 10**9), suffix=st.text(max_size=20))
@example(lr=1.0, seed=0, suffix="\x85")
@example(lr=1.0, seed=0, suffix="0E0")
def test_any_value_round_trips_through_yaml(tmp_path_factory, lr, seed, suffix):
    values = {"train": {"lr": lr, "seed": seed}, "task": {"source": "file", "suffix": suffix}}
    recipe = recipe_from_dict(values)
    path = tmp_path_factory.mktemp("yaml") / "one.yaml"
    path.write_text(recipe_to_yaml(recipe), encoding="utf-8")
    assert load_recipe(str(path)) == recipe


# Refusals


def test_misplaced_key_is_answered_with_its_section(tmp_path):
    error = refusal(tmp_path, "name: x\nlr: 3")
    assert error.message == "lr is not a setting (mine.yaml:2)"
    assert error.hint == "write train.lr instead of lr"
    assert error.exit_code == 2


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("train.lrr", "train.lr"),
        ("model.lr", "train.lr"),
        ("trian.lr", "train.lr"),
        ("gropu_size", "train.group_size"),
        ("loss.knid", "loss.kind"),
        ("sampling.max_tokens", "sampling.max_new_tokens"),
        ("trian", "train"),
        ("zzzqqq", None),
    ],
)
def test_nearest_known_key(key, meant):
    assert find_nearest_key(key) == meant


def test_known_keys_hold_sections_settings_and_the_settings_of_list_items():
    assert {"train", "train.lr", "task.datasets", "task.datasets.weight", "name"} <= set(list_known_keys())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("inject.gate=0.5", "guide.inject.max_accuracy"),
        ("auto.c_r=2", "autonpo.trigger.max_reward_gain_se"),
        ("guide.k=4", "guide.cache.samples_per_prompt"),
        ("engine.tensor_parallel=2", "engine.vllm.tensor_parallel_size"),
        ("train.keep_anchors=3", "train.keep_full_checkpoints"),
    ],
)
def test_old_key_is_unknown_and_answered_with_the_new_one(old, new):
    key = old.partition("=")[0]
    with pytest.raises(NpoError) as caught:
        load_recipe("micro", [old])
    assert caught.value.message == f"unknown key {key}: it is now {new} (command line)"
    assert caught.value.hint == f"write {new} instead of {key}"


def test_old_section_in_a_file_is_answered_key_by_key(tmp_path):
    with pytest.raises(NpoError) as caught:
        load_recipe(written(tmp_path, "inject: {gate: 0.5, shape: soft}"))
    assert caught.value.message == (
        "unknown key inject.gate: it is now guide.inject.max_accuracy; "
        "unknown key inject.shape: it is now guide.inject.ratio_shaping (mine.yaml:1)"
    )


def test_every_old_key_is_unknown_and_its_new_key_exists():
    known = set(list_known_keys())
    assert {old for old in OLD_KEYS if old in known} == set()
    assert {new for new in OLD_KEYS.values() if new not in known} == set()


def test_unknown_key_without_near_match_lists_the_settings():
    with pytest.raises(NpoError) as caught:
        load_recipe("micro", ["eval.zzzqqq=1"])
    assert caught.value.hint == "eval has the settings every, samples_per_prompt"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lr=-1", "train.lr must be a number above 0, got -1"),
        ("train.lr=fast", 'train.lr must be a number above 0, got "fast"'),
        ("train.lr=.inf", "train.lr must be a number above 0, got Infinity"),
        ("train.seed=true", "train.seed must be a whole number, got true"),
        ("train.num_steps=3.0", "train.num_steps must be a whole number at least 1, got 3.0"),
        ("train.num_steps='3'", 'train.num_steps must be a whole number at least 1, got "3"'),
        (
            "train.keep_full_checkpoints=0",
            "train.keep_full_checkpoints must be a whole number at least 1 or null, got 0",
        ),
        ("train.betas=[0.9, 2]", "train.betas.1 must be a number at least 0 and below 1, got 2"),
        ("train.betas=[0.9]", "train.betas.1 is missing"),
        ("train.betas=3", "train.betas must be a list of 2 numbers, got 3"),
        ("loss.kind=ppo", 'loss.kind must be one of grpo, gspo, gspo_token, cispo, got "ppo"'),
        ("loss.divide_by_std=1", "loss.divide_by_std must be true or false, got 1"),
        ("task.suffix=", "task.suffix must be text, got null"),
        ("train=5", "train must be a group of settings (KEY: VALUE), got 5"),
        ("train.lr.x=3", 'train.lr must be a number above 0, got {"x": 3}'),
        ("task.source=fil", "task.source=fil is not a known task: did you mean file?"),
        ("train.prompts_per_step=2000", "task.pool_size must be at least train.prompts_per_step"),
        ("task.datasets=[{weight: 1}]", "task.datasets.0.name is missing"),
    ],
)
def test_bad_value_error_names_what_is_allowed_and_given(tmp_path, override, message):
    # prompts_per_step and pool_size are settings of two sections, so no one place is to blame
    place = str(tmp_path / "mine.yaml") if "prompts_per_step" in override else "command line"
    assert refusal(tmp_path, "name: x", override).message == f"{message} ({place})"


def test_all_problems_are_reported_together(tmp_path):
    message = refusal(tmp_path, "train:\n  lr: -1\n  oops: 1\nloss:\n  kind: ppo\n").message
    assert message == (
        "train.lr must be a number above 0, got -1 (mine.yaml:2); train.oops is not a setting (mine.yaml:3); "
        'loss.kind must be one of grpo, gspo, gspo_token, cispo, got "ppo" (mine.yaml:5)'
    )


def test_many_problems_are_counted_after_the_sixth(tmp_path):
    text = "\n".join(f"zzzz{number}: 1" for number in range(9))
    assert refusal(tmp_path, text).message.endswith("zzzz5 is not a setting (mine.yaml:6); and 3 more")


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ("train:\n  lr: 1\n  lr: 2", 3, "the key lr is given twice"),
        ("train:\n  lr: [1\nfoo: 2", 3, "expected ',' or ']', but got ':'"),
        ("a: b: c", 1, "mapping values are not allowed here"),
        ("name: x\n\ttrain: 1", 2, "found character '\\t' that cannot start any token"),
        ("name: &a x\ndescription: *a", 2, "aliases are not part of a recipe"),
        ("? [1]\n: 2", 1, "a key must be plain text"),
        ("name: !!python/name:os.system x", 1, "could not determine a constructor"),
        ("name: x\n---\nname: y", 2, "but found another document"),
    ],
)
def test_malformed_yaml_is_refused_with_file_and_line(tmp_path, text, line, problem):
    message = refusal(tmp_path, text).message
    assert message.startswith(f"{tmp_path / 'mine.yaml'}:{line}: ")
    assert problem in message


@pytest.mark.parametrize("text", ["", "# nothing\n", "- 1", "just text", "a: !!int x", 'name: "\\ud800"', "a: \x00"])
def test_file_without_settings_is_refused(tmp_path, text):
    assert refusal(tmp_path, text).hint


def test_recipe_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "mine.yaml").write_bytes(b"name: \xff")
    with pytest.raises(NpoError, match="not UTF-8"):
        load_recipe(str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize("override", ["train.lr", "=3", ".lr=3", "train..lr=3", "", "train.=1"])
def test_override_without_key_or_equals_is_refused(override):
    with pytest.raises(NpoError, match="is not a setting: write KEY=VALUE"):
        load_recipe("micro", [override])


def test_malformed_override_error_names_the_key():
    with pytest.raises(NpoError, match=r"^the value of train\.lr:1: "):
        load_recipe("micro", ["train.lr=[1"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("{long}=1", "{short} is not a setting (command line)"),
        ("train.{long}=1", "train.{short6} is not a setting (command line)"),
        ("{dots}=1", "is not a setting: write KEY=VALUE"),
        ("engine.kind={long}", "is not a known engine"),
        ("train.lr=!!{long} 1", "could not determine a constructor"),
        ("train.lr={long}", "train.lr must be a number above 0, got"),
    ],
)
def test_huge_key_or_value_is_answered_at_once_and_shown_short(override, message, monkeypatch):
    # comparing it with every known key would take minutes
    ratio = messages._ratio
    monkeypatch.setattr(messages, "_ratio", lambda one, other: ratio(one, other) if len(one) < 100 else pytest.fail())
    values = {
        "long": 100_000 * "a",
        "dots": ".".join(50_000 * "a"),
        "short": 57 * "a" + "...",
        "short6": 51 * "a" + "...",
    }
    with pytest.raises(NpoError) as caught:
        load_recipe("micro", [override.format_map(values)])
    assert message.format_map(values) in caught.value.message
    assert len(caught.value.message) < 400
    assert len(caught.value.hint) < 400


@pytest.mark.parametrize("tag", ["int", "float", "timestamp", "bool"])
def test_empty_tagged_value_is_refused(tag):
    with pytest.raises(NpoError, match=r"the value of train\.lr: a value does not fit its !!tag"):
        load_recipe("micro", [f"train.lr=!!{tag} ''"])


@pytest.mark.parametrize("override", ["model.lora.rank=100000000", "model.threads=1000000000"])
def test_absurd_number_is_refused(override):
    key, _, value = override.partition("=")
    with pytest.raises(
        NpoError, match=rf"{key} must be a whole number at least 1 and at most \d+ or null, got {value}"
    ):
        load_recipe("micro", [override])


def test_extends_cycle_is_refused(tmp_path):
    written(tmp_path, "extends: mine.yaml", "other.yaml")
    error = refusal(tmp_path, "extends: other.yaml")
    assert error.message == "recipes extend each other in a cycle: mine.yaml -> other.yaml -> mine.yaml"


def test_unknown_recipe_name_gets_the_nearest():
    with pytest.raises(NpoError) as caught:
        find_recipe("micr")
    assert caught.value.hint.startswith("npo recipes micro ")


def test_missing_recipe_file_is_refused(tmp_path):
    with pytest.raises(NpoError, match="there is no recipe file"):
        load_recipe(str(tmp_path / "none.yaml"))


# Comparing


def test_diff_recipes_names_keys_old_and_new_values():
    old = recipe_from_dict({})
    new = apply_overrides(old, ["train.seed=4", "eval.every=10"])
    assert diff_recipes(old, new) == [("train.seed", 0, 4), ("eval.every", 0, 10)]


@pytest.mark.parametrize(
    "change", ["train.num_steps=900", "train.save_every=5", "eval.every=1", "scoring.samples_per_prompt=2", "name=x"]
)
def test_free_settings_may_change(change):
    old = recipe_from_dict({})
    check_frozen_settings(old, apply_overrides(old, [change]), purpose="resume")


def test_frozen_settings_may_not_change():
    old = recipe_from_dict({})
    with pytest.raises(NpoError) as caught:
        check_frozen_settings(old, apply_overrides(old, ["train.weight_decay=0.5"]), purpose="fork")
    assert caught.value.message == "train.weight_decay cannot change from 0.0 to 0.5: completed steps depend on it"
    assert "npo train RECIPE NEW_RUN train.weight_decay=0.5" in caught.value.hint


def test_fork_settings_may_change_only_when_forking():
    old = recipe_from_dict({})
    new = apply_overrides(old, ["guide.inject.max_accuracy=0.5"])
    check_frozen_settings(old, new, purpose="fork")
    with pytest.raises(NpoError, match=r"guide\.inject\.max_accuracy cannot change from 0\.6 to 0\.5 within a branch"):
        check_frozen_settings(old, new, purpose="resume")


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_num_steps_is_frozen_within_a_branch_with_a_decaying_schedule(schedule):
    old = recipe_from_dict({"train": {"schedule": schedule}})
    longer = apply_overrides(old, ["train.num_steps=400"])
    check_frozen_settings(old, longer, purpose="fork")
    with pytest.raises(NpoError, match=f"the {schedule} schedule of the completed steps was computed for 300 steps"):
        check_frozen_settings(old, longer, purpose="resume")


@pytest.mark.parametrize(
    "change", ["train.lr=0.5", "train.schedule=cosine", "train.warmup_steps=3", "train.min_lr_ratio=0.5"]
)
def test_learning_rate_and_schedule_may_change_at_a_fork_only(change):
    old = recipe_from_dict({"train": {"schedule": "linear"}})
    new = apply_overrides(old, [change])
    check_frozen_settings(old, new, purpose="fork")
    with pytest.raises(NpoError, match="within a branch, only when forking"):
        check_frozen_settings(old, new, purpose="resume")
    with pytest.raises(NpoError, match="this command trains nothing"):
        check_frozen_settings(old, new, purpose="measure")


def test_every_setting_has_a_description():
    def walk(settings: type, prefix: str = "") -> list[str]:
        missing = []
        for name, field in settings.model_fields.items():
            inner = field.annotation if isinstance(field.annotation, type) else None
            if inner is not None and hasattr(inner, "model_fields"):
                missing += walk(inner, f"{prefix}{name}.")
            elif not field.description:
                missing.append(prefix + name)
        return missing

    assert walk(Recipe) == []


PATHS_RECIPE = """
extends: micro
model: {path: base}
task: {source: file, path: data/d.jsonl, heldout_path: ../h.jsonl, verifier: "grade.py:f"}
"""


def test_paths_in_a_recipe_begin_at_the_recipe_and_on_the_command_line_here(tmp_path, monkeypatch):
    (tmp_path / "p" / "base").mkdir(parents=True)
    (tmp_path / "p" / "r.yaml").write_text(PATHS_RECIPE)
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "s.yaml").write_text("extends: ../p/r.yaml\ntask: {heldout_path: /abs/h.jsonl}\n")
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("p/r.yaml", ["task.heldout_path=h.jsonl"])
    assert (recipe.model.path, recipe.task.path, recipe.task.heldout_path, recipe.task.verifier) == (
        *("./p/base", "p/data/d.jsonl", "h.jsonl"),
        "p/grade.py:f",
    )
    extended = load_recipe("q/s.yaml").task
    assert (Path(str(extended.path)).resolve(), extended.heldout_path) == (tmp_path / "p/data/d.jsonl", "/abs/h.jsonl")


def test_each_verifier_of_a_list_is_a_path_beside_the_recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("task: {verifier: [exact, grade.py:f], reward_weights: [1, 0.5]}\n")
    assert load_recipe(str(path)).task.verifiers == ("exact", f"{tmp_path}/grade.py:f")


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("micro-base", "micro-base"),
        ("owner/name", "owner/name"),  # a hub id: no folder p/owner/name, none here either
        ("here/only", "./p/here/only"),  # a folder here is not beside the recipe
        ("missing", "./p/missing"),
        ("./missing", "./p/missing"),
        ("/abs/model", "/abs/model"),
        ("~/model", "~/model"),
    ],
)
def test_model_in_a_recipe_is_a_folder_beside_it_or_a_name(tmp_path, monkeypatch, written, read):
    (tmp_path / "p").mkdir()
    (tmp_path / "here" / "only").mkdir(parents=True)
    (tmp_path / "p" / "r.yaml").write_text(f"model: {{path: {written}}}\n")
    monkeypatch.chdir(tmp_path)
    assert load_recipe("p/r.yaml").model.path == read


def test_paths_in_a_shipped_recipe_begin_at_the_current_folder():
    assert load_recipe("smollm2-arithmetic").task.path == "arithmetic/train.jsonl"
    assert load_recipe(str(find_recipe_folder() / "smollm2-arithmetic.yaml")).task.path == "arithmetic/train.jsonl"


def test_problem_of_a_section_is_located_on_the_command_line_that_caused_it():
    """The section itself is in the file, too."""
    with pytest.raises(NpoError, match=r"needs a teacher: set target\.teacher=SPEC \(command line\)"):
        load_recipe("micro", ["target.kind=distribution"])
