"""AutoNPO's records to tables of text: its moves, what each probe found, why it kept still, what it all cost.

The evidence of a move is plain data, perhaps read back from a file that dropped what was no number: an absent figure
is `-`.

The moves of AutoNPO in words, one line each, and one or two figures as the reason.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from textwrap import shorten
from typing import Any

from npo_cli.report.table import Table, drop_empty_columns, format_count, format_number
from npo_cli.types.autonpo import NonTriggerSpan, ProbeResult, Transition
from npo_cli.types.costs import RunCosts

COUNTED = ("streak", "num_prompts_with_rollouts", "num_prompts")


def describe_transition(move: Transition) -> str:
    """`main step 120: warning: reward gained 0.004 where noise is 0.021, entropy fell 9 %`."""
    said = describe_reason(move)
    return f"{move.state.branch} step {move.step}: {move.event.replace('_', ' ')}{f': {said}' if said else ''}"


def describe_reason(move: Transition) -> str:
    """What the move rests on; empty where the event says it all."""
    evidence = move.evidence
    match move.event:
        case "warning" | "trigger" | "recovered" | "capped" | "moved" | "unmoved":
            return _signals(evidence)
        case "accepted" | "rejected":
            return _confirmation(evidence)
        case "guided" | "unguided":
            return (
                f"{evidence.get('num_found', '?')} of {evidence.get('num_prompts', '?')} mistakes answered, "
                f"{evidence.get('num_reused', '?')} by the probe"
                if "num_prompts" in evidence
                else _assumed(evidence)
            )
        case "rolled_back":
            return f"back to step {evidence['to_step']}" if "to_step" in evidence else _assumed(evidence)
        case "kept" | "reverted":
            return (
                f"held-out {evidence['replayed']:.3f} against {evidence['abandoned']:.3f}, difference "
                f"[{evidence['difference_low']:+.3f}, {evidence['difference_high']:+.3f}]"
                if "replayed" in evidence
                else ""
            )
        case "pushed":
            return f"the policy's own motion guides until step {evidence['until']}"
        case "missed" | "unpushed":
            return str(evidence.get("what", ""))
        case _:
            return ""


def _assumed(evidence: Mapping[str, Any]) -> str:
    return "assumed" if evidence.get("assumed") else ""


def _signals(evidence: Mapping[str, Any]) -> str:
    gain, margin, drop = (evidence.get(name) for name in ("reward_gain", "reward_margin", "entropy_drop"))
    if gain is None or margin is None or drop is None:
        return ""
    fell = f"entropy fell {drop:.1%}" if drop >= 0 else f"entropy rose {-drop:.1%}"
    return f"reward gained {gain:+.4f} (noise {margin:.4f}), {fell}"


def _confirmation(evidence: Mapping[str, Any]) -> str:
    if evidence.get("assumed"):
        return "assumed"
    if evidence.get("reason"):
        return str(evidence["reason"])
    chosen = next((score for score in evidence.get("scores", ()) if score.get("is_selected")), None)
    if chosen is None:
        return ""
    return (
        f"D* = {chosen['distance']}: Q {chosen['quality']:.3f} [{chosen['quality_low']:.3f}, "
        f"{chosen['quality_high']:.3f}], V {chosen['variance']:.3g}, best in {chosen['p_best']:.0%}"
    )


Evidence = Mapping[str, Any]

MAX_GAP = 5
"""A break of fewer steps does not interrupt a range that is shown."""
NUM_RANGES = 4
MAX_REASON_CHARS = 54
"""Letters of a reason that fit with the rest into a line of 100."""
PROFILES = ("argmax", "one_se", "faithful", "calibrated", "group2", "seq_kl")


def transitions_tables(moves: Sequence[Transition]) -> tuple[Table, ...]:
    """Every move with what it was based on, then what each probe found."""
    rows = tuple((str(one.step), one.event, one.state.branch, describe_evidence(one)) for one in moves)
    assumed = any(one.evidence.get("assumed") for one in moves)
    notes = ("assumed: a record cannot be probed, so every trigger counts as accepted.",) if assumed else ()
    title = "What AutoNPO would have done" if any(map(_is_rehearsed, moves)) else "What AutoNPO did"
    table = drop_empty_columns(
        Table(title=title, header=("step", "event", "branch", "based on"), rows=rows, notes=notes)
    )
    found = [(f"step {one.step} of {one.state.branch}", one.evidence) for one in moves if one.evidence.get("scores")]
    return (table, *(part for where, evidence in found for part in probe_tables(evidence, where=where)))


def _is_rehearsed(move: Transition) -> bool:
    return bool(move.evidence.get("rehearsed") or move.evidence.get("assumed"))


# What a move was based on


def describe_evidence(move: Transition) -> str:
    """The evidence of a move in one cell, `-` where the event says it all."""
    seen = move.evidence
    match move.event:
        case "started":
            told = _settings(seen.get("settings") or {})
        case "accepted" if seen.get("assumed"):
            told = f"assumed: D = {seen.get('distance')}, the largest that leads to a checkpoint"
        case "rolled_back" if seen.get("assumed"):
            told = f"assumed: to {_either(seen.get('to_steps', ()))}"
        case "rolled_back":
            told = f"{describe_reason(move)}, replayed until {move.state.until_step}"
        case "armed":
            told = f"the {'rest' if move.phase_before == 'COOLDOWN' else 'warm-up'} is over"
        case _ if move.state.phase == "COOLDOWN":
            # A probe's whole reason stands below its own table.
            reason = (
                shorten(describe_reason(move), MAX_REASON_CHARS, placeholder=" ...")
                if seen.get("scores")
                else describe_reason(move)
            )
            told = "; ".join(filter(None, (f"rest until {move.state.until_step}", reason)))
        case _:
            told = describe_reason(move)
    return told or "-"


def _either(steps: Sequence[int]) -> str:
    """`61, 71 or 81`."""
    return " or ".join(filter(None, (", ".join(map(str, steps[:-1])), *map(str, steps[-1:]))))


def _settings(settings: Evidence) -> str:
    """The trigger's settings by the symbols of AUTONPO.md, and how often and how far AutoNPO may act."""
    autonpo = settings.get("autonpo") or {}
    shown = (autonpo.get("trigger") or {}) | autonpo
    names = (("W", "window"), ("patience", "patience"), ("c_r", "max_reward_gain_se"), ("d_H", "min_entropy_drop"))
    rest = (("c_H", "min_entropy_drop_se"), ("warm-up", "warmup_steps"), ("rest", "cooldown_steps"))
    most = (("max", "max_interventions"),)
    push = (("push first for", "extrapolate"),) * bool(autonpo.get("extrapolate"))
    return ", ".join(f"{name} {shown[key]:g}" for name, key in (*names, *rest, *most, *push) if key in shown)


