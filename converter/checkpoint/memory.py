"""Where a plan's tensors go if not to files: into memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from converter.checkpoint.plan import Plan, Planned
from converter.checkpoint.reader import as_numpy, as_torch
from converter.dtypes import sha256

if TYPE_CHECKING:
    import torch


class Memory:
    """As `Writer`, but that it keeps a plan's tensors, on the CPU, each with memory of its own."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.tensors: dict[str, torch.Tensor] = {}

    def write(self, tensor: Planned, array: np.ndarray) -> None:
        if array.shape != tensor.shape or tensor.name in self.tensors:
            raise AssertionError(f"{tensor.name}: {array.shape}, planned {tensor.shape}, once")
        self.tensors[tensor.name] = as_torch(np.asarray(array))

    @property
    def sha256(self) -> dict[str, str]:
        """See `Writer`. Computed when it is asked for: only undoing compares."""
        return {name: sha256(as_numpy(tensor)) for name, tensor in self.tensors.items()}

    def __enter__(self) -> Memory:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        missing = {t.name for t in self.plan.tensors} - set(self.tensors)
        if error is None and missing:
            raise AssertionError(f"planned but never made: {sorted(missing)[:4]}")
