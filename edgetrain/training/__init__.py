"""Carrying a run out: schedules, the trainer, the predictor."""
