"""Near-Future Policy Optimization: a policy taught by its own near future (arXiv 2604.20733).

    import npo_cli as npo

    recipe = npo.Recipe.load("micro", ["train.lr=3e-4"])
    result = npo.train(recipe, "runs/a")
    npo.Run("runs/a").metrics()

Importing the package loads nothing else: each name below is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from npo_cli.api.callbacks import Callback
    from npo_cli.api.comparison import CompareResult, compare
    from npo_cli.api.guides import ScoreResult, sample_guide, score
    from npo_cli.api.run import Run
    from npo_cli.api.stages import RecordStream
    from npo_cli.api.training import TrainingResult, evaluate, replay, resume, scout, train
    from npo_cli.config.recipe import Recipe
    from npo_cli.errors import CallbackError, NpoError, RunFailed, StoppedEarly
    from npo_cli.types.guides import GuideCacheInfo
    from npo_cli.types.rollouts import CheckpointSaved, EvalReport, Notice, Progress, StepReport
    from npo_cli.types.scores import CandidateScore, GuideChoice

__version__ = "0.1.0"

_MODULES = {
    "npo_cli.api.callbacks": ("Callback",),
    "npo_cli.api.comparison": ("CompareResult", "compare"),
    "npo_cli.api.guides": ("ScoreResult", "sample_guide", "score"),
    "npo_cli.api.run": ("Run",),
    "npo_cli.api.stages": ("RecordStream",),
    "npo_cli.api.training": ("TrainingResult", "evaluate", "replay", "resume", "scout", "train"),
    "npo_cli.config.recipe": ("Recipe",),
    "npo_cli.errors": ("CallbackError", "NpoError", "RunFailed", "StoppedEarly"),
    "npo_cli.types.guides": ("GuideCacheInfo",),
    "npo_cli.types.rollouts": ("CheckpointSaved", "EvalReport", "Notice", "Progress", "StepReport"),
    "npo_cli.types.scores": ("CandidateScore", "GuideChoice"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "Callback",
    "CallbackError",
    "CandidateScore",
    "CheckpointSaved",
    "CompareResult",
    "EvalReport",
    "GuideCacheInfo",
    "GuideChoice",
    "Notice",
    "NpoError",
    "Progress",
    "Recipe",
    "RecordStream",
    "Run",
    "RunFailed",
    "ScoreResult",
    "StepReport",
    "StoppedEarly",
    "TrainingResult",
    "compare",
    "evaluate",
    "replay",
    "resume",
    "sample_guide",
    "score",
    "scout",
    "train",
]


def __getattr__(name: str) -> Any:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module 'npo_cli' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = globals()[name] = getattr(import_module(module), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