# What a probe found


def probes_tables(confirmations: Sequence[ProbeResult]) -> tuple[Table, ...]:
    """Q, V and S by distance, every V, and the mistakes by age, of each probe."""
    return tuple(table for one in confirmations for table in probe_tables(dataclasses.asdict(one), where="a probe"))


def probe_tables(found: Evidence, *, where: str) -> tuple[Table, ...]:
    """The same of one probe, whose evidence may have come from a file."""
    scores = sorted(found["scores"], key=lambda one: one["distance"])
    views = (_variances(scores),) if scores else ()
    return (_scores(found, scores, where=where), *views, _strata(found.get("strata", ())))


def _scores(found: Evidence, scores: Sequence[Evidence], *, where: str) -> Table:
    header = ("D", "mistakes", "Q", "V", "S = Q/V", "p(best)", "")
    rows = tuple(
        (
            *(str(one["distance"]), format_count(one.get("num_failed_prompts"))),
            *(_bounded(one, name) for name in ("quality", "variance", "signal")),
            *(format_number(one.get("p_best"), digits=2), "<- D*" if one.get("is_selected") else ""),
        )
        for one in scores
    )
    verdict = "accepted" if found.get("is_accepted") else f"rejected: {found.get('reason') or 'no reason recorded'}"
    asked = f"{format_count(found.get('num_prompts'))} prompts, {format_count(found.get('num_samples'))} samples"
    notes = [f"{verdict}.", f"{asked}, {format_count(found.get('num_tokens'))} tokens; intervals are 95 %."]
    others = found.get("chosen_by") or {}
    if others:
        ordered = sorted(others, key=lambda name: (PROFILES.index(name) if name in PROFILES else len(PROFILES), name))
        notes.append("D by rule and profile: " + ", ".join(f"{name} {others[name]}" for name in ordered) + ".")
    return Table(title=f"Rollback distances, {where}", header=header, rows=rows, notes=tuple(notes))


def _variances(scores: Sequence[Evidence]) -> Table:
    """V from both sides; the two agree where their intervals overlap."""
    header = ("D", "asked", "V forward", "V backward", "agree", "tail", "KL/token", "KL/sequence", "on record")
    words = {None: "-", True: "yes", False: "NO"}
    rows = tuple(
        (
            *(str(one["distance"]), format_count(one.get("num_probed"))),
            *(format_number(one.get("variance_forward")), format_number(one.get("variance_backward"))),
            words[one.get("variances_agree")],
            "HEAVY" if one.get("heavy_tail") else "",
            *(format_number(one.get("kl_per_token"), digits=4), format_number(one.get("kl_per_sequence"))),
            format_count(one.get("num_backward")),
        )
        for one in scores
    )
    kind = scores[0].get("variance_kind", "V")
    notes = ("forward: samples of now, seen by the old policy; backward: samples on record, seen by that of now.",)
    return drop_empty_columns(Table(title=f"V from both sides, {kind}", header=header, rows=rows, notes=notes))


