"""What a run's journal holds, entry by entry. msgspec checks names, types and ranges of all that is read."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from edgetrain.record import CellRecord, Count, Sums

FORMAT = 2  # of the run folder; it changes when runs of older versions cannot be read any more

#: The name of a file in the folder where it belongs: it leads nowhere else.
FileName = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9_][A-Za-z0-9_@.-]{0,200}\Z")]


class FileEntry(Struct, frozen=True):
    """A file as it was written.

    Attributes:
        name: within its folder.
        checksum: xxh3-128 of its content, in hex.
        size: bytes.
    """

    name: FileName
    checksum: str
    size: Count


#: By unit ("000", "classifier"), then by kind ("weights", "optim").
Files = dict[FileName, dict[FileName, FileEntry]]


class Fingerprint(Struct, frozen=True, array_like=True):
    """By what a cell is recognised.

    Attributes:
        name: of the cell.
        signature: digest of what it is made of.
        behaviour: numbers that it computes with fixed weights; empty if that is unknown.
    """

    name: str
    signature: str
    behaviour: tuple[float, ...] = ()


class MethodFingerprint(Struct, frozen=True):
    """By what a user's own method is recognised.

    Attributes:
        name: of the method.
        digest: of its code; empty if that cannot be read.
    """

    name: str
    digest: str


class Begin(Struct, tag="begin", frozen=True, kw_only=True):
    """The first entry.

    Attributes:
        format: of the run folder.
        config: the run's ``config.toml``.
        net: of the cells.
        method: if it is the user's own.
        kept: files of the cells that an edit starts from.
    """

    format: int
    config: str
    net: list[Fingerprint]
    method: MethodFingerprint | None = None
    kept: Files = {}


class Configure(Struct, tag="configure", frozen=True):
    """``config.toml`` was written anew."""

    config: str


class Edit(Struct, tag="edit", frozen=True):
    """What was changed after the run was first finished, in words."""

    words: str


class Results(Struct, tag="results", frozen=True):
    """The files of a finished run's model and record, by name."""

    files: dict[FileName, FileEntry]


class Within(Struct, frozen=True):
    """A position within a visit.

    Attributes:
        visit: its number.
        step: the first step that is not done.
        sums: of the steps before.
    """

    visit: Count
    step: Count
    sums: Sums


class LatentStream(Struct, frozen=True):
    """One stream of latents in a checkpoint.

    Attributes:
        stream: its name.
        file: holds its rows.
        shape: of a row.
        written: rows that are there.
        sums: the file of their checksums.
    """

    stream: str
    file: FileName
    shape: list[Count]
    written: Count
    sums: FileEntry


class SavedLatents(Struct, frozen=True):
    """One cell's latents in a checkpoint.

    Attributes:
        rows: that the files have room for.
        first: number of the first.
        step_order: whether they are in the order of the epoch's steps.
        streams: their files.
    """

    rows: Annotated[int, Meta(gt=0, le=1 << 62)]
    first: Count
    step_order: bool
    streams: list[LatentStream]


class Totals(Struct, frozen=True):
    """What a run has used, over all processes that worked on it.

    Attributes:
        seconds: in all.
        checkpoint_seconds: of these, for checkpoints.
        written: bytes written to disk.
        energy: joules that the device used; ``None`` is unknown.
    """

    seconds: float = 0.0
    checkpoint_seconds: float = 0.0
    written: Count = 0
    energy: float | None = None


class Checkpoint(Struct, tag="checkpoint", frozen=True, kw_only=True, omit_defaults=True):
    """A state from which the run continues bit for bit.

    Attributes:
        number: of the checkpoint, from 1.
        files: of all units; ``store.run`` fills them in.
        visits: done; what they emitted is emitted again, unless it is in ``latents``.
        within: position in the visit under way, if any.
        cells: what the cells and the classifier measured.
        latents: that cannot be emitted again, by number.
        totals: see ``Totals``.
        data: digest of the prepared training rows.
        test: digest of the prepared test rows, if there are any.
        finished: whether files have their final names.
    """

    number: Count
    files: Files = {}
    visits: Count = 0
    within: Within | None = None
    cells: list[CellRecord] = []
    latents: dict[int, SavedLatents] = {}
    totals: Totals = Totals()
    data: str | None = None
    test: str | None = None
    finished: bool = False


Entry = Begin | Configure | Edit | Checkpoint | Results
