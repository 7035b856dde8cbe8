"""The last words of each command: its result in one sentence, and the command that comes next.

Each function takes the records that the command printed, and reads what else it needs from the run directory.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from npo_cli.errors import quote_path
from npo_cli.report.prompt_tables import describe_history
from npo_cli.report.table import format_bytes
from npo_cli.report.tables import summarize_branches
from npo_cli.storage.bench_dir import is_bench, load_bench_index
from npo_cli.storage.checkpoints import list_ancestry_checkpoints
from npo_cli.storage.index import find_best_branch, select_line_evals
from npo_cli.storage.interrupted import find_last_saved_step, list_interrupted_branches
from npo_cli.storage.layout import FIRST_BRANCH, RunDir, open_run
from npo_cli.storage.lineage import (
    choose_replay_name,
    find_first_segment,
    is_scout,
    list_branches,
    list_result_branches,
)
from npo_cli.storage.metrics import read_metrics
from npo_cli.storage.scouts import has_ended
from npo_cli.types.autonpo import Transition
from npo_cli.types.calibration import CandidateGain, RuleResult
from npo_cli.types.comparison import MethodDifference, MethodSummary, MethodTimeToThreshold
from npo_cli.types.costs import CostToThreshold, RunCosts
from npo_cli.types.guides import GuideCacheInfo
from npo_cli.types.memory import PeakUsage
from npo_cli.types.rollouts import CheckpointEntry, CheckpointSaved, EvalReport, Segment, StepReport
from npo_cli.types.scores import CandidateScore, choose_guide
from npo_cli.types.views import (
    Conclusion,
    GroupView,
    PlannedWork,
    PromptHistory,
    RemovedFolder,
    RolloutView,
    RunListing,
)

T = TypeVar("T")
Records = Sequence[Any]
NUM_REWARDS = 5
"""Newest steps of a scout whose mean reward is shown."""
SUGGESTED_LEARNER = 0.4
"""Share of the steps so far at which the first scoring is suggested."""


def select(records: Records, kind: type[T]) -> list[T]:
    """The records of one kind."""
    return [record for record in records if isinstance(record, kind)]


# Training


def conclude_training(root: Path, records: Records) -> Conclusion:
    """Accuracy of the branch that was trained last, and what comes after it."""
    run, trained = open_run(root), select(records, StepReport)
    last = (trained or select(records, RunCosts) or select(records, CheckpointSaved))[-1]
    branch = last.branch
    moves = select(records, Transition)
    if moves:
        sentence = f"{describe_accuracy(run, branch)}; {describe_moves(moves)}"
        return Conclusion(sentence=sentence, next=f"npo autonpo {quote_path(root)}")
    return conclude_branch(run, branch)


def conclude_branch(run: RunDir, branch: str) -> Conclusion:
    """Accuracy of a branch, beside its parent's at the same step; of a scout its reward."""
    if is_scout(run, branch):
        return conclude_scout(run, branch)
    parent = find_first_segment(run, branch).parent
    beside = "" if parent is None else describe_parent(run, branch, parent)
    return Conclusion(sentence=f"{describe_accuracy(run, branch)}{beside}", next=suggest_next(run, branch))


def conclude_named_scout(root: Path, branch: str, records: Records) -> Conclusion:
    """The end of `npo scout`, also where nothing was left to train."""
    return conclude_scout(open_run(root), branch)


def conclude_scout(run: RunDir, branch: str) -> Conclusion:
    """How far a scout came, by its training reward."""
    first, step, root = find_first_segment(run, branch), find_last_saved_step(run, branch), quote_path(run.root)
    rewards = [row["reward"] for row in read_metrics(run, branch) if row["step"] <= step and "reward" in row]
    newest = rewards[-NUM_REWARDS:]
    mean = f", mean reward {sum(newest) / len(newest):.2f} over {len(newest)} steps" if newest else ""
    sentence = f"scout {branch} is trained to step {step}{mean}"
    if not has_ended(run, branch):
        return Conclusion(sentence=sentence, next=f"npo resume {root} --branch {branch}")
    option = format_branch_option(str(first.parent))
    return Conclusion(
        sentence=sentence, next=f"npo sample-guide {root}{option} --at {first.fork_step} --source scout:{branch}"
    )


