"""A tokenizer with a chat template means chat unless told otherwise; what was decided is printed and kept."""

import json
import shutil
from pathlib import Path

import pytest

from npo_cli.config.loading import load_recipe, recipe_from_dict
from npo_cli.errors import NpoError
from npo_cli.policy.model_folder import MICRO_BASE_FOLDER, decide_chat
from npo_cli.session.session import open_task
from npo_cli.storage.layout import open_run
from tests.helpers.cli_errors import SMALL, npo

TEMPLATE = "{% for turn in messages %}{{ turn['content'] }}{% endfor %}#"
TASK = ("task.source=file", "task.path=d.jsonl", "task.verifier=last_number")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Data, a model `base` without a chat template, and `chat`, the same with one."""
    rows = (json.dumps({"prompt": f"{number}+1=", "answer": str(number + 1)}) for number in range(24))
    (tmp_path / "d.jsonl").write_text("\n".join(rows))
    for name in ("base", "chat"):
        shutil.copytree(MICRO_BASE_FOLDER, tmp_path / name)
    config = tmp_path / "chat" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": TEMPLATE}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("settings", "is_chat", "line"),
    [
        (["model.path=chat"], True, "prompts: chat messages, by the tokenizer's chat template (task.chat=true)"),
        (["model.path=base"], False, "prompts: plain text, since the tokenizer has no chat template"),
        (["model.path=chat", "task.chat=false"], False, "prompts: plain text (task.chat=false), though the tokenizer"),
    ],
    ids=str,
)
def test_chat_template_decides_and_the_run_keeps_it(folder, settings, is_chat, line):
    result = npo("train", "micro", "run", *SMALL, *TASK, "train.num_steps=1", *settings)
    assert result.code == 0
    assert line in result.err
    recipe = recipe_from_dict(open_run(folder / "run").read_recipe())
    assert recipe.task.chat is is_chat
    assert {bool(prompt.messages) for prompt in open_task(recipe).train} == {is_chat}


def test_prompts_of_a_fixed_form_leave_it_open(folder):
    assert decide_chat(load_recipe("micro", ["model.path=chat"])).task.chat is None
    result = npo("train", "micro", "run", *SMALL, "train.num_steps=1", "model.path=chat")
    assert (result.code, "prompts:" in result.err) == (0, False)


def test_system_message_needs_a_chat_template(folder):
    assert decide_chat(load_recipe("micro", [*TASK, "model.path=chat", "task.system=Add."])).task.chat
    with pytest.raises(NpoError, match="the tokenizer of base has no chat template"):
        decide_chat(load_recipe("micro", [*TASK, "model.path=base", "task.system=Add."]))


def test_check_shows_the_prompt_as_the_run_will_have_it(folder):
    checked = npo("check", "micro", *TASK, "model.path=chat")
    assert "chat messages, through the chat template" in checked.out + checked.err
