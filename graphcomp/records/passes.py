"""What passes decided and did, and why."""

from typing import Any

from pydantic import Field, model_validator

from graphcomp.records import old
from graphcomp.records.program import Snapshot
from graphcomp.records.record import Record


class Drift(Record):
    """How far a lossy step moved the outputs, on the calibration batches."""

    relative_l2: float = Field(description="||new - old|| / ||old|| of the outputs")
    top1_agreement: float | None = Field(
        description="fraction of samples with the same argmax; null if not a classifier"
    )


class LeftAlone(Record):
    """Something a pass left alone, and why."""

    where: str = Field(description="node or module path")
    reason: str = Field(description="in words")


class Width(Record):
    """What was decided for one channel group; `evidence["groups"]` of a removal is a list of them."""

    group: str = Field(description="the layer that the group is named after")
    channels: int = Field(description="before the pass")
    share: float | None = Field(
        description="what part (of the channels, of the energy, …) was to be preserved; null if the "
        "criterion has a rule of its own, or widths were drawn at random"
    )
    wanted: int = Field(description="channels that preserve it, before rounding")
    kept: int = Field(description="channels after the pass")
    sensitivity: float | None = Field(
        default=None,
        description="squared movement of the outputs for a unit of what its readers lose; if measured",
    )


class Spectrum(Width):
    """A channel group's decision with the spectrum of its responses' covariance (`pfa`)."""

    eigenvalues: list[float] = Field(
        description="of the responses' covariance, largest first, normalised to sum 1 (all 0 if nothing "
        "varies), six significant digits"
    )
    samples: int = Field(description="that the covariance was estimated from")
    dead: int = Field(description="channels whose responses do not vary")
    statistics: list[str] = Field(description="nodes whose outputs were analysed")


class ModeTrial(Record):
    """One kind of arithmetic that a network could be trained with."""

    precision: str = Field(description="float32 (the program's own type) or bf16 (autocast)")
    layout: str = Field(description="of images in memory: contiguous or channels_last")
    ms: float | None = Field(
        description="a step's CPU time, on a GPU its wall time; null if it does not run here"
    )


class RateTrial(Record):
    """A short training with one learning rate."""

    rate: float = Field(description="highest learning rate")
    statistics: str = Field(description="of normalisations: batch or frozen")
    loss: float | None = Field(
        description="mean afterwards, on samples held out if there are; null: diverged"
    )


class EpochRow(Record):
    """One epoch of a training; number 0 is the program as it came."""

    epoch: int = Field(description="from 0")
    steps: int = Field(description="of the optimiser, from the beginning")
    rate: float | None = Field(description="learning rate of the last step; null for number 0")
    loss: float | None = Field(description="mean over the epoch's samples as it trained; null for number 0")
    held_out: float | None = Field(
        description="score on held-out training data: top-1 accuracy, or minus the mean absolute error where "
        "labels are values; null if there is none"
    )
    held_out_loss: float | None = Field(
        default=None,
        description="loss on held-out training data of a network that learns from another: the best epoch "
        "has the least; null without a teacher, or if it is not finite",
    )
    samples: int = Field(description="seen in the epoch")
    seconds: float = Field(description="of the steps alone")


class Training(Record):
    """How a program was trained."""

    samples: int = Field(description="to learn from")
    held_out_samples: int = Field(description="of the training data, to choose the best epoch by")
    batch: int = Field(description="samples a step at most, over all processes")
    processes: int = Field(description="that shared every step")
    device: str = Field(description="`cpu` or `cuda:0`")
    precision: str = Field(description="`float32` or `bf16`")
    layout: str = Field(description="`contiguous` or `channels_last`")
    trials: list[ModeTrial] = Field(description="what the choice of precision and layout was made from")
    rates: list[RateTrial] = Field(
        default_factory=list, description="what the choice of the learning rate was made from"
    )
    lr: float | None = Field(default=None, description="the highest learning rate; null: of an older run")
    clip: float | None = Field(default=None, description="largest norm of all gradients together")
    statistics: str = Field(default="batch", description="of normalisations in training: batch or frozen")
    epochs: list[EpochRow] = Field(description="number 0 first")
    kept_epoch: int = Field(description="the one that is the result")
    bn_samples: int = Field(description="that normalisation statistics were estimated from at the end")
    held_out: float | None = Field(description="score of the result on held-out training data")
    samples_per_second: float | None = Field(description="in the steps; null if there was none")
    seconds: float = Field(description="of the steps alone")
    resumed: int = Field(description="how often the training went on after an interruption")
    teacher: str | None = Field(
        default=None, description="which program it learned from: a step of the run, or a directory"
    )

    @property
    def summary(self) -> str:
        """One line."""
        last = self.epochs[-1]
        kept = f"trained {last.steps} steps, kept epoch {self.kept_epoch} of {last.epoch}"
        parts = [kept] if last.epoch else []
        if self.rates:
            clip = f", gradients up to {self.clip:.3g}" if self.clip is not None else ""
            frozen = ", statistics frozen" if self.statistics == "frozen" else ""
            parts.append(f"lr {self.lr:.2g} of {len(self.rates)} trials{clip}{frozen}")
        parts += [f"learned from {self.teacher}"] if self.teacher else []
        parts += [f"statistics from {self.bn_samples} samples"] if self.bn_samples else []
        if self.held_out is not None and self.epochs[0].held_out is not None:
            parts.append(f"held-out score {self.epochs[0].held_out:.4f} -> {self.held_out:.4f}")
        return "; ".join(parts)