def describe_accuracy(run: RunDir, branch: str) -> str:
    """`accuracy 0.92 [0.89, 0.94] at step 240 of main (best 0.93 at 200)`; without an evaluation the step alone."""
    evals = select_line_evals(run, branch)
    if not evals:
        return f"{branch} is trained to step {find_last_saved_step(run, branch)}, without a held-out evaluation"
    last, best = evals[max(evals)], max(evals.values(), key=lambda one: (one.accuracy, one.step))
    better = f" (best {best.accuracy:.2f} at {best.step})" if best.step != last.step else ""
    saved = find_last_saved_step(run, branch)
    ahead = f", trained to step {saved}" if saved > last.step else ""
    return f"accuracy {format_accuracy(last)} at step {last.step} of {branch}{better}{ahead}"


def describe_parent(run: RunDir, branch: str, parent: str) -> str:
    """`; main 0.92 at step 240`: the parent at the same step, where it was evaluated there."""
    own, other = select_line_evals(run, branch), select_line_evals(run, parent)
    if not own or max(own) not in other:
        return ""
    return f"; {parent} had {other[max(own)].accuracy:.2f}"


def format_accuracy(one: EvalReport) -> str:
    """`0.92 [0.89, 0.94]`."""
    return f"{one.accuracy:.2f} [{one.accuracy_low:.2f}, {one.accuracy_high:.2f}]"


def describe_moves(moves: Sequence[Transition]) -> str:
    """`2 rollbacks, 1 rejected`; with a ladder also its windows."""
    rollbacks, windows = (sum(one.event == event for one in moves) for event in ("rolled_back", "rung_applied"))
    rejected = sum(one.is_rejection for one in moves)
    rungs = f"{windows} window{'s' * (windows != 1)} of a rung, " if windows else ""
    return f"{rungs}{rollbacks} rollback{'s' * (rollbacks != 1)}, {rejected} rejected"


def suggest_next(run: RunDir, branch: str) -> str:
    """After training: evaluate, finish, score a guide for a learner, or compare the replay with its parent."""
    root, option = quote_path(run.root), format_branch_option(branch)
    if find_last_saved_step(run, branch) < run.read_recipe(branch)["train"]["num_steps"]:
        return f"npo resume {root}{option}"
    if not select_line_evals(run, branch):
        return f"npo eval {root}{option}"
    first = find_first_segment(run, branch)
    if first.parent is not None:
        return f"npo compare {first.parent}={root}:{first.parent} {branch}={root}:{branch}"
    return suggest_scoring(run, branch)


def suggest_scoring(run: RunDir, branch: str) -> str:
    """A scoring for the learner that the recipe names, else for one that has later checkpoints."""
    planned = (run.read_recipe(branch).get("guide") or {}).get("replay") or {}
    steps = [found.step for found in list_ancestry_checkpoints(run, branch)]
    at = planned.get("at_step")
    if at is None and len(steps) > 1:
        at = min(steps[:-1], key=lambda step: abs(step - SUGGESTED_LEARNER * steps[-1]))
    if at is None:
        return f"npo index {quote_path(run.root)}{format_branch_option(branch)}"
    return f"npo score-checkpoints {quote_path(run.root)}{format_branch_option(branch)} --at {at}"


def format_branch_option(branch: str) -> str:
    """` --branch late`; nothing for main, which is the default."""
    return "" if branch == FIRST_BRANCH else f" --branch {branch}"


def conclude_eval(root: Path, records: Records) -> Conclusion:
    """The best of the evaluated checkpoints."""
    reports = select(records, EvalReport)
    best = max(reports, key=lambda one: (one.accuracy, one.step))
    among = f", the best of {len(reports)}" if len(reports) > 1 else ""
    sentence = f"accuracy {format_accuracy(best)} at step {best.step} of {best.branch}{among}"
    run = open_run(root)
    more = list_ancestry_checkpoints(run, best.branch)
    if len(reports) == 1 and len(select_line_evals(run, best.branch)) < len(more):
        return Conclusion(
            sentence=sentence, next=f"npo eval {quote_path(root)}{format_branch_option(best.branch)} --all"
        )
    return Conclusion(sentence=sentence, next=suggest_scoring(run, best.branch))


# Guides


