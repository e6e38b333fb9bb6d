"""What an optimiser remembers goes through surgery like the weights that it belongs to.

    momenta of parameters → a program that has them for weights → the same removal → momenta of what is left

A removal of channels deletes positions of tensors and leaves the values of the others, whatever they mean. So
there is nothing to know here about convolution groups, normalisations or joins: the program of momenta is cut
by the very surgery that cut the program.
"""

from collections.abc import Callable, Mapping

from torch import Tensor

from graphcomp.ir import Program, editable


def cut_momenta(
    momenta: Mapping[str, Tensor], program: Program, rewrite: Callable[[Program], Program]
) -> dict[str, Tensor]:
    """Momenta of `program`'s parameters as those of what `rewrite` makes of it.

    Args:
        momenta: `train.training.Fitted.momenta`, by `parameter#what`. What is no tensor of its parameter's
            shape (a count of steps) stays as it is.
        program: before the removal.
        rewrite: removes channels, and does nothing else to values.

    Returns:
        The momenta of the parameters that are left.
    """
    kinds: dict[str, dict[str, Tensor]] = {}
    for key, value in momenta.items():
        name, _, what = key.partition("#")
        kinds.setdefault(what, {})[name] = value
    kept: dict[str, Tensor] = {}
    for what, values in kinds.items():
        shaped = {n: v for n, v in values.items() if v.shape == program.tensors[n].shape}
        held = Program(editable(program, shaped), program.example_inputs)
        left = rewrite(held).tensors
        for name, value in values.items():
            if name in left:
                kept[f"{name}#{what}"] = left[name].detach().clone() if name in shaped else value
    return kept
