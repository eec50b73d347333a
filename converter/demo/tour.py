"""`neoconvert demo`: HF -> TL -> HF in both TL layouts, every byte compared; a head ablated in TL and
brought back; then ONNX beside it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.markup import escape

from converter.checkpoint import Checkpoint, open_checkpoint
from converter.checkpoint.record import rerecord
from converter.convert import export_onnx, hf_to_tl, tl_to_hf
from converter.demo import MODEL
from converter.display import Display
from converter.dtypes import same_bits
from converter.explaining import explain
from converter.layout import Layout
from converter.output import shown
from converter.verification.loading import has_hooked_transformer, load_bridge, load_hooked

_BLOCK, _HEAD = 1, 3
"""The head that the demo ablates."""

LOAD = """\
[bold]Load the results[/]

  [dim]# TransformerLens 3[/]
  from converter import load_hooked
  model = load_hooked("{hooked}")

  [dim]# TransformerLens 3 or 4[/]
  from converter import load_bridge
  bridge = load_bridge("{bridge}")

  [dim]# transformers, and TransformerBridge.boot_transformers(...), open the HF directory[/]
  from transformers import AutoModelForCausalLM
  model = AutoModelForCausalLM.from_pretrained("{hf}")

  [dim]# onnxruntime, optimum and transformers.js open the same directory[/]
  import onnxruntime
  session = onnxruntime.InferenceSession("{hf}/model.onnx")
"""


def run(output: Path, display: Display) -> tuple[dict[str, Any], int]:
    """Convert the shipped model there and back under `output`; exit code 1 if a byte differs."""
    original = open_checkpoint(MODEL)
    display.say(
        f"The demo model: {original.config.n_layers} layers, trained, in {shown(str(MODEL))}\n"
    )
    trips: dict[str, Any] = {}
    layouts: tuple[Layout, ...] = ("hooked", "bridge")
    for layout in layouts:
        there, back = output / layout, output / f"hf-from-{layout}"
        steps = []
        with display.progress() as progress:
            steps.append(
                hf_to_tl(original, there, layout=layout, overwrite=True, progress=progress)
            )
        display.conversion(steps[-1])
        with display.progress() as progress:
            steps.append(tl_to_hf(open_checkpoint(there), back, overwrite=True, progress=progress))
        display.conversion(steps[-1])
        differing = differences(original, open_checkpoint(back))
        n = len(original.stored)
        if differing:
            display.say(
                f"[red]✗ HF → {layout} → HF: {len(differing)} of {n} tensors differ{'s' * (len(differing) == 1)}[/]\n"
            )
        else:
            display.say(
                f"[green]✓[/] [bold]HF → {layout} → HF: all {n} tensors returned, bit for bit,"
                " under the same names[/]\n"
            )
        trips[layout] = {
            "conversions": [step.to_json() for step in steps],
            "tensors": n,
            "differing": differing,
        }
    edit, found = edited(original, output, display)
    with display.progress() as progress:
        added = export_onnx(output / "hf-from-hooked", progress=progress)
    display.conversion(added)
    display.say()
    display.say(
        LOAD.format(
            hooked=output / "hooked", bridge=output / "bridge", hf=output / "hf-from-hooked"
        )
    )
    failed = any(trip["differing"] for trip in trips.values()) or not found
    return {
        "output": str(output), "round_trips": trips, "edit": edit, "onnx": added.to_json(),
    }, int(failed)  # fmt: skip


def edited(original: Checkpoint, output: Path, display: Display) -> tuple[dict[str, Any], bool]:
    """Process, ablate a head in TransformerLens, bring it back; whether `explain` names the head."""
    layout: Layout = "hooked" if has_hooked_transformer() else "bridge"
    there, back = output / "processed", output / "hf-from-edited"
    with display.progress() as progress:
        done = [
            hf_to_tl(
                original, there, layout=layout, process="default", ledger="exact", overwrite=True,
                progress=progress,
            )
        ]  # fmt: skip
    display.conversion(done[-1])
    display.say(f"[bold]In TransformerLens[/]: model.blocks[{_BLOCK}].attn.W_O[{_HEAD}] = 0\n")
    ablate(there, layout)
    with display.progress() as progress:
        done.append(tl_to_hf(open_checkpoint(there), back, overwrite=True, progress=progress))
    display.conversion(done[-1])
    explanation = explain(original, open_checkpoint(back))
    ablated = (f"transformer.h.{_BLOCK}.attn.attention.out_proj.weight", f"head {_HEAD}")
    found = ablated in {(fact.name, fact.place) for fact in explanation.tensors}
    changed = [fact for fact in explanation.tensors if not fact.same]
    mark = "[green]✓[/]" if found else "[red]✗[/]"
    display.say(
        f"{mark} [bold]brought back to Hugging Face's own basis: {len(changed)} of"
        f" {len(explanation.tensors)} tensors differ from the original, the others in no bit[/]"
    )
    for line in explanation.lines():
        display.say(f"  [dim]explain:[/] {escape(line)}")
    display.say()
    return {
        "conversions": [step.to_json() for step in done],
        "changed": [fact.name for fact in changed],
        "explained": explanation.to_json(),
    }, found


def ablate(directory: Path, layout: Layout) -> None:
    """What a user does: open the model, change it, save its state dict over the file's."""
    import torch
    from safetensors.torch import save_file

    model = (load_hooked if layout == "hooked" else load_bridge)(directory)
    with torch.no_grad():
        model.blocks[_BLOCK].attn.W_O[_HEAD] = 0
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, directory / "model.safetensors")
    rerecord(directory)  # so that the next demo may replace what this one edited


def differences(a: Checkpoint, b: Checkpoint) -> list[str]:
    """Names of the tensors that the two do not both hold with the same bytes."""
    names = {t.name for t in a.stored.values()} ^ {t.name for t in b.stored.values()}
    both = set(a.stored) & set(b.stored)
    names |= {a.stored[k].name for k in both if not same_bits(a.tensor(k), b.tensor(k))}
    return sorted(names)
