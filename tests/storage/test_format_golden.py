"""The format on disk, byte for byte. A change here is a change of format: see FORMAT.md before making one."""

import re
from pathlib import Path

from npo_cli.storage.evals import append_prompt_results
from npo_cli.storage.guide_cache import QueriedPrompt, finish_guide_cache, open_guide_cache
from npo_cli.storage.index import build_index
from npo_cli.storage.layout import RunDir
from npo_cli.storage.lineage import append_segment
from npo_cli.storage.lock import lock_run
from npo_cli.storage.metrics import StepLog, append_event, append_sampling_time
from npo_cli.storage.rollout_log import RolloutLog
from npo_cli.storage.sample_store import append_eval, open_sample_store, save_scores
from npo_cli.types.rollouts import Segment, StepReport
from tests.storage.builders import (
    RECIPE,
    evaluation,
    group,
    guide_info,
    make_eval_results,
    new_run,
    score,
    trajectory,
    write_checkpoint,
)

FILES = """\
.lock
branches/late/recipe.yaml
branches/main/checkpoints/step_000040/anchor/npo_anchor.json
branches/main/checkpoints/step_000040/anchor/state.json
branches/main/checkpoints/step_000040/config.json
branches/main/checkpoints/step_000040/model.safetensors
branches/main/checkpoints/step_000040/npo.json
branches/main/metrics.jsonl
branches/main/recipe.yaml
branches/main/rollouts.jsonl
branches/main/timings.jsonl
evals.jsonl
events.jsonl
guides/g/asked.jsonl
guides/g/guide.json
guides/g/timings.jsonl
guides/g/trajectories.jsonl
index.json
npo_run.json
outcomes.jsonl
recipe.yaml
scores/main_step_000020_23d29984/samples.jsonl
scores/main_step_000020_23d29984/scores.json
scores/main_step_000020_23d29984/settings.json
scores/main_step_000020_23d29984/timings.jsonl
segments.jsonl
"""

BIRTH = """\
{
 "format": 1,
 "run_id": "RUN",
 "created": "TIME",
 "npo_version": "0.1.0"
}
"""

RECIPE_YAML = """\
name: tiny
train:
  seed: 0
  num_steps: 4
"""

SEGMENTS = """\
{"time":"TIME","branch":"main","parent":null,"fork_step":0,"guide":null,"guide_until":null,"ahead_until":null,"overrides":[]}
{"time":"TIME","branch":"late","parent":"main","fork_step":20,"guide":"g","guide_until":40,"ahead_until":null,"overrides":["train.lr=1"]}
"""

METRICS = """\
{"step":1,"branch":"main","reward":0.5,"dropped":["kl"]}
"""

ROLLOUTS = (
    '{"step":1,"num_groups":1,"prompt":{"prompt_id":"p0","answer":"7","text":"3+4=","messages":[],"dataset":"","row":0,'
    '"images":[]},"mix":"gate_closed","own_accuracy":1.0,"rollouts":['
    '{"prompt_id":"p0","slot":0,"response_ids":[7,1],"behavior_logps":[-0.5,-0.25],"text":"7","finished":true,'
    '"sampler_step":0,"source":"own","mean_entropy":null,"verdict":"correct","reward":1.0},'
    '{"prompt_id":"p0","slot":1,"response_ids":[7,1],"behavior_logps":[-0.5,-0.25],"text":"7","finished":true,'
    '"sampler_step":0,"source":"own","mean_entropy":null,"verdict":"correct","reward":1.0}]}\n'
)

EVALS = (
    '{"branch":"main","step":40,"num_prompts":4,"num_samples":2,"accuracy":0.5,"accuracy_low":0.25,'
    '"accuracy_high":0.75,"pass_at_k":0.5,"pass_at_k_low":0.25,"pass_at_k_high":0.75,"mean_length":2.0,"cut_off":0.0,'
    '"num_tokens":16}\n'
)

OUTCOMES = '{"branch":"main","step":40,"num_samples":2,"prompts":["0a","0b","0c","0d"],"num_correct":[2,1,0,1]}\n'

# The sha256 sums are those of `{}\\n` and of the 73 bytes of a one-number safetensors file.
MANIFEST = """\
{
 "step": 40,
 "branch": "main",
 "files": {
  "config.json": {
   "size": 3,
   "sha256": "ca3d163bab055381827226140568f3bef7eaac187cebd76878e0b63e9e442356"
  },
  "model.safetensors": {
   "size": 73,
   "sha256": "17cb74260b8a37e17ab8c501420696f65206e3594a6f75a404519ac40037feaa"
  }
 },
 "digest": "4cd1773e5205c4b2c6d5a29c141691a996e92396f4473ac30852e2cd9ddb7c17",
 "saved": "TIME"
}
"""

ANCHOR_MANIFEST = """\
{
 "step": 40,
 "branch": "main",
 "files": {
  "state.json": {
   "size": 13,
   "sha256": "a8dcf9de0bb0ebe3df0a96e1a5bcb58c016f74844ed60b04c80cd2686a258bac"
  }
 },
 "saved": "TIME"
}
"""

GUIDE = """\
{
 "name": "g",
 "run_id": "RUN",
 "branch": "main",
 "at_step": 20,
 "guide_step": 40,
 "guide_digest": "d",
 "num_steps": 20,
 "tokenizer_digest": "t",
 "sampling": "8 by 2, random",
 "num_prompts": 1,
 "num_found": 1,
 "num_samples": 4,
 "num_tokens": 12,
 "complete": true,
 "source": "checkpoint",
 "origin": "",
 "has_logps": true,
 "num_trajectories": 1,
 "given_tokens": 0,
 "side_tokens": 0,
 "older_step": null
}
"""

