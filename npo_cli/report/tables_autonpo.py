"""AutoNPO's records as text: one line per transition, and tables of transitions, probes, non-triggers and costs.

The evidence of a transition is plain data, perhaps read back from a file in which non-finite numbers are absent: an
absent number is shown as `-`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from textwrap import shorten
from typing import Any

from npo_cli.report.table import Table, drop_empty_columns, format_count, format_number
from npo_cli.types.autonpo import NonTriggerSpan, ProbeResult, Transition
from npo_cli.types.costs import RunCosts

Evidence = Mapping[str, Any]

MAX_GAP = 5
"""A gap of at most this many steps does not split a range that is shown."""
MAX_RANGES = 4
MAX_REASON_CHARS = 54
"""Characters of a reason that fit with the other columns into 100."""
PROFILES = ("argmax", "one_se", "faithful", "calibrated", "group2", "seq_kl")


# Transitions


def describe_transition(transition: Transition) -> str:
    """`main step 120: warning: reward gained +0.0040 (noise 0.0210), entropy fell 9.0%`."""
    reason = describe_reason(transition)
    name = transition.event.replace("_", " ")
    return f"{transition.state.branch} step {transition.step}: {name}{f': {reason}' if reason else ''}"


def describe_reason(transition: Transition) -> str:
    """What the transition rests on; empty if its name says it all."""
    evidence = transition.evidence
    if evidence.get("assumed"):
        what = f"{evidence['num_steps']} steps" if "num_steps" in evidence else evidence.get("rung")
        return f"assumed: {what}" if what else "assumed"
    match transition.event:
        case "warning" | "trigger" | "recovered" | "limit_reached":
            return _describe_signals(evidence)
        case "probe_accepted" | "probe_rejected":
            return _describe_probe(evidence)
        case "guide_built" | "guide_empty":
            return (
                f"{evidence.get('num_prompts_with_rollouts', '?')} of {evidence.get('num_prompts', '?')} failed "
                f"prompts have a guide, {evidence.get('num_reused', '?')} from the probe"
            )
        case "rolled_back":
            return f"back to step {evidence.get('to_step', '?')}"
        case "replay_accepted" | "replay_rejected":
            return _describe_test(evidence)
        case "prerequisite_missing":
            return str(evidence.get("reason", ""))
        case _:
            return _describe_rung(transition)


def _describe_signals(evidence: Evidence) -> str:
    gain, margin, drop = (evidence.get(name) for name in ("reward_gain", "reward_margin", "entropy_drop"))
    if gain is None or margin is None or drop is None:
        return ""
    fell = f"entropy fell {drop:.1%}" if drop >= 0 else f"entropy rose {-drop:.1%}"
    return f"reward gained {gain:+.4f} (noise {margin:.4f}), {fell}"


def _describe_rung(transition: Transition) -> str:
    """What a transition of the ladder rests on; empty for any other."""
    evidence = transition.evidence
    match transition.event:
        case "rung_refused" | "rung_chosen" | "window_done":
            return ": ".join(filter(None, (evidence.get("rung"), _describe_forecast(evidence))))
        case "early_bootstrap" if evidence.get("rung"):
            return f"{evidence['rung']} of {evidence['scout_steps']} steps from step {transition.step}"
        case "scout_trained":
            return f"{evidence['scout']}, {evidence['num_steps']} steps, {format_count(evidence['num_tokens'])} tokens"
        case "rung_applied":
            to_step, until = evidence["to_step"], evidence["until_step"]
            back = f", back to step {to_step}" if to_step < transition.step else ""
            return f"{evidence['rung']}{back}, window until {until}"
        case "rung_measured":
            return _describe_effect(evidence)
        case _:
            return ""


def _describe_forecast(evidence: Evidence) -> str:
    """Why a rung is refused, or what it is expected to be worth; empty without a forecast."""
    if evidence.get("reason"):
        return str(evidence["reason"])
    if evidence.get("value") is None:
        return ""
    basis = "untried" if evidence["basis"] == "untried" else f"{evidence['num_measured']} measured"
    return f"value {evidence['value']:.2f}, {basis}"


def _describe_effect(evidence: Evidence) -> str:
    return (
        f"{evidence['rung']}: accuracy {evidence['accuracy']:.3f}, expected {evidence['accuracy_expected']:.3f} "
        f"[{evidence['effect_low']:+.3f}, {evidence['effect_high']:+.3f}] at a cost of {evidence['cost']:.1f} steps: "
        f"value {evidence['value']:.2f}"
    )


def _describe_probe(evidence: Evidence) -> str:
    if evidence.get("reason"):
        return str(evidence["reason"])
    selected = next((score for score in evidence.get("scores", ()) if score.get("is_selected")), None)
    if selected is None:
        return ""
    is_net = selected.get("quality_net") is not None
    name = "quality_net" if is_net else "quality"
    parts = [
        f"D* = {selected['distance']}: Q {'net ' if is_net else ''}{selected[name]:.3f} "
        f"[{selected[f'{name}_low']:.3f}, {selected[f'{name}_high']:.3f}]",
        f"V {selected['variance']:.3g}",
    ]
    if selected.get("value") is not None:
        parts.append(f"{selected['steps_saved']:.1f} steps saved for {selected['price']:.1f}")
    ages = [one for one in evidence.get("strata", ()) if one.get("num_probed")]
    if len(ages) > 1:
        parts.append("Q by age " + " ".join(f"{_format_age(one)}: {one['quality']:.3f}" for one in ages))
    return ", ".join(parts)


def _format_age(stratum: Evidence) -> str:
    return f"{stratum['min_age']}-{stratum['max_age'] - 1}"


def _describe_test(evidence: Evidence) -> str:
    if "replayed_accuracy" not in evidence:
        return ""
    return (
        f"held-out accuracy {evidence['replayed_accuracy']:.3f}, before {evidence['abandoned_accuracy']:.3f}, "
        f"difference [{evidence['difference_low']:+.3f}, {evidence['difference_high']:+.3f}]"
    )


def transitions_tables(transitions: Sequence[Transition]) -> tuple[Table, ...]:
    """Every transition with what it rests on, then the result of each probe."""
    rows = tuple((str(one.step), one.event, one.state.branch, describe_evidence(one)) for one in transitions)
    assumed = any(one.evidence.get("assumed") for one in transitions)
    notes = ("assumed: recorded metrics cannot be probed, so every trigger counts as accepted.",) if assumed else ()
    is_simulated = assumed or any(one.evidence.get("simulated") for one in transitions)
    title = "What AutoNPO would have done" if is_simulated else "What AutoNPO did"
    table = drop_empty_columns(
        Table(title=title, header=("step", "event", "branch", "based on"), rows=rows, notes=notes)
    )
    probes = [
        (f"step {one.step} of {one.state.branch}", one.evidence) for one in transitions if one.evidence.get("scores")
    ]
    probe_parts = (part for title, evidence in probes for part in probe_tables(evidence, where=title))
    return (table, *rung_tables(transitions), *probe_parts)


SHORT_RUNG_COLUMNS = ("step", "rung", "window", "cost", "value")


def rung_tables(transitions: Sequence[Transition], *, is_short: bool = False) -> tuple[Table, ...]:
    """Every rung that was applied, what it was expected to be worth and what it was worth; nothing without one.
    `is_short`: for a narrow terminal."""
    rows: list[tuple[str, ...]] = []
    forecast, applied = "-", None
    for one in transitions:
        if one.event == "rung_chosen":
            is_known = one.evidence.get("value_low") is not None
            forecast = _format_interval(one.evidence, "value") if is_known else "untried"
        elif one.event == "probe_accepted":
            forecast = format_number(one.evidence.get("value_split"), digits=2)
        elif one.event in ("rung_applied", "rolled_back") and one.state.rung is not None:
            window = f"{one.evidence['to_step'] + 1}-{one.evidence['until_step']}" if "to_step" in one.evidence else "-"
            applied = (str(one.step), one.state.rung, one.state.branch, window, forecast)
            rows.append((*applied, "-", "-", "-", "-"))
        elif one.event == "rung_measured" and applied is not None:
            names = ("effect", "partly_solved_gain", "value")
            effect, partly_solved, value = (_format_interval(one.evidence, name) for name in names)
            rows[-1] = (*applied, effect, partly_solved, format_number(one.evidence["cost"], digits=1), value)
    if not rows:
        return ()
    header = ("step", "rung", "branch", "window", "forecast", "effect", "partly solved", "cost", "value")
    if is_short:
        places = [header.index(name) for name in SHORT_RUNG_COLUMNS]
        kept = tuple(tuple(row[place] for place in places) for row in rows)
        notes = ("value: 1 + steps saved / cost, above 1 where it paid; --full shows the effect.",)
        return (
            drop_empty_columns(Table(title="Rungs of the ladder", header=SHORT_RUNG_COLUMNS, rows=kept, notes=notes)),
        )
    notes = (
        "effect: on-policy accuracy after the window, minus the trend before the trigger at equal cost; partly solved: "
        "share of partly solved groups in the window, minus its trend.",
        "cost: in steps of the time before; value: 1 + steps saved / cost, above 1 where it paid; intervals are 95 %.",
    )
    return (drop_empty_columns(Table(title="Rungs of the ladder", header=header, rows=tuple(rows), notes=notes)),)


def describe_evidence(transition: Transition) -> str:
    """What a transition rests on, in one cell; `-` if its name says it all."""
    evidence, until = transition.evidence, transition.state.until_step
    match transition.event:
        case "started":
            text = _describe_settings(evidence.get("settings") or {})
        case "probe_accepted" if evidence.get("assumed") and not transition.state.is_early:
            text = f"assumed: D = {evidence.get('distance')}, the largest that reaches a checkpoint"
        case "rolled_back" if evidence.get("assumed"):
            text = f"assumed: to {_join_alternatives(evidence.get('to_steps', ()))}"
        case "rolled_back":
            text = f"{describe_reason(transition)}, replay until {until}"
        case "rung_measured":
            text = describe_reason(transition)
        case "armed":
            text = f"end of the {'cooldown' if transition.phase_before == 'COOLDOWN' else 'warm-up'}"
        case _ if transition.state.phase == "COOLDOWN":
            reason = describe_reason(transition)
            # The whole reason of a probe stands below its own table.
            if evidence.get("scores"):
                reason = shorten(reason, MAX_REASON_CHARS, placeholder=" ...")
            text = "; ".join(filter(None, (f"cooldown until {until}", reason)))
        case _:
            text = describe_reason(transition)
    return text or "-"


def _join_alternatives(steps: Sequence[int]) -> str:
    """`61, 71 or 81`."""
    return " or ".join(filter(None, (", ".join(map(str, steps[:-1])), *map(str, steps[-1:]))))


def _describe_settings(settings: Evidence) -> str:
    """The trigger's settings by their symbols, the cooldown, and the limit of interventions."""
    autonpo = settings.get("autonpo") or {}
    values = (autonpo.get("trigger") or {}) | autonpo
    names = (
        *(("W", "window"), ("patience", "patience"), ("c_r", "max_reward_gain_se"), ("d_H", "min_entropy_drop")),
        *(("c_H", "min_entropy_drop_se"), ("warm-up", "warmup_steps"), ("cooldown", "cooldown_steps")),
        ("max", "max_interventions"),
    )
    return ", ".join(f"{name} {values[key]:g}" for name, key in names if key in values)


