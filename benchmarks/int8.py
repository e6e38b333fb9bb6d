"""8 bit files side by side: ONNX Runtime's own quantizer, with and without `reduce_range`, and graphcomp's.

    graphcomp compile models:resnet20 --weights W --passes fold-bn --data "$DATA" --out dense
    python benchmarks/int8.py dense/model.onnx --data "$DATA" --limit 2000

Every file is made of the same float file and the same 256 calibration samples. Accuracy is a paired
difference to the float file on the same images; signal to noise is that of the logits on them; speed is the
ratio of median times, files loaded in turn, at batch 1, one thread. `worst layer` is how far a fused layer
is from itself as written, in steps of its output, on samples and on inputs of 0 and 255: more than 1 is
saturation.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

from graphcomp import load_data, quantize_onnx
from graphcomp.data import Split
from graphcomp.measure import paired_difference
from graphcomp.onnx.quantization import checks
from graphcomp.onnx.quantization.layers import find_layers
from graphcomp.onnx.quantization.quantize import SAMPLES
from graphcomp.runtime import onnxfile
from graphcomp.runtime.bench import ratio_interval
from graphcomp.runtime.turns import in_turn, is_busy

BATCH = 16
Feeds = dict[str, NDArray[Any]]
FORMS = {
    "ORT defaults": {"activation_type": QuantType.QInt8, "per_channel": False},
    "ORT u8 per channel": {"activation_type": QuantType.QUInt8, "per_channel": True},
    "ORT reduce_range": {"activation_type": QuantType.QUInt8, "per_channel": True, "reduce_range": True},
}


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """Samples as ONNX Runtime's calibrator asks for them."""

    def __init__(self, batches: Sequence[Feeds]) -> None:
        self._rest: Iterator[Feeds] = iter(batches)

    def get_next(self) -> Feeds | None:
        """One batch; None behind the last."""
        return next(self._rest, None)


def batches_of(split: Split, name: str) -> list[Feeds]:
    """All samples; the last batch may be smaller."""
    return [{name: x.numpy()} for x, _ in split.batches(BATCH)]


def measure(file: Path, data: str, limit: int, seconds: float, folder: Path) -> list[dict[str, Any]]:
    """One row a file."""
    read = onnxfile.read(file)
    (source,) = read.inputs
    shape = tuple(int(n or 0) for n in source.shape[1:])
    samples = load_data(data, input_shape=shape, seed=0)
    calibration, test = samples.train.spread(SAMPLES), samples.eval.spread(limit)
    files = {"float32": file}
    for form, options in FORMS.items():
        files[form] = folder / f"{form.replace(' ', '-')}.onnx"
        reader = Reader(batches_of(calibration, source.name))
        quantize_static(file, files[form], reader, weight_type=QuantType.QInt8, **options)
    files["graphcomp"] = folder / "graphcomp.onnx"
    ours = quantize_onnx(file, files["graphcomp"], samples.train, faster_only=False)
    print(ours.model_dump_json(indent=1))
    feeds = batches_of(test, source.name)
    logits = {
        name: np.concatenate([y[0] for y in checks.run_all(path.read_bytes(), feeds)])
        for name, path in files.items()
    }
    times = in_turn(list(files.values()), runs=2000, seconds=seconds)
    layers, _ = find_layers(onnx.load(file))
    labels, busy = test.labels.numpy(), is_busy(times)
    rows = []
    for (name, path), taken in zip(files.items(), times, strict=True):
        right = logits[name].argmax(1) == labels
        base, new = ((t.cpu if busy else t.wall) for t in (times[0], taken))
        speed = ratio_interval(base, new)
        row: dict[str, Any] = {
            "file": name,
            "kB": path.stat().st_size / 1e3,
            "accuracy": float(right.mean()),
            "difference": paired_difference(logits["float32"].argmax(1) == labels, right).model_dump(),
            "snr_db": checks.snr([logits["float32"]], [logits[name]]),
            "ms": float(np.median(new)),
            "speed": speed.model_dump(),
            "clock": "CPU" if busy else "wall",
        }
        if name != "float32":
            quantised = onnx.load(path)
            steps = checks.errors_by_layer(quantised, layers, feeds[0])
            _, left = checks.census(quantised, layers)
            row |= {"worst layer": max(steps.values()), "checked": len(steps), "in float": len(left)}
            row["wrong layers"] = sum(s > 1 for s in steps.values())
        rows.append(row)
    return rows


def main() -> None:
    """Measure one file and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--data", required=True, help="as of `graphcomp compile`")
    parser.add_argument("--limit", type=int, default=2000, help="test images")
    parser.add_argument("--seconds", type=float, default=30.0, help="of timing, for all files together")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(asked.file, asked.data, asked.limit, asked.seconds, Path(folder))
    print(
        f"{asked.limit} images:\n\n| file | kB | top-1 | difference | logits SNR | speed | wrong | in float |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        d, s = row["difference"], row["speed"]
        print(
            f"| {row['file']} | {row['kB']:.0f} | {row['accuracy']:.2%} "
            f"| {100 * d['value']:+.2f} ({100 * d['low']:+.2f} to {100 * d['high']:+.2f}) "
            f"| {row['snr_db']:.1f} dB | {s['value']:.2f} ({s['low']:.2f} to {s['high']:.2f}) "
            f"| {row.get('wrong layers', 0)} of {row.get('checked', 0)} | {row.get('in float', 0)} |"
        )
    if asked.json:
        asked.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
