"""The weight update: guard, clipping, AdamW, schedules and the teacher's moving average."""
