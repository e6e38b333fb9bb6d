"""Targets: by name, and `auto` for this machine."""

import pytest

from graphcomp.errors import RecipeError
from graphcomp.runtime import machine
from graphcomp.runtime.providers import PROVIDERS
from graphcomp.runtime.targets import TARGETS, find_target


def test_table() -> None:
    """The multiples that kernels compute anyway, by target."""
    assert {name: (t.provider, t.multiple) for name, t in TARGETS.items()} == {
        "cpu-avx512": ("cpu", 16),
        "cpu-avx2": ("cpu", 8),
        "cpu-avx2-int8": ("cpu", 16),
        "cpu-vnni-int8": ("cpu", 8),
        "openvino": ("openvino", 8),
        "openvino-avx2-int8": ("openvino", 16),
        "openvino-vnni-int8": ("openvino", 16),
        "cuda-fp16": ("cuda", 8),
        "cuda-tf32": ("cuda", 4),
        "tensorrt-int8": ("tensorrt", 16),
    }
    for name, target in TARGETS.items():
        assert target.name == name
        assert target.provider in PROVIDERS
        # Nothing is claimed that was not run.
        assert ("measured" in target.note) == (target.provider in ("cpu", "openvino"))


@pytest.mark.parametrize("name", TARGETS)
def test_by_name(name: str) -> None:
    assert find_target(name) is TARGETS[name]


@pytest.mark.parametrize(
    ("isa", "name"), [("avx512", "cpu-avx512"), ("avx2", "cpu-avx2"), ("other", "cpu-avx2")]
)
def test_auto(isa: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "instruction_set", lambda: isa)
    assert find_target("auto") is TARGETS[name]


@pytest.mark.parametrize(
    ("flags", "machine_name", "name"),
    [
        ({"avx2"}, "x86_64", "cpu-avx2-int8"),
        ({"avx2", "avx512f"}, "x86_64", "cpu-avx2-int8"),
        ({"avx2", "avx512f", "avx512_vnni"}, "x86_64", "cpu-vnni-int8"),
        ({"avx2", "avx_vnni"}, "AMD64", "cpu-vnni-int8"),
        (set(), "aarch64", "cpu-vnni-int8"),
    ],
)
def test_auto_for_8_bits(
    flags: set[str], machine_name: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_cpu_flags", lambda: frozenset(flags))
    monkeypatch.setattr(machine.platform, "machine", lambda: machine_name)
    assert find_target("auto", eight_bits=True) is TARGETS[name]


def test_names_of_float_targets_for_8_bits() -> None:
    """They do not say whether there is VNNI: the grid that saturates nowhere."""
    known = {f"{runtime}-{isa}-int8" for runtime in ("cpu", "openvino") for isa in ("avx2", "vnni")}
    assert {n for n, t in TARGETS.items() if t.saturates is not None} == {*known, "tensorrt-int8"}
    assert find_target("openvino", eight_bits=True) is TARGETS["openvino-avx2-int8"]
    for name in ("cpu-avx2", "cpu-avx512", "cpu-avx2-int8"):
        assert find_target(name, eight_bits=True) is TARGETS["cpu-avx2-int8"]
    assert find_target("cpu-vnni-int8", eight_bits=True) is TARGETS["cpu-vnni-int8"]
    for name in ("cuda-fp16", "cuda-tf32"):
        with pytest.raises(RecipeError, match=f"{name}' with quantize, .* expected auto, cpu-avx2-int8"):
            find_target(name, eight_bits=True)


@pytest.mark.parametrize("name", ["cpu", "", "AUTO", "cuda"])
def test_unknown(name: str) -> None:
    with pytest.raises(RecipeError) as caught:
        find_target(name)
    assert str(caught.value) == f"target: found {name!r}, expected one of auto, {', '.join(TARGETS)}"
