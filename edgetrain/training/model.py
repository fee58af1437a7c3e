"""A finished run as one module: from raw rows to class scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from edgetrain.data.prepare import Statistics
from edgetrain.objectives.base import Objective
from edgetrain.training.inputs import Shape


class Model(nn.Module):
    """Input scaling, cells and a vote.

    Args:
        objective: the rule, which reads votes off cells.
        shape: of the run's rows.
        statistics: by which rows were scaled or normalised.
        cells: the trained cells with their heads (``None``: has none).
        classifier: tensors of the trained classifier by name, or ``None``.
        vote: whose scores are returned: ``sum``, ``last`` or ``classifier``.
    """

    shift: Tensor
    rest: Tensor
    scale: Tensor

    def __init__(
        self,
        objective: Objective,
        shape: Shape,
        statistics: Statistics,
        cells: Sequence[tuple[nn.Module, nn.Module | None]],
        classifier: Mapping[str, Tensor] | None,
        vote: str,
    ):
        super().__init__()
        self.objective, self.shape, scaling = objective, shape, statistics.scaling
        self.normalization = statistics.normalization
        self.vote = vote
        self.scaled, self.clipped = scaling is not None, scaling is not None and scaling.clip
        if scaling is not None:
            for name in ("shift", "rest", "scale"):
                self.register_buffer(name, torch.from_numpy(getattr(scaling, name)))
        self.cells = nn.ModuleList(cell for cell, _ in cells)
        self.heads = nn.ModuleList(nn.Identity() if head is None else head for _, head in cells)
        self.has_head = [head is not None for _, head in cells]
        self.reads = objective.read_by_classifier(len(cells)) if classifier is not None else ()
        self.classifier = nn.ParameterDict(
            {name.replace(".", "_"): nn.Parameter(value.clone()) for name, value in (classifier or {}).items()}
        )

    def forward(self, x: Tensor) -> Tensor:
        """Class scores [B, C], float32, of raw rows [B, ...] as the run was given them."""
        streams = self.objective.unlabelled_streams(self.prepared(x))
        votes: dict[str, Tensor] = {}
        for index, (cell, head) in enumerate(zip(self.cells, self.heads, strict=True)):
            streams, scores = self.objective.read(cell, head if self.has_head[index] else None, streams)
            if scores is not None:
                votes["sum"] = votes["sum"] + scores if "sum" in votes else scores
                votes["last"] = scores
            if index in self.reads:
                block = self.reads.index(index)
                features = self.objective.features(streams[self.objective.classifier_stream])
                logits = features @ self.classifier[f"{block}_weight"].T
                before = votes.get("classifier")
                votes["classifier"] = logits + self.classifier["0_bias"] if before is None else before + logits
        return votes[self.vote]

    def prepared(self, x: Tensor) -> Tensor:
        """Rows as the first cell reads them: float32 (token ids: int64) [B, *shape]."""
        channels, *rest = self.shape.shape
        if self.shape.channels == "last" and tuple(x.shape[1:]) == (*rest, channels):
            x = x.movedim(-1, 1)
        x = x.reshape(len(x), *self.shape.shape)
        if self.shape.vocabulary is not None:
            return x.long()
        if self.scaled:
            values = (x.double() - self.shift - self.rest) * self.scale
            return (values.clamp(0.0, 1.0) if self.clipped else values).float()
        values = x.float() if self.shape.pixel_max is None else x.float() / self.shape.pixel_max
        return values if self.normalization is None else self.normalization.apply_(values.clone())
