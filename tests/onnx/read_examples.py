# ruff: noqa: E501, N802 - a table reads better with one line a group
"""An example, or several, of every operator that is read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto

from tests.onnx.onnx_files import OPEN, make

N = OPEN
X4, X3, X2 = (N, 4, 6, 5), (N, 4, 7), (N, 6)
QKV = dict.fromkeys("qkv", (N, 2, 5, 3))


def weight(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed + len(shape)).normal(size=shape).astype(np.float32)


def ints(*numbers: int) -> NDArray[np.int64]:
    return np.array(numbers, np.int64)


@dataclass(frozen=True)
class Example:
    operator: str
    inputs: Mapping[str, Sequence[Any]] = field(default_factory=lambda: {"x": X4})
    constants: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)
    opset: int = 18
    outputs: int = 1
    kinds: Mapping[str, int] = field(default_factory=dict)
    order: Sequence[str] = ()
    low: float = -3.0
    high: float = 3.0

    @property
    def name(self) -> str:
        said = "-".join(f"{k}={v}" for k, v in self.attributes.items())
        shapes = "-".join("x".join(map(str, s)) for s in self.inputs.values())
        constants = "-".join(
            f"{k}{v.reshape(-1)[:4].tolist() if v.size < 5 else v.shape}" for k, v in self.constants.items()
        )
        return f"{self.operator}@{self.opset}-{shapes}-{said}-{constants}".replace(" ", "")

    def model(self) -> ModelProto:
        names = list(self.order or [*self.inputs, *self.constants])
        outputs = ["y", *(f"y{i}" for i in range(1, self.outputs))]
        node = onnx.helper.make_node(
            self.operator, names, outputs, name=f"the_{self.operator}", **self.attributes
        )
        return make([node], self.inputs, self.constants, outputs, opset=self.opset, kinds=self.kinds)

    def feeds(self, batch: int, seed: int = 0) -> dict[str, NDArray[Any]]:
        rng = np.random.default_rng(seed + batch)
        types = {
            TensorProto.INT64: np.int64,
            TensorProto.BOOL: np.bool_,
            TensorProto.INT32: np.int32,
            TensorProto.FLOAT16: np.float16,
            TensorProto.UINT8: np.uint8,
        }
        found = {}
        for name, shape in self.inputs.items():
            sizes = [batch if s == N else s for s in shape]
            kind = self.kinds.get(name, TensorProto.FLOAT)
            numbers = rng.uniform(self.low, self.high, sizes)
            found[name] = (
                (numbers > 0) if kind == TensorProto.BOOL else numbers.astype(types.get(kind, np.float32))
            )
        return found


def E(operator: str, shape: Sequence[Any] | None = None, *, opset: int = 18, outputs: int = 1, low: float = -3.0, high: float = 3.0,
      c: Mapping[str, Any] | None = None, i: Mapping[str, Sequence[Any]] | None = None, kinds: Mapping[str, int] | None = None,
      order: Sequence[str] = (), **attributes: Any) -> Example:  # fmt: skip
    inputs = i if i is not None else {"x": shape if shape is not None else X4}
    return Example(
        operator,
        inputs,
        {k: np.asarray(v) for k, v in (c or {}).items()},
        attributes,
        opset,
        outputs,
        kinds or {},
        order,
        low,
        high,
    )


I64, BOOL = TensorProto.INT64, TensorProto.BOOL
TWO = {"a": X4, "b": X4}
XI = {"kinds": {"x": I64}}
W = weight(6, 4, 3, 3)
F32 = np.float32

POINTWISE = """Relu Sigmoid Tanh Exp Abs Neg Erf Floor Ceil Sign Sin Cos Tan Atan Sinh Cosh Asinh Softsign
    Mish HardSwish LeakyRelu Elu Celu ThresholdedRelu Selu Softplus HardSigmoid Shrink Round""".split()

EXAMPLES: list[Example] = [
    *(E(op) for op in POINTWISE),
    *(E(op, low=0.1) for op in ("Log", "Sqrt", "Reciprocal")),
    *(E(op, low=-0.9, high=0.9) for op in ("Asin", "Acos", "Atanh")),
    E("Acosh", low=1.1),
    E("LeakyRelu", alpha=0.3), E("Elu", alpha=0.5), E("Celu", alpha=2.0), E("ThresholdedRelu", alpha=0.2),
    E("Selu", alpha=1.5, gamma=0.7), E("HardSigmoid", alpha=1 / 6, beta=0.5), E("Shrink", lambd=1.0, bias=1.0),
    E("Gelu", opset=20), E("Gelu", opset=20, approximate="tanh"), E("Swish", opset=24), E("Swish", opset=24, alpha=2.0),
    E("Clip", c={"lo": F32(-1), "hi": F32(2)}), E("Clip", c={"lo": F32(0), "hi": F32(6)}),
    E("Clip", c={"hi": F32(2)}, order=["x", "", "hi"]), E("Clip", c={"lo": F32(0.5)}),
    E("Clip", c={"lo": F32(-np.inf), "hi": F32(1)}), E("Clip", opset=6, min=-1.0, max=1.0), E("Clip", opset=6, max=1.0),
    E("Clip"),
    E("PRelu", c={"s": weight(4, 1, 1)}), E("PRelu", c={"s": weight(1)}), E("PRelu", c={"s": weight(4, 6, 5)}),
    E("PRelu", c={"s": weight(1, 4, 1, 1)}), E("PRelu", X2, c={"s": weight(6)}),
    E("Softmax"), E("Softmax", axis=1), E("Softmax", opset=11), E("Softmax", X2, opset=11), E("Softmax", opset=11, axis=2),
    E("Softmax", (N, 4, 1, 1), opset=9), E("LogSoftmax", axis=2), E("LogSoftmax", X2, opset=12), E("Hardmax", X2, opset=13),
    *(E(op, i=TWO) for op in ("Add", "Sub", "Mul", "Div")),
    *(E(op, c={"b": F32(2.5)}) for op in ("Add", "Sub", "Mul", "Div")),
    *(E(op, c={"b": F32(2.5)}, order=["b", "x"], low=0.2) for op in ("Add", "Sub", "Mul", "Div", "Pow")),
    *(E(op, c={"b": weight(4, 1, 1)}) for op in ("Add", "Sub", "Mul", "Div")),
    *(E(op, c={"b": weight(4, 1, 1)}, order=["b", "x"], low=0.2) for op in ("Sub", "Div")),
    E("Add", (N, 4), c={"b": weight(1, 1, 4)}), E("Add", X2, c={"b": weight(1, 1, 1)}),
    E("Div", X2, c={"b": ints(2)}, **XI, low=-9, high=9), E("Add", X2, c={"b": ints(2)}, **XI),
    E("Pow", c={"b": F32(2)}), E("Pow", c={"b": F32(0.5)}, low=0.1), E("Pow", i=TWO, low=0.2), E("Pow", c={"b": ints(3)}),
    E("Mod", X2, c={"b": ints(3)}, **XI, low=-9, high=9), E("Mod", c={"b": F32(1.5)}, fmod=1),
    *(E(op, i=TWO) for op in ("Max", "Min", "Sum", "Mean")),
    *(E(op, c={"b": F32(0.5)}) for op in ("Max", "Min")), *(E(op, c={"b": F32(0.5)}, order=["b", "x"]) for op in ("Max", "Min")),
    E("Max", c={"b": weight(4, 1, 1)}), E("Max"), E("Sum", i={"a": X4, "b": X4, "d": (N, 4, 1, 1)}),
    E("Cast", to=I64), E("Cast", X2, **XI, to=1), E("Cast", to=BOOL), E("Cast", to=11),
    E("CastLike", X2, c={"like": F32(1)}, **XI), E("CastLike", i={"x": X2, "b": X2}, kinds={"x": I64}),
    *(E(op, X2, c={"b": ints(3)}, **XI, high=9, low=0) for op in ("BitwiseAnd", "BitwiseOr", "BitwiseXor")),
    E("BitShift", X2, c={"b": np.uint8(2)}, kinds={"x": TensorProto.UINT8}, direction="RIGHT", low=0, high=200),
    *(E(op, i=TWO) for op in ("Equal", "Greater", "Less", "GreaterOrEqual", "LessOrEqual")),
    *(E(op, c={"b": F32(0.5)}, order=["b", "x"]) for op in ("Greater", "Less", "GreaterOrEqual", "LessOrEqual")),
    E("Equal", X2, c={"b": ints(1)}, **XI),
    *(E(op, i=TWO, kinds={"a": BOOL, "b": BOOL}) for op in ("And", "Or", "Xor")), E("Not", X2, kinds={"x": BOOL}),
    E("IsNaN"), E("IsInf"), E("IsInf", detect_negative=0), E("IsInf", detect_positive=0),
    E("Where", i={"c": X4, "a": X4, "b": X4}, kinds={"c": BOOL}),
    E("Where", i={"c": X4, "a": X4}, c={"b": F32(-np.inf)}, kinds={"c": BOOL}),
    E("Where", X4, c={"a": F32(1), "b": F32(0)}, kinds={"x": BOOL}),
    E("Where", i={"a": X2}, c={"c": np.array([True, False, True, True, False, False]), "b": weight(6)}, order=["c", "a", "b"]),
    *(E(op, c={"axes": ints(2, 3)}) for op in ("ReduceMean", "ReduceMax", "ReduceMin", "ReduceLogSumExp", "ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceSum", "ReduceProd")),
    E("ReduceLogSum", c={"axes": ints(1)}, low=0.1), E("ReduceMean", opset=13, axes=[1], keepdims=0), E("ReduceSum", opset=11, axes=[-1]),
    E("ReduceMean", c={"axes": ints(-1)}, keepdims=0), E("ReduceSum", noop_with_empty_axes=1), E("ReduceL2", c={"axes": ints(1)}, keepdims=0),
    E("ArgMax", axis=1), E("ArgMin", axis=-1, keepdims=0), E("TopK", X2, c={"k": ints(3)}, outputs=2), E("TopK", opset=9, outputs=2, k=2, axis=1),
    E("TopK", X2, c={"k": ints(2)}, outputs=2, largest=0),
    *(E(op, c={"axes": ints(1)}, kinds={"x": TensorProto.INT32}) for op in ("ReduceSum", "ReduceProd", "ReduceL1", "ReduceSumSquare")),
    *(E("CumSum", c={"axis": np.int64(1)}, kinds={"x": TensorProto.INT32}, reverse=r) for r in (0, 1)),
    E("CumSum", c={"axis": np.int64(2)}), E("CumSum", c={"axis": np.int64(1)}, reverse=1),
    E("LpNormalization", axis=1), E("LpNormalization", p=1),
    E("Einsum", i={"a": (N, 3, 4), "b": (N, 4, 5)}, equation="bij,bjk->bik"), E("Einsum", X4, c={"w": weight(4, 3)}, equation="nchw,cd->ndhw"),
    E("OneHot", X2, c={"d": ints(5), "v": np.array([-1, 2], F32)}, kinds={"x": I64}, low=-5, high=5),
    E("OneHot", X2, c={"d": ints(4), "v": np.array([0, 1], F32)}, kinds={"x": I64}, axis=1, low=0, high=4),
    E("MatMul", X2, c={"w": weight(6, 3)}), E("MatMul", X4, c={"w": weight(5, 3)}), E("MatMul", i={"a": (N, 3, 4), "b": (N, 4, 5)}),
    E("MatMul", X3, c={"w": weight(2, 4)}, order=["w", "x"]), E("MatMul", X4, c={"w": weight(4, 5, 3)}),
    E("Gemm", X2, c={"w": weight(6, 3), "b": weight(3)}), E("Gemm", X2, c={"w": weight(3, 6), "b": weight(1, 3)}, transB=1, alpha=0.5, beta=2.0),
    E("Gemm", X2, c={"w": weight(3, 6)}, transB=1), E("Gemm", X2, c={"w": weight(6, 3), "b": F32(2)}), E("Gemm", i={"x": X2, "c": (N, 3)}, c={"w": weight(6, 3)}, order=["x", "w", "c"], beta=0.5),
    E("Gemm", i={"x": X2, "w": X2}, transB=1), E("Gemm", X2, c={"w": weight(3, 6), "b": weight(1)}, transB=1),
    E("Conv", c={"w": W}), E("Conv", c={"w": W, "b": weight(6)}, pads=[1, 1, 1, 1], strides=[2, 2]), E("Conv", c={"w": W}, pads=[0, 1, 2, 1]),
    E("Conv", c={"w": W}, auto_pad="SAME_UPPER", strides=[2, 2]), E("Conv", c={"w": W}, auto_pad="SAME_LOWER", strides=[2, 2]), E("Conv", c={"w": W}, auto_pad="VALID"),
    E("Conv", c={"w": weight(4, 1, 3, 3)}, group=4), E("Conv", c={"w": W}, dilations=[2, 2], pads=[2, 2, 2, 2]), E("Conv", X3, c={"w": weight(2, 4, 3)}),
    E("Conv", (N, 2, 4, 5, 6), c={"w": weight(3, 2, 2, 2, 2)}), E("Conv", i={"x": X4, "w": (6, 4, 3, 3)}),
    E("ConvTranspose", c={"w": weight(4, 3, 2, 2)}, strides=[2, 2]), E("ConvTranspose", c={"w": weight(4, 3, 3, 3), "b": weight(3)}, pads=[1, 1, 1, 1], output_padding=[1, 1], strides=[2, 2]),
    E("ConvTranspose", c={"w": weight(4, 3, 3, 3)}, pads=[0, 1, 1, 0], strides=[2, 2]), E("ConvTranspose", c={"w": weight(4, 3, 3, 3)}, auto_pad="SAME_UPPER", strides=[2, 2]),
    E("ConvTranspose", c={"w": weight(4, 3, 3, 3)}, output_shape=[12, 10], strides=[2, 2]), E("ConvTranspose", c={"w": weight(4, 2, 3, 3)}, group=2), E("ConvTranspose", X3, c={"w": weight(4, 3, 3)}),
    E("ConvTranspose", c={"w": weight(4, 3, 3, 3)}, dilations=[2, 1]),
    E("MaxPool", kernel_shape=[3, 3]), E("MaxPool", kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1), E("MaxPool", kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[2, 2]),
    E("MaxPool", kernel_shape=[3, 3], pads=[0, 0, 1, 1], strides=[2, 2]), E("MaxPool", kernel_shape=[3, 3], auto_pad="SAME_UPPER", strides=[2, 2]), E("MaxPool", kernel_shape=[2, 2], dilations=[2, 2]),
    E("MaxPool", X3, kernel_shape=[2]), E("MaxPool", kernel_shape=[2, 2], pads=[0, 0, 1, 1], strides=[2, 2], ceil_mode=1), E("MaxPool", kernel_shape=[3, 3], auto_pad="SAME_LOWER"),
    E("AveragePool", kernel_shape=[3, 3]), E("AveragePool", kernel_shape=[3, 3], pads=[1, 1, 1, 1]), E("AveragePool", kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1),
    E("AveragePool", kernel_shape=[3, 3], auto_pad="SAME_UPPER", strides=[2, 2]), E("AveragePool", kernel_shape=[2, 2], pads=[0, 1, 1, 0]), E("AveragePool", kernel_shape=[2, 2], pads=[0, 1, 1, 0], count_include_pad=1),
    E("AveragePool", X3, kernel_shape=[2]), E("AveragePool", kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1), E("AveragePool", kernel_shape=[3, 3], auto_pad="SAME_LOWER", strides=[2, 2]),
    E("GlobalAveragePool"), E("GlobalAveragePool", X3), E("GlobalMaxPool"), E("GlobalMaxPool", X3), E("GlobalAveragePool", (N, 2, 3, 4, 5)),
    E("LRN", size=3), E("LRN", size=5, alpha=0.1, beta=0.5, bias=2.0),
    *(E("BatchNormalization", s, c={"s": weight(n), "b": weight(n, seed=1), "m": weight(n, seed=2), "v": np.abs(weight(n)) + 0.5}, opset=15, epsilon=1e-3) for s, n in ((X4, 4), (X3, 4), (X2, 6))),
    E("InstanceNormalization", c={"s": weight(4), "b": weight(4)}), E("InstanceNormalization", X3, c={"s": weight(4), "b": weight(4)}),
    E("GroupNormalization", c={"s": weight(2), "b": weight(2)}, num_groups=2), E("GroupNormalization", c={"s": weight(4), "b": weight(4)}, num_groups=2, opset=21),
    E("LayerNormalization", X3, c={"s": weight(7), "b": weight(7)}), E("LayerNormalization", c={"s": weight(6, 5)}, axis=2), E("LayerNormalization", c={"s": weight(1), "b": weight(6, 5)}, axis=-2),
    E("RMSNormalization", X3, c={"s": weight(7)}, opset=23),
    E("MeanVarianceNormalization", opset=13, axes=[1, 2, 3]), E("MeanVarianceNormalization", opset=9, axes=[2, 3]), E("MeanVarianceNormalization", X3, opset=18, axes=[1]),
    E("RotaryEmbedding", i={"x": (N, 2, 5, 6), "p": (N, 5)}, c={"c": weight(9, 2), "s": weight(9, 2, seed=1)}, order=["x", "c", "s", "p"], opset=23, rotary_embedding_dim=4, kinds={"p": I64}, low=0, high=8),
    E("RotaryEmbedding", i={"x": (N, 5, 8), "p": (N, 5)}, c={"c": weight(9, 2), "s": weight(9, 2, seed=1)}, order=["x", "c", "s", "p"], opset=23, num_heads=2, interleaved=1, kinds={"p": I64}, low=0, high=8),
    E("CenterCropPad", (N, 4, 7), c={"z": ints(6, 3)}, axes=[1, 2]), E("CenterCropPad", X4, c={"z": ints(3, 9)}, axes=[2, 3]),
    E("Attention", i=QKV, opset=23), E("Attention", i=QKV, opset=23, is_causal=1, scale=0.3), E("Attention", i=QKV, c={"m": weight(5, 5)}, opset=24),
    E("Attention", i=QKV, c={"m": np.tril(np.ones((2, 5, 5), bool))}, opset=23), E("Attention", i={**QKV, "m": (N, 1, 5, 5)}, opset=23, kinds={"m": BOOL}),
    E("Attention", i={"q": (N, 4, 5, 3), "k": (N, 2, 7, 3), "v": (N, 2, 7, 6)}, opset=23), E("Attention", i={"q": (N, 5, 8), "k": (N, 7, 4), "v": (N, 7, 6)}, opset=23, q_num_heads=4, kv_num_heads=2),
    E("Reshape", c={"s": ints(0, -1)}), E("Reshape", c={"s": ints(-1, 20, 6)}), E("Reshape", c={"s": ints(0, 2, 2, 30)}), E("Reshape", c={"s": ints(-1, 2)}),
    E("Reshape", (N, 6, 4), c={"s": ints(0, 0, 2, 2)}), E("Reshape", X4, c={"s": ints(0, 4, -1)}),
    E("Flatten"), E("Flatten", axis=2), E("Flatten", X4, axis=-1), E("Flatten", X2, axis=0),
    E("Squeeze", (N, 1, 4, 1), c={"a": ints(1, 3)}), E("Squeeze", (N, 1, 4), opset=11, axes=[1]), E("Squeeze", (N, 1, 4, 1)),
    E("Unsqueeze", c={"a": ints(1, -1)}), E("Unsqueeze", X2, opset=11, axes=[0]),
    E("Expand", (N, 1, 4), c={"s": ints(1, 3, 1)}), E("Expand", (N, 4), c={"s": ints(2, 1, 4)}),
    E("Identity"), E("Dropout"), E("Dropout", opset=10, ratio=0.5),
    E("DepthToSpace", (N, 8, 2, 3), blocksize=2), E("DepthToSpace", (N, 8, 2, 3), blocksize=2, mode="CRD"), E("SpaceToDepth", (N, 2, 4, 6), blocksize=2),
    E("Transpose"), E("Transpose", perm=[0, 2, 3, 1]), E("Transpose", perm=[0, 1, 2, 3]),
    E("Concat", i=TWO, axis=1), E("Concat", i=TWO, axis=-1), E("Concat", axis=1), E("Concat", i={"a": X2, "b": X2}, axis=0),
    E("Slice", c={"s": ints(1), "e": ints(3), "a": ints(1)}), E("Slice", c={"s": ints(1, -3), "e": ints(2**40, -1), "a": ints(2, 3), "t": ints(2, 1)}),
    E("Slice", c={"s": ints(-1), "e": ints(-(2**62)), "a": ints(3), "t": ints(-2)}), E("Slice", opset=9, starts=[0, 1], ends=[9, 3], axes=[2, 3]), E("Slice", c={"s": ints(3), "e": ints(0), "a": ints(2), "t": ints(-1)}),
    E("Slice", c={"s": ints(0, 1), "e": ints(2**31, 3)}), E("Slice", X2, c={"s": ints(2), "e": ints(5), "a": ints(-1)}),
    E("Split", opset=13, outputs=2, axis=1), E("Split", c={"s": ints(1, 3)}, outputs=2, axis=1), E("Split", outputs=3, axis=3, num_outputs=3), E("Split", opset=11, outputs=2, axis=1, split=[1, 3]),
    E("Gather", c={"i": np.int64(1)}, axis=1), E("Gather", c={"i": ints(1, 2)}, axis=1), E("Gather", c={"i": ints(2, 0, -1)}, axis=1), E("Gather", c={"i": np.array([[0, 1], [3, 2]])}, axis=1),
    E("Gather", (N, 5), c={"t": weight(9, 3)}, order=["t", "x"], kinds={"x": I64}, low=0, high=8), E("Gather", c={"i": np.int64(-1)}, axis=2),
    E("Gather", i={"x": (N, 5), "i": (N,)}, axis=1, kinds={"i": I64}, low=0, high=4), E("Gather", i={"x": (N, 5), "i": (N, 2)}, axis=1, kinds={"i": I64}, low=0, high=4),
    *(E("ScatterElements", i={"x": X2, "i": X2, "u": X2}, axis=1, kinds={"i": I64}, low=-5, high=5, reduction=how) for how in ("none", "add", "max")),
    E("Scatter", opset=9, i={"x": X2, "i": X2, "u": X2}, axis=1, kinds={"i": I64}, low=0, high=5),
    E("LpPool", kernel_shape=[2, 2]), E("LpPool", kernel_shape=[2, 3], strides=[2, 1], pads=[0, 1, 1, 1], p=3), E("LpPool", X3, kernel_shape=[3], p=1),
    E("LpPool", opset=11, kernel_shape=[3, 3], auto_pad="SAME_UPPER", strides=[2, 2]), E("GlobalLpPool"), E("GlobalLpPool", p=3),
    E("Col2Im", (N, 8, 12), c={"a": ints(5, 4), "b": ints(2, 2)}), E("Col2Im", (N, 12, 4), c={"a": ints(4, 6), "b": ints(2, 3)}, strides=[2, 3]),
    E("Col2Im", (N, 4, 9), c={"a": ints(4, 4), "b": ints(2, 2)}, pads=[1, 1, 1, 1], strides=[2, 2]),
    E("GatherElements", i={"x": X2, "i": X2}, axis=1, kinds={"i": I64}, low=-5, high=5), E("Gather", c={"i": ints(0, 0, 1)}, axis=2),
    E("Pad", c={"p": ints(0, 0, 1, 2, 0, 0, 3, 0)}), E("Pad", c={"p": ints(0, 1, 0, 0, 0, 1, 0, 0), "v": F32(1.5)}), E("Pad", c={"p": ints(0, 0, 1, 2, 0, 0, 3, 1)}, mode="reflect"),
    E("Pad", c={"p": ints(0, 0, 1, 2, 0, 0, 3, 1)}, mode="edge"), E("Pad", opset=10, pads=[0, 0, 1, 1, 0, 0, 1, 1]), E("Pad", c={"p": ints(1, 2), "v": F32(0), "a": ints(2)}), E("Pad", c={"p": ints(0, 0, -1, 0, 0, 0, 0, -2)}),
    E("Pad", X3, c={"p": ints(0, 0, 2, 0, 0, 1)}, mode="reflect"),
    E("Tile", c={"r": ints(1, 2, 1, 3)}), E("Tile", X2, c={"r": ints(1, 1)}), E("Trilu", (N, 4, 4)), E("Trilu", (N, 4, 4), c={"k": np.int64(-1)}, upper=0),
    E("GridSample", i={"x": X4, "g": (N, 3, 3, 2)}, low=-1.2, high=1.2), E("GridSample", i={"x": X4, "g": (N, 3, 3, 2)}, low=-1.2, high=1.2, align_corners=1, padding_mode="border"),
    E("Upsample", opset=9, c={"s": np.array([1, 1, 2, 2], F32)}), E("Upsample", opset=7, scales=[1.0, 1.0, 2.0, 3.0]), E("Upsample", opset=9, c={"s": np.array([1, 1, 2, 2], F32)}, mode="linear"),
]  # fmt: skip


def recurrent(
    operator: str,
    direction: str = "forward",
    bias: bool = True,
    state: bool = False,
    layout: int = 0,
    **attributes: Any,
) -> Example:
    gates, both = {"LSTM": 4, "GRU": 3}[operator], 2 if direction == "bidirectional" else 1
    constants = {"w": weight(both, gates * 3, 5), "r": weight(both, gates * 3, 3, seed=1)}
    constants |= {"b": weight(both, 2 * gates * 3, seed=2)} if bias else {}
    order = ["x", "w", "r", "b" if bias else ""]
    inputs: dict[str, Sequence[Any]] = {"x": (N, 4, 5) if layout else (4, N, 5)}
    if state:
        names = ["h", "c"][: {"LSTM": 2, "GRU": 1}[operator]]
        inputs |= dict.fromkeys(names, (N, both, 3) if layout else (both, N, 3))
        order += ["", *names]
    more = {"linear_before_reset": 1} if operator == "GRU" else {}
    return Example(
        operator,
        inputs,
        constants,
        {"hidden_size": 3, "direction": direction, "layout": layout, **more, **attributes},
        outputs={"LSTM": 3, "GRU": 2}[operator],
        order=order,
    )


EXAMPLES += [
    recurrent(op, direction, bias=bias, state=state, layout=1)
    for op in ("LSTM", "GRU")
    for direction, bias, state in (
        ("forward", True, False),
        ("reverse", False, True),
        ("bidirectional", True, True),
    )
]


def resize(scales: Sequence[float] | None, sizes: Sequence[int] | None, **attributes: Any) -> Example:
    constants = {"s": np.array(scales, F32)} if scales is not None else {"z": ints(*(sizes or ()))}
    order = ["x", "", "s"] if scales is not None else ["x", "", "", "z"]
    return E("Resize", c=constants, order=order, **attributes)


COORDINATES = ["half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric", "half_pixel_symmetric"]
EXAMPLES += [
    resize(scales, None, mode=mode, coordinate_transformation_mode=c, opset=19)
    for mode in ("nearest", "linear", "cubic")
    for c in COORDINATES
    for scales in ([1, 1, 2, 2], [1, 1, 1.5, 0.6])
]
EXAMPLES += [
    E("Resize", c={"z": ints(9, 3)}, order=["x", "", "", "z"], mode=mode, axes=[2, 3])
    for mode in ("nearest", "linear", "cubic")
]
EXAMPLES += [
    resize([1, 1, 2, 2], None, mode="nearest", nearest_mode=n, coordinate_transformation_mode="asymmetric")
    for n in ("floor", "ceil", "round_prefer_ceil", "round_prefer_floor")
]
