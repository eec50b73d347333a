"""From a checkpoint to a file that onnxruntime runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from converter.checkpoint import Checkpoint
from converter.checkpoint.reader import SafetensorsReader
from converter.checkpoint.record import sealed
from converter.errors import OutputExists, UsageError
from converter.onnx import weights as placing
from converter.onnx.builder import OPSET
from converter.onnx.graph import build
from converter.onnx.hooks import hooks_matching
from converter.onnx.opening import metadata
from converter.onnx.reading import read_onnx
from converter.strict_json import Json

GRAPH_NAME = "model.onnx"


@dataclass(frozen=True)
class ExportResult:
    """What was written."""

    path: Path
    weights: placing.Mode
    with_past: bool
    hooks: tuple[str, ...]
    """Hook points that are outputs, in the order of the forward pass."""
    written: tuple[Path, ...]
    """The graph, and the file of external weights."""
    shared: tuple[Path, ...]
    """Weight files that the graph points into, beside it."""
    graph_bytes: int
    weight_bytes: int
    """Bytes of weights that the graph uses, wherever they are."""
    nodes: int
    opset: int = OPSET

    def moved(self, old: Path, new: Path) -> ExportResult:
        """The same files, after their directory was renamed."""

        def there(paths: Sequence[Path]) -> tuple[Path, ...]:
            return tuple(new / path.relative_to(old) for path in paths)

        (path,) = there([self.path])
        return replace(self, path=path, written=there(self.written), shared=there(self.shared))


def export(
    checkpoint: Checkpoint,
    output_dir: Path | None = None,
    *,
    weights: placing.Mode = "shared",
    with_past: bool = True,
    hooks: Sequence[str] = (),
    file_name: str = GRAPH_NAME,
    data_name: str | None = None,
    made: Json | None = None,
) -> ExportResult:
    """Write the model as ONNX into a directory, which is made if need be.

    Args:
        output_dir: None: the checkpoint's own.
        weights: see `converter.onnx.weights`. For "shared", the directory must hold the
            checkpoint's weight files.
        with_past: inputs `past_key_values` and outputs `present`.
        hooks: glob patterns of TransformerLens's hook points that become outputs too.
        file_name: of the graph. The graph may be written under a temporary name and renamed.
        data_name: of the file of external weights, by default `model.onnx_data` of `model.onnx`.
            It is named in the graph and cannot be renamed.
        made: how the weights were made from their original, as neoconvert.json says it
            ("route", "steps"); None: as it does beside the checkpoint.

    Raises:
        UsageError: unknown hooks; weights that cannot live where they are asked to; a file that
            is there already (OutputExists).
        NotRepresentable: an activation that the graph cannot express.
        BadInput: what was written cannot be read back.
    """
    directory = checkpoint.directory if output_dir is None else output_dir
    path, data = directory / file_name, directory / (data_name or f"{file_name}_data")
    wanted = hooks_matching(hooks, checkpoint.config)
    located = placing.place_weights(checkpoint, weights, data.name)
    shared = tuple(placing.shared_files(checkpoint)) if weights == "shared" else ()
    for file in shared:
        _require_beside(file, directory)
    written = (path, data) if weights == "external" else (path,)
    for file in written:
        if file.exists() or file.is_symlink():
            raise OutputExists(
                "There is a file of this name already.", where=str(file), do="Remove it first."
            )
    provenance = made or checkpoint.source.provenance or {}
    kept: Json = {
        name: provenance[name]
        for name in ("route", "steps", "reverse", "source_sha256")
        if name in provenance
    }
    said = metadata(checkpoint.config, kept)
    model = build(located, directory, with_past=with_past, hooks=wanted, metadata=said)
    directory.mkdir(parents=True, exist_ok=True)
    try:
        content = ir.to_proto(model).SerializeToString(deterministic=True)
        graph_bytes = path.write_bytes(sealed(content))
        if weights == "external":
            located.write(data)
        read_onnx(path)
    except BaseException:
        for file in written:
            file.unlink(missing_ok=True)
        raise
    return ExportResult(
        path=path,
        weights=weights,
        with_past=with_past,
        hooks=wanted,
        written=written,
        shared=tuple(directory / file.name for file in shared),
        graph_bytes=graph_bytes,
        weight_bytes=located.nbytes,
        nodes=model.graph.num_nodes(),
    )


def _require_beside(file: Path, directory: Path) -> None:
    """The weight file, or a copy of it, must be a real file in the graph's own directory:
    onnxruntime follows neither `../` nor a link that leaves the directory."""
    here = directory / file.name
    if not here.is_file() or not _same(here, file):
        raise UsageError(
            f"The weights cannot be shared: {file.name} is not beside the graph.",
            where=str(here),
            do=f"Export into {file.parent}, or use --weights external with an OUTPUT.",
        )
    if here.resolve().parent != directory.resolve():
        raise UsageError(
            "The weights cannot be shared: the weight file is a link out of its directory, as in"
            " the hub's cache, and onnxruntime does not follow it.",
            where=str(here),
            do="Name an OUTPUT directory: the checkpoint is copied there, with its graph.",
        )


def _same(a: Path, b: Path) -> bool:
    if os.path.samefile(a, b):
        return True
    return a.stat().st_size == b.stat().st_size and (
        SafetensorsReader(a).places == SafetensorsReader(b).places
    )
