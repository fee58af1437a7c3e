"""The optimizers of a run, from its settings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from edgetrain.config import Settings
from edgetrain.errors import InputError
from edgetrain.stream.optimizers import LearningRate, OptimizerRecipe


def optimizer_of(settings: Settings, rows: int) -> OptimizerRecipe:
    """The optimizer of each cell.

    Args:
        settings: of the run, with the defaults of its method.
        rows: number of training samples.

    Raises:
        InputError: settings that it does not have, or out of range.
    """
    return OptimizerRecipe(
        name=settings.optimizer or "",
        lr=settings.lr or 0.0,
        weight_decay=settings.weight_decay or 0.0,
        more=_optimizer_arguments(settings),
        clip_value=settings.clip_value,
        clip_norm=settings.clip_norm,
        schedule=LearningRate.parse(settings.lr_schedule or "constant"),
        steps=settings.epochs * -(-rows // settings.batch_size),
        epochs=settings.epochs,
    )


def classifier_optimizer_of(settings: Settings, rows: int) -> OptimizerRecipe | None:
    """The optimizer of the trained classifier, if there is one; see ``optimizer_of``."""
    if not settings.classifier_epochs:
        return None
    return replace(
        optimizer_of(settings, rows),
        lr=settings.classifier_lr or 0.0,
        weight_decay=settings.classifier_weight_decay or 0.0,
        clip_norm=None,  # its blocks step one by one
        steps=settings.classifier_epochs * -(-rows // settings.batch_size),
        epochs=settings.classifier_epochs,
    )


def _optimizer_arguments(settings: Settings) -> tuple[tuple[str, Any], ...]:
    """Momentum and betas, where the optimizer has them.

    Raises:
        InputError: it has none, or they are out of range.
    """
    name, momentum = settings.optimizer, settings.momentum
    if name == "sgd":
        if settings.betas is not None:
            raise InputError("--betas is for adam, adamw and adamax; sgd has --momentum")
        if momentum is not None and momentum >= 1:
            raise InputError(f"--momentum {momentum:g}: expected a number from 0 to below 1")
        if settings.nesterov and not momentum:
            raise InputError("--nesterov needs --momentum, such as 0.9")
        return (("momentum", momentum), ("nesterov", settings.nesterov)) if momentum else ()
    if momentum is not None or settings.nesterov:
        flag = "--momentum" if momentum is not None else "--nesterov"
        raise InputError(f"{flag} is for --optimizer sgd; this run uses {name}, which has --betas")
    if settings.betas is None:
        return ()
    try:
        first, second = (float(part) for part in settings.betas.split(","))
    except ValueError:
        first = second = -1.0
    if not (0 <= first < 1 and 0 <= second < 1):
        raise InputError(f"--betas {settings.betas!r}: expected two numbers from 0 to below 1, such as 0.9,0.999")
    return (("betas", (first, second)),)