class FittedLayer(Record):
    """One layer that `refit` fitted; errors are those on samples that are held out, if there are enough."""

    layer: str = Field(description="module path")
    original: str = Field(description="the layer that it comes from")
    rows: int = Field(description="sampled positions of all samples")
    columns: int = Field(description="weights of one output channel")
    ridge: float | None = Field(description="null: only the bias was fitted, or the layer was exact already")
    before: float = Field(description="squared error against the original, as a share of its variance")
    after: float = Field(description="the same after the fit")
    note: str | None = Field(default=None, description="why not all was fitted that could be")
    together: list[str] = Field(default=[], description="layers in front that were improved with it")
    left: float | None = Field(default=None, description="part of its error that this left")


class Fit(Record):
    """How a program was fitted to an earlier one in closed form."""

    original: str = Field(description="which program it was fitted to: a step of the run, or a directory")
    samples: int = Field(description="of the calibration data that were looked at, without labels")
    positions: int = Field(description="of every map, at most")
    layers: list[FittedLayer] = Field(description="in the order in which they were fitted")
    seconds: float = Field(description="that it took")
    resumed: int = Field(description="layers that an interrupted run had fitted before")

    @property
    def summary(self) -> str:
        """One line."""
        fitted = [x for x in self.layers if x.after != x.before]
        if not fitted:
            return f"nothing differs from {self.original}"
        before, after = (sum(getattr(x, n) for x in fitted) / len(fitted) for n in ("before", "after"))
        return (
            f"fitted {len(fitted)} layers to {self.original} on {self.samples} samples; "
            f"mean relative error {before:.3g} -> {after:.3g}"
        )


class Plan(Record):
    """What a pass decided: JSON, saved beside the result, diffable, replayable without the data."""

    name: str = Field(description="the pass")
    options: dict[str, Any] = Field(default_factory=dict, description="of the pass")
    decisions: dict[str, Any] = Field(default_factory=dict, description="read by simulate and rewrite only")
    kept: list[LeftAlone] = Field(default_factory=list, description="what was left alone, and why")
    summary: str = Field(default="", description="one line: what the pass does")
    evidence: dict[str, Any] = Field(
        default_factory=dict, description="why it was decided so: for reports, read by no verb"
    )
    fitted: bool = Field(
        default=False,
        description="whether weights are fitted to data in closed form: a usual learning rate may leave such "
        "a network within a few steps, so that trainings behind it search theirs",
    )
    bulk: dict[str, str] = Field(
        default_factory=dict,
        description="decisions that are too many numbers to be read, packed; not in a program's history",
    )


class Step(Record):
    """A pass that ran, or a round of one: what it decided, and what came of it."""

    index: int = Field(description="0 for the first pass, and for the first round of one")
    plan: Plan = Field(
        description="what was decided; without decisions and bulk, which plans/NN-NAME.json holds"
    )
    drift: Drift | None = Field(description="null for a pass that changes no value")
    verify_error: float = Field(
        description="max |rewrite - simulate| / max |simulate|, float64, scrambled statistics"
    )
    seconds: float = Field(description="wall time of the step")
    changed: bool = Field(
        default=True,
        description="whether the result holds or computes anything else than the program before it",
    )
    training: Training | None = Field(default=None, description="null for a pass that does not train")
    fit: Fit | None = Field(default=None, description="null for a pass that fits nothing in closed form")
    removed: dict[str, int] = Field(
        default_factory=dict, description="of a round: layer -> output channels that it removed"
    )
    start: Snapshot | None = Field(
        default=None,
        description="of a pass that goes over several rounds: the program as it came, without its layers; "
        "like the rounds it was judged by held-out training samples",
    )
    rounds: list["Step"] = Field(
        default_factory=list, description="of such a pass; the snapshots of rounds hold no layers"
    )
    kept_rounds: int = Field(
        default=0, description="how many of them the result has behind it; those after them were undone"
    )
    after: Snapshot = Field(description="the program after the step")

    _schema_1 = model_validator(mode="before")(old.step)

    @property
    def name(self) -> str:
        """Of the pass."""
        return self.plan.name

    @property
    def learned(self) -> Training | Fit | None:
        """From data; None for a pass whose plan says all."""
        return self.training or self.fit

    @property
    def summary(self) -> str:
        """What the pass did, in one line."""
        return self.plan.summary if self.learned is None else self.learned.summary

    @property
    def plan_file(self) -> str:
        """Where the whole plan is saved, relative to the output directory."""
        return f"plans/{self.index + 1:02d}-{self.name}.json"

    @property
    def snapshots(self) -> list[Snapshot]:
        """Of a pass that goes over several rounds: the program as it came, and after each."""
        return [] if self.start is None else [self.start, *(row.after for row in self.rounds)]

    def brief(self) -> "Step":
        """As reports hold it: without what verbs and strategies alone read."""
        plan = self.plan.model_copy(update={"decisions": {}, "bulk": {}})
        rounds = [r.brief().model_copy(update={"after": r.after.without_layers()}) for r in self.rounds]
        return self.model_copy(update={"plan": plan, "rounds": rounds})
