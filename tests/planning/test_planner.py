"""What a plan accepts fits, and what it refuses does not. ``pytest tests/planning/test_planner.py``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tiers import examples

from edgetrain.baselines.backprop import Backpropagation
from edgetrain.errors import BudgetError, InputError
from edgetrain.nets.spec import open_net
from edgetrain.objectives.base import Objective, nodes
from edgetrain.objectives.ff import ForwardForward
from edgetrain.objectives.lbp import AutoencoderCells, DenoisingAutoencoderCells
from edgetrain.objectives.mf import MonoForward
from edgetrain.objectives.predsim import PredictionAndSimilarity
from edgetrain.objectives.sll import StochasticLayerwise
from edgetrain.planning import dryrun, planner
from edgetrain.planning.plan import Plan
from edgetrain.planning.planner import backprop_peak, make_plan, require_fit
from edgetrain.planning.storage import bookkeeping_bytes
from edgetrain.planning.words import choices_in_words
from edgetrain.planning.workload import Workload
from edgetrain.store.rows import RowFormat
from edgetrain.stream.optimizers import OptimizerRecipe
from edgetrain.units import MIB

CPU = torch.device("cpu")
WITHOUT_SHRINKING = (Phase.explicit, Phase.generate)  # a dry run takes too long to be repeated hundreds of times
METHODS: dict[str, type[Objective]] = {
    kind.name: kind for kind in (MonoForward, AutoencoderCells, DenoisingAutoencoderCells, Backpropagation)
}


# A dry run is pure, and takes a tenth of a second: each is made once for the planner and for the tests.
_made: dict[
    tuple[object, ...], tuple[Workload, dryrun.Peak]
] = {}  # a workload is known by its id while it is held here


def once(work: Workload, *how: int) -> dryrun.Peak:
    key = (id(work), *how)
    if key not in _made:
        _made[key] = (work, dryrun.cell_peak(work, *how))
    return _made[key][1]


def cell_peak(work: Workload, *how: int) -> int:
    return once(work, *how).bytes


def classifier_peak(work: Workload, micro_batch: int, resident: bool) -> int:
    return once(work, work.depth, micro_batch, 1, resident).bytes


@pytest.fixture(scope="module", autouse=True)
def each_dry_run_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner, "cell_peak", once)
        yield
    _made.clear()


def workload(
    method: str = "mf",
    net: str = "mlp:30,20",
    shape: tuple[int, ...] = (12,),
    batch: int = 16,
    rows: int = 50,
    schedule: str = "separate",
    epochs: int = 2,
) -> Workload:
    kind = METHODS[method]
    opened = open_net(net, shape, (MonoForward if method == "bp" else kind).net_defaults)
    reads_all = kind.vote == "classifier"
    objective = kind(5, opened.options, trains_classifier=reads_all)
    return Workload(
        nodes=tuple(nodes(objective.join(list(opened.cells)), shape, 0)),
        objective=objective,
        optimizer=OptimizerRecipe("adam", 1e-3),
        classifier=OptimizerRecipe("adam", 1e-3) if reads_all else None,
        schedule=schedule,
        classes=5,
        rows=rows,
        test_rows=10,
        batch_size=batch,
        epochs=epochs,
        classifier_epochs=epochs if reads_all else 0,
        inputs=RowFormat(shape),
        latent_dtype="float32",
        device=CPU,
        seed=0,
        prefetch=2,
    )


def real_peaks(work: Workload, plan: Plan) -> list[int]:
    """Each visit's peak at the plan's micro-batches and tiles, found again."""
    peaks = [cell_peak(work, index, cell.micro_batch, cell.tiles) for index, cell in enumerate(plan.cells)]
    if plan.classifier is not None:
        peaks.append(classifier_peak(work, plan.classifier.micro_batch, plan.classifier_resident))
    return peaks


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    method = draw(st.sampled_from(sorted(METHODS)))
    widths = draw(st.lists(st.integers(1, 80), min_size=1, max_size=2))
    return workload(
        method,
        f"mlp:{','.join(map(str, widths))}",
        (draw(st.integers(1, 80)),),
        batch=draw(st.integers(1, 20)),
        rows=draw(st.integers(1, 80)),
        schedule="sequence" if method != "bp" and draw(st.booleans()) else "separate",
    )


@pytest.mark.counted
@settings(max_examples=examples(1), deadline=None, derandomize=True, phases=WITHOUT_SHRINKING)
@given(work=workloads(), share=st.floats(0.3, 1.3), placement=st.sampled_from(["auto", "stream"]))
def test_what_is_accepted_fits_and_what_is_refused_does_not(work: Workload, share: float, placement: str) -> None:
    free = make_plan(work, None, placement)
    assert free.fits
    budget = int(share * free.predicted_peak)
    plan = make_plan(work, budget, placement)
    assert plan.fits == (budget >= plan.min_budget)
    assert plan.predicted_peak == max(real_peaks(work, plan)) == max(cell.peak for cell in plan.visits)
    if plan.fits:
        assert plan.predicted_peak <= budget
        require_fit(plan)
    else:
        with pytest.raises(BudgetError):
            require_fit(plan)
    least = make_plan(work, plan.min_budget, placement)
    assert least.fits
    assert least.predicted_peak <= plan.min_budget
    assert not make_plan(work, int(0.99 * plan.min_budget), placement).fits


@pytest.mark.counted
@settings(max_examples=examples(1), deadline=None, derandomize=True, phases=WITHOUT_SHRINKING)
@given(work=workloads(), share=st.floats(0.4, 1.1))
def test_the_largest_micro_batch_that_fits_is_taken(work: Workload, share: float) -> None:
    budget = int(share * make_plan(work, None).predicted_peak)
    plan = make_plan(work, budget)
    size = min(work.batch_size, work.rows)
    for index, cell in enumerate(plan.cells):
        assert 1 <= cell.micro_batch <= size
        if not plan.fits or cell.micro_batch == size:
            continue
        assert cell_peak(work, index, size) > budget


@pytest.mark.counted
@settings(max_examples=examples(1), deadline=None, derandomize=True, phases=WITHOUT_SHRINKING)
@given(work=workloads())
def test_no_micro_batch_at_all_needs_less_than_the_smallest_budget(work: Workload) -> None:
    least = make_plan(work, None, "stream").min_budget  # no resident classifier
    size = min(work.batch_size, work.rows)
    needed = []
    for index in range(work.depth):
        sizes = [size] if work.couples_batch(index) else [1, size // 3 + 1]
        needed.append(min(cell_peak(work, index, micro) for micro in {*sizes, size}))
    if work.classifier is not None:
        needed.append(min(classifier_peak(work, micro, False) for micro in {1, size}))
    assert least <= max(needed)


@pytest.mark.parametrize("method", ["mf", "lbp-ae", "bp"])
def test_cells_with_batch_normalisation_are_never_split(method: str) -> None:
    work = workload(method, "mlp:30,20;norm=batch", batch=32)
    free = make_plan(work, None)
    tight = make_plan(work, free.predicted_peak // 2)
    assert [cell.micro_batch for cell in tight.cells] == [32] * work.depth
    assert not tight.fits
    with pytest.raises(InputError, match="--micro-batch 8: the samples of a batch influence each other"):
        make_plan(work, None, micro_batch=8)
    assert make_plan(work, None, micro_batch=32).micro_batches[0] == 32


def coupled(batch: int = 32, net: str = "mlp:30,20") -> Workload:
    """A run of the rule that compares the samples of a batch with each other."""
    opened = open_net(net, (12,), PredictionAndSimilarity.net_defaults)
    objective = PredictionAndSimilarity(5, opened.options)
    cells = tuple(nodes(list(opened.cells), (12,), 0))
    return replace(workload(batch=batch), nodes=cells, objective=objective)


@pytest.mark.slow
@pytest.mark.parametrize("net", ["mlp:30,20", "mlp:30,20;norm=none"])
def test_a_batch_whose_samples_are_compared_is_made_smaller_by_the_user_only(net: str) -> None:
    free = make_plan(coupled(net=net), None)
    assert free.micro_batches == [32, 32]
    tight = make_plan(coupled(net=net), int(0.6 * free.predicted_peak))
    assert tight.micro_batches == [32, 32]
    assert not tight.fits
    assert tight.whole_batch is not None
    with pytest.raises(InputError, match=f"--batch-size is too large.*state --batch-size {tight.whole_batch}$"):
        require_fit(tight)
    assert make_plan(coupled(tight.whole_batch, net), tight.budget).fits
    assert not make_plan(coupled(2 * tight.whole_batch, net), tight.budget).fits
    hopeless = make_plan(coupled(net=net), 5000)
    assert hopeless.whole_batch is None
    with pytest.raises(BudgetError):
        require_fit(hopeless)


def test_a_budget_that_holds_a_whole_batch_does_not_split_it() -> None:
    work = workload(batch=32)
    assert make_plan(work, None).micro_batches == [32, 32]
    assert make_plan(work, make_plan(work, None).predicted_peak).micro_batches == [32, 32]


def test_a_wide_input_is_split_when_the_budget_asks_for_it() -> None:
    work = workload(net="mlp:4", shape=(2000,), batch=256, rows=256)
    whole = make_plan(work, None)
    split = make_plan(work, whole.predicted_peak // 2)
    assert split.fits
    assert split.micro_batches[0] < 256
    assert split.min_budget < whole.predicted_peak // 4


@pytest.mark.parametrize("asked", [7, [7, 3]])
def test_micro_batches_that_were_asked_for_are_kept(asked: int | list[int]) -> None:
    work = workload()
    plan = make_plan(work, None, micro_batch=asked)
    assert plan.micro_batches == (asked if isinstance(asked, list) else [asked, asked])
    assert plan.predicted_peak == max(real_peaks(work, plan))
    assert not make_plan(work, plan.predicted_peak - 1, micro_batch=asked, tiles=1).fits


def test_a_micro_batch_beyond_the_batch_is_the_batch() -> None:
    assert make_plan(workload(), None, micro_batch=1000).micro_batches == [16, 16]
    assert make_plan(workload(rows=9), None, micro_batch=1000).micro_batches == [9, 9]


def test_a_list_of_another_length_is_refused() -> None:
    with pytest.raises(InputError, match="micro_batch lists 3 numbers; expected 2"):
        make_plan(workload(), None, micro_batch=[1, 2, 3])
    with pytest.raises(InputError, match="micro_batch lists 2 numbers; expected 3"):
        make_plan(workload("lbp-ae"), None, micro_batch=[1, 2])


def test_the_refusal_names_what_was_asked_and_what_would_do() -> None:
    work = workload("lbp-dae", net="mlp:400x2")
    with pytest.raises(BudgetError) as caught:
        require_fit(make_plan(work, MIB))
    said = str(caught.value)
    assert "\n" not in said
    assert said.startswith("--max-gpu-mb 1 cannot hold 'linear 400-400'")
    stated = float(said.rpartition(" is ")[2].removesuffix(" MiB"))
    assert make_plan(work, int(stated * MIB)).fits
    assert not make_plan(work, int(0.99 * stated * MIB)).fits


def test_host_and_disk_limits_are_refused_too() -> None:
    work = workload()
    fine = make_plan(work, None, host_budget=1 << 40, disk_budget=1 << 40)
    require_fit(fine)
    for limits, flag in (({"host_budget": 1000}, "--max-host-mb"), ({"disk_budget": 1000}, "--max-disk-gb")):
        with pytest.raises(BudgetError, match=flag):
            require_fit(make_plan(work, None, **limits))  # type: ignore[arg-type]


# --- backpropagation --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("net", "shape"),
    [("mlp:40x6", (12,)), ("mlp:40x6", (40,)), ("mlp:9,9,9,9,9,30,30,30,30,30,30", (12,)), ("cnn:4,4,4", (4, 32, 32))],
)
def test_backpropagations_extrapolated_peak_is_that_of_its_dry_run(net: str, shape: tuple[int, ...]) -> None:
    work = workload("mf", net, shape)
    opened = open_net(net, shape, MonoForward.net_defaults)
    direct = workload("bp", net, shape)
    assert backprop_peak(work, opened) == cell_peak(direct, 0, 16)


def test_backpropagation_of_a_thousand_layers_is_extrapolated() -> None:
    opened = open_net("mlp:30x1000", (30,), MonoForward.net_defaults)
    few = open_net("mlp:30x4", (30,), MonoForward.net_defaults)
    work = workload("mf", "mlp:30x2", (30,))
    deep, shallow = (backprop_peak(work, net) for net in (opened, few))
    assert deep - shallow == 996 * (16 * 30 * 30 + 4)  # weight, gradient, two moments and a step count of each layer


def test_a_local_rule_needs_less_than_backpropagation_on_a_deep_net() -> None:
    work = workload("mf", "mlp:60x8", (60,))
    opened = open_net("mlp:60x8", (60,), MonoForward.net_defaults)
    assert make_plan(work, None).predicted_peak < backprop_peak(work, opened) / 3


# --- what else a plan says --------------------------------------------------------------------


def test_a_thousand_equal_cells_are_planned_as_fast_as_three() -> None:
    deep = make_plan(workload(net="mlp:30x1000"), None, "stream")
    few = make_plan(workload(net="mlp:30x3"), None, "stream")
    assert len(deep.cells) == 1000
    assert deep.predicted_peak == few.predicted_peak
    assert {cell.peak for cell in deep.cells[1:-1]} == {few.cells[1].peak}


def test_parameters_and_latents_are_those_of_the_cells() -> None:
    plan = make_plan(workload("lbp-ae", "mlp:30,20"), None)
    assert [cell.params for cell in plan.visits] == [
        (12 * 30 + 30) + (30 * 12 + 12),
        (30 * 20 + 20) + (20 * 30 + 30),
        5 * (30 + 20) + 5,
    ]
    assert [cell.latents for cell in plan.visits] == [50 * 30 * 4, 50 * 20 * 4, 0]


def test_views_are_latents_several_times_over_but_inputs_lie_there_once() -> None:
    one, three = (make_plan(replace(workload("lbp-ae"), views=views), None) for views in (1, 3))
    assert [cell.latents for cell in three.cells] == [3 * cell.latents for cell in one.cells]
    more = 2 * sum(cell.latents for cell in one.cells)
    assert three.disk_bytes - one.disk_bytes == three.written_bytes - one.written_bytes == more
    assert three.predicted_peak == one.predicted_peak
    assert three.host_bytes == one.host_bytes


def test_a_classifier_of_the_last_latents_keeps_no_others() -> None:
    opened = open_net("mlp:30,20,10", (12,), StochasticLayerwise.net_defaults)
    cells = tuple(nodes(list(opened.cells), (12,), 0))
    objective = StochasticLayerwise(5, opened.options, trains_classifier=True)
    work = replace(workload(), nodes=cells, objective=objective, classifier=OptimizerRecipe("adam", 1e-3))
    plan = make_plan(replace(work, classifier_epochs=2, test_rows=0), None)
    assert work.classifier_reads == (2,)
    assert work.feature_widths == [10]
    assert [cell.latents for cell in plan.cells] == [50 * 4 * width for width in (30, 20, 10)]
    assert plan.classifier is not None
    assert plan.classifier.params == 5 * (10 + 1)
    inputs = (12 * 4 + 8) * 50
    params = sum(cell.params for cell in plan.visits)
    latents = 50 * 4 * (30 + 20)  # those of two cells at once
    assert plan.disk_bytes == inputs + latents + 2 * 12 * params + bookkeeping_bytes(work)


def test_streams_of_a_rule_are_latents_each_and_all_labels_are_tried_on_disk() -> None:
    opened = open_net("mlp:30,20", (12,), ForwardForward.net_defaults)
    cells = tuple(nodes(list(opened.cells), (12,), 0))
    work = replace(workload(), nodes=cells, objective=ForwardForward(5, opened.options), test_rows=5000)
    plan = make_plan(work, None)
    assert [cell.latents for cell in plan.cells] == [2 * 50 * 4 * 30, 0]  # pos and neg
    labelled = 5000 * 4 * 30 * 6  # five labels, and the neutral one
    assert plan.disk_bytes > labelled
    fewer = make_plan(replace(work, test_rows=4000), None)
    assert plan.disk_bytes - fewer.disk_bytes == 1000 * (4 * 30 * 6 + 12 * 4 + 8)


def test_the_last_cell_of_a_chain_without_a_classifier_writes_no_latents() -> None:
    assert [cell.latents for cell in make_plan(workload(), None).cells] == [50 * 30 * 4, 0]


def test_the_classifier_is_streamed_where_the_whole_of_it_does_not_fit() -> None:
    work = replace(workload("lbp-ae", "mlp:600x6", (12,), batch=4), classes=400)
    work = replace(work, objective=AutoencoderCells(400, work.objective.options, trains_classifier=True))
    free = make_plan(work, None)
    assert free.classifier_resident
    tight = make_plan(work, max(max(cell.peak for cell in free.cells), classifier_peak(work, 4, False)))
    assert tight.fits
    assert tight.predicted_peak < free.predicted_peak
    assert not tight.classifier_resident


@pytest.mark.slow
def test_the_smallest_budget_does_not_depend_on_the_budget_that_was_stated() -> None:
    work = replace(workload("lbp-ae", "mlp:60x6", (12,), batch=4), classes=400)
    work = replace(work, objective=AutoencoderCells(400, work.objective.options, trains_classifier=True))
    free = make_plan(work, None)
    assert make_plan(work, free.min_budget - 1).min_budget == free.min_budget


def test_the_leanest_placement_streams_the_classifier() -> None:
    assert not make_plan(workload("lbp-ae"), None, "stream").classifier_resident


def test_a_resident_plan_needs_more_and_writes_no_latents() -> None:
    work = workload()
    stream, resident = make_plan(work, None, "stream"), make_plan(work, None, "resident")
    assert (stream.placement, resident.placement) == ("stream", "resident")
    assert resident.predicted_peak > stream.predicted_peak
    assert resident.written_bytes == stream.written_bytes - 50 * 30 * 4
    assert resident.min_budget == resident.predicted_peak
    assert not make_plan(work, resident.predicted_peak - 1, "resident").fits


def test_a_plan_is_plain_json_in_mebibytes() -> None:
    plan = make_plan(workload(), 3 * MIB)
    found = plan.as_dict(None)
    assert found["fits"] is True
    assert found["budget_mb"] == 3
    assert found["bp_predicted_peak_mb"] is None
    assert found["predicted_peak_mb"] == pytest.approx(plan.predicted_peak / MIB, abs=1e-3)
    assert [cell["name"] for cell in found["cells"]] == ["linear 12-30", "linear 30-20"]


@settings(max_examples=6, deadline=None, derandomize=True, phases=WITHOUT_SHRINKING)
@given(rows=st.integers(1, 500), widths=st.lists(st.integers(1, 50), min_size=1, max_size=4))
def test_disk_holds_at_least_inputs_cells_and_the_latents_needed_at_once(rows: int, widths: list[int]) -> None:
    work = workload(net=f"mlp:{','.join(map(str, widths))}", rows=rows)
    plan = make_plan(work, None)
    pairs = [sum(cell.latents for cell in plan.cells[index : index + 2]) for index in range(len(widths))]
    params = sum(cell.params for cell in plan.cells)
    assert plan.disk_bytes >= rows * (prod(work.inputs.shape) * 4 + 8) + max(pairs) + 12 * params


def test_words_say_how_batches_and_cells_are_cut() -> None:
    work = workload("mf", "mlp:64x3")

    def said(**asked: Any) -> str:
        return " ".join(choices_in_words(make_plan(work, None, **asked)))

    assert said() == "Cells stream one at a time; the data set and latents stream from disk in batches."
    assert "Batches of 16 are taken in parts by 3 of 3 visits, 'linear 64-64' in parts of 4" in said(
        micro_batch=[8, 4, 8]
    )
    assert "in tiles: 1 of 3 cells, 'linear 64-64' in 2" in said(tiles=[1, 2, 1])


def test_messages_count_cells_from_one() -> None:
    with pytest.raises(InputError, match="in cell 1;"):
        make_plan(coupled(), None, micro_batch=8)