def conclude_scoring(root: Path, at: int | None, branch: str | None, records: Records) -> Conclusion:
    """The chosen guide, or that no guide is worth it."""
    scores, name = select(records, CandidateScore), branch or FIRST_BRANCH
    if at is None:
        at = open_run(root).read_recipe(name)["guide"]["replay"]["at_step"]
    choice, where = choose_guide(scores), f"step {at} of {name}"
    again = f"{quote_path(root)}{format_branch_option(name)}"
    if choice.chosen is None:
        return Conclusion(
            sentence=f"no guide is worth it here, for {where}: {choice.reason}", next=f"npo index {again}"
        )
    one = next(score for score in scores if score.is_selected)
    value = "" if one.value is None else f"; forecast: {describe_value(one.value)}"
    sentence = f"{one.candidate} has the best score for {where}: S {format_short(one, 'signal')}{value}"
    return Conclusion(sentence=sentence, next=f"npo replay {again} --at {at}")


def describe_value(value: float) -> str:
    """The forecast in words; a guide pays if it saves at least a step per step of its price."""
    pays = "it pays" if value >= 1 else "it does not pay"
    return f"{pays} ({value:.2g} steps saved per step of its price)"


def conclude_replay(root: Path, at: int, branch: str | None, name: str | None, records: Records) -> Conclusion:
    """The replay's accuracy beside its parent's, or that no guide is worth it."""
    if select(records, StepReport) or select(records, CheckpointSaved):
        return conclude_training(root, records)
    if select(records, CandidateScore):
        return conclude_scoring(root, at, branch, records)
    return conclude_branch(open_run(root), name or choose_replay_name(branch or FIRST_BRANCH, at))


def format_short(one: object, name: str) -> str:
    """A value with its interval to two digits: `0.36 [0.29, 0.43]`; `-` where it is absent."""
    value, low, high = (getattr(one, f"{name}{end}", None) for end in ("", "_low", "_high"))
    if value is None:
        return "-"
    return f"{value:.2f}" if low is None or high is None else f"{value:.2f} [{low:.2f}, {high:.2f}]"


def conclude_guide(root: Path, records: Records) -> Conclusion:
    """How many prompts the guide cache has a response to."""
    info = select(records, GuideCacheInfo)[-1]
    last = info.learner_step + info.num_steps
    sentence = (
        f"guide {info.name}: {info.num_prompts_with_rollouts} of {info.num_prompts} prompts of steps "
        f"{info.learner_step + 1}-{last} of {info.branch} have a verified response"
    )
    if info.lazy_settings:
        sentence = (
            f"guide {info.name}: its prompts are sampled during the replay of steps {info.learner_step + 1}-{last}"
        )
    elif not info.num_prompts_with_rollouts:
        again = f"npo score-checkpoints {quote_path(root)}{format_branch_option(info.branch)} --at {info.learner_step}"
        return Conclusion(sentence=sentence, next=again)
    return Conclusion(
        sentence=sentence, next=f"npo resume {quote_path(root)} --at {info.learner_step} --guide {info.name}"
    )


def conclude_calibration(root: Path, records: Records) -> Conclusion:
    """The candidate with the largest measured gain, and how well the rules predict the gain."""
    gains, rules = select(records, CandidateGain), select(records, RuleResult)
    best = max(gains, key=lambda one: one.gain)
    sentence = (
        f"{best.candidate} gained most at step {best.learner_step} of {best.branch}: "
        f"{best.gain:+.3f} [{best.gain_low:+.3f}, {best.gain_high:+.3f}] accuracy"
    )
    known = [one for one in rules if one.rank_correlation is not None]
    if known:
        rule = max(known, key=lambda one: one.rank_correlation or 0.0)
        sentence += f"; {rule.rule} predicts the gain best (rank correlation {rule.rank_correlation:.2f})"
    if best.gain <= 0:
        return Conclusion(sentence=f"no candidate gained: {sentence}", next=f"npo index {quote_path(root)}")
    place = f"{quote_path(root)}{format_branch_option(best.branch)} --at {best.learner_step}"
    return Conclusion(sentence=sentence, next=f"npo replay {place} --source {shlex.quote(best.candidate)}")


# Several runs, and removing branches