# Probes


def probes_tables(results: Sequence[ProbeResult]) -> tuple[Table, ...]:
    """Q, V and S by distance, V from both directions, and failed prompts by age, of each probe."""
    return tuple(table for one in results for table in probe_tables(dataclasses.asdict(one), where="a probe"))


def probe_tables(result: Evidence, *, where: str) -> tuple[Table, ...]:
    """The tables of one probe, whose result may have been read from a file."""
    scores = sorted(result["scores"], key=lambda score: score["distance"])
    drift = (_drift_table(scores),) if scores else ()
    return (_distances_table(result, scores, where=where), *drift, _strata_table(result.get("strata", ())))


def _distances_table(result: Evidence, scores: Sequence[Evidence], *, where: str) -> Table:
    header = ("D", "failed", "Q", "Q net", "V", "S", "p(best)", "steps saved", "price", "value", "")
    rows = tuple(
        (
            *(str(one["distance"]), format_count(one.get("num_failed_prompts"))),
            _format_interval(one, "quality"),
            _format_interval(one, "quality_net") if one.get("quality_net") is not None else "-",
            *(_format_interval(one, name) for name in ("variance", "signal")),
            *(format_number(one.get("p_best"), digits=2), format_number(one.get("steps_saved"), digits=1)),
            *(format_number(one.get("price"), digits=1), format_number(one.get("value"), digits=2)),
            "<- D*" if one.get("is_selected") else "",
        )
        for one in scores
    )
    accepted = result.get("is_accepted")
    verdict = "accepted" if accepted else f"rejected: {result.get('reason') or 'no reason recorded'}"
    counts = ", ".join(f"{format_count(result.get(f'num_{name}'))} {name}" for name in ("prompts", "samples", "tokens"))
    notes = [f"{verdict}.", f"{counts}; intervals are 95 %."]
    if result.get("quality_split") is not None:
        notes.append(f"{_describe_split(result)}.")
    selections = result.get("selection_by_profile") or {}
    if selections:
        names = sorted(selections, key=lambda name: (PROFILES.index(name) if name in PROFILES else len(PROFILES), name))
        notes.append("D by rule and profile: " + ", ".join(f"{name} {selections[name]}" for name in names) + ".")
    title = f"Rollback distances, {where}"
    return drop_empty_columns(Table(title=title, header=header, rows=rows, notes=tuple(notes)))


