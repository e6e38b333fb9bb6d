"""`graphcomp bench`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from graphcomp.cli.console import out_console, progress_shown
from graphcomp.cli.options import InputShapes, shapes_of
from graphcomp.errors import RecipeError


def bench_command(
    base: Annotated[Path, typer.Argument(help="ONNX file of the original")],
    new: Annotated[Path, typer.Argument(help="ONNX file of the compressed network")],
    provider: Annotated[
        str,
        typer.Option(
            "--provider", help="cpu, cuda, tensorrt or openvino; several, e.g. cpu,openvino, side by side"
        ),
    ] = "cpu",
    batch: Annotated[str, typer.Option("--batch", help="batch sizes, e.g. 1,8,32")] = "1",
    threads: Annotated[int, typer.Option("--threads", min=1)] = 1,
    runs: Annotated[int, typer.Option("--runs", min=1, help="runs of each model at most")] = 200,
    seconds: Annotated[
        float, typer.Option("--seconds", min=0.01, help="seconds a batch size at most")
    ] = 10.0,
    cuda_graphs: Annotated[
        bool, typer.Option("--cuda-graphs", help="record and replay launches on GPUs; not yet run on one")
    ] = False,
    precision: Annotated[
        str,
        typer.Option(
            "--precision", help="arithmetic of GPUs: fp32, fp16, bf16 (TensorRT); not yet run on one"
        ),
    ] = "fp32",
    input_shape: InputShapes = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="write the result as JSON, of several providers a list of results"),
    ] = None,
) -> None:
    """Time two ONNX files against each other: interleaved, with intervals, without silent fallback."""
    from graphcomp.base import write_text
    from graphcomp.runtime import asked_of, benchmark, format_table, probe, sweep_table

    batches, providers, shapes = _integers(batch, "--batch"), _providers(provider), shapes_of(input_shape)
    asked, kind = asked_of(providers), _precision(precision)
    graphs = {p: cuda_graphs and p in asked for p in providers}
    kinds: dict[Any, Any] = {p: kind if p in asked else "fp32" for p in providers}
    for one in providers:  # all of them before any is timed: none is left out in silence
        probe(one, threads, cuda_graphs=graphs[one], precision=kinds[one])
    with progress_shown() as progress:
        results = [
            benchmark(
                base, new, provider=one, batches=batches, threads=threads, runs=runs, seconds=seconds,
                cuda_graphs=graphs[one], precision=kinds[one], input_shapes=shapes, progress=progress,
            )
            for one in providers
        ]  # fmt: skip
    for result in results:
        out_console.print(format_table(result))
    if len(batches) > 1 or len(results) > 1:
        out_console.print(sweep_table(results))
    if json_file is not None:
        plain = [result.model_dump(mode="json") for result in results]
        write_text(json_file, json.dumps(plain if len(plain) > 1 else plain[0], indent=2))


def _integers(text: str, option: str) -> tuple[int, ...]:
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or min(values) < 1:
        raise RecipeError(f"{option}: found {text!r}, expected positive integers such as 1,8,32")
    return values


def _precision(text: str) -> Any:
    if text not in ("fp32", "fp16", "bf16"):
        raise RecipeError(f"--precision: found {text!r}, expected fp32, fp16 or bf16")
    return text


def _providers(text: str) -> list[Any]:
    from graphcomp.runtime import PROVIDERS

    found = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not found or set(found) - set(PROVIDERS):
        raise RecipeError(f"--provider: found {text!r}, expected {', '.join(PROVIDERS)}, or several of them")
    return found
