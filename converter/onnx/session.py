"""An ONNX file in onnxruntime, on CPU: tokens in, logits and all other outputs out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from converter.errors import CannotDoHere, CorruptFile
from converter.onnx.bounds import Allowance, AsksTooMuch, bounded, to_open, to_run
from converter.onnx.dialect import MASK, POSITIONS, TOKENS
from converter.onnx.reading import ForeignGraph, read_onnx
from converter.onnx.tensor_data import AGAIN

Array = NDArray[Any]
_PAST, _PRESENT = "past_key_values.", "present."
_DTYPES: dict[str, Any] = {
    "tensor(float16)": np.float16,
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
}
_SILENT = 4
_FOLDER = "session.model_external_initializers_file_folder_path"


def providers() -> list[str]:
    """What onnxruntime can run on. Without onnxruntime, ImportError."""
    return list(_imported().get_available_providers())


def has_cuda() -> bool:
    """Whether onnxruntime is here and can use a GPU."""
    try:
        return "CUDAExecutionProvider" in providers()
    except ImportError:
        return False


def _imported() -> Any:
    """onnxruntime. Since 1.32 it reports to its makers, unless that is switched off beforehand."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    return onnxruntime


def _not(_value: bool) -> None:
    """Before onnxruntime 1.21, opening cannot be stopped."""


def _onnxruntime(path: Path) -> Any:
    try:
        return _imported()
    except ImportError as error:
        raise CannotDoHere(
            "onnxruntime is not installed.", where=str(path), do="pip install onnxruntime"
        ) from error


Edit = Callable[[onnx.ModelProto], onnx.ModelProto]


def with_outputs(names: Sequence[str]) -> Edit:
    """Values inside a graph become outputs too."""

    def edit(model: onnx.ModelProto) -> onnx.ModelProto:
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
        return model

    return edit


