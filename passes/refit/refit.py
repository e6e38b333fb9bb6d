"""refit: every layer fitted again, in closed form and without labels, to what the original computed.

Layers are fitted in the order of the graph, each on what the network, fitted so far, feeds it (METHODS 9.5):

    W, b = argmin  E |W a + b - y|^2  +  ridge * |W - W0|^2

with a the patch that the layer reads at a sampled position, y what the original has there at the rows that
are left, and W0 the weights as they were. Before an addition whose other operand is already computed, y is
the original's sum less that operand: a layer makes up for what the other branch lost. Before a ReLU only
the sign counts where the original's value is negative. Statistics of normalisations are part of what is
fitted: do not estimate them again afterwards.

It changes values and nothing else. Which rows of the original a layer's outputs are follows from the plans of
the passes in between (`lineage`). Where nothing was removed, nothing changes, bit for bit.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, TypeAdapter
from pydantic.dataclasses import dataclass
from torch import Tensor

from graphcomp.base import cache, distributed, load_state, remove, save_state
from graphcomp.bases import (
    OPTIONS,
    Globs,
    RowRemoval,
    find_step,
    load_saved,
    load_step,
    matches,
    no_such_step,
    options_of,
    require_matches,
)
from graphcomp.compiler import is_program_dir
from graphcomp.errors import AnalysisError, PassError
from graphcomp.ir import Program
from graphcomp.measure import is_mixing
from graphcomp.passes.refit.lineage import Replay, origins, packed, unpacked
from graphcomp.passes.refit.lockstep import Limits, fit
from graphcomp.passes.refit.units import Unit, find_units
from graphcomp.pipeline import (
    Concern,
    Context,
    KeepingRows,
    Outlook,
    Reshaping,
    TrainingPass,
    require_data,
)
from graphcomp.records import Fit, FittedLayer, LeftAlone, Plan

STATE = "fitted"
"""Name of the folder of what was fitted so far, in the working directory; a file a layer."""


class _Recorded(RowRemoval):
    """What any removal of rows comes to, whoever planned it."""

    name: ClassVar[str] = "refit"


class _Learned:
    """A training, whoever planned it."""


@dataclass(frozen=True, config=OPTIONS)
class Refit:
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
    only: Annotated[
        Literal["bias"] | None, Field(description="bias: means alone are restored, no weight is fitted")
    ] = None
    include: Annotated[Globs, Field(description="globs on module paths of layers to fit")] = ("*",)
    exclude: Annotated[Globs, Field(description="globs on module paths of layers to leave alone")] = ()

    def require(self, outlook: Outlook) -> None:
        """Data, an earlier program and layers for every glob."""
        require_data(self.name, outlook.context)
        if len(outlook.program.example_inputs) != 1:
            raise AnalysisError(
                f"{self.name}: found {len(outlook.program.example_inputs)} inputs, expected a network with "
                "one; data sources yield one tensor a sample"
            )
        names = [earlier.name for earlier in outlook.context.earlier]
        if self.teacher is not None and find_step(self.teacher, names) is None:
            self._place(names)
        if outlook.names and outlook.plain:
            layers = (t for t, m in outlook.program.called_modules().items() if is_mixing(m))
            require_matches((*self.include, *self.exclude), layers)

    def foresee(self, outlook: Outlook) -> Outlook:
        """Structure stays."""
        return outlook

    def plan(self, program: Program, context: Context) -> Plan:
        """Name the original and the layers that can be fitted to it.

        Raises:
            DataError: no data. PassError: no such program, or one that this one was not made from.
        """
        require_data(self.name, context)
        label, original, since = self._teacher(program, context)
        units, left = self._units(program, original, since)
        original = _followed(original, since)
        summary = f"{len(units)} layers to fit to {label}" if units else f"nothing differs from {label}"
        return Plan(
            name=self.name,
            options=options_of(self),
            decisions={
                "teacher": label,
                "teacher_fingerprint": original.fingerprint(),
                "seed": context.seed,
                "samples": min(self.samples, len(context.data.train)) if context.data else 0,
                "layers": {u.layer: u.origin.layer for u in units},
            },
            bulk={u.layer: packed(u.origin) for u in units},
            kept=left,
            summary=summary,
        )

    def simulate(self, program: Program, plan: Plan) -> Program:
        """Refuse: a plan is not enough to fit."""
        raise PassError(
            f"{self.name}: found a plan without data, expected data to fit to; run the pass in a pipeline"
        )

    def rewrite(self, program: Program, plan: Plan) -> Program:
        """Nothing: a fitted program has the shapes that it had."""
        return program

    def train(self, program: Program, plan: Plan, context: Context) -> tuple[Program, Fit]:
        """Fit layer by layer; an interrupted fit goes on behind the last layer that was done; collective."""
        data = require_data(self.name, context)
        label, original, since = self._teacher(program, context)
        original = _followed(original, since)
        found = {layer: unpacked(of, plan.bulk[layer]) for layer, of in plan.decisions["layers"].items()}
        units = [u for u in find_units(program, original, found)[0] if u.layer in found]
        split = data.train.spread(self.samples)
        seed: int = plan.decisions["seed"]
        work = cache.identity(
            program=program.fingerprint(), plan=plan.model_dump(mode="json"), samples=split.fingerprint()
        )
        state = _State(context.workdir and context.workdir / STATE, work)
        known = distributed.on_first(state.read)
        limits = Limits(
            self.positions,
            None if self.ridge == "auto" else self.ridge,
            seed,
            context.memory,
            self.only == "bias",
        )
        rows = [row for row, _ in known]

        def done(row: FittedLayer, tensors: Mapping[str, Tensor]) -> None:
            rows.append(row)
            distributed.on_first(lambda: state.write(row, tensors))

        started = time.perf_counter()
        result = program
        if units:
            fitted = {row.layer: tensors for row, tensors in known}
            result = fit(program, original, units, split, limits, context.progress, fitted, done)
        distributed.on_first(state.clear)
        return result, Fit(
            original=label,
            samples=len(split),
            positions=self.positions,
            layers=rows,
            seconds=time.perf_counter() - started,
            resumed=len(known),
        )

    def _units(
        self, program: Program, earlier: Program, since: Sequence[Plan]
    ) -> tuple[list[Unit], list[LeftAlone]]:
        """What can be fitted to an earlier program, given the plans since, and what is left alone."""
        passes = [(plan, _pass_of(plan)) for plan in since]
        if all(isinstance(pass_, Reshaping) for _, pass_ in passes):
            return [], []
        moving = [
            (p, pass_) for p, pass_ in passes if not isinstance(pass_, TrainingPass | _Learned | KeepingRows)
        ]
        found = origins(earlier, [_replay(pass_, plan) for plan, pass_ in moving])
        units, left = find_units(program, _followed(earlier, since), found)
        outside = [
            u for u in units if not matches([u.layer], self.include) or matches([u.layer], self.exclude)
        ]
        left += [LeftAlone(where=u.layer, reason="excluded") for u in outside]
        return [u for u in units if u not in outside], left

    def _teacher(self, program: Program, context: Context) -> tuple[str, Program, list[Plan]]:
        """Who it is, the program, and the plans since."""
        names = [earlier.name for earlier in context.earlier]
        index = _default(context) if self.teacher is None else find_step(self.teacher, names)
        if index is not None:
            label, original = load_step(context, index)
        else:
            label = self._place(names)
            original = load_saved(label)
        count = len(original.history)
        if list(program.history[:count]) != list(original.history):
            raise PassError(
                f"teacher: found {label}, whose history is no beginning of this network's, expected a "
                "program that this one was made from; name an earlier step"
            )
        return label, original, [Plan.model_validate(plan) for plan in program.history[count:]]

    def _place(self, names: list[str]) -> str:
        if isinstance(self.teacher, str) and is_program_dir(self.teacher):
            return self.teacher
        raise no_such_step(repr(self.teacher), names)


def _followed(program: Program, since: Sequence[Plan]) -> Program:
    """An earlier program, written as the later one is."""
    for plan in since:
        pass_ = _pass_of(plan)
        if isinstance(pass_, Reshaping):
            program = pass_.follow(program, plan)
    return program


def _default(context: Context) -> int:
    """What was trained last before the last removals: trained by them or after them does not count."""
    removed = False
    for index in reversed(range(1, len(context.earlier))):
        kind = _kind(context.earlier[index].name)
        if kind is None or issubclass(kind, Refit | Reshaping):
            continue
        if hasattr(kind, "iteration"):
            if removed and _trained(context, index):
                return index
            removed = True
        elif not hasattr(kind, "train"):
            removed = True
        elif removed:
            return index
    return 0


def _trained(context: Context, index: int) -> bool:
    """Whether a pass that may go over several rounds did."""
    before, after = (context.earlier[i].load().history for i in (index - 1, index))
    plans = [Plan.model_validate(plan) for plan in after[len(before) :]]
    return any(isinstance(_pass_of(plan), TrainingPass | _Learned) for plan in plans)


def _kind(name: str) -> Any:
    """The class of a pass by its name; None if there is none."""
    from graphcomp.passes import PASSES  # which offers this pass

    return PASSES.get(name)


def _pass_of(plan: Plan) -> Any:
    """The pass that made a plan; of one that is part of another, what its plan comes to."""
    if (kind := _kind(plan.name)) is not None:
        return TypeAdapter(kind).validate_python(plan.options)
    if "rows" in plan.decisions:
        return _Recorded()
    if "epochs" in plan.options:
        return _Learned()
    raise PassError(
        f"teacher: found the pass {plan.name!r} in this network's history, expected passes of this version; "
        "fit to a later step"
    )


def _replay(pass_: Any, plan: Plan) -> Replay:
    return lambda program: pass_.rewrite(program, plan)


class _State:
    """What was fitted before an interruption: a file a layer, its row and its tensors."""

    def __init__(self, folder: Path | None, work: str) -> None:
        self.folder, self.work = folder, work
        self.count = 0

    def read(self) -> list[tuple[FittedLayer, dict[str, Tensor]]]:
        found = []
        for path in sorted(self.folder.glob("*.safetensors")) if self.folder is not None else ():
            state = load_state(path, self.work)
            if state is not None:
                found.append((FittedLayer.model_validate(state[0]), state[1]))
        self.count = len(found)
        return found

    def write(self, row: FittedLayer, tensors: Mapping[str, Tensor]) -> None:
        if self.folder is not None:
            path = self.folder / f"{self.count:05}.safetensors"
            save_state(path, self.work, row.model_dump(mode="json"), tensors)
            self.count += 1

    def clear(self) -> None:
        if self.folder is not None:
            remove(self.folder)
