"""The moves of AutoNPO in words, one line each, and one or two figures as the reason."""

from collections.abc import Mapping
from typing import Any

from npo_cli.auto_records import Transition

COUNTED = ("streak", "num_found", "num_asked")


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
                f"{evidence.get('num_found', '?')} of {evidence.get('num_asked', '?')} mistakes answered, "
                f"{evidence.get('num_reused', '?')} by the probe"
                if "num_asked" in evidence
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
    gain, margin, drop = (evidence.get(name) for name in ("gain", "margin", "drop"))
    if gain is None or margin is None or drop is None:
        return ""
    fell = f"entropy fell {drop:.1%}" if drop >= 0 else f"entropy rose {-drop:.1%}"
    return f"reward gained {gain:+.4f} (noise {margin:.4f}), {fell}"


def _confirmation(evidence: Mapping[str, Any]) -> str:
    if evidence.get("assumed"):
        return "assumed"
    if evidence.get("reason"):
        return str(evidence["reason"])
    chosen = next((score for score in evidence.get("scores", ()) if score.get("chosen")), None)
    if chosen is None:
        return ""
    return (
        f"D* = {chosen['distance']}: Q {chosen['quality']:.3f} [{chosen['quality_low']:.3f}, "
        f"{chosen['quality_high']:.3f}], V {chosen['variance']:.3g}, best in {chosen['p_best']:.0%}"
    )
