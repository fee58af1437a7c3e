"""Numbers of parameters that the papers print, to the digit, through the recipes and heads that runs use."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from edgetrain.config import Settings
from edgetrain.training.inputs import Shape
from edgetrain.training.job import cells_of, method_of, net_of, objective_of, with_defaults

MNIST, CIFAR = (1, 28, 28), (3, 32, 32)


def counts(method: str, net: str, shape: tuple[int, ...], classes: int, **values: Any) -> dict[str, int]:
    """Learned numbers in the cells, in their heads, and in the trained classifier."""
    given = Settings().with_values({"method": method, "net": net, **values})
    kind = method_of(given)
    settings, data = with_defaults(given, kind), Shape("images", shape, 255.0, False, classes, ())
    recipes = net_of(settings, kind, data, settings.net)
    objective = objective_of(settings, kind, data, recipes)
    cells = cells_of(settings, objective, data, recipes)
    found = {"cells": 0, "heads": 0, "classifier": 0}
    for cell in cells:
        assert cell.recipe is not None
        with torch.device("meta"):
            head = objective.head(cell)
        found["cells"] += cell.recipe.parameters()
        found["heads"] += 0 if head is None else sum(value.numel() for value in head.parameters())
    reads = objective.read_by_classifier(len(cells))
    if reads:
        found["classifier"] = classes * (1 + sum(objective.width(cells[index].shape) for index in reads))
    return found


#: What a paper prints, and of which parts it is the sum.
PRINTED = {
    # LBP paper, CIFAR-100: encoders, decoders and the classifier on all latents.
    "AE-LBP": (7_889_572, "lbp-ae", "mlp:1024/5", CIFAR, 100, {}, ("cells", "heads", "classifier")),
    "CAE-LBP": (12_232_103, "lbp-cae", "cnn:64,128,256,512,1024", CIFAR, 100, {}, ("cells", "heads", "classifier")),
    # Its backpropagated twins: the same cells, and a classifier on the last one, which is bp's head.
    "CNN": (6_373_092, "bp", "cnn:64,128,256,512,1024", CIFAR, 100, {"like": "lbp-cae"}, ("cells", "heads")),
    "MLP": (8_497_252, "bp", "mlp:1024x6", CIFAR, 100, {"like": "lbp-ae"}, ("cells", "heads")),
    "MLP by its spec": (8_497_252, "bp", "mlp:1024x6;bias=1", CIFAR, 100, {}, ("cells", "heads")),
    # MF paper, MNIST, no biases: weights and the projections of all cells.
    "MF": (1_804_000, "mf", "mlp:1000x2", MNIST, 10, {}, ("cells", "heads")),
    "MF's BP": (1_794_000, "bp", "mlp:1000x2", MNIST, 10, {}, ("cells", "heads")),
    # FedFwd: layers alone; Forward-Forward has no heads.
    "FedFwd, 2 layers, MNIST": (643_000, "ff", "mlp:500x2", MNIST, 10, {}, ("cells", "heads")),
    "FedFwd, 3 layers, MNIST": (893_500, "ff", "mlp:500x3", MNIST, 10, {}, ("cells", "heads")),
    "FedFwd, 2 layers, CIFAR": (1_787_000, "ff", "mlp:500x2", CIFAR, 10, {}, ("cells", "heads")),
    "FedFwd, 3 layers, CIFAR": (2_037_500, "ff", "mlp:500x3", CIFAR, 10, {}, ("cells", "heads")),
}


@pytest.mark.parametrize("of", PRINTED)
def test_the_number_of_parameters_is_the_papers(of: str) -> None:
    printed, method, net, shape, classes, values, parts = PRINTED[of]
    found = counts(method, net, shape, classes, **values)
    assert sum(found[part] for part in parts) == printed, found
    assert sum(found.values()) == printed  # nothing is left out


def test_a_trained_classifier_is_counted_where_it_is_asked_for() -> None:
    """The classifier of Hinton's one-pass reading is not counted in FedFwd's numbers."""
    found = counts("ff", "mlp:500x2", MNIST, 10, classifier_epochs=1)
    assert found == {"cells": 643_000, "heads": 0, "classifier": 10 * (500 + 500 + 1)}