def _describe_split(result: Evidence) -> str:
    """What decided: the choice measured on the samples that did not make it, and why sampling ended."""
    ends = {"futility": "for futility", "success": "for success"}
    end = f"sampling ended {ends[result['stop']]}; " if result.get("stop") in ends else ""
    level = result.get("level") or 0.025
    return (
        f"{end}Q of the choice on the half that did not choose: {_format_interval(result, 'quality_split')}, "
        f"one-sided error {level:.2g}"
    )


def _drift_table(scores: Sequence[Evidence]) -> Table:
    """V from both directions; the two agree if their intervals overlap."""
    header = ("D", "probed", "V forward", "V backward", "agree", "tail", "KL/token", "KL/sequence", "recorded")
    words = {None: "-", True: "yes", False: "NO"}
    rows = tuple(
        (
            *(str(one["distance"]), format_count(one.get("num_probed"))),
            *(format_number(one.get("variance_forward")), format_number(one.get("variance_backward"))),
            words[one.get("variances_agree")],
            "HEAVY" if one.get("has_heavy_tail") else "",
            *(format_number(one.get("kl_per_token"), digits=4), format_number(one.get("kl_per_sequence"))),
            format_count(one.get("num_backward_samples")),
        )
        for one in scores
    )
    kind = scores[0].get("variance_kind", "V")
    notes = (
        "forward: the current policy's samples, scored by the old policy; backward: the old policy's recorded "
        "rollouts, scored by the current policy.",
    )
    return drop_empty_columns(Table(title=f"V in both directions, {kind}", header=header, rows=rows, notes=notes))


