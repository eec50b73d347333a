"""An ONNX file in onnxruntime, on CPU: tokens in, logits and all other outputs out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converter.errors import CannotDoHere, CorruptFile
from converter.onnx.dialect import MASK, POSITIONS, TOKENS
from converter.onnx.reading import read_onnx

Array = NDArray[Any]
_PAST, _PRESENT = "past_key_values.", "present."


class Session:
    """A checked file, opened.

    Args:
        lean: leave float32 weights mapped from their file instead of copying them into the
            layout that is fastest to multiply: next to no time and memory to open, and slower
            on long inputs. (Weights of other dtypes are widened at opening in any case.)
        threads: None: onnxruntime's choice.

    Raises:
        BadInput: see `read_onnx`; or onnxruntime refuses the graph.
        CannotDoHere: onnxruntime is not installed.
    """

    def __init__(self, path: Path, *, lean: bool = False, threads: int | None = None) -> None:
        self.file = read_onnx(path)
        try:
            import onnxruntime
        except ImportError as error:
            raise CannotDoHere(
                "onnxruntime is not installed.", where=str(path), do="pip install onnxruntime"
            ) from error
        options: Any = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        if lean:
            options.add_session_config_entry("session.disable_prepacking", "1")
        try:
            self._session: Any = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # its exceptions have no base of their own
            raise CorruptFile(
                f"onnxruntime refuses the graph: {str(error).splitlines()[0]}",
                where=str(path),
                do="Export it again.",
            ) from error
        self.inputs: dict[str, list[int | str]] = {
            i.name: i.shape for i in self._session.get_inputs()
        }
        self.outputs: dict[str, list[int | str]] = {
            o.name: o.shape for o in self._session.get_outputs()
        }

    def __call__(
        self,
        tokens: Array,
        mask: Array | None = None,
        past: Mapping[str, Array] | None = None,
        *,
        wanted: tuple[str, ...] | None = None,
    ) -> dict[str, Array]:
        """Outputs by name: all, or those `wanted`.

        Args:
            tokens: integers [batch, pos].
            mask: [batch, past + pos], false at left padding; None: no padding.
            past: what `past_of` makes of the outputs of the step before; None: none.
        """
        batch, length = tokens.shape
        feeds: dict[str, Array] = {TOKENS: tokens.astype(np.int64, copy=False)}
        before = 0
        for name, (_, heads, _, width) in self._past_shapes().items():
            feeds[name] = past[name] if past else np.zeros((batch, heads, 0, width), np.float32)
            before = feeds[name].shape[2]
        if mask is None:
            mask = np.ones((batch, before + length), bool)
        # transformers does not derive positions from the mask for GPT-Neo; its clients do.
        positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)[:, before:]
        feeds |= {MASK: mask.astype(np.int64), POSITIONS: positions.astype(np.int64)}
        names = list(wanted or self.outputs)
        feeds = {name: feed for name, feed in feeds.items() if name in self.inputs}
        return dict(zip(names, self._session.run(names, feeds), strict=True))

    def _past_shapes(self) -> dict[str, Any]:
        return {name: shape for name, shape in self.inputs.items() if name.startswith(_PAST)}


def past_of(outputs: Mapping[str, Array]) -> dict[str, Array]:
    """The outputs `present` of one step as the inputs `past_key_values` of the next."""
    return {
        _PAST + name.removeprefix(_PRESENT): value
        for name, value in outputs.items()
        if name.startswith(_PRESENT)
    }