def conclude_listing(folder: Path, records: Records) -> Conclusion:
    """How many runs there are, and how many are at work."""
    runs = select(records, RunListing)
    if not runs:
        return Conclusion(sentence=f"no run below {folder}", next=f"npo train micro {quote_path(folder / 'first')}")
    counts = [
        (state, sum(one.state == state for one in runs)) for state in ("running", "stopped", "finished", "damaged")
    ]
    states = ", ".join(f"{number} {state}" for state, number in counts if number)
    sentence = f"{len(runs)} run{'s' * (len(runs) != 1)} below {folder}: {states}"
    known = {state: one for one in reversed(runs) for state in (one.state,)}
    if "damaged" in known:
        return Conclusion(sentence=sentence, next=f"npo verify {quote_path(Path(known['damaged'].run))}")
    if "stopped" in known:
        return Conclusion(sentence=sentence, next=f"npo resume {quote_path(Path(known['stopped'].run))}")
    best = max(runs, key=lambda one: one.best_accuracy or 0.0)
    return Conclusion(sentence=sentence, next=f"npo show {quote_path(Path(best.run))}")


def conclude_removal(root: Path, branch: str, recursive: bool, records: Records) -> Conclusion:
    """What was deleted, or would be."""
    folders = select(records, RemovedFolder)
    size = format_bytes(sum(one.size_bytes for one in folders))
    count = f"{len(folders)} folder{'s' * (len(folders) != 1)}, {size}"
    others = [name for name in dict.fromkeys(one.branch for one in folders) if name != branch]
    also = f" with {', '.join(others)}" if others else ""
    name = quote_path(root)
    if folders and folders[0].is_deleted:
        return Conclusion(sentence=f"deleted branch {branch}{also} of {root}: {count}", next=f"npo verify {name}")
    sentence = f"would delete branch {branch}{also} of {root}: {count}; what it cost stays counted"
    return Conclusion(sentence=sentence, next=f"npo rm {name}:{branch}{' --recursive' * recursive} --yes")


# Reading a run


def conclude_index(root: Path, records: Records) -> Conclusion:
    """How many checkpoints there are, and the one with the highest accuracy."""
    run, entries = open_run(root), select(records, CheckpointEntry)
    whole = [one for one in entries if one.complete]
    branches = len({one.branch for one in whole})
    count = f"{len(whole)} checkpoint{'s' * (len(whole) != 1)} on {branches} branch{'es' * (branches != 1)}"
    measured = [one for one in whole if one.accuracy is not None]
    if not measured:
        return Conclusion(sentence=f"{count}, none evaluated", next=f"npo eval {quote_path(root)} --all")
    best = max(measured, key=lambda one: (one.accuracy, -one.step))
    sentence = f"{count}; best accuracy {best.accuracy:.2f} at step {best.step} of {best.branch}"
    return Conclusion(sentence=sentence, next=suggest_scoring(run, FIRST_BRANCH))


def conclude_show(root: Path, what: str, records: Records) -> Conclusion:
    """What the shown records say, by topic."""
    run, name = open_run(root), quote_path(root)
    match what:
        case "metrics":
            return Conclusion(
                sentence=_describe_metrics(run, select(records, StepReport)), next=f"npo show {name} costs"
            )
        case "rollouts" if select(records, PromptHistory):
            seen = select(records, PromptHistory)[0]
            sentence = f"prompt {seen.prompt_id} on {seen.branch}: {describe_history(seen)}"
            return Conclusion(sentence=sentence, next=f"npo show {name} groups{format_branch_option(seen.branch)}")
        case "rollouts":
            return _conclude_rollouts(root, select(records, RolloutView))
        case "groups":
            groups = select(records, GroupView)
            failed = sum(one.group.on_policy_accuracy == 0 for one in groups)
            where = f"step {groups[-1].step} of {groups[-1].branch}"
            sentence = f"{failed} of {len(groups)} groups of {where} have no correct on-policy rollout"
            return Conclusion(
                sentence=sentence, next=f"npo show {name} rollouts{format_branch_option(groups[-1].branch)}"
            )
        case "guides":
            guides = select(records, GuideCacheInfo)
            done = [one for one in guides if one.complete]
            sentence = f"{len(guides)} guide cache{'s' * (len(guides) != 1)}, {len(done)} complete"
            last = (done or guides)[-1]
            return Conclusion(sentence=sentence, next=f"npo resume {name} --at {last.learner_step} --guide {last.name}")
        case "lineage":
            branches = {one.branch for one in select(records, Segment)} & set(list_branches(run))
            left = list_interrupted_branches(run)
            state = f"interrupted: {', '.join(left)}" if left else "none interrupted"
            sentence = f"{len(branches)} branch{'es' * (len(branches) != 1)}, {state}"
            return Conclusion(sentence=sentence, next=f"npo resume {name}" if left else f"npo show {name} costs")
        case _:
            return conclude_costs(root, records)