def _strata_table(strata: Sequence[Evidence]) -> Table:
    header = ("age", "failed", "probed", "samples", "correct", "pass@1")
    counts = ("num_failed_prompts", "num_probed", "num_samples", "num_correct")
    rows = tuple(
        (
            _format_age(one),
            *(format_count(one.get(name)) for name in counts),
            _format_interval(one, "quality"),
        )
        for one in strata
    )
    return Table(title="Failed prompts by age in steps", header=header, rows=rows)


def _format_interval(one: Evidence, name: str) -> str:
    """`0.500 [0.400, 0.600]`, or `-` if absent."""
    value, low, high = (one.get(key) for key in (name, f"{name}_low", f"{name}_high"))
    return "-" if value is None else f"{format_number(value)} [{format_number(low)}, {format_number(high)}]"


# Steps without a trigger


def no_trigger_tables(spans: Sequence[NonTriggerSpan]) -> tuple[Table, ...]:
    """Each reason with its steps, most frequent first."""
    reasons: dict[str, list[NonTriggerSpan]] = {}
    for span in spans:
        reasons.setdefault(span.reason, []).append(span)
    totals = {reason: sum(span.num_steps for span in some) for reason, some in reasons.items()}
    rows = tuple(
        (reason, format_count(totals[reason]), REASON_MEANINGS.get(reason, ""), _format_ranges(reasons[reason]))
        for reason in sorted(totals, key=lambda reason: -totals[reason])
    )
    header = ("reason", "steps", "meaning", "where")
    notes = (f"Ranges include gaps of fewer than {MAX_GAP} steps; the counts are exact.",)
    return (Table(title="Steps without a trigger", header=header, rows=rows, notes=notes),)


