"""The card that travels with a tuned model: whose voice, from what, how measured, what it must not be used for."""

from __future__ import annotations

from typing import Any


def model_card(record: dict[str, Any], stored: dict[str, Any] | None) -> str:
    """Markdown. `record` is model.json, `stored` evaluation.json if the model was evaluated."""
    consent = record["consent"]
    granted = f"granted by {consent['author'] or 'the author'}" if consent["granted"] else "not recorded"
    until = f", until {consent['until']}" if consent["until"] else ""
    lines = [
        f"# {record['name']}",
        "",
        f"A voice tuned with giong on top of `{record['base']}` (method `{record['method']}`).",
        "",
        f"- Consent to imitate: {granted}{until}.",
        f"- Default sampling: {', '.join(f'{name} {value}' for name, value in record['sampling'].items())}.",
        f"- Training run: {record['run']}.",
    ]
    if stored:
        arm = next((arm for arm in stored["evaluation"]["arms"] if arm["name"] == "fine_tuned"), None)
        if arm and arm["style_gap_closed"]:
            gap = arm["style_gap_closed"]
            lines.append(
                f"- Style gap closed: {gap['point']:.2f} [{gap['low']:.2f}, {gap['high']:.2f}], on {arm['num_replies']} test requests."
            )
        if arm:
            lines.append("- Gates: " + ", ".join(f"{gate['name']} {gate['status']}" for gate in arm["gates"]) + ".")
        if stored["verdict"]:
            lines.append(f"- Verdict: {stored['verdict']['decision']}. {stored['verdict']['reason']}")
    lines += ["", "Use it only as the consent allows. It writes in a style; it does not know facts.", ""]
    return "\n".join(lines)
