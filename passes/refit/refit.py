"""refit: every layer fitted again, in closed form and without labels, to what the original computed.

Layers are fitted in the order of the graph, each on what the network, fitted so far, feeds it (METHODS 9.5):

    W, b = argmin  E |W a + b - y|^2  +  ridge * |W - W0|^2

with a the patch that the layer reads at a sampled position, y what the original has there at the rows that
are left, and W0 the weights as they were. Before an addition whose other operand is already computed, y is
the original's sum less that operand: a layer makes up for what the other branch lost. Before a ReLU only
the sign counts where the original's value is negative. Layers that nothing reads but the next one are then
improved together with it (`joint`). Statistics of normalisations are part of what is
fitted: do not estimate them again afterwards.

It changes values and nothing else. Which rows of the original a layer's outputs are follows from the plans of
the passes in between (`lineage`). Where nothing was removed, nothing changes, bit for bit.
"""

import time
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from graphcomp.base import cache, distributed
from graphcomp.bases import OPTIONS, Globs, Learning, find_step, not_asked, options_of, require_matches
from graphcomp.ir import Program
from graphcomp.measure import is_mixing
from graphcomp.passes.refit.lineage import origins, packed, unpacked
from graphcomp.passes.refit.lockstep import Limits, fit
from graphcomp.passes.refit.state import State
from graphcomp.passes.refit.teacher import Teacher, find_teacher, place_of
from graphcomp.passes.refit.units import Unit, find_units
from graphcomp.pipeline import Concern, Context, Outlook, require_data
from graphcomp.records import Fit, FittedLayer, LeftAlone, Plan


@dataclass(frozen=True, config=OPTIONS)
class Refit(Learning):
    """Fit all layers again, in closed form, to what the original network computes: no labels, no training."""

    name: ClassVar[str] = "refit"
    concern: ClassVar[Concern] = "weights"

    samples: Annotated[int, Field(ge=1, description="of the calibration data, without labels")] = 1000
    positions: Annotated[int, Field(ge=1, description="of every map of every sample, drawn at random")] = 64
    teacher: Annotated[
        str | int | None,
        Field(
            description="whom to fit to: a step of the run by its name (the last of that name) or number, "
            "`input` (or 0): what the run began with, or the directory of a saved program; default: what was "
            "trained last before the last removals, the run's input if nothing was"
        ),
    ] = None
    ridge: Annotated[
        Literal["auto"] | Annotated[float, Field(ge=0)],
        Field(
            description="pull towards the weights as they are, as a share of the inputs' mean energy; auto: "
            "of 1e-3 to 1 what is best on samples held out from the fit"
        ),
    ] = "auto"
    together: Annotated[
        bool,
        Field(
            description="layers that nothing reads but the next one are improved together with it, for what "
            "that one is to yield"
        ),
    ] = True
    only: Annotated[
        Literal["bias"] | None, Field(description="bias: means alone are restored, no weight is fitted")
    ] = None
    include: Annotated[Globs, Field(description="globs on module paths of layers to fit")] = ("*",)
    exclude: Annotated[Globs, Field(description="globs on module paths of layers to leave alone")] = ()

    def require(self, outlook: Outlook) -> None:
        """Data, an earlier program and layers for every glob."""
        require_data(self.name, outlook.context)
        names = [earlier.name for earlier in outlook.context.earlier]
        if self.teacher is not None and find_step(self.teacher, names) is None:
            place_of(self.teacher, names)
        if outlook.names and outlook.plain:
            layers = (t for t, m in outlook.program.called_modules().items() if is_mixing(m))
            require_matches((*self.include, *self.exclude), layers)

    def plan(self, program: Program, context: Context) -> Plan:
        """Name the original and the layers that can be fitted to it.

        Raises:
            DataError: no data. PassError: no such program, or one that this one was not made from.
        """
        data = require_data(self.name, context)
        teacher = find_teacher(self.teacher, program, context, self.name)
        units, left = self._units(program, teacher)
        label = teacher.label
        return Plan(
            name=self.name,
            options=options_of(self),
            decisions={
                "teacher": label,
                "teacher_fingerprint": teacher.original.fingerprint(),
                "seed": context.seed,
                "samples": min(self.samples, len(data.train)),
                "layers": {u.layer: u.origin.layer for u in units},
            },
            fitted=bool(units),
            bulk={u.layer: packed(u.origin) for u in units},
            kept=left,
            summary=f"{len(units)} layers to fit to {label}" if units else f"nothing differs from {label}",
        )

    def train(self, program: Program, plan: Plan, context: Context) -> tuple[Program, Fit]:
        """Fit layer by layer; an interrupted fit goes on behind the last layer that was done; collective."""
        split = require_data(self.name, context).train.spread(self.samples)
        teacher = find_teacher(self.teacher, program, context, self.name)
        original = teacher.original
        found = {layer: unpacked(of, plan.bulk[layer]) for layer, of in plan.decisions["layers"].items()}
        units = [u for u in find_units(program, original, found)[0] if u.layer in found]
        decided = plan.model_dump(mode="json")
        work = cache.identity(program=program.fingerprint(), plan=decided, samples=split.fingerprint())
        state = State(context.workdir, work)
        known = distributed.on_first(state.read)
        rows = [row for row, _ in known]

        def done(row: FittedLayer, tensors: Mapping[str, Tensor]) -> None:
            rows.append(row)
            distributed.on_first(lambda: state.write(row, tensors))

        started = time.perf_counter()
        result = program
        if units:
            limits = Limits(
                positions=self.positions,
                ridge=None if self.ridge == "auto" else self.ridge,
                seed=plan.decisions["seed"],
                memory=context.memory,
                bias_only=self.only == "bias",
                together=self.together,
            )
            before = {row.layer: (row, tensors) for row, tensors in known}
            result = fit(program, original, units, split, limits, context.progress, before, done)
        distributed.on_first(state.clear)
        return result, Fit(
            original=teacher.label,
            samples=len(split),
            positions=self.positions,
            layers=rows,
            seconds=time.perf_counter() - started,
            resumed=len(known),
        )

    def _units(self, program: Program, teacher: Teacher) -> tuple[list[Unit], list[LeftAlone]]:
        """What can be fitted, and what is left alone."""
        if teacher.is_same:
            return [], []
        found = origins(teacher.earlier, teacher.replays)
        units, left = find_units(program, teacher.original, found)
        outside = {u: not_asked([u.layer], self.include, self.exclude) for u in units}
        left += [LeftAlone(where=u.layer, reason=reason) for u, reason in outside.items() if reason]
        return [u for u in units if not outside[u]], left
