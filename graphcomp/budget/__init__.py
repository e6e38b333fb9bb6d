"""How many channels or ranks go, and what they cost: allocation, predicted and measured time."""
