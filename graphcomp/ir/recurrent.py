"""One recurrent layer with one name a tensor: what files hold, and programs can copy and save.

torch's own keeps lists of its parameters beside them, which a copy with other tensors would not follow.
"""

import torch
from torch import Tensor, nn


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
        for end in self._ends:
            self.register_parameter(f"weight_ih{end}", nn.Parameter(torch.zeros(rows, input_size)))
            self.register_parameter(f"weight_hh{end}", nn.Parameter(torch.zeros(rows, hidden_size)))
            for name in ("bias_ih", "bias_hh") if bias else ():
                self.register_parameter(f"{name}{end}", nn.Parameter(torch.zeros(rows)))

    @property
    def _ends(self) -> tuple[str, ...]:
        return ("", "_reverse") if self.bidirectional else ("",)

    def _weights(self) -> list[Tensor]:
        names = ("weight_ih", "weight_hh", *(("bias_ih", "bias_hh") if self.bias else ()))
        return [getattr(self, name + end) for end in self._ends for name in names]

    def _state(self, x: Tensor, given: Tensor | None) -> Tensor:
        return x.new_zeros(len(self._ends), x.size(1), self.hidden_size) if given is None else given


class LstmLayer(RecurrentLayer):
    """As `torch.nn.LSTM` with one layer; rows of its weights are those of the gates i, f, g, o."""

    gates = 4

    def forward(
        self, x: Tensor, hidden: Tensor | None = None, cell: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """From (time, batch, input) and states (directions, batch, hidden), zeros if None, all outputs.

        These are (time, batch, directions x hidden), and the last states.
        """
        states = [self._state(x, hidden), self._state(x, cell)]
        return torch.lstm(x, states, self._weights(), self.bias, 1, 0.0, False, self.bidirectional, False)


class GruLayer(RecurrentLayer):
    """As `torch.nn.GRU` with one layer; rows of its weights are those of the gates r, z, n."""

    gates = 3

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """From (time, batch, input) and a state (directions, batch, hidden), zeros if None, all outputs.

        These are (time, batch, directions x hidden), and the last state.
        """
        state = self._state(x, hidden)
        return torch.gru(x, state, self._weights(), self.bias, 1, 0.0, False, self.bidirectional, False)
