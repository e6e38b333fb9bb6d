"""ONNX Runtime and this machine: targets, sessions, timings."""

from graphcomp.runtime import external, onnxfile
from graphcomp.runtime.bench import benchmark
from graphcomp.runtime.doctor import diagnose, render
from graphcomp.runtime.inputs import check_inputs, random_inputs
from graphcomp.runtime.kernel import ACTIVATIONS, Kernel, Timer, measure, race_timer
from graphcomp.runtime.machine import adds_in_int16, cores, environment, memory
from graphcomp.runtime.onnxfile import NodeWork, OnnxFile, node_work
from graphcomp.runtime.precision import Precision
from graphcomp.runtime.providers import HEAVY, HOST, PROVIDERS, Provider, asked_of, run_errors
from graphcomp.runtime.session import OpenSession, open_session, probe
from graphcomp.runtime.tables import format_table, sweep_table
from graphcomp.runtime.targets import TARGETS, Target, find_target
from graphcomp.runtime.turns import BUSY, RACE_LOADS, race

__all__ = [
    "ACTIVATIONS",
    "BUSY",
    "HEAVY",
    "HOST",
    "Kernel",
    "NodeWork",
    "OnnxFile",
    "OpenSession",
    "PROVIDERS",
    "Precision",
    "Provider",
    "RACE_LOADS",
    "TARGETS",
    "Target",
    "Timer",
    "adds_in_int16",
    "asked_of",
    "benchmark",
    "check_inputs",
    "cores",
    "diagnose",
    "environment",
    "external",
    "find_target",
    "format_table",
    "measure",
    "memory",
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
