"""8 bit files side by side: by ONNX Runtime, with and without `reduce_range`, by NNCF and by graphcomp.

    graphcomp compile models:resnet20 --weights W --passes fold-bn --data "$DATA" --out dense
    graphcomp compile models:resnet20 --weights W --passes "$SMALLER" --data "$DATA" --out small
    python benchmarks/int8.py dense/model.onnx --name ResNet-20 --data "$DATA"
    python benchmarks/int8.py small/model.onnx --name Smaller --dense dense/model.onnx --data "$DATA"
    python benchmarks/as_cpu.py avx2 benchmarks/int8.py dense/model.onnx --name "ResNet-20, AVX2" …
    python benchmarks/int8.py --render

With `as_cpu.py` all of it, of graphcomp `grid=pairs`, is as on a processor without VNNI. The rows of a
network are kept in `out/int8.json`; `--render` writes them into docs/results.md, where networks that it has
already stay as they are unless they are measured anew. Every file is made of the
same float file and the same calibration samples, 256 if not said. Accuracy is a paired difference to the
float file on the same images; signal to noise is that of the logits on them; speed is the ratio of median
times, files loaded in turn, one thread, against the float file and, with `--dense`, against that of the dense
network; with OpenVINO installed, there as well, against the float file's own time there, and only of files
that it computes as ONNX Runtime does. NNCF is compared where it is installed. `wrong` counts fused layers
that are more than one step of their output from themselves as written, on samples and on inputs of 0 and 255:
that is saturation. `in float` are layers with constant weights that the runtime did not fuse. Images without
labels (of networks with random weights) leave accuracy out.
"""

import argparse
import importlib.util
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from rows import DOCS, Row, Rows, table, where
from section import PART, read_parts, read_section, replace_section

from graphcomp import load_data, quantize_onnx
from graphcomp.data import Split
from graphcomp.errors import GraphcompError
from graphcomp.measure import paired_difference
from graphcomp.onnx.quantization import checks
from graphcomp.onnx.quantization.grids import GRIDS
from graphcomp.onnx.quantization.layers import find_layers
from graphcomp.onnx.quantization.quantize import SAMPLES
from graphcomp.runtime import Provider, onnxfile, open_session, random_inputs
from graphcomp.runtime.bench import ratio_interval
from graphcomp.runtime.openvino import require_agreement
from graphcomp.runtime.turns import in_turn, is_busy

BATCH = 16
Feeds = dict[str, NDArray[Any]]
FORMS = {
    "ORT defaults": {"activation_type": QuantType.QInt8, "per_channel": False},
    "ORT u8 per channel": {"activation_type": QuantType.QUInt8, "per_channel": True},
    "ORT reduce_range": {"activation_type": QuantType.QUInt8, "per_channel": True, "reduce_range": True},
}


BEGIN, END = "<!-- int8: begin, written by benchmarks/int8.py --render -->", "<!-- int8: end -->"
KERNELS = {
    None: "",
    "avx2": ", kernels for AVX2 (`as_cpu.py avx2`)",
    "avx512": ", kernels for AVX-512 without VNNI (`as_cpu.py avx512`)",
}
LOST, MOST_TIMES = 0.01, 1.5
"""Of top-1, that a file may lose, or so many times half of its interval."""


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """Samples as ONNX Runtime's calibrator asks for them."""

    def __init__(self, batches: Sequence[Feeds]) -> None:
        self._rest: Iterator[Feeds] = iter(batches)

    def get_next(self) -> Feeds | None:
        """One batch; None behind the last."""
        return next(self._rest, None)


def by_nncf(model: onnx.ModelProto, samples: list[Feeds]) -> onnx.ModelProto:
    """What NNCF makes of the same samples, with all else at its defaults."""
    import nncf  # type: ignore[import-not-found]

    made = nncf.quantize(model, nncf.Dataset(samples), subset_size=len(samples))
    assert isinstance(made, onnx.ModelProto)
    return made


def batches_of(split: Split, name: str, size: int = BATCH) -> list[Feeds]:
    """All samples; the last batch may be smaller."""
    return [{name: x.numpy()} for (x,), _ in split.batches(size)]