REASON_MEANINGS: Mapping[str, str] = {
    "warmup": "before autonpo.trigger.warmup_steps",
    "replay": "in a replay",
    "window": "in the window of a rung",
    "cooldown": "in a cooldown",
    "no_signal": "reward or entropy missing",
    "short_history": "fewer than autonpo.trigger.window yet",
    "rising": "the reward still rises",
    "entropy_level": "the entropy falls too little",
    "short_streak": "fewer than autonpo.trigger.patience in a row",
    "no_checkpoint": "warning, but no checkpoint yet",
    "limit_reached": "autonpo.max_interventions is reached",
}


def _format_ranges(spans: Sequence[NonTriggerSpan]) -> str:
    """`41-92, 101-161`: short gaps are closed, and of many ranges the longest are shown."""
    closed: list[tuple[int, int]] = []
    for span in sorted(spans, key=lambda span: span.first_step):
        if closed and span.first_step - closed[-1][1] <= MAX_GAP:
            closed[-1] = (closed[-1][0], max(closed[-1][1], span.last_step))
        else:
            closed.append((span.first_step, span.last_step))
    shown = sorted(sorted(closed, key=lambda pair: pair[0] - pair[1])[:MAX_RANGES])
    rest = f" and {len(closed) - len(shown)} more" if len(closed) > len(shown) else ""
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in shown) + rest


# Costs


def account_tables(accounts: Sequence[RunCosts]) -> tuple[Table, ...]:
    """Everything a run executed, one column for each branch that it is seen from."""
    lines: tuple[tuple[str, Callable[[RunCosts], str]], ...] = (
        ("step", lambda one: format_count(one.step)),
        ("optimizer updates", lambda one: format_count(one.updates)),
        ("training tokens", lambda one: format_count(one.training_tokens)),
        ("probe tokens", lambda one: format_count(one.probe_tokens)),
        ("guide tokens", lambda one: format_count(one.guide_tokens)),
        ("acceptance-test tokens", lambda one: format_count(one.acceptance_test_tokens)),
        *(
            (("calibration tokens", lambda one: format_count(one.calibration_tokens)),)
            * any(one.calibration_tokens for one in accounts)
        ),
        *(
            (
                ("unused guide caches", lambda one: ", ".join(one.unused_guides) or "-"),
                ("their tokens", lambda one: format_count(one.unused_guide_tokens)),
            )
            * any(one.unused_guides for one in accounts)
        ),
        *((("scout tokens", lambda one: format_count(one.scout_tokens)),) * any(one.scout_tokens for one in accounts)),
        ("abandoned tokens", lambda one: format_count(one.abandoned_tokens)),
        ("all tokens", lambda one: format_count(one.tokens)),
        *(
            (("read by the teacher", lambda one: format_count(one.teacher_tokens)),)
            * any(one.teacher_tokens for one in accounts)
        ),
        ("wall clock, s", lambda one: f"{one.seconds:,.1f}" if one.seconds > 0 else "-"),
        ("interventions", lambda one: format_count(one.num_interventions)),
        ("rejections", lambda one: format_count(one.num_rejections)),
    )
    rows = tuple((name, *(value(one) for one in accounts)) for name, value in lines)
    header = ("everything executed", *(one.branch for one in accounts))
    notes = (
        "acceptance test: held-out samples that decided which branch continues; other evaluations are not charged.",
        "abandoned: steps outside the branch's ancestry.",
        *(("unused: no branch is charged with them.",) * any(one.unused_guides for one in accounts)),
    )
    return (Table(title="Costs", header=header, rows=rows, notes=notes),)


AUTONPO_TABLES: Mapping[type, Callable[[Sequence[Any]], tuple[Table, ...]]] = {
    Transition: transitions_tables,
    ProbeResult: probes_tables,
    NonTriggerSpan: no_trigger_tables,
    RunCosts: account_tables,
}
"""How each kind of record is tabulated, in the order in which kinds are shown."""
