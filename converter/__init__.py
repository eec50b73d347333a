"""neoconvert: GPT-Neo checkpoints between Hugging Face and TransformerLens, every file verified.

    import converter

    converter.hf_to_tl("EleutherAI/gpt-neo-125m", "neo-tl")
    model = converter.load_hooked("neo-tl")

    model = converter.to_hooked(hf_model, process="default")  # the same with nothing on disk
    hf_model = converter.to_hf_model(model)

Names are imported when they are first used, so that `import converter` is instant.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from converter.errors import (
    BadInput,
    CannotDoHere,
    CannotUndo,
    ConfigError,
    CorruptFile,
    Fault,
    HubUnreachable,
    MissingShard,
    MissingTensor,
    NeoconvertError,
    NoSpace,
    NotRepresentable,
    OutputExists,
    PickleRefused,
    SamePlace,
    SourceChanged,
    SourceNotFound,
    SystemRefused,
    TensorMismatch,
    UnknownTensor,
    UnsafeReference,
    UsageError,
    VerificationFailed,
)

__version__ = "0.1.0"

if TYPE_CHECKING:
    from converter.adapter import with_adapter
    from converter.checkpoint import Checkpoint, open_checkpoint, open_model
    from converter.convert import bake, export_onnx, hf_to_tl, tl_to_hf
    from converter.explaining import Explanation, explain
    from converter.exporting import Graph
    from converter.inspection import Inspection, inspect
    from converter.models import to_bridge, to_hf_model, to_hooked, to_state_dict
    from converter.opening import open_artifact
    from converter.pipeline import Conversion
    from converter.pushing import push
    from converter.recorded import reference
    from converter.verification.loading import load_bridge, load_hooked
    from converter.verification.result import Verification
    from converter.verification.verify import verify

_HOMES = {
    "Checkpoint": "checkpoint",
    "Conversion": "pipeline",
    "Explanation": "explaining",
    "Graph": "exporting",
    "Inspection": "inspection",
    "Verification": "verification",
    "bake": "convert",
    "explain": "explaining",
    "export_onnx": "convert",
    "hf_to_tl": "convert",
    "inspect": "inspection",
    "load_bridge": "verification.loading",
    "load_hooked": "verification.loading",
    "open_artifact": "opening",
    "open_checkpoint": "checkpoint",
    "open_model": "checkpoint",
    "push": "pushing",
    "tl_to_hf": "convert",
    "reference": "recorded",
    "to_bridge": "models",
    "to_hf_model": "models",
    "to_hooked": "models",
    "to_state_dict": "models",
    "verify": "verification",
    "with_adapter": "adapter",
}

__all__ = [
    "BadInput",
    "CannotDoHere",
    "CannotUndo",
    "Checkpoint",
    "ConfigError",
    "Conversion",
    "CorruptFile",
    "Explanation",
    "Fault",
    "Graph",
    "HubUnreachable",
    "Inspection",
    "MissingShard",
    "MissingTensor",
    "NeoconvertError",
    "NoSpace",
    "NotRepresentable",
    "OutputExists",
    "PickleRefused",
    "SamePlace",
    "SourceChanged",
    "SourceNotFound",
    "SystemRefused",
    "TensorMismatch",
    "UnknownTensor",
    "UnsafeReference",
    "UsageError",
    "Verification",
    "VerificationFailed",
    "bake",
    "explain",
    "export_onnx",
    "hf_to_tl",
    "inspect",
    "load_bridge",
    "load_hooked",
    "open_artifact",
    "open_checkpoint",
    "open_model",
    "push",
    "reference",
    "tl_to_hf",
    "to_bridge",
    "to_hf_model",
    "to_hooked",
    "to_state_dict",
    "verify",
    "with_adapter",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
