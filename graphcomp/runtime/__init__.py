"""ONNX Runtime and this machine: targets, sessions, timings."""

from graphcomp.runtime import doctor, onnxfile
from graphcomp.runtime.bench import (
    BUSY,
    RACE_LOADS,
    benchmark,
    check_inputs,
    format_table,
    race,
    random_inputs,
    sweep_table,
)
from graphcomp.runtime.doctor import cores, diagnose, environment, render
from graphcomp.runtime.kernel import ACTIVATIONS, Kernel, Timer, measure, race_timer
from graphcomp.runtime.onnxfile import NodeWork, OnnxFile, node_work
from graphcomp.runtime.session import HEAVY, PROVIDERS, OpenSession, Provider, open_session, probe, run_errors
from graphcomp.runtime.targets import TARGETS, Target, find_target

__all__ = [
    "ACTIVATIONS",
    "BUSY",
    "HEAVY",
    "Kernel",
    "NodeWork",
    "OnnxFile",
    "OpenSession",
    "PROVIDERS",
    "Provider",
    "RACE_LOADS",
    "TARGETS",
    "Target",
    "Timer",
    "benchmark",
    "check_inputs",
    "cores",
    "diagnose",
    "doctor",
    "environment",
    "find_target",
    "format_table",
    "measure",
    "node_work",
    "onnxfile",
    "open_session",
    "probe",
    "race",
    "race_timer",
    "random_inputs",
    "render",
    "run_errors",
    "sweep_table",
]
