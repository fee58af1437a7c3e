"""From settings to a run that can be planned: data opened, net read, every default filled in."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch

from edgetrain.config import Settings
from edgetrain.data.augment import Augmentation
from edgetrain.data.base import DataSet
from edgetrain.data.layout import Reading
from edgetrain.data.specs import absolute, open_data
from edgetrain.data.validation import with_validation
from edgetrain.errors import DiagnosticWarning, InputError
from edgetrain.memory import device as devices
from edgetrain.memory import rates
from edgetrain.memory.threads import thread_limit
from edgetrain.nets.base import Net
from edgetrain.nets.spec import open_net
from edgetrain.objectives.base import Node, Objective, nodes
from edgetrain.planning import storage
from edgetrain.planning.cost import visit_times
from edgetrain.planning.plan import Decisions, Plan, RunTimes
from edgetrain.planning.planner import make_plan
from edgetrain.planning.probe import Probe
from edgetrain.planning.workload import Workload
from edgetrain.training.inputs import Shape, describe, normalization_of
from edgetrain.training.methods import METHODS, method_of
from edgetrain.training.optimizers import classifier_optimizer_of, optimizer_of
from edgetrain.training.process import process_state
from edgetrain.units import from_mb, show_mb, stated_mb

_LISTED = 10  # cells of a user's net, in a note


@dataclass(frozen=True)
class Job:
    """A run, resolved.

    Attributes:
        settings: with nothing left open but limits.
        data: the data set.
        shape: what the run remembers of it.
        net: the recipes, before a baseline joins them.
        work: what the planner and the trainer need.
        decided: by the plan of a run that is resumed, and kept; ``None``: nothing yet.
    """

    settings: Settings
    data: DataSet
    shape: Shape
    net: Net
    work: Workload
    decided: Decisions | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """How the modules of a user's net were read, in sentences."""
        cells = [recipe for recipe in self.net.cells if recipe.made_of]
        if not cells:
            return ()
        listed = [f"{number} {recipe.made_of}" for number, recipe in enumerate(cells, 1)]
        if len(listed) > 2 * _LISTED:
            listed = [*listed[:_LISTED], f"and so on to {listed[-1]}"]
        notes = (f"cells: {'; '.join(listed)}",)
        output, method = self.net.output, self.work.objective
        if output is None:
            return notes
        kept = "is trained" if method.keeps_output else f"is left out: {method.name} trains none"
        return (*notes, f"the output layer, {output.made_of}, {kept}")

    @property
    def input(self) -> str:
        """What the training rows are and how they were read, in a line."""
        return describe(self.data, self.work.objective.nonnegative_input, self.settings.normalize)


def open_job(settings: Settings, net: Any = None, data: DataSet | None = None, method: Any = None) -> Job:
    """Resolve settings.

    Args:
        settings: as given.
        net: modules or a function given in Python instead of ``settings.net``.
        data: a data set given in Python instead of ``settings.data``.
        method: a class given in Python instead of ``settings.method``.

    Raises:
        InputError: something is unknown or does not fit together.
    """
    method = method_of(settings, method)
    device = devices.resolve(settings.device)
    settings = with_defaults(settings, method)
    _check_threads(settings)
    _check_micro_batch(settings)
    opened = data_of(settings, data)
    if settings.vote == "auto" and settings.validation is None:
        raise InputError("--vote auto needs --validation, such as 0.1: a vote is never chosen by test rows")
    _check_evaluation(settings, method, opened)
    assert opened.train is not None
    shape = Shape.of(opened)
    recipes = net_of(settings, method, shape, settings.net if net is None else net)
    objective = objective_of(settings, method, shape, recipes)
    if settings.normalize is None:
        images = opened.input == "image" and not objective.nonnegative_input
        settings = replace(settings, normalize="data" if images else "none")
    if settings.memory_format == "auto":
        settings = replace(settings, memory_format="channels-last" if device.type == "cpu" else "contiguous")
    work = Workload(
        nodes=cells_of(settings, objective, shape, recipes),
        objective=objective,
        optimizer=optimizer_of(settings, opened.train.rows),
        classifier=classifier_optimizer_of(settings, opened.train.rows),
        schedule=settings.schedule or ("streamed" if objective.streams_layers else "separate"),
        classes=shape.classes,
        rows=opened.train.rows,
        test_rows=sum(part.rows for part in (opened.test, opened.validation) if part is not None),
        batch_size=settings.batch_size,
        epochs=settings.epochs,
        classifier_epochs=settings.classifier_epochs or 0,
        inputs=replace(
            shape.format,
            normalization=normalization_of(settings.normalize, opened, objective.nonnegative_input, measured=False),
        ),
        latent_dtype=settings.latent_dtype,
        device=device,
        seed=settings.seed,
        prefetch=settings.prefetch,
        views=settings.views or 1,
        augmentation=Augmentation.parse(settings.augment, shape.shape) if settings.augment else None,
        keep_latents=settings.keep_latents,
        evaluate_every=settings.evaluate_every,
        patience=settings.patience,
    )
    return Job(settings, opened, shape, recipes, work)


