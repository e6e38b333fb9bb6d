"""What a program costs and how good it is."""

from typing import Literal

from pydantic import Field, model_validator

from graphcomp.records import old
from graphcomp.records.record import Record


class LayerRow(Record):
    """One convolution, linear or recurrent layer of a program."""

    name: str = Field(description="module path, e.g. layer1.0.conv1")
    kind: str = Field(description="class name, e.g. Conv2d")
    in_channels: int = Field(description="or input features")
    out_channels: int = Field(description="or output features")
    kernel: tuple[int, ...] = Field(
        default=(), description="a number for each spatial axis; empty for a linear or recurrent layer"
    )
    groups: int = Field(default=1, description="of a grouped convolution")
    params: int = Field(description="elements of weight and bias")
    macs: int = Field(description="multiply-accumulates for one sample")


class Score(Record):
    """How good a program is on the evaluation data, with its 95 % interval."""

    measure: Literal["accuracy", "error"] = Field(
        description="accuracy: top-1, a fraction in [0, 1]; error: where labels are values, the mean over "
        "samples of the mean |output - label| over a sample's values"
    )
    value: float = Field(description="of the measure")
    samples: int = Field(description="how many were evaluated")
    low: float = Field(description="lower end of the interval: Wilson's of an accuracy, normal of an error")
    high: float = Field(description="upper end of it")
    top5: float | None = Field(
        default=None,
        description="share of the samples whose class is one of the five likeliest by the network; null for "
        "errors, for networks of five outputs or fewer, and where it was not counted",
    )

    _schema_1 = model_validator(mode="before")(old.score)

    @property
    def higher_is_better(self) -> bool:
        """An accuracy is, an error is not."""
        return self.measure == "accuracy"


class Snapshot(Record):
    """What one program costs and how good it is."""

    params_trainable: int = Field(description="elements of the parameters that require a gradient")
    params_state: int = Field(description="trainable + frozen parameters and all buffers")
    params_order: int = Field(
        default=0, description="of those, integers that say where rebuilt weights belong; never trained"
    )
    macs: int = Field(description="multiply-accumulates for one sample")
    score: Score | None = Field(default=None, description="null where it was not measured")
    layers: list[LayerRow] = Field(default_factory=list, description="in the order they run")

    _schema_1 = model_validator(mode="before")(old.snapshot)

    def without_layers(self) -> "Snapshot":
        """The totals."""
        return self.model_copy(update={"layers": []})
