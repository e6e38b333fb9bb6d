"""Training a program: options, schedules, batches, the loop."""
