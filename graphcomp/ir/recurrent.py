"""One recurrent layer with one name a tensor: what files hold, and programs can copy and save.

torch's own keeps lists of its parameters beside them, which a copy with other tensors would not follow.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from graphcomp.ir.hooks import is_hooked


class RecurrentLayer(nn.Module):
    """Weights of one layer, forwards and, if `bidirectional`, backwards (names end in `_reverse`).

    Attributes:
        input_size, hidden_size: numbers of features that go in, and that one direction yields.
        bias: whether there are biases.
        bidirectional: whether it also runs from the end.
    """

    gates = 1

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, bidirectional: bool = False
    ) -> None:
        super().__init__()
        self.input_size, self.hidden_size = input_size, hidden_size
        self.bias, self.bidirectional = bias, bidirectional
        rows = self.gates * hidden_size
        for end in self.ends:
            self.register_parameter(f"weight_ih{end}", nn.Parameter(torch.zeros(rows, input_size)))
            self.register_parameter(f"weight_hh{end}", nn.Parameter(torch.zeros(rows, hidden_size)))
            for name in ("bias_ih", "bias_hh") if bias else ():
                self.register_parameter(f"{name}{end}", nn.Parameter(torch.zeros(rows)))

    @property
    def ends(self) -> tuple[str, ...]:
        """What the names of a direction's tensors end in."""
        return ("", "_reverse") if self.bidirectional else ("",)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the tensors of a direction, in the order of torch's functions."""
        return ("weight_ih", "weight_hh", *(("bias_ih", "bias_hh") if self.bias else ()))

    def _weights(self) -> list[Tensor]:
        return [getattr(self, name + end) for end in self.ends for name in self.names]

    def _shaped(self, x: Tensor, *states: Tensor | None) -> tuple[Tensor, Tensor]:
        """Outputs and a state without numbers: torch would take every step of time to find their shapes."""
        count = len(self.ends)
        features, size = (getattr(self, name).shape[1] for name in self.names[:2])
        widths = [x.shape[2], *(s.shape[2] for s in states if s is not None)]
        if widths != [features, *[size] * (len(widths) - 1)]:
            raise RuntimeError(f"found widths {widths}, expected {features} features, and {size} of a state")
        outputs = x.new_empty(x.size(0), x.size(1), count * size)
        return outputs, x.new_empty(count, x.size(1), size)

    def _state(self, x: Tensor, given: Tensor | None) -> Tensor:
        return x.new_zeros(len(self.ends), x.size(1), self.hidden_size) if given is None else given


class LstmLayer(RecurrentLayer):
    """As `torch.nn.LSTM` with one layer; rows of its weights are those of the gates i, f, g, o."""

    gates = 4

    def forward(
        self, x: Tensor, hidden: Tensor | None = None, cell: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """From (time, batch, input) and states (directions, batch, hidden), zeros if None, all outputs.

        These are (time, batch, directions x hidden), and the last states.
        """
        if x.is_meta:
            outputs, state = self._shaped(x, hidden, cell)
            return outputs, state, torch.empty_like(state)
        states = [self._state(x, hidden), self._state(x, cell)]
        return torch.lstm(x, states, self._weights(), self.bias, 1, 0.0, False, self.bidirectional, False)


class GruLayer(RecurrentLayer):
    """As `torch.nn.GRU` with one layer; rows of its weights are those of the gates r, z, n."""

    gates = 3

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """From (time, batch, input) and a state (directions, batch, hidden), zeros if None, all outputs.

        These are (time, batch, directions x hidden), and the last state.
        """
        if x.is_meta:
            return self._shaped(x, hidden)
        state = self._state(x, hidden)
        return torch.gru(x, state, self._weights(), self.bias, 1, 0.0, False, self.bidirectional, False)


class OpenRecurrent(nn.Module):
    """Takes and yields what `nn.LSTM` and `nn.GRU` do.

    Args:
        module: one that `opens_recurrent` takes. Its weights become those of layers of ours, one for each.
    """

    def __init__(self, module: nn.LSTM | nn.GRU) -> None:
        super().__init__()
        self.input_size, self.hidden_size = module.input_size, module.hidden_size
        self.num_layers, self.bidirectional = module.num_layers, module.bidirectional
        self.batch_first, self.bias = module.batch_first, module.bias
        self.has_cell = isinstance(module, nn.LSTM)
        self.layers = nn.ModuleList(_layer_of(module, i) for i in range(module.num_layers))
        self.dropout = nn.Dropout(module.dropout)
        self.train(module.training)

    def flatten_parameters(self) -> None:
        """Nothing: torch's moves its weights into one piece of memory."""

    def forward(self, input: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
        """See `nn.LSTM` and `nn.GRU`."""
        batched = input.dim() == 3
        states = [] if hx is None else list(hx) if self.has_cell else [hx]
        x = input
        if not batched:
            x, states = x.unsqueeze(1), [s.unsqueeze(1) for s in states]
        elif self.batch_first:
            x = x.transpose(0, 1)
        count, lasts = 1 + self.bidirectional, []
        for i, layer in enumerate(self.layers):
            if i:
                x = self.dropout(x)
            part = slice(i * count, (i + 1) * count)
            x, *last = layer(x, *(states if self.num_layers == 1 else [s[part] for s in states]))
            lasts.append(last)
        if not batched:
            x = x.squeeze(1)
        elif self.batch_first:
            x = x.transpose(0, 1)
        ended = [self._together(parts) for parts in zip(*lasts, strict=True)]
        if not batched:
            ended = [s.squeeze(1) for s in ended]
        return x, tuple(ended) if self.has_cell else ended[0]

    def _together(self, states: tuple[Tensor, ...]) -> Tensor:
        """(layers x directions, batch, hidden)."""
        if len(states) == 1:
            return states[0]
        return torch.stack([s[i] for s in states for i in range(1 + self.bidirectional)])


def _layer_of(module: nn.LSTM | nn.GRU, index: int) -> RecurrentLayer:
    width = module.input_size if index == 0 else module.hidden_size * (1 + module.bidirectional)
    kind = LstmLayer if isinstance(module, nn.LSTM) else GruLayer
    with torch.device("meta"):
        layer = kind(width, module.hidden_size, module.bias, module.bidirectional)
    for name in layer._parameters:
        stem, reverse, _ = name.partition("_reverse")
        layer._parameters[name] = cast(nn.Parameter, getattr(module, f"{stem}_l{index}{reverse}"))
    return layer


def opens_recurrent(module: Any) -> bool:
    """Whether it is torch's own LSTM or GRU, without a projection of what it yields, and without hooks."""
    if type(module) not in (nn.LSTM, nn.GRU) or module.proj_size:
        return False
    return not is_hooked(module)