TRAJECTORIES = (
    '{"prompt_id":"p0","response_ids":[7,1],"behavior_logps":[-0.1,-1.2345678],"text":"7","verdict":"correct",'
    '"guide_step":40,"num_sampled":4,"num_correct":1,"source":"guide","number":0,"finished":true}\n'
)

SETTINGS = """\
{
 "branch": "main",
 "at": 20,
 "candidates": [
  40
 ],
 "settings": {
  "k": 8
 }
}
"""

INDEX = """\
{
 "checkpoints": [
  {
   "branch": "main",
   "step": 40,
   "parent": null,
   "tier": "anchor",
   "size_bytes": SIZE,
   "complete": true,
   "digest": "4cd1773e5205c4b2c6d5a29c141691a996e92396f4473ac30852e2cd9ddb7c17",
   "path": "branches/main/checkpoints/step_000040",
   "reward": null,
   "entropy": null,
   "accuracy": 0.5,
   "quality": 0.5,
   "variance": 0.5,
   "signal": 0.5,
   "scored_for": 20
  }
 ]
}
"""


def filled_run(folder: Path) -> RunDir:
    """A run with one of everything."""
    run = new_run(folder)
    with lock_run(run):
        metrics = {"reward": 0.5, "kl": float("nan")}
        StepLog(run, "main").write(StepReport(branch="main", step=1, metrics=metrics, timings={"seconds": 1.0}))
        RolloutLog(run.rollouts_path("main")).write_step(1, [group("p0")])
        write_checkpoint(run, 40)
        append_prompt_results(run, make_eval_results(40))
        append_eval(run, evaluation(40))
        scoring = open_sample_store(run, "main", 20, candidates=[40], settings={"k": 8})
        append_sampling_time(scoring.folder, 0.5, num_tokens=0)
        scoring.samples.append({"step": 40})
        save_scores(scoring, [score(40)])
        store = open_guide_cache(run, guide_info(run))
        append_sampling_time(run.guide_folder("g"), 1.5, num_tokens=12)
        store.add_rollout(trajectory("p0"))
        store.add_queried_prompt(QueriedPrompt(prompt_id="p0", num_sampled=4, num_correct=1, num_tokens=12))
        finish_guide_cache(run, guide_info(run))
        run.save_recipe("late", RECIPE)
        replay = Segment(branch="late", parent="main", fork_step=20, guide_cache="g", guide_until=40)
        append_segment(run, replay, overrides=["train.lr=1"])
        append_event(run, "rolled_back", {"branch": "late", "learner_step": 20})
        build_index(run)
    return run


def timeless(path: Path, run_id: str) -> str:
    """The text of a file with times and the run's id replaced by words."""
    return re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?\+00:00", "TIME", path.read_text()).replace(run_id, "RUN")


def test_a_run_directory_is_laid_out_as_format_md_says(tmp_path):
    run = filled_run(tmp_path)
    found = sorted(path.relative_to(run.root).as_posix() for path in run.root.rglob("*") if path.is_file())
    assert "".join(f"{name}\n" for name in found) == FILES


def test_small_files_are_spelled_as_format_md_says(tmp_path):
    run = filled_run(tmp_path)
    spelled = {
        "npo_run.json": BIRTH,
        "recipe.yaml": RECIPE_YAML,
        "branches/main/recipe.yaml": RECIPE_YAML,
        "segments.jsonl": SEGMENTS,
        "events.jsonl": '{"time":"TIME","kind":"rolled_back","branch":"late","at":20}\n',
        "evals.jsonl": EVALS,
        "outcomes.jsonl": OUTCOMES,
        "branches/main/metrics.jsonl": METRICS,
        "branches/main/timings.jsonl": '{"step":1,"branch":"main","time":"TIME","seconds":1.0}\n',
        "branches/main/rollouts.jsonl": ROLLOUTS,
        "guides/g/guide.json": GUIDE,
        "guides/g/asked.jsonl": '{"prompt_id":"p0","num_sampled":4,"num_correct":1,"num_tokens":12}\n',
        "guides/g/timings.jsonl": '{"time":"TIME","seconds":1.5,"num_tokens":12}\n',
        "guides/g/trajectories.jsonl": TRAJECTORIES,
        "scores/main_step_000020_23d29984/settings.json": SETTINGS,
        "scores/main_step_000020_23d29984/samples.jsonl": '{"step":40}\n',
        "scores/main_step_000020_23d29984/timings.jsonl": '{"time":"TIME","seconds":0.5,"num_tokens":0}\n',
    }
    for name, text in spelled.items():
        assert timeless(run.root / name, run.run_id) == text, name


def test_manifests_and_index_are_spelled_as_format_md_says(tmp_path):
    run = filled_run(tmp_path)
    folder = run.checkpoint_folder("main", 40)
    assert timeless(folder / "npo.json", run.run_id) == MANIFEST
    assert timeless(folder / "anchor" / "npo_anchor.json", run.run_id) == ANCHOR_MANIFEST
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert timeless(run.index_path, run.run_id) == INDEX.replace("SIZE", str(size))


def test_the_same_run_made_twice_differs_only_in_times_and_its_id(tmp_path):
    first, second = filled_run(tmp_path / "a"), filled_run(tmp_path / "b")
    for name in FILES.split():
        if not name.endswith(".safetensors"):
            assert timeless(first.root / name, first.run_id) == timeless(second.root / name, second.run_id), name
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        paths = [run.root / "branches" / "main" / name for run in (first, second)]
        assert paths[0].read_bytes() == paths[1].read_bytes()