class Session:
    """A checked file, opened.

    Args:
        lean: leave float32 weights mapped from their file instead of copying them into the
            layout that is fastest to multiply: next to no time and memory to open, and slower
            on long inputs. (Weights of other dtypes are widened at opening in any case.)
        threads: None: onnxruntime's choice.
        cuda: the number of the GPU to run on, without TF32; None: on CPU.
        edit: what is run is what this makes of the graph; the file is left as it is.
        optimised: whether onnxruntime may fuse nodes, and fold constants into copies of weights.

    Raises:
        BadInput: see `read_onnx`; or onnxruntime refuses the graph.
        AsksTooMuch: opening it takes more memory or time than its size is a reason for.
        CannotDoHere: onnxruntime, or its CUDA provider, is not installed.
    """

    def __init__(
        self,
        path: Path,
        *,
        lean: bool = False,
        threads: int | None = None,
        cuda: int | None = None,
        edit: Edit | None = None,
        optimised: bool = True,
    ) -> None:
        self.file = read_onnx(path)
        self._ort = ort = _onnxruntime(path)
        options: Any = ort.SessionOptions()
        options.log_severity_level = _SILENT
        if threads is not None:
            options.intra_op_num_threads = threads
        if lean:
            options.add_session_config_entry("session.disable_prepacking", "1")
        providers: list[Any] = ["CPUExecutionProvider"]
        if cuda is not None:
            providers.insert(0, ("CUDAExecutionProvider", {"device_id": cuda, "use_tf32": 0}))
        if not optimised:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.enable_cpu_mem_arena = options.enable_mem_pattern = False
        graph: str | bytes = str(path)
        if edit is not None:
            options.add_session_config_entry(_FOLDER, str(path.parent.resolve()))
            graph = edit(onnx.load_model(str(path), load_external_data=False)).SerializeToString()
        self._cuda, self._most = cuda is not None, Allowance(0, 0)
        allowed = to_open(self.file.elements, path.stat().st_size)
        cancel = partial(getattr(options, "set_load_cancellation_flag", _not), True)
        try:
            with self._within(allowed, cancel):
                self._session: Any = ort.InferenceSession(graph, options, providers=providers)
            inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
            self._dtypes = {i.name: _DTYPES.get(i.type) for i in inputs}
            self.inputs: dict[str, list[int | str]] = {i.name: i.shape for i in inputs}
            self.outputs: dict[str, list[int | str]] = {o.name: o.shape for o in outputs}
        except (AsksTooMuch, MemoryError):
            raise
        except Exception as error:  # its exceptions have no base of their own
            raise CorruptFile(
                f"onnxruntime refuses the graph: {(str(error) or repr(error)).splitlines()[0]}",
                where=str(path),
                do=AGAIN,
            ) from error
        if cuda is not None and "CUDAExecutionProvider" not in self._session.get_providers():
            raise CannotDoHere(
                "onnxruntime cannot use the GPU here.",
                where=f"onnxruntime {ort.__version__}: {', '.join(self._session.get_providers())}",
                do="pip install onnxruntime-gpu, or use --device cpu.",
            )
        self._past = dict(self._past_shapes())

    def __call__(
        self,
        tokens: Array,
        mask: Array | None = None,
        past: Mapping[str, Array] | None = None,
        *,
        start: int = 0,
        wanted: tuple[str, ...] | None = None,
    ) -> dict[str, Array]:
        """Outputs by name: all, or those `wanted`.

        Args:
            tokens: integers [batch, pos].
            mask: [batch, past + pos], false at left padding; None: no padding.
            past: what `past_of` makes of the outputs of the step before; None: none.
            start: the position of the first token.

        Raises:
            AsksTooMuch: it takes more memory or time than its size and the tokens are a reason for.
        """
        batch, length = tokens.shape
        feeds: dict[str, Array] = {TOKENS: tokens.astype(np.int64, copy=False)}
        before = 0
        for name, (heads, width) in self._past.items():
            empty = np.zeros((batch, heads, 0, width), self._dtypes[name])
            feeds[name] = past[name] if past else empty
            before = feeds[name].shape[2]
        if mask is None:
            mask = np.ones((batch, before + length), bool)
        # transformers does not derive positions from the mask for GPT-Neo; its clients do.
        positions = start + np.maximum(np.cumsum(mask, axis=1) - 1, 0)[:, before:]
        feeds |= {MASK: mask.astype(np.int64), POSITIONS: positions.astype(np.int64)}
        names = list(wanted or self.outputs)
        feeds = {name: feed for name, feed in feeds.items() if name in self.inputs}
        options: Any = self._ort.RunOptions()
        options.log_severity_level = _SILENT
        allowed = to_run(
            tokens.size,
            before + length,
            elements=self.file.elements,
            widest=self.file.widest,
            heads=max((heads for heads, _ in self._past.values()), default=None),
            outputs=len(names),
        )
        # The pool of memory grows by what the longest run took.
        self._most = self._most.beside(allowed)
        with self._within(self._most, partial(setattr, options, "terminate", True)):
            found = self._session.run(names, feeds, options)
        return dict(zip(names, found, strict=True))

    def _within(self, allowed: Allowance, stop: Callable[[], None]) -> AbstractContextManager[None]:
        return bounded(allowed.on_gpu() if self._cuda else allowed, stop, str(self.file.path))

    def _past_shapes(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Heads and width of the keys and values of each block."""
        for name, shape in self.inputs.items():
            if not name.startswith(_PAST):
                continue
            if len(shape) != 4 or not (isinstance(shape[1], int) and isinstance(shape[3], int)):
                raise ForeignGraph(
                    f"The input {name} is {shape}, and not [batch, heads, past, width].",
                    where=str(self.file.path),
                    do=AGAIN,
                )
            yield name, (shape[1], shape[3])


def past_of(outputs: Mapping[str, Array]) -> dict[str, Array]:
    """The outputs `present` of one step as the inputs `past_key_values` of the next."""
    return {
        _PAST + name.removeprefix(_PRESENT): value
        for name, value in outputs.items()
        if name.startswith(_PRESENT)
    }
