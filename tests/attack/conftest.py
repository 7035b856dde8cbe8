"""What the workflow makes, once for all tests that damage copies of it."""

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.attack.workflow import Workflow


@pytest.fixture(scope="session")
def workflow(tmp_path_factory: pytest.TempPathFactory, producers: None) -> "Workflow":
    """Every command, once."""
    from tests.attack.kinds import group_files
    from tests.attack.workflow import Workflow, list_commands
    from tests.helpers.cli_errors import npo

    root = tmp_path_factory.mktemp("a workflow é")
    for command in list_commands(root):
        words = command.words()
        assert words is not None, command.name
        result = npo(*words)
        assert result.code == 0, (command.name, result.err)
    return Workflow(root=root, files=group_files(root), outputs={})
