"""The data sets that are known by name: their files, where those come from, and their checksums."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edgetrain.data.cifar import CifarRows


@dataclass(frozen=True)
class Download:
    """A file as its publisher offers it.

    Attributes:
        file: its name at the base URL.
        digest: ``sha256:`` or ``md5:`` and the checksum in hex.
        archive: whether it is a tar archive of the set's files; otherwise it is one of them, compressed.
    """

    file: str
    digest: str
    archive: bool = False


@dataclass(frozen=True)
class KnownSet:
    """A data set that is known by name.

    Attributes:
        name: as typed, and the name of its folder.
        summary: what it holds, in a line.
        layout: which reader reads it.
        train: the training files' names without ``.gz`` or ``.xz``; IDX: images, labels; text: one archive
            of all.
        test: the same for the test files.
        class_names: label 0 first.
        base_url: where its downloads are.
        downloads: what to fetch for all of its files.
        label_bytes: CIFAR: label bytes of a row.
        file_rows: CIFAR: rows of a training file and of a test file.
        instead: a file of one's own that does for all of these files, or empty.
    """

    name: str
    summary: str
    layout: Literal["idx", "cifar", "text"]
    train: tuple[str, ...]
    test: tuple[str, ...]
    class_names: tuple[str, ...]
    base_url: str
    downloads: tuple[Download, ...]
    label_bytes: int = 1
    file_rows: tuple[int, int] = (0, 0)
    instead: str = ""

    @property
    def files(self) -> tuple[str, ...]:
        """All file names, without ``.gz`` or ``.xz``."""
        return self.train + self.test

    @property
    def rows(self) -> CifarRows:
        """CIFAR: how rows lie in the files."""
        return CifarRows(self.label_bytes, len(self.class_names))

    @property
    def file_sizes(self) -> dict[str, int]:
        """CIFAR: the bytes of each file, unpacked."""
        sizes = dict.fromkeys(self.train, self.file_rows[0] * self.rows.row_bytes)
        return sizes | dict.fromkeys(self.test, self.file_rows[1] * self.rows.row_bytes)


_IDX_TRAIN = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
_IDX_TEST = ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
_KRIZHEVSKY = "https://www.cs.toronto.edu/~kriz/"

_CIFAR100_NAMES = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel
can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur
dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion
lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree
pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea
seal shark shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table
tank telephone television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman
worm
"""


def _idx_downloads(*digests: str) -> tuple[Download, ...]:
    names = zip(_IDX_TRAIN + _IDX_TEST, digests, strict=True)
    return tuple(Download(f"{name}.gz", f"sha256:{digest}") for name, digest in names)


_MNIST = KnownSet(
    "mnist",
    "70,000 grey images of handwritten digits, 28x28, 10 classes",
    "idx",
    _IDX_TRAIN,
    _IDX_TEST,
    tuple("0123456789"),
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    _idx_downloads(
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    ),
)

_FASHION_MNIST = KnownSet(
    "fashion-mnist",
    "70,000 grey images of clothes, 28x28, 10 classes",
    "idx",
    _IDX_TRAIN,
    _IDX_TEST,
    (
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    _idx_downloads(
        "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
    ),
)

_CIFAR10 = KnownSet(
    "cifar10",
    "60,000 colour images, 32x32, 10 classes",
    "cifar",
    tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
    ("test_batch.bin",),
    ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    _KRIZHEVSKY,
    (Download("cifar-10-binary.tar.gz", "md5:c32a1d4ab5d03f1284b67883e8d87530", archive=True),),
    file_rows=(10_000, 10_000),
)

_CIFAR100 = KnownSet(
    "cifar100",
    "60,000 colour images, 32x32, 100 classes",
    "cifar",
    ("train.bin",),
    ("test.bin",),
    tuple(_CIFAR100_NAMES.split()),
    _KRIZHEVSKY,
    (Download("cifar-100-binary.tar.gz", "md5:03b5dce01913d631647c71ecec9e9cb8", archive=True),),
    label_bytes=2,
    file_rows=(50_000, 10_000),
)

_IMDB = KnownSet(
    "imdb",
    "50,000 film reviews as text, 2 classes",
    "text",
    ("aclImdb_v1.tar",),
    (),
    ("negative", "positive"),
    "http://ai.stanford.edu/~amaas/data/sentiment/",
    (Download("aclImdb_v1.tar.gz", "md5:7c2ac02c03563afcf9b574c7e56c153a"),),  # read as it is, not unpacked
    instead="imdb.csv",
)

KNOWN = {known.name: known for known in (_MNIST, _FASHION_MNIST, _CIFAR10, _CIFAR100, _IMDB)}
