"""The training step: schedules, guard, AdamW and moving average, plain or in one kernel."""
