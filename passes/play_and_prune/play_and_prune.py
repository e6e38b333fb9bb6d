"""play-and-prune: a pruner and a controller play against each other (Singh et al. 2019, "Play and Prune").

    min over filter subsets  #w    s.t.   max over weights on that subset  C(#w)  >=  E - eps    (METHODS 3.1)

E is the accuracy of the network as it came and C that of the network as it is, both on samples held out from
the training data. In every epoch the pruner trains with an l1 term on the smallest filters and removes those
that became small enough (`afp`); how hard it plays, and below which norm a filter goes, the controller
decides by what accuracy is left to lose (`prc`). So no rate is asked for: the game finds one for each layer.

Where a filter begins to count is a search before the first epoch (`thresholds`): for every layer alone, the
largest threshold W_gamma at which losing all filters below it costs at most `delta0` points.

The result is the network after the last epoch that had C >= E - eps. Layers whose channels others share (by
residual additions) are left alone, as in `apoz`.
"""

from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, ClassVar, Self

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from graphcomp.bases import OPTIONS, Globs, Learning, options_of, why_shared
from graphcomp.channels import analyse
from graphcomp.errors import PassError
from graphcomp.ir import Program
from graphcomp.passes.play_and_prune.afp import Cut, Epoch, EpochOptions
from graphcomp.passes.play_and_prune.filters import find_layers
from graphcomp.passes.play_and_prune.prc import Limits, Standing, points, stand
from graphcomp.passes.play_and_prune.thresholds import first_thresholds
from graphcomp.pipeline import Concern, Context, Course, Outlook, Pass, held_out_samples, require_trained
from graphcomp.records import LeftAlone, Plan


@dataclass(frozen=True, config=OPTIONS)
class PlayAndPrune(Learning):
    """Train and remove filters epoch by epoch, as fast as the accuracy allows (Singh et al. 2019)."""

    name: ClassVar[str] = "play-and-prune"
    concern: ClassVar[Concern] = "channels"
    keeps_momenta: ClassVar[bool] = True

    eps: Annotated[
        float,
        Field(gt=0, le=100, description="points of accuracy on held-out training samples to lose at most"),
    ] = 1.0
    alpha: Annotated[
        float, Field(gt=0, lt=1, description="fraction of a layer's filters that are candidates in an epoch")
    ] = 0.1
    lambda0: Annotated[float, Field(gt=0, description="weight of the l1 term for each point to lose")] = 1e-4
    delta_w: Annotated[
        float, Field(gt=0, description="factor of the thresholds: above 1 removes faster, below slower")
    ] = 1.0
    delta0: Annotated[
        float, Field(ge=0, description="points that the filters below a layer's first threshold may cost")
    ] = 0.1
    samples: Annotated[
        int, Field(ge=1, description="held-out samples at most for the search of the first thresholds")
    ] = 1000
    max_epochs: Annotated[int, Field(ge=1, description="ends the game")] = 60
    patience: Annotated[
        int, Field(ge=1, description="as do this many epochs in a row that do not bring the accuracy back")
    ] = 10
    stall: Annotated[int, Field(ge=1, description="and this many in a row that remove nothing")] = 10
    include: Annotated[
        Globs, Field(description="globs on the module paths of layers that may lose filters")
    ] = ("*",)
    exclude: Annotated[Globs, Field(description="and of those that may not")] = ()
    training: Annotated[EpochOptions, Field(description="how an epoch is trained")] = field(
        default_factory=EpochOptions
    )

    @property
    def iteration(self) -> Self:
        """The game."""
        return self

    @property
    def held_out(self) -> float:
        """What an epoch holds out."""
        return self.training.held_out

    @property
    def most_rounds(self) -> int:
        """An epoch and a cut."""
        return 2 * self.max_epochs

    # -------------------------------------------------------------- before the game

    def require(self, outlook: Outlook) -> None:
        """Labelled data, layers to play on, and an accuracy that says something."""
        held_out_samples(self.name, outlook.context.data, self.held_out)
        require_trained(self.name, outlook, "accuracy decides what goes")
        self._epoch(0.0, 0).require(outlook)

    def plan(self, program: Program, context: Context) -> Plan:
        """Check that the network can be trained, and search the first thresholds (3.4).

        Raises:
            DataError: no labelled data, or too few. PassError: no layer to play on, no trained classifier.
        """
        judges = held_out_samples(self.name, context.data, self.held_out)
        self._epoch(0.0, 0).plan(program, context)
        channels = analyse(program)
        layers = find_layers(channels, self.include, self.exclude)
        if not layers:
            raise PassError(
                f"{self.name}: found no layer whose filters can go one by one, expected at least one; "
                "include more layers"
            )
        some = judges.subset(np.arange(min(self.samples, len(judges))))
        thresholds = first_thresholds(channels, layers, some, self.delta0, context.progress)
        shared = ((g.name, why_shared(g)) for g in channels.removable)
        return Plan(
            name=self.name,
            options=options_of(self),
            decisions={"thresholds": thresholds},
            kept=[LeftAlone(where=name, reason=reason) for name, reason in shared if reason is not None],
            summary=f"thresholds for {len(layers)} layers from {len(some)} held-out samples",
            evidence={"thresholds": thresholds},
        )

    rewrite = Learning.simulate

    # -------------------------------------------------------------- the game

    def next_pass(self, course: Course) -> Pass | None:
        """An epoch at the rate that the controller allows, then a cut."""
        at = self._standing(course)
        if at.move is None:
            return None
        if at.move == "epoch":
            return self._epoch(at.rate, at.epochs)
        chosen = course.rounds[-1].plan.decisions["candidates"]
        first: Mapping[str, float] = course.plan.decisions["thresholds"]
        return Cut(chosen, {name: self.delta_w * at.rate * first[name] for name in chosen})

    def result(self, course: Course) -> int:
        """The last round after an epoch with C >= E - eps."""
        return self._standing(course).best

    def ending(self, course: Course) -> str:
        """What ended the game."""
        return self._standing(course).ending

    def _standing(self, course: Course) -> Standing:
        accuracies = [points(s.score) for s in course.snapshots]
        removed = [bool(done.plan.decisions.get("rows")) for done in course.rounds]
        return stand(accuracies, removed, self.eps, Limits(self.patience, self.stall, self.max_epochs))

    def _epoch(self, rate: float, number: int) -> Epoch:
        """lambda_A (3.6); every epoch draws its own random numbers."""
        options = options_of(self.training)
        if self.training.seed is not None:
            options["seed"] = (self.training.seed + number) % 2**32
        return Epoch(
            **options,
            weight=rate * self.lambda0,
            alpha=self.alpha,
            include=self.include,
            exclude=self.exclude,
            pressure=rate,
        )
