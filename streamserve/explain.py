"""`streamserve config`: every setting and where it comes from; with --explain also what was left open and why it got its value.

Owns the table. Decisions are resolve()'s and the kernel registry's.
"""

import json
from dataclasses import asdict
from typing import Any

from streamserve.config import Config, shown_settings
from streamserve.flags import settings
from streamserve.resolve import Reason, Resolved


def run(config: Config, given: frozenset[str], *, explain: bool, as_json: bool) -> int:
    """Print the table. With `explain` the model is opened (its header, not its weights)."""
    rows = setting_rows(config, given)
    if not explain:
        print(json.dumps(rows, indent=1) if as_json else _table(rows, ("flag", "value", "origin")))
        return 0
    resolved, kernels = _decide(config)
    decisions = [asdict(reason) for reason in (*resolved.reasons, *kernels)]
    if as_json:
        memory = {name: getattr(resolved, name) for name in ("weight_bytes", "kv_bytes", "reserve_bytes", "free_bytes")}
        print(json.dumps({"settings": rows, "decisions": decisions, "memory": memory}, indent=1))
    else:
        print(_table(rows, ("flag", "value", "origin")))
        print(f"\nfor {resolved.served_model_name}:")
        print(_table(decisions, ("name", "value", "origin", "flag", "why")))
    return 0


def setting_rows(config: Config, given: frozenset[str]) -> list[dict[str, Any]]:
    """One row per setting: flag, value, origin ("flag", "default", or "open": decided when the model is known)."""
    rows = []
    shown = shown_settings(config)
    for setting in settings():
        name = setting.field.name
        value = getattr(getattr(config, setting.group), name)
        origin = "flag" if name in given else "open" if value is None and name in _DECIDED else "default"
        rows.append({"flag": setting.flag, "value": shown[name], "origin": origin})
    return rows


_DECIDED = frozenset(
    {
        "context_length",
        "max_total_tokens",
        "max_running_requests",
        "chunked_prefill_size",
        "max_decode_pause_ms",
        "threads",
        "served_model_name",
        "model_path",
    }
)


def _decide(config: Config) -> tuple[Resolved, tuple[Reason, ...]]:
    from streamserve import facts  # brings torch

    device = facts.find_device(config)
    checkpoint = facts.open_model(config)
    resolved, choices = facts.decide(config, checkpoint, device, facts.find_drafter(config, checkpoint, device))
    return resolved, facts.kernel_reasons(choices)


def _table(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> str:
    texts = [[_shown(row[column]) for column in columns] for row in rows]
    widths = [max(len(text[i]) for text in texts) for i in range(len(columns))]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in texts)


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return " ".join(value) or "-" if isinstance(value, (list, tuple)) else str(value)
