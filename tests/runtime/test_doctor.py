import re
import tomllib
from pathlib import Path

import pytest
from rich.console import Console

from graphcomp.errors import ProviderError
from graphcomp.runtime import doctor, machine
from graphcomp.runtime.providers import PROVIDERS


def test_environment_names_machine_and_versions() -> None:
    found = machine.environment()
    assert found.cores >= 1
    assert found.cpu
    assert found.versions.keys() >= {"torch", "torchvision", "onnx", "onnxscript", "onnx-ir", "numpy"}
    assert any(name.startswith("onnxruntime") for name in found.versions)


@pytest.mark.parametrize(
    ("name", "flags", "isa"),
    [
        ("x86_64", {"avx512f", "avx2"}, "avx512"),
        ("AMD64", {"avx2"}, "avx2"),
        ("x86_64", {"sse4_2"}, "other x86"),
        ("arm64", set(), "arm64-neon"),
        ("aarch64", {"asimd"}, "arm64-neon"),
        ("riscv64", set(), "other"),
    ],
)
def test_instruction_set(name: str, flags: set[str], isa: str) -> None:
    assert machine._classify(name, flags) == isa


@pytest.mark.parametrize(
    ("isa", "target"), [("avx512", "cpu-avx512"), ("avx2", "cpu-avx2"), ("arm64-neon", "cpu-avx2")]
)
def test_auto_target_follows_the_vectors(isa: str, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "instruction_set", lambda: isa)
    assert machine.auto_target() == target


def test_floors_are_those_of_pyproject() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    floors = {}
    for line in tomllib.loads(text)["project"]["dependencies"]:
        match = re.match(r"([\w-]+)>=(\d+)\.(\d+)", line)
        assert match is not None, line
        floors[match[1]] = (int(match[2]), int(match[3]))
    assert {name: floors[name] for name in machine.MINIMUM} == machine.MINIMUM


def test_every_provider_is_tried() -> None:
    names = [finding.name for finding in doctor.diagnose()]
    assert [name for name in names if name.startswith("provider")] == [
        "provider cpu",
        "provider cuda",
        "provider tensorrt",
        "provider openvino",
    ]
    assert {"onnxruntime", "instruction set", "GPU (torch)", "threads", "load", "torch"} <= set(names)


def test_accelerators_and_load_are_worth_a_word_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found or not: what is essential does not depend on what was found."""
    optional = {"provider cuda", "provider tensorrt", "provider openvino", "GPU (torch)", "threads", "load"}
    assert {finding.name for finding in doctor.diagnose() if not finding.essential} == optional

    def fail(name: str) -> None:
        raise ProviderError("none")

    monkeypatch.setattr(doctor, "probe", fail)
    assert [doctor._provider(name).essential for name in PROVIDERS] == [True, False, False, False]


def test_provider_that_fails_is_reported_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ProviderError(f"provider {name!r}: broken [sic]; mend it")

    monkeypatch.setattr(doctor, "probe", fail)
    found = doctor._provider("cuda")
    assert (found.ok, found.detail) == (False, "provider 'cuda': broken [sic]")
    assert found.advice.startswith("only needed to time on cuda")


def test_cpu_provider_really_ran() -> None:
    found = doctor._provider("cpu")
    assert found.ok
    assert "ran a convolution" in found.detail


@pytest.mark.parametrize(
    ("runtimes", "ok", "advice"),
    [
        ({"onnxruntime-gpu": "1.31.1"}, True, ""),
        ({}, False, "pip install onnxruntime-gpu"),
        ({"onnxruntime": "1.23.2"}, False, "pip install --upgrade 'onnxruntime>=1.24'"),
        (
            {"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.31.1"},
            False,
            "pip uninstall onnxruntime onnxruntime-gpu",
        ),
    ],
)
def test_runtime(runtimes: dict[str, str], ok: bool, advice: str) -> None:
    found = doctor._runtime(runtimes)
    assert found.ok is ok
    assert advice in found.advice
    assert (found.advice == "") is ok


@pytest.mark.parametrize(
    ("version", "ok"),
    [
        ("2.9.0", True),
        ("2.9", True),
        ("2.14.1+cu130", True),
        ("2.9.0.dev20250801+cu130", True),
        ("2.9rc1", True),
        ("3", True),
        ("2.8.1", False),
        ("2", False),
        ("1.99", False),
        ("odd", False),
    ],
)
def test_versions_compare_as_numbers(version: str, ok: bool) -> None:
    assert doctor._at_least(version, (2, 9)) is ok


def test_missing_package_says_how_to_install_it() -> None:
    found = doctor._package("no-such-package-anywhere", (1, 2))
    assert (found.ok, found.detail) == (False, "not installed")
    assert "no-such-package-anywhere>=1.2" in found.advice


@pytest.mark.parametrize(("contention", "ok"), [(1.0, True), (1.1, True), (1.5, False)])
def test_load(contention: float, ok: bool) -> None:
    found = doctor._load(contention)
    assert found.ok is ok
    assert ("CPU time" in found.advice) is not ok


def test_contention_is_wall_over_cpu() -> None:
    assert doctor._contention(0.02) >= 0.9


def test_render_shows_text_with_brackets() -> None:
    findings = [doctor.Finding("a", True, "found [x]"), doctor.Finding("b", False, "bad", "do [this]")]
    console = Console(width=100)
    with console.capture() as captured:
        console.print(doctor.render(findings))
    text = captured.get()
    assert "found [x]" in text
    assert "do [this]" in text
    assert re.search(r"no\s+│ b", text)
