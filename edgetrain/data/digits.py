"""The UCI optical digits, shipped in the package: 1,797 images of 8x8 with values 0..16.

E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning
Repository, https://doi.org/10.24432/C50P49, CC BY 4.0; see ``digits.LICENSE``.

``digits.npz`` holds the rows of scikit-learn's ``load_digits`` in their order, as uint8, split once
into 1,437 training and 360 test rows by ``stratified(labels, 360, "digits")``.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from edgetrain.data.base import DataSet
from edgetrain.data.npz import open_npz

PIXEL_MAX = 16.0


def open_digits() -> DataSet:
    """The shipped digits: (1, 8, 8), uint8 0..16, ten classes."""
    found = open_npz(Path(__file__).with_name("digits.npz"))
    return replace(found, name="digits", pixel_max=PIXEL_MAX, names=tuple("0123456789"))
