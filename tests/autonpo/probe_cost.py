"""What each probe of finished AutoNPO runs cost, and what it would have cost with every prompt sampled at once.

    python -m tests.autonpo.probe_cost RUN ... > probe_cost.csv

Before the sequential test, a probe sampled all of its `num_prompts` failed prompts, even where no segment had enough
of them. That probe is repeated here from the run's own checkpoints, on the same pool and with the same seeds, so that
both rules look at the same prompts. Needs full checkpoints at the probed steps (train.keep_full_checkpoints). Nothing
is written to the runs.
"""

import argparse
import csv
import sys
from pathlib import Path
from typing import Any

from npo_cli.autonpo.probe import start_probe
from npo_cli.autonpo.rollback_choice import allocate_probe_prompts
from npo_cli.config.loading import recipe_from_dict
from npo_cli.session.session import count_generated_tokens, load_checkpoint, open_session, sample_groups
from npo_cli.storage.autonpo_log import read_transitions
from npo_cli.storage.checkpoints import list_ancestry_checkpoints
from npo_cli.storage.layout import open_run
from npo_cli.types.autonpo import AutoNPOState

FIELDS = ("run", "branch", "step", "event", "stop", "failed_prompts", "prompts", "tokens", "all_prompts", "all_tokens")


def measure_probes(root: Path) -> list[dict[str, Any]]:
    """One row per late probe of the run."""
    run = open_run(root)
    rows = []
    recipe = recipe_from_dict(run.read_recipe(), source=str(root))
    with open_session(run, recipe, checkpoint=None) as session:
        for transition in read_transitions(run):
            if (
                transition.phase_before != "PROBE"
                or transition.state.is_early
                or "num_tokens" not in transition.evidence
            ):
                continue
            branch, step, evidence = transition.state.branch, transition.step, transition.evidence
            (current,) = (each for each in list_ancestry_checkpoints(run, branch) if each.step == step)
            probe = start_probe(session, AutoNPOState(branch=branch, step=step), current)
            num_failed = sum(len(stratum.prompt_ids) for stratum in probe.strata)
            chosen = allocate_probe_prompts(
                probe.strata, num_prompts=min(recipe.autonpo.probe.num_prompts, num_failed), seed=probe.seed
            )
            prompts = [session.task.prompt(prompt_id) for stratum in chosen for prompt_id in stratum]
            load_checkpoint(session.policy, current)
            groups = sample_groups(
                session,
                prompts,
                seed_label=("probe", branch, step),
                slots=range(recipe.autonpo.probe.samples_per_prompt),
                sampler_step=step,
                temperature=recipe.guide.cache.temperature,
            )
            values = (
                root.name, branch, step, transition.event, evidence.get("stop"), num_failed, evidence["num_prompts"],
                evidence["num_tokens"], len(prompts), count_generated_tokens(groups),
            )  # fmt: skip
            rows.append(dict(zip(FIELDS, values, strict=True)))
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", nargs="+", type=Path)
    writer = csv.DictWriter(sys.stdout, FIELDS)
    writer.writeheader()
    for path in parser.parse_args().runs:
        writer.writerows(measure_probes(path))
