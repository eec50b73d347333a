"""How large a graph becomes when the functions that its file defines are put in place of their calls.

Functions that call one another twice each double with every level, and onnxruntime puts them in place
before anything else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import onnx

Call = tuple[str, str]
"""Domain and operator."""


def expanded(
    nodes: Iterable[onnx.NodeProto], functions: Mapping[Call, Iterable[onnx.NodeProto]]
) -> int | None:
    """Nodes after all calls; None where a function calls itself.

    Args:
        nodes: of the graph and of those in its nodes' attributes.
        functions: by what calls them; their nodes likewise.
    """
    calls = {call: _counted(inner) for call, inner in functions.items()}
    sizes: dict[Call, int] = {}
    waiting = set(calls)
    while waiting:
        ready = [call for call in waiting if not calls[call].keys() & waiting]
        if not ready:
            return None
        for call in ready:
            sizes[call] = _total(calls[call], sizes)
        waiting -= set(ready)
    return _total(_counted(nodes), sizes)


def _counted(nodes: Iterable[onnx.NodeProto]) -> Counter[Call]:
    return Counter((node.domain, node.op_type) for node in nodes)


def _total(calls: Counter[Call], sizes: Mapping[Call, int]) -> int:
    return sum(count * sizes.get(call, 1) for call, count in calls.items())