def _describe_metrics(run: RunDir, reports: Sequence[StepReport]) -> str:
    best = find_best_branch(run)
    names = list(dict.fromkeys(one.branch for one in reports))
    branch = best if best in names else names[0]
    own = summarize_branches([one for one in reports if one.branch == branch])[0]
    ends = [f"{one:.2f}" for one in own.rewards if one is not None]
    sentence = f"{branch}: reward {' -> '.join(ends)} over steps {own.steps}"
    return sentence if len(names) == 1 else f"{sentence}, the best of {len(names)} branches"


def _conclude_rollouts(root: Path, views: Sequence[RolloutView]) -> Conclusion:
    last = views[-1]
    right = sum(one.rollout.verdict == "correct" for one in views)
    steps = len({one.step for one in views})
    where = f"step {last.step}" if steps == 1 else f"{steps} steps"
    sentence = f"{right} of {len(views)} rollouts of {where} of {last.branch} are correct"
    option = f"{format_branch_option(last.branch)} --prompt {shlex.quote(last.rollout.prompt_id)}"
    return Conclusion(sentence=sentence, next=f"npo show {quote_path(root)} rollouts{option}")


def conclude_costs(root: Path, records: Records) -> Conclusion:
    """The branch that reached the highest threshold with the fewest tokens, beside main."""
    reached = [one for one in select(records, CostToThreshold) if one.total_tokens and not one.is_best_held]
    name = quote_path(root)
    if not reached:
        run = open_run(root)
        return Conclusion(sentence=describe_accuracy(run, find_best_branch(run)), next=f"npo eval {name} --all")
    highest = max(one.threshold for one in reached)
    found = [one for one in reached if one.threshold == highest]
    cheapest = min(found, key=lambda one: one.total_tokens or 0)
    first = next((one for one in found if one.name == FIRST_BRANCH), None)
    sentence = f"{cheapest.name} reaches accuracy {highest:.2f} for {cheapest.total_tokens:,} tokens"
    others = [one for one in found if one is not cheapest]
    if first is not None and others:
        other = min(others, key=lambda one: one.total_tokens or 0) if first is cheapest else first
        sentence += f", {other.name} for {other.total_tokens:,}"
    elif len(list_result_branches(open_run(root))) > 1 and len(found) == 1:
        sentence += ", no other branch does"
    return Conclusion(sentence=sentence, next=f"npo report {name}")


def conclude_autonpo(root: Path, records: Records) -> Conclusion:
    """What AutoNPO did in a run."""
    moves = select(records, Transition)
    last = moves[-1]
    sentence = f"AutoNPO on {last.state.branch}, {last.state.phase} at step {last.step}: {describe_moves(moves)}"
    run = open_run(root)
    is_done = find_last_saved_step(run, last.state.branch) >= run.read_recipe(last.state.branch)["train"]["num_steps"]
    name = quote_path(root)
    return Conclusion(sentence=sentence, next=f"npo report {name}" if is_done else f"npo resume {name} --autonpo")


# Several runs


def conclude_report(roots: Sequence[Path], out: Path, branch: str | None, records: Records) -> Conclusion:
    """Where the report is, and the branch that it leads with."""
    if len(roots) > 1 or is_bench(roots[0]):
        names = " ".join(quote_path(root) for root in roots)
        return Conclusion(
            sentence=f"{out} shows {len(roots)} folders of runs side by side", next=f"npo compare {names}"
        )
    run = open_run(roots[0])
    name = branch or find_best_branch(run)
    step = find_last_saved_step(run, name)
    evals = select_line_evals(run, name)
    if evals:
        step = max(evals.values(), key=lambda one: (one.accuracy, one.step)).step
    place = f"{quote_path(roots[0])}{format_branch_option(name)}"
    sentence = f"{out} shows {roots[0]}: {describe_accuracy(run, name)}"
    return Conclusion(sentence=sentence, next=f"npo export {place} --step {step} --out step-{step}")


