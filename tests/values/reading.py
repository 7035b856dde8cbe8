"""Everything that the circles read from disk or from `--json`, as records under neutral names.

Names of files, metrics and most JSON keys are in `keys.py`; keys whose values are combined here (of rollouts, samples,
lineage) are spelled here. Nothing here imports the package: the files are read as any other program would read them.
"""

import base64
import hashlib
import json
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tests.values import keys


def read_steps(run: Path, branch: str) -> list[dict[str, Any]]:
    """Metrics and rollouts of every step of a branch."""
    rollouts = _rollouts_by_step(run / keys.ROLLOUTS_FILE.format(branch=branch))
    metrics = _lines(run / keys.METRICS_FILE.format(branch=branch))
    return [
        _picked(line, keys.STEP_KEYS) | _present(_picked(line, keys.GUIDED_STEP_KEYS)) | rollouts[line["step"]]
        for line in metrics
    ]


def count_steps(run: Path, branch: str) -> int:
    """Steps on record so far; safe to call while the run is being written."""
    path = run / keys.METRICS_FILE.format(branch=branch)
    return path.read_bytes().count(b"\n") if path.exists() else 0


def read_weights(run: Path, branch: str, step: int) -> dict[str, float]:
    """Norms of a checkpoint's trained weights: a number that moves with any of them."""
    from safetensors.torch import load_file

    folder = run / keys.CHECKPOINT_FOLDER.format(branch=branch, step=step)
    tensors = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    values = [tensor.double() for part in tensors for tensor in part.values()]
    return {
        "L1 norm": sum(value.abs().sum().item() for value in values),
        "L2 norm": sum(value.square().sum().item() for value in values) ** 0.5,
    }


def read_lineage(run: Path) -> list[dict[str, Any]]:
    """Branches in the order of their birth: names as given, parents as places in this list."""
    first: dict[str, dict[str, Any]] = {}
    for line in _lines(run / keys.LINEAGE_FILE):
        first.setdefault(line["branch"], line)
    names = list(first)
    return [
        {
            "parent": None if line["parent"] is None else names.index(line["parent"]),
            "fork step": line["fork_step"],
            "guided until": line["guide_until"],
        }
        for line in first.values()
    ]


def branch_names(run: Path) -> list[str]:
    """Today's names of the branches, in the order of their birth."""
    return list(dict.fromkeys(line["branch"] for line in _lines(run / keys.LINEAGE_FILE)))


def read_evals(run: Path) -> list[dict[str, Any]]:
    """Held-out evaluations, in the order in which they were made."""
    return [_picked(line, keys.EVAL_KEYS) for line in _lines(run / keys.EVALS_FILE)]


def read_guide(run: Path, name: str) -> dict[str, Any]:
    """Counts, prompts and trajectories of a guide cache."""
    folder = run / keys.GUIDE_FOLDER.format(name=name)
    groups = [group for line in _lines(folder / keys.GUIDE_FILES["samples"]) for group in line["groups"]]
    found = [rollout for group in groups for rollout in group["rollouts"]]
    return {
        **_picked(json.loads((folder / keys.GUIDE_FILES["info"]).read_text()), keys.GUIDE_INFO_KEYS),
        "asked": _digest([[line["prompt_id"], line["num_sampled"], line["num_correct"]] for line in groups]),
        "token ids": _digest([[line["prompt_id"], line["response_ids"]] for line in found]),
        "sum of log-probabilities": sum(_sum_of_column(line["behavior_logps"]) for line in found),
    }


def read_scores(run: Path) -> dict[str, Any]:
    """Q, V and S of the only scoring of a run: of later checkpoints, and of all candidates if others are among them."""
    (path,) = run.glob(keys.SCORES_FILES)
    (samples,) = run.glob(keys.SCORE_SAMPLES_FILES)
    found = json.loads(path.read_text())
    rows = [
        [
            _candidate_number(line["candidate"], found["learner_step"]),
            each["prompt_id"],
            each["slot"],
            each["response_ids"],
        ]
        for line in _lines(samples)
        for group in line["groups"]
        for each in group["rollouts"]
    ]
    scores = [entry for entry in found["scores"] if entry["candidate"] != keys.NO_GUIDE]
    later = [entry for entry in scores if entry["source"] == "checkpoint"]
    return {
        "checkpoints": [_picked(entry, keys.SCORE_KEYS) | _kinds_of_variance(entry) for entry in later],
        "sources": [_source(entry) for entry in scores] if len(later) < len(scores) else [],
        "no guide": [_picked(entry, keys.NO_GUIDE_KEYS) for entry in found["scores"] if entry not in scores],
        "sampled": {"responses": len(rows), "tokens": sum(len(row[3]) for row in rows), "token ids": _digest(rows)},
    }


