"""What a run writes, as data: reports, plans, timings, explanations."""