def _check_evaluation(settings: Settings, method: type[Objective], data: DataSet) -> None:
    """Refuse evaluations for which there are no rows, or by which nothing can be decided.

    Raises:
        InputError: says what is missing.
    """
    if settings.patience is not None and settings.validation is None:
        raise InputError("--patience needs --validation, such as 0.1: a run is never stopped by its test rows")
    if settings.patience is not None and settings.schedule == "separate" and method.vote == "classifier":
        raise InputError(
            f"--patience: the cells of {method.name} make no predictions of their own; use --schedule sequence, which"
            " stops by the predictions of the classifier"
        )
    evaluates = settings.evaluate_every is not None or settings.patience is not None
    if evaluates and settings.placement == "resident":
        raise InputError("--placement resident: evaluations in the course of training stream the cells; leave one out")
    if settings.evaluate_every is not None and data.test is None and data.validation is None:
        raise InputError(f"--evaluate-every: data {data.name!r} has no test rows; hold some out with --validation 0.1")


def data_of(settings: Settings, data: DataSet | None = None) -> DataSet:
    """The data set of settings, or ``data``, with the validation rows held out.

    Raises:
        InputError: it has no training rows, or too few to hold some out.
    """
    opened = open_data(settings.data, stated_reading(settings)) if data is None else data
    if opened.train is None:
        raise InputError(f"data {opened.name!r}: holds no training rows")
    return opened if settings.validation is None else with_validation(opened, settings.validation)


def stated_reading(settings: Settings) -> Reading:
    """What settings state of how rows are to be read."""
    return Reading(settings.input, settings.channels)


def net_of(settings: Settings, method: type[Objective], shape: Shape, net: Any) -> Net:
    """The net of settings for a method, with its options.

    Raises:
        InputError: it cannot be read, does not fit the data, or has fewer cells than asked for.
    """
    like = settings.like or method.like
    preferred = METHODS[like] if like else method
    reads = method.reads(shape.shape, shape.input == "table", shape.classes)
    found = open_net(net, shape.shape, preferred.net_defaults, shape.vocabulary, settings.seed, reads, shape.classes)
    if found.in_shape != shape.shape:
        found = replace(found, options={**found.options, "label": "beside"})
    if settings.cells is None:
        return found
    if settings.cells > len(found.cells):
        raise InputError(f"--cells {settings.cells}: net {found.spec!r} has {len(found.cells)} cells")
    whole = settings.cells == len(found.cells)
    return replace(found, cells=found.cells[: settings.cells], output=found.output if whole else None)


def objective_of(settings: Settings, method: type[Objective], shape: Shape, net: Net) -> Objective:
    """The rule with the settings' constants."""
    return method(
        shape.classes, net.options, constants_of(settings, method), trains_classifier=bool(settings.classifier_epochs)
    )


def cells_of(settings: Settings, objective: Objective, shape: Shape, net: Net) -> tuple[Node, ...]:
    """The cells that are trained.

    Raises:
        InputError: the rule cannot learn from them or from the data.
    """
    if shape.vocabulary is not None and not objective.takes_tokens:
        raise InputError(f"{objective.name} cannot learn from token ids; use a method such as mf with --net mlp:...")
    joined = objective.join(list(net.cells))
    for index, recipe in enumerate(joined):
        for name, other, there in recipe.tied:
            raise InputError(
                f"net {net.spec!r}: {name} of cell {index + 1} is {there} of cell {other + 1}: {objective.name} trains"
                " cells apart, so weights cannot be shared between them; put both layers into one module, or use"
                " --method bp"
            )
    output = net.output if objective.keeps_output else None
    channels_last = settings.memory_format == "channels-last"
    cells = tuple(nodes(joined, shape.shape, settings.seed, output, channels_last))
    objective.check(cells)
    return cells