def measure(asked: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """One row a file."""
    file: Path = asked.file
    read = onnxfile.read(file)
    (source,) = read.inputs
    shape = tuple(int(n or 0) for n in source.shape[1:])
    samples = load_data(asked.data, input_shape=shape, seed=0)
    calibration, test = samples.train.spread(asked.samples), samples.eval.spread(asked.limit)
    files = {"float32": file}
    for form, options in FORMS.items():
        files[form] = folder / f"{form.replace(' ', '-')}.onnx"
        reader = Reader(batches_of(calibration, source.name))
        quantize_static(file, files[form], reader, weight_type=QuantType.QInt8, **options)
    if importlib.util.find_spec("nncf") is not None:
        files["NNCF"] = folder / "nncf.onnx"
        onnx.save(by_nncf(onnx.load(file), batches_of(calibration, source.name, 1)), files["NNCF"])
    files["graphcomp"] = folder / "graphcomp.onnx"
    ours = quantize_onnx(file, files["graphcomp"], samples.train, grid=asked.grid, count=asked.samples)
    if ours.path is None:  # it lost, and is shown all the same
        quantize_onnx(
            file, files["graphcomp"], samples.train, grid=asked.grid, count=asked.samples, faster_only=False
        )
    print(ours.model_dump_json(indent=1, exclude={"bench"}))
    feeds = batches_of(test, source.name)
    logits = {
        name: np.concatenate([y[0] for y in checks.run_all(path.read_bytes(), feeds)])
        for name, path in files.items()
    }
    layers, _ = find_layers(onnx.load(file))
    rows = []
    for name, path in files.items():
        row: dict[str, Any] = {
            "file": name,
            "kB": path.stat().st_size / 1e3,
            "load ms": load_ms(path),
            "snr_db": checks.snr([logits["float32"]], [logits[name]]),
        }
        if test.labelled:
            was, now = (logits[each].argmax(1) == test.labels.numpy() for each in ("float32", name))
            row |= {"accuracy": float(now.mean()), "difference": paired_difference(was, now).model_dump()}
        if name != "float32":
            quantised = onnx.load(path)
            steps = checks.errors_by_layer(quantised, layers, feeds[0])
            _, left = checks.census(quantised, layers)
            worst = max(steps.values(), default=0)
            row |= {"worst layer": worst, "checked": len(steps), "in float": len(left)}
            row["wrong layers"] = sum(s > 1 for s in steps.values())
        rows.append(row)
    rows[0]["images"] = len(test)
    add_times(rows, [*files.values(), *([asked.dense] if asked.dense else [])], asked)
    return rows


def load_ms(path: Path) -> float:
    """The median of five."""
    return float(np.median([open_session(path).load_seconds for _ in range(5)])) * 1e3


def add_times(rows: list[dict[str, Any]], files: list[Path], asked: argparse.Namespace) -> None:
    """Speeds of every file against the first and, where there is one more, the last."""
    timed: list[tuple[Provider, list[int]]] = [("cpu", list(range(len(files))))]
    if importlib.util.find_spec("openvino") is not None:
        there = [i for i, file in enumerate(files) if agrees(file)]
        if 0 in there:  # what is not measured there has no ratio
            timed.append(("openvino", there))
        else:
            print(f"{files[0]}: OpenVINO does not compute the float file, so nothing is timed there")
    for provider, numbers in timed:
        for batch in asked.batch:
            chosen = [files[i] for i in numbers]
            times = in_turn(chosen, provider=provider, batch=batch, runs=2000, seconds=asked.seconds)
            busy = is_busy(times)
            taken = {i: t.cpu if busy else t.wall for i, t in zip(numbers, times, strict=True)}
            for i in set(taken) & set(range(len(rows))):
                rows[i][f"{provider} {batch}"] = ratio_interval(taken[0], taken[i]).model_dump()
                rows[i][f"{provider} {batch} ms"] = float(np.median(taken[i]))
                if len(rows) in taken:
                    rows[i][f"{provider} {batch} of dense"] = ratio_interval(
                        taken[len(rows)], taken[i]
                    ).model_dump()
            rows[0][f"clock of {provider} {batch}"] = "CPU" if busy else "wall"


def agrees(file: Path) -> bool:
    """Whether OpenVINO computes what ONNX Runtime computes; says so if it does not."""
    read = onnxfile.read(file)
    feeds = random_inputs(read, 1, 0)
    shapes = {name: x.shape for name, x in feeds.items()}
    expected, written = (open_session(file, plain=plain).session.run(None, feeds) for plain in (False, True))
    try:
        found = open_session(file, "openvino", shapes=shapes).session.run(None, feeds)
        require_agreement(file.name, found, expected, written)
    except GraphcompError as error:
        print(error)
        return False
    return True


def interval(found: dict[str, float] | None) -> str:
    """`1.42 (1.36 to 1.51)`."""
    return f"{found['value']:.2f} ({found['low']:.2f} to {found['high']:.2f})" if found else ""


def shown(files: Sequence[Row]) -> str:
    """The table of one network."""
    first = files[0]
    speeds = [k for k in first if k.startswith(("cpu", "openvino")) and not k.endswith("ms")]
    labelled = "accuracy" in first
    rows = []
    for row in files:
        cells = {"file": row["file"], "kB": f"{row['kB']:.0f}", "load ms": f"{row['load ms']:.0f}"}
        if labelled:
            d = {} if row is first else row["difference"]
            cells["top-1"] = f"{row['accuracy']:.2%}"
            cells["difference"] = d and "{value:+.2f} ({low:+.2f} to {high:+.2f})".format(
                **{end: 100 * number for end, number in d.items()}
            )
        cells["logits SNR"] = "" if row is first else f"{row['snr_db']:.1f} dB"
        cells |= {name: interval(row.get(name)) for name in speeds}
        cells["wrong"] = f"{row['wrong layers']} of {row['checked']}" if row.get("checked") else ""
        cells["in float"] = "" if row is first else str(row["in float"])
        rows.append(cells)
    return table(list(rows[0]), [[str(cell or "") for cell in row.values()] for row in rows])


def missed(files: Sequence[Row]) -> str:
    """What graphcomp's file was to do and does not, a sentence."""
    by = {row["file"]: row for row in files}
    ours = by["graphcomp"]
    d = ours.get("difference")
    said = []
    if d and -d["value"] > max(LOST, MOST_TIMES * (d["high"] - d["low"]) / 2):
        said.append(f"loses {-100 * d['value']:.2f} points")
    if ours["worst layer"] > 1:
        said.append(f"a layer is {ours['worst layer']} steps off")
    for other in ("ORT defaults", "NNCF"):
        if other in by and by[other]["snr_db"] > ours["snr_db"]:
            said.append(f"{other}: {by[other]['snr_db']:.1f} dB, ours {ours['snr_db']:.1f}")
    if d and by["ORT defaults"]["accuracy"] > ours["accuracy"]:
        said.append("ORT's defaults classify more images rightly")
    slower = [k for k, v in ours.items() if isinstance(v, dict) and k[:3] in ("cpu", "ope") and v["high"] < 1]
    said += [f"slower than {'the dense float32' if k.endswith('dense') else 'float32'}: {k}" for k in slower]
    return f"Missed: {'; '.join(said) or 'nothing'}."


def render(rows: Rows) -> None:
    """Write the section of docs/results.md."""
    parts = read_parts(read_section(DOCS, BEGIN, END))
    for name, row in rows.found.items():
        parts[name] = (
            f"{row['samples']} images to calibrate, {row['images']:,} to test "
            f"({row['data'].partition(':')[0]}). {row['where']}, load {row['load']:.1f}"
            f"{KERNELS[row['as']]}. {missed(row['files'])}\n\n{shown(row['files'])}"
        )
    said = [
        BEGIN,
        "## 8 bits, network by network",
        "`benchmarks/int8.py` says how each column is measured. Speeds are ratios of times of files in turn, "
        "on one thread, of CPU time where the machine was busy; `cpu` is ONNX Runtime; empty where OpenVINO "
        "computes something else than it. Differences are paired, with 95 % intervals. Asked of graphcomp's "
        "file: at most 1 point lost, or 1.5 times half of the interval; no layer more than a step off; more "
        "signal to noise than ONNX Runtime's defaults and NNCF; never slower than float32. Where 8 bits are "
        "slower `quantize` ships the float file and says so.",
        *(f"{PART}{name}\n\n{text}" for name, text in parts.items()),
        END,
    ]
    replace_section(DOCS, BEGIN, END, "\n\n".join(said))


def main() -> None:
    """Measure one file and print its table, or render all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, nargs="?")
    parser.add_argument("--name", help="of the row; default: the file's")
    parser.add_argument("--dense", type=Path, help="float file of the network before it was compressed")
    parser.add_argument("--data", help="as of `graphcomp compile`")
    parser.add_argument("--grid", choices=GRIDS, help="of graphcomp's file; default: of this machine")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="to calibrate on")
    parser.add_argument("--limit", type=int, default=2000, help="test images")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="batch sizes")
    parser.add_argument(
        "--seconds", type=float, default=30.0, help="of timing a batch size, for all files together"
    )
    parser.add_argument("--render", action="store_true", help="write docs/results.md instead")
    asked = parser.parse_args()
    rows = Rows.load("int8")
    if asked.render:
        render(rows)
        return
    if asked.file is None or asked.data is None:
        parser.error("a file and --data are needed")
    kernels = os.environ.get("AS_CPU")
    if kernels is not None and asked.grid is None:
        asked.grid = "pairs"
    with tempfile.TemporaryDirectory() as folder:
        files = measure(asked, Path(folder))
    load = os.getloadavg()[0]
    row = {
        "files": files,
        "images": files[0].pop("images"),
        "samples": asked.samples,
        "data": asked.data,
        "load": load,
        "as": kernels,
    }
    row["where"] = where()
    rows.put(asked.name or str(asked.file), row)
    print(shown(files))
    print(missed(files))


if __name__ == "__main__":
    main()