def _candidate_number(candidate: str, learner_step: int) -> int:
    """Candidates are numbered in the digest: checkpoints by their step, the screening as -1."""
    return {"screening": -1, "self": learner_step}[candidate] if ":" not in candidate else int(candidate.split(":")[1])


def _source(entry: Mapping[str, Any]) -> dict[str, Any]:
    picked = _picked(entry, keys.SOURCE_KEYS)
    kind = {"checkpoint": "near"}.get(picked["kind"], picked["kind"])
    return picked | {"kind": kind, "tries": picked["samples"] / picked["prompts"]}


def read_moves(run: Path) -> list[dict[str, Any]]:
    """What AutoNPO decided, with the evidence."""
    moves = []
    for line in _lines(run / keys.MOVES_FILE):
        evidence = line["evidence"]
        moves.append(
            _picked(line, keys.MOVE_KEYS)
            | {"state": _picked(line["state"], keys.STATE_KEYS)}
            | {"evidence": _present(_picked(evidence, keys.EVIDENCE_KEYS))}
            | {"distances": [_picked(score, keys.DISTANCE_KEYS) for score in evidence.get("scores", ())]}
        )
    return moves


def read_probes(run: Path) -> list[dict[str, Any]]:
    """Responses of AutoNPO's probes; sorted, because the folders are named by a digest of settings."""
    paths = run.glob(keys.PROBE_FILES)
    probes = [_of_groups([group for line in _lines(path) for group in line["groups"]]) for path in paths]
    return sorted(probes, key=lambda probe: probe["token ids"])


def read_printed(lines: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What a command printed as JSON lines, without seconds; kinds that are not in `keys.LINES` are left out."""
    known = [(*keys.LINES[line[keys.LINE_KIND]], line) for line in lines if line[keys.LINE_KIND] in keys.LINES]
    return [{"kind": kind} | _picked(line, wanted) for kind, wanted, line in known]


def _rollouts_by_step(path: Path) -> dict[int, dict[str, Any]]:
    groups: dict[int, list[dict[str, Any]]] = {}
    for line in _lines(path):
        groups.setdefault(line["step"], []).append(line)
    return {step: _of_groups(found) for step, found in groups.items()}


def _of_groups(groups: list[dict[str, Any]]) -> dict[str, Any]:
    rollouts = [rollout for group in groups for rollout in group["rollouts"]]
    return {
        "prompts": _digest([group.get("prompt", group)["prompt_id"] for group in groups]),
        "token ids": _digest([rollout["response_ids"] for rollout in rollouts]),
        "sum of log-probabilities": sum(_sum_of_column(rollout["behavior_logps"]) for rollout in rollouts),
        "mixes": _counted(group.get("injection_status", "off") for group in groups),
        "sources": _counted(rollout["source"] for rollout in rollouts),
        "verdicts": _counted(rollout["verdict"] for rollout in rollouts),
    }


def _sum_of_column(column: str | None) -> float:
    return sum(float(number) for (number,) in struct.iter_unpack("<f", base64.b64decode(column or "")))


def _kinds_of_variance(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {"all kinds of V, sorted": sorted(entry["variances"].values())}


def _picked(line: Mapping[str, Any], wanted: Mapping[str, str]) -> dict[str, Any]:
    return {neutral: _worded(_value(line, today)) for neutral, today in wanted.items()}


def _value(line: Any, path: str) -> Any:
    for key in path.split("."):
        line = line.get(key)
    return line


def _present(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if value is not None}


def _worded(value: Any) -> Any:
    return keys.WORDS.get(value, value) if isinstance(value, str) else value


def _counted(words: Iterable[str | None]) -> dict[str, int]:
    return dict(sorted(Counter(str(_worded(word)) for word in words).items()))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, separators=(",", ":")).encode()).hexdigest()[:16]


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]
