"""The papers' parameter counts, of the references' own tensors."""

from __future__ import annotations

from itertools import pairwise

import torch
from reference import cae, ff, lbp, mf


def count(values):
    return sum(value.numel() for value in values)


def classifier(classes, features):
    classifier = lbp.Classifier(torch.zeros(classes, features), torch.zeros(classes), 0.0, 0.0)
    return count(classifier.layer.parameters())


def test_cae_lbp():
    x, total, features = torch.zeros(1, 3, 32, 32), 0, 0
    for channels, units in pairwise([3, 64, 128, 256, 512, 1024]):
        encoder, decoder = cae.kernels(x.shape[2])
        shapes = [(units, channels, encoder, encoder), (units,), (units, channels, decoder, decoder), (channels,)]
        cell = cae.Cell([torch.zeros(shape) for shape in shapes], 0.0, 0.0)
        total += count([cell.w, cell.b, cell.v, cell.c])
        with torch.no_grad():
            z = cell.encode(x)
            assert cell.decode(z, *x.shape[2:]).shape == x.shape
        features += z[0].numel()
        x = z
    assert features == 31_744
    assert total + classifier(100, features) == 12_232_103


def test_ae_lbp():
    total, widths = 0, [3072, 1024, 512, 256, 128, 64]
    for d, n in pairwise(widths):
        cell = lbp.Cell(0, [torch.zeros(shape) for shape in [(n, d), (n,), (d, n), (d,)]], 0.0, 0.0)
        total += count([cell.w, cell.b, cell.v, cell.c])
    assert total + classifier(100, sum(widths[1:])) == 7_889_572


def test_fedfwd():
    found = []
    for inputs in (784, 3072):
        for layers in (2, 3):
            sizes = pairwise([inputs] + [500] * layers)
            cells = [ff.Cell(torch.zeros(n, d), torch.zeros(n), 0.0) for d, n in sizes]
            found.append(count(value for cell in cells for value in (cell.weight, cell.bias)))
    assert found == [643_000, 893_500, 1_787_000, 2_037_500]


def test_mf_and_ff_beside_it():
    cells = [mf.Cell(torch.zeros(n, d), torch.zeros(10, n), 0.0) for d, n in pairwise([784, 1000, 1000])]
    weights = count(cell.weight for cell in cells)
    assert weights + count(cell.projection for cell in cells) == 1_804_000  # FF prediction
    assert weights + count([cells[-1].projection]) == 1_794_000  # BP prediction
    plain = [ff.Cell(torch.zeros(n, d), None, 0.0, d == 784) for d, n in pairwise([784, 1000, 1000])]
    assert count(cell.weight for cell in plain) == 1_784_000
    features = ff.one_pass(plain, torch.zeros(1, 784), 10)
    assert 1_784_000 + 10 * sum(part.shape[1] for part in features) == 1_804_000  # one pass, softmax on all