def conclude_bench(out: Path, records: Records) -> Conclusion:
    """How many runs of how many methods are finished."""
    index = load_bench_index(out)
    methods = dict.fromkeys(method for method, _ in index)
    sentence = f"{len(index)} runs of {len(methods)} methods are finished: {', '.join(methods)}"
    return Conclusion(sentence=sentence, next=f"npo compare {quote_path(out)}")


def conclude_plan(recipe: str, records: Records) -> Conclusion:
    """The peak of each place, beside its limit."""
    peaks = select(records, PeakUsage)
    needs = ", ".join(
        f"{one.location} {format_bytes(one.num_bytes)}"
        + ("" if one.limit_bytes is None else f" of {format_bytes(one.limit_bytes)}")
        for one in peaks
    )
    if all(one.fits for one in peaks):
        return Conclusion(sentence=f"{recipe} fits: {needs}", next=f"npo train {shlex.quote(recipe)}")
    return Conclusion(sentence=f"{recipe} does not fit: {needs}")


def conclude_dry_run(command: Sequence[str], records: Records) -> Conclusion:
    """The sum of what a command would do; next is the same command without --dry-run."""
    works = select(records, PlannedWork)
    parts = []
    samples, tokens = (sum(getattr(work, name) or 0 for work in works) for name in ("samples", "max_tokens"))
    if samples:
        parts.append(f"sample at most {samples:,} responses of {tokens:,} tokens")
    disk = sum(work.num_bytes or 0 for work in works)
    if disk:
        parts.append(f"take at most {format_bytes(disk)} on the disk")
    words = shlex.join(word for word in command if word != "--dry-run")
    sentence = f"nothing was written; the command would {' and '.join(parts) or 'sample nothing'}"
    return Conclusion(sentence=sentence, next=f"npo {words}")


def conclude_compare(texts: Sequence[str], records: Records) -> Conclusion:
    """The method with the highest final accuracy, and its difference from the baseline or what it cost.

    `texts` is what was compared: a bench is reported as a whole.
    """
    found = select(records, MethodSummary)
    best = max(found, key=lambda one: one.final_accuracy.value)
    seeds = f"{len(best.seeds)} seed{'s' * (len(best.seeds) != 1)}"
    sentence = f"{best.method} ends highest: final accuracy {format_estimate(best.final_accuracy)}, {seeds}"
    differences = select(records, MethodDifference)
    one = next((each for each in differences if each.method == best.method), None)
    if one is not None:
        sentence += f"; {format_estimate(one.final_accuracy, sign='+')} over {one.baseline}"
    elif differences:
        second = max(differences, key=lambda each: each.final_accuracy.value)
        sentence += f"; {second.method} is {format_estimate(second.final_accuracy, sign='+')} from it"
    cheapest = _describe_cheapest(select(records, MethodTimeToThreshold))
    runs = list(dict.fromkeys(run.rpartition(":")[0] for each in found for run in each.runs))
    if len(texts) == 1 and is_bench(Path(texts[0])):
        runs = list(texts)
    shown = " ".join(shlex.quote(text) for text in runs)
    return Conclusion(sentence=f"{sentence}{cheapest}", next=f"npo report {shown}")


def _describe_cheapest(found: Sequence[MethodTimeToThreshold]) -> str:
    """The method that reached the highest threshold with the fewest tokens."""
    reached = [one for one in found if not one.is_censored and one.curve == "own" and "tokens" in one.costs]
    if not reached:
        return ""
    highest = max(one.threshold for one in reached)
    one = min((each for each in reached if each.threshold == highest), key=lambda each: each.costs["tokens"])
    return f"; cheapest to {highest:g} by tokens: {one.method}"


def format_estimate(one: Any, *, sign: str = "") -> str:
    """`0.92 [0.89, 0.94]`, with a sign where it is a difference."""
    form = f"{sign}.2f"
    known = "" if one.low is None or one.high is None else f" [{one.low:{form}}, {one.high:{form}}]"
    return f"{one.value:{form}}{known}"
