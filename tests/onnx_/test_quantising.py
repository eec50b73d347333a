"""Graphs with weights of their own in the hands of onnxruntime's quantisers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from converter.checkpoint import Checkpoint, open_checkpoint
from converter.onnx import export
from converter.onnx.opening import open_graph, reader_of
from converter.onnx.structure import Nodes, compare_nodes
from converter.verification import verify
from tests.models import random_hf, write_as
from tests.onnx_.quantising import int8, q4


def kinds(path: Path) -> Counter[str]:
    model = onnx.load_model(str(path), load_external_data=False)
    return Counter(node.op_type for node in model.graph.node)


@pytest.mark.parametrize("mode", ["inline", "external"])
@pytest.mark.parametrize("tied", [True, False])
def test_quantisers_see_every_matrix(tmp_path: Path, mode: Any, tied: bool) -> None:
    """But a tied head at 4 bits, which is the embedding, and stays so."""
    there = open_checkpoint(random_hf(tmp_path / "m", tied=tied))
    path = export(there, tmp_path / "o", weights=mode).path
    matrices = 6 * there.config.n_layers + 1
    assert kinds(q4(path))["MatMulNBits"] == matrices - tied
    assert kinds(int8(path))["MatMulInteger"] == matrices


@pytest.mark.parametrize("layout", ["hf", "hooked", "bridge"])
def test_what_is_left_of_the_weights_is_known(
    tiny: Checkpoint, tmp_path: Path, layout: Any
) -> None:
    there = tiny if layout == "hf" else open_checkpoint(write_as(tiny, tmp_path / "tl", layout))
    path = export(there, tmp_path / "o", weights="inline").path
    for quantise in (int8, q4):
        found = open_graph(quantise(path))
        assert found.layout == ("hf" if layout == "hf" else "bridge")
        assert not found.complete
        assert "ln_final.b" in found.stored
        assert "blocks.0.attn.W_Q" not in found.stored
        for key in found.stored:
            np.testing.assert_array_equal(found.tensor(key), tiny.tensor(key))


def test_graphs_with_gemm_of_their_own_weights_still_verify(tiny: Checkpoint) -> None:
    """As the version before this wrote them."""
    shared = export(tiny).path
    model = onnx.load_model(str(shared))  # with the weights in it
    old = shared.with_name("old.onnx")
    onnx.save_model(model, str(old))
    assert kinds(old)["Gemm"] == 6 * tiny.config.n_layers + 1
    assert reader_of(open_graph(old)).turned == set()
    assert compare_nodes(open_graph(old)) == Nodes(ours=True)
    assert verify(tiny, old, effort="quick").passed


def test_a_matrix_the_wrong_way_round_is_seen(tiny: Checkpoint, tmp_path: Path) -> None:
    """Square, so that its shape says nothing."""
    path = export(tiny, tmp_path / "o", weights="inline").path
    model = onnx.load_model(str(path))
    name = "transformer.h.1.attn.attention.q_proj.weight"
    (tensor,) = (t for t in model.graph.initializer if t.name == name)
    turned = onnx.numpy_helper.to_array(tensor).T.copy()
    tensor.CopyFrom(onnx.numpy_helper.from_array(turned, name))
    path.write_bytes(model.SerializeToString())
    result = verify(tiny, path, checks=["weights"])
    assert result.weights is not None
    assert result.weights.mismatched == (name,)