def constants_of(settings: Settings, method: type[Objective]) -> dict[str, float]:
    """The settings' constants as numbers by name.

    Raises:
        InputError: unknown name, or no number.
    """
    found: dict[str, float] = {}
    for item in (settings.constants or "").split(","):
        name, _, text = (part.strip() for part in item.partition("="))
        if not item.strip():
            continue
        if name not in method.constants:
            known = f"; known: {', '.join(method.constants)}" if method.constants else " has no constants"
            raise InputError(f"--constants {settings.constants!r}: {method.name}{known}; not {name!r}")
        try:
            found[name] = float(text)
        except ValueError:
            raise InputError(f"--constants {settings.constants!r}: {name}={text!r}; expected a number") from None
        if not 0 <= found[name] < float("inf"):
            raise InputError(f"--constants {settings.constants!r}: {name}={text}; expected a number from 0 on")
        if name in method.shares and found[name] >= 1:
            raise InputError(f"--constants {settings.constants!r}: {name}={text}; expected a share from 0 to below 1")
    return found


def with_defaults(settings: Settings, method: type[Objective]) -> Settings:
    """Settings with the method's defaults where nothing was said, and the data's path made absolute.

    Raises:
        InputError: a setting has no meaning for the method.
    """
    prefers = method.defaults
    if prefers.schedule is None and settings.schedule is not None:
        raise InputError(f"--schedule is for local methods; {method.name} trains the whole net at once")
    if settings.clip_norm is not None and method.streams_layers:
        raise InputError(
            f"--clip-norm needs the gradients of the whole net, and {method.name} has those of one layer at a time; use"
            " --clip-value, or --method bp-checkpoint"
        )
    if settings.placement == "resident" and method.streams_layers:
        raise InputError(f"--placement resident: {method.name} streams its layers; use --method bp")
    schedule = settings.schedule or prefers.schedule
    constants_of(settings, method)
    _check_views(settings, method, schedule)
    values: dict[str, Any] = {
        "data": absolute(settings.data),
        "net": settings.net or method.default_net,
        "schedule": schedule,
        "optimizer": settings.optimizer or prefers.optimizer,
        "lr": _or(settings.lr, prefers.lr),
        "weight_decay": _or(settings.weight_decay, prefers.weight_decay),
        "threads": settings.threads or min(torch.get_num_threads(), thread_limit() or torch.get_num_threads()),
        "like": settings.like or method.like,
        "evaluate_every": settings.evaluate_every or (None if settings.patience is None else 1),
        **_classifier(settings, method, schedule),
    }
    return replace(settings, **values)


def _check_micro_batch(settings: Settings) -> None:
    """Refuse micro-batches that are larger than the batch.

    Raises:
        InputError: names the larger one.
    """
    asked = settings.micro_batch if isinstance(settings.micro_batch, list) else [settings.micro_batch or 1]
    if max(asked) > settings.batch_size:
        raise InputError(f"--micro-batch {max(asked)} is larger than --batch-size {settings.batch_size}")


def _check_threads(settings: Settings) -> None:
    """Refuse a number of threads that a parallel region does not get, as the bits of the result depend on it.

    Raises:
        InputError: OpenMP's limit is lower.
    """
    limit = thread_limit()
    if limit is not None and settings.threads is not None and settings.threads > limit:
        raise InputError(
            f"--threads {settings.threads}: OMP_THREAD_LIMIT allows {limit} here, and results depend on the number of"
            f" threads; set OMP_THREAD_LIMIT={settings.threads} or unset it"
        )
    cores = os.cpu_count() or 1
    if settings.threads is not None and settings.threads > cores:
        warnings.warn(
            DiagnosticWarning(f"--threads {settings.threads} on {cores} cores: more threads than cores are slow"),
            stacklevel=2,
        )


def _classifier(settings: Settings, method: type[Objective], schedule: str | None) -> dict[str, Any]:
    """Settings of the trained classifier, if there is one."""
    trained = method.vote == "classifier" or settings.classifier_epochs is not None
    if method.classifier is None or not trained:
        for name in ("classifier_lr", "classifier_weight_decay", "classifier_epochs"):
            if getattr(settings, name) is not None:
                why = "does not" if method.classifier is None else "does with --classifier-epochs"
                raise InputError(
                    f"--{name.replace('_', '-')} is for methods that train a classifier on latents; {method.name} {why}"
                )
        return {}
    return {
        "classifier_lr": _or(settings.classifier_lr, method.defaults.classifier_lr),
        "classifier_weight_decay": _or(settings.classifier_weight_decay, method.defaults.classifier_weight_decay),
        "classifier_epochs": _classifier_epochs(settings, schedule),
    }


