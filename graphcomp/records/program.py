"""What a program costs and how good it is."""

from pydantic import Field

from graphcomp.records.record import Record


class LayerRow(Record):
    """One convolution or linear layer of a program."""

    name: str = Field(description="module path, e.g. layer1.0.conv1")
    kind: str = Field(description="class name, e.g. Conv2d")
    in_channels: int = Field(description="or input features")
    out_channels: int = Field(description="or output features")
    kernel: tuple[int, ...] = Field(
        default=(), description="a number for each spatial axis; empty for a linear layer"
    )
    groups: int = Field(default=1, description="of a grouped convolution")
    params: int = Field(description="elements of weight and bias")
    macs: int = Field(description="multiply-accumulates for one sample")


class Accuracy(Record):
    """Top-1 accuracy on the evaluation data."""

    top1: float = Field(description="fraction in [0, 1]")
    samples: int = Field(description="how many were evaluated")
    low: float = Field(description="lower end of the 95 % Wilson interval")
    high: float = Field(description="upper end of the 95 % Wilson interval")


class MeanError(Record):
    """Mean absolute error on evaluation data whose labels are values (regression)."""

    mae: float = Field(description="mean over samples of the mean |output - label| over a sample's values")
    samples: int = Field(description="how many were evaluated")
    low: float = Field(description="lower end of the 95 % interval of the mean (normal)")
    high: float = Field(description="upper end of the 95 % interval of the mean (normal)")


class Snapshot(Record):
    """What one program costs and how good it is."""

    params_trainable: int = Field(description="elements of the parameters that require a gradient")
    params_state: int = Field(description="trainable + frozen parameters and all buffers")
    params_order: int = Field(
        default=0, description="of those, integers that say where rebuilt weights belong; never trained"
    )
    macs: int = Field(description="multiply-accumulates for one sample")
    accuracy: Accuracy | None = Field(default=None, description="null where it was not measured")
    error: MeanError | None = Field(default=None, description="in place of accuracy where labels are values")
    layers: list[LayerRow] = Field(default_factory=list, description="in the order they run")

    def without_layers(self) -> "Snapshot":
        """The totals."""
        return self.model_copy(update={"layers": []})
