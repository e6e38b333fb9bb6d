"""Which channels are coupled, which may go, and how they go exactly."""
