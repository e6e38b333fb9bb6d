"""Why a network is not as much faster as it is smaller."""

from graphcomp.explanation.explanation import TRACED_RUNS, TRACED_SECONDS, explain, explain_bench

__all__ = ["TRACED_RUNS", "TRACED_SECONDS", "explain", "explain_bench"]