def _strata(strata: Sequence[Evidence]) -> Table:
    header = ("age", "mistakes", "asked", "samples", "correct", "pass@1")
    rows = tuple(
        (
            f"{one['min_age']}-{one['max_age'] - 1}",
            *(
                format_count(one.get(name))
                for name in ("num_failed_prompts", "num_probed", "num_samples", "num_correct")
            ),
            _bounded(one, "quality"),
        )
        for one in strata
    )
    return Table(title="Mistakes by age in steps", header=header, rows=rows)


def _bounded(one: Evidence, name: str) -> str:
    """`0.500 [0.400, 0.600]`, or as much of it as there is."""
    value, low, high = (one.get(key) for key in (name, f"{name}_low", f"{name}_high"))
    return "-" if value is None else f"{format_number(value)} [{format_number(low)}, {format_number(high)}]"


# Why nothing happened, and what it cost


def no_trigger_tables(stretches: Sequence[NonTriggerSpan]) -> tuple[Table, ...]:
    """Each reason with its steps, most frequent first."""
    reasons: dict[str, list[NonTriggerSpan]] = {}
    for one in stretches:
        reasons.setdefault(one.reason, []).append(one)
    totals = {reason: sum(one.num_steps for one in some) for reason, some in reasons.items()}
    rows = tuple(
        (reason, format_count(totals[reason]), REASON_MEANINGS.get(reason, ""), _ranges(reasons[reason]))
        for reason in sorted(totals, key=lambda reason: -totals[reason])
    )
    header = ("why not", "steps", "meaning", "where")
    notes = (f"Ranges run on over breaks of fewer than {MAX_GAP} steps; the counts are exact.",)
    return (Table(title="Steps without a trigger", header=header, rows=rows, notes=notes),)


REASON_MEANINGS: Mapping[str, str] = {
    "warming_up": "before autonpo.trigger.warmup_steps",
    "replaying": "in a replay",
    "resting": "in a cooldown",
    "no_signal": "reward or entropy missing",
    "short_history": "fewer than autonpo.trigger.window yet",
    "rising": "reward still rises",
    "entropy_level": "entropy falls too little",
    "streak": "both hold, too briefly",
    "waiting": "warned, no checkpoint yet",
    "capped": "autonpo.max_interventions is reached",
}


def _ranges(stretches: Sequence[NonTriggerSpan]) -> str:
    """`41-92, 101-161`: breaks shorter than a flicker are closed, and of many ranges the longest are kept."""
    closed: list[tuple[int, int]] = []
    for one in sorted(stretches, key=lambda one: one.first_step):
        if closed and one.first_step - closed[-1][1] <= MAX_GAP:
            closed[-1] = (closed[-1][0], max(closed[-1][1], one.last_step))
        else:
            closed.append((one.first_step, one.last_step))
    kept = sorted(sorted(closed, key=lambda span: span[0] - span[1])[:NUM_RANGES])
    rest = f" and {len(closed) - len(kept)} more" if len(closed) > len(kept) else ""
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in kept) + rest


def account_tables(accounts: Sequence[RunCosts]) -> tuple[Table, ...]:
    """Everything a run executed, a column for each branch that it is seen from."""
    lines: tuple[tuple[str, Callable[[RunCosts], str]], ...] = (
        ("logical step", lambda one: format_count(one.step)),
        ("optimiser updates", lambda one: format_count(one.updates)),
        ("training tokens", lambda one: format_count(one.training_tokens)),
        ("probe tokens", lambda one: format_count(one.probe_tokens)),
        ("guide tokens", lambda one: format_count(one.guide_tokens)),
        ("judge tokens", lambda one: format_count(one.acceptance_test_tokens)),
        ("abandoned tokens", lambda one: format_count(one.abandoned_tokens)),
        ("all tokens", lambda one: format_count(one.tokens)),
        ("wall clock, s", lambda one: f"{one.seconds:,.1f}" if one.seconds > 0 else "-"),
        ("interventions", lambda one: format_count(one.num_interventions)),
        ("rejections", lambda one: format_count(one.num_rejections)),
    )
    rows = tuple((name, *(told(one) for one in accounts)) for name, told in lines)
    header = ("everything executed", *(one.branch for one in accounts))
    notes = (
        "judge: held-out tests that decided which branch goes on; other evaluations are nobody's cost.",
        "abandoned: steps that are not on the branch's line.",
    )
    return (Table(title="Account", header=header, rows=rows, notes=notes),)


AUTONPO_TABLES: Mapping[type, Callable[[Sequence[Any]], tuple[Table, ...]]] = {
    Transition: transitions_tables,
    ProbeResult: probes_tables,
    NonTriggerSpan: no_trigger_tables,
    RunCosts: account_tables,
}
"""How each kind of record is tabulated, in the order in which kinds are shown."""
