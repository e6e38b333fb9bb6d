"""What records of schema 1 looked like: they are read as those of today."""

from typing import Any

PLAN = ("name", "options", "summary", "kept", "evidence")
"""What a step repeated of its plan."""


def report(data: Any) -> Any:
    """A report, or an evaluation."""
    is_old = isinstance(data, dict) and data.get("schema_version") == 1
    return {**data, "schema_version": 2} if is_old else data


def step(data: Any) -> Any:
    """A step was flat, and had rows for its rounds, of which the first was the program as it came."""
    if not isinstance(data, dict) or "plan" in data:
        return data
    plan = {name: data[name] for name in PLAN if name in data}
    new = {k: v for k, v in data.items() if k not in (*PLAN, "plan_file", "rounds")} | {"plan": plan}
    if not data.get("rounds"):
        return new
    first, *rows = data["rounds"]
    kept = sum(row["kept"] for row in rows)
    return new | {"start": _snapshot(first), "rounds": [_round(row) for row in rows], "kept_rounds": kept}


def _round(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "index": row["number"] - 1,
        "plan": {name: row[name] for name in ("name", "summary", "evidence") if name in row},
        "drift": None,
        "after": _snapshot(row),
        **{k: row[k] for k in ("removed", "verify_error", "training", "seconds") if k in row},
    }


def snapshot(data: Any) -> Any:
    """A snapshot had an accuracy or an error."""
    if not isinstance(data, dict) or not data.keys() & {"accuracy", "error"}:
        return data
    rest = {k: v for k, v in data.items() if k not in ("accuracy", "error")}
    return rest | {"score": data.get("accuracy") or data.get("error")}


def score(data: Any) -> Any:
    """What it measured was the name of its value."""
    for name, measure in (("top1", "accuracy"), ("mae", "error")):
        if isinstance(data, dict) and name in data:
            return {"measure": measure, **{("value" if k == name else k): v for k, v in data.items()}}
    return data


def _snapshot(row: dict[str, Any]) -> dict[str, Any]:
    """Of parameters and buffers only those that are trained were counted."""
    known = {name: row[name] for name in ("params_trainable", "macs", "accuracy")}
    return {**known, "params_state": row["params_trainable"]}