def _check_views(settings: Settings, method: type[Objective], schedule: str | None) -> None:
    """Views are what ``separate`` caches; elsewhere every epoch is a fresh one."""
    if settings.views is not None and schedule != "separate":
        raise InputError("--views is for --schedule separate; here every epoch is a fresh view of the data")
    if settings.views is not None and not settings.augment and not method.draws_streams:
        raise InputError("--views needs --augment: without it all views of the data are the same")
    if settings.augment and schedule == "separate" and settings.views is None:
        raise InputError(
            "--augment needs --views N under --schedule separate: finished cells cache N augmented views of the data,"
            " on N times the disk; or use --schedule sequence, which makes a fresh one every epoch"
        )


def budget_of(settings: Settings, work: Workload) -> int | None:
    """Bytes that PyTorch's allocator may reserve; ``None``: no limit.

    Where device and host share one memory, batches on their way on the host come off the budget as well.

    Raises:
        InputError: the device does not have so much, or its context is unknown, or nothing is left.
    """
    device = work.device
    budget = devices.default_budget(device)
    if settings.max_gpu_mb is not None:
        budget = from_mb(settings.max_gpu_mb)
        total = devices.total_bytes(device) if device.type == "cuda" else None
        if total is not None and budget > total:
            raise InputError(
                f"--max-gpu-mb {settings.max_gpu_mb:g}: the device has {total >> 20} MiB; use a smaller budget"
            )
    outside = outside_of(settings, work)
    if budget is None or not outside:
        return budget
    if budget <= sum(outside.values()):
        taken = " and ".join(f"{what} ({show_mb(size)})" for what, size in outside.items())
        raise InputError(f"--max-gpu-mb {stated_mb(budget)} is taken up by {taken}; use a larger one")
    return budget - sum(outside.values())


def outside_of(settings: Settings, work: Workload) -> dict[str, int]:
    """Bytes that the stated budget holds besides what PyTorch's allocator reserves, by what takes them.

    Raises:
        InputError: the device's context is unknown.
    """
    device, outside = work.device, {}
    if settings.count_context:
        context = devices.context_bytes(device)
        if context is None:
            raise InputError(f"--count-context: what a context takes on {device} is unknown here; leave the flag out")
        outside["the CUDA context"] = context
    if devices.is_integrated(device):
        outside["batches in the memory that device and host share"] = storage.staging_bytes(work)
    return outside


def plan_job(job: Job, budget: int | None = None) -> Plan:
    """The plan of a job on this machine.

    Args:
        job: the run.
        budget: bytes that PyTorch's allocator may reserve, of a run that holds memory now; ``None``: as the settings or
            the device say, and nothing is held, so that cells can be tried on a GPU.

    Raises:
        InputError: a limit is larger than what there is.
    """
    settings, decided, probe = job.settings, job.decided, None
    if budget is None:
        budget = budget_of(settings, job.work)
        probe = Probe(budget) if job.work.device.type == "cuda" else None
    return make_plan(
        job.work,
        budget,
        "resident" if decided is not None and decided.placement == "resident" else settings.placement,
        settings.micro_batch if decided is None else decided.micro_batch,
        settings.tiles if decided is None else decided.tiles,
        None if settings.max_host_mb is None else from_mb(settings.max_host_mb),
        None if settings.max_disk_gb is None else from_mb(settings.max_disk_gb * 1024),
        None if decided is None else decided.cut,
        sum(outside_of(settings, job.work).values()),
        probe,
    )


def times_of(job: Job, plan: Plan) -> RunTimes | None:
    """What each cell and the classifier will take on this machine, if ``doctor`` measured its rates."""
    with process_state(job.settings):
        known = rates.load(job.work.device)
        if known is None:
            return None
        times = visit_times(job.work, plan, known, psutil.virtual_memory().available // 2)
        return RunTimes(times, known.measured or "an unknown date")


def host_tier(job: Job, plan: Plan) -> int:
    """Bytes of host memory for cells between visits."""
    if plan.host_budget is not None:
        return max(0, plan.host_budget - plan.host_bytes)
    if job.settings.placement == "stream":
        return 0  # the leanest form: only the next cell waits on the host
    return devices.default_host_bytes(job.work.device, plan.budget)


def _or(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else value


def _classifier_epochs(settings: Settings, schedule: str | None) -> int:
    epochs = settings.classifier_epochs or settings.epochs
    if schedule == "sequence" and epochs != settings.epochs:
        raise InputError(
            f"--classifier-epochs {epochs}: under --schedule sequence the classifier trains in every one of the"
            f" {settings.epochs} epochs; leave it out or use --schedule separate"
        )
    return epochs
