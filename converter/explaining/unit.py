"""One unit of both checkpoints, in `hooked` axes and float64."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import ml_dtypes
import numpy as np

from converter.checkpoint import Checkpoint
from converter.dtypes import CODES, cast, same_bits
from converter.explaining.compare import noise
from converter.explaining.operand import Operand, parts, taken, values
from converter.layout.ops import axes
from converter.processing import Carry
from converter.processing.attn_scale import SCALED
from converter.processing.fold_ln import STEP as _FOLD
from converter.processing.step import FLOAT32, Part

_W_POS = "pos_embed.W_pos"
_CARRY = Carry()


@dataclass(frozen=True)
class Pair:
    """The tensors of a unit, by `hooked` name without the block; `a` original, `b` converted."""

    prefix: str
    """"blocks.{i}.", or nothing."""
    a: dict[str, Operand]
    b: dict[str, Operand]
    raw: dict[str, float]
    """The largest difference of the values that are stored."""
    d_axis: dict[str, int | None]
    a_carried: frozenset[Part] = frozenset()
    b_carried: frozenset[Part] = frozenset()
    """LayerNorms that carried biases, with what reads them; `unpack` made the biases explicit."""
    odd: dict[str, tuple[Operand, Operand]] = field(default_factory=dict)
    """Tensors of such LayerNorms that are not quite what carries biases: expected, found."""

    def of(self, names: list[str]) -> Pair:
        """Some of the tensors."""
        a, b = ({name: unit[name] for name in names} for unit in (self.a, self.b))
        return replace(self, a=a, b=b, odd={n: x for n, x in self.odd.items() if n in names})


def load(original: Checkpoint, converted: Checkpoint, keys: Iterable[str]) -> Pair:
    """Read the tensors of these `hooked` names, which are of one unit."""
    keys = list(keys)
    slot = converted.slots[keys[0]]
    prefix = "" if slot.layer is None else f"blocks.{slot.layer}."
    sides: list[dict[str, np.ndarray]] = [{}, {}]
    raw: dict[str, float] = {}
    n_ctx = min(original.config.n_ctx, converted.config.n_ctx)
    for key in keys:
        name = key.removeprefix(prefix)
        a, b = original.tensor(key), converted.tensor(key)
        if key == _W_POS:
            a, b = a[:n_ctx], b[:n_ctx]
        raw[name] = _difference(a, b)
        sides[0][name], sides[1][name] = a, b
    absorb = original.config.score_divisors != converted.config.score_divisors
    a_unit, b_unit = (
        _in_float64(side, checkpoint, slot.layer if absorb else None)
        for side, checkpoint in zip(sides, (original, converted), strict=True)
    )
    d_axis = {}
    for key in keys:
        hub = [axis for dim in axes(converted.slots[key].to_hub.after) for axis in dim]
        d_axis[key.removeprefix(prefix)] = hub.index("d") if "d" in hub else None
    return Pair(prefix, a_unit, b_unit, raw, d_axis)


def _in_float64(
    arrays: dict[str, np.ndarray], checkpoint: Checkpoint, layer: int | None
) -> dict[str, Operand]:
    declared = {
        name: next(c for c, d in CODES.items() if d == a.dtype) for name, a in arrays.items()
    }
    narrow = _narrower([a for a in arrays.values() if a.ndim > 1])
    result = {}
    for name in list(arrays):
        array = arrays.pop(name)
        code = narrow if narrow and _wider(declared[name], narrow) else declared[name]
        value = array.astype(np.float64)
        if name in SCALED and layer is not None and checkpoint.config.score_divisors:
            value /= checkpoint.config.score_divisors[layer]
        result[name] = Operand.stored(value, code, declared[name])
    return result


def _narrower(matrices: list[np.ndarray]) -> str | None:
    """A dtype that holds all these values, where it is narrower than the one that they are in."""
    matrices = [m for m in matrices if m.any()]
    for code in ("BF16", "F16", "F32") if matrices else ():
        if all(_wider(_code(m), code) and _holds(code, m) for m in matrices):
            return code
    return None


def _code(array: np.ndarray) -> str:
    return next(code for code, dtype in CODES.items() if dtype == array.dtype)


def _wider(code: str, than: str) -> bool:
    precision = ml_dtypes.finfo(CODES[than]).eps
    return bool(ml_dtypes.finfo(CODES[code]).eps < precision)


def _holds(code: str, array: np.ndarray) -> bool:
    first = slice(0, max(1, 4096 // max(1, array[0].size)))
    for part in (first, *parts(array)):
        x = array[part].astype(np.float64)
        if not np.array_equal(cast(x, code).astype(np.float64), x):
            return False
    return True


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    if same_bits(a, b):
        return 0.0
    worst = 0.0
    for part in parts(a):
        x, y = a[part].astype(np.float64), b[part].astype(np.float64)
        with np.errstate(invalid="ignore"):
            gap = np.where((x == y) | (np.isnan(x) & np.isnan(y)), 0, np.abs(x - y))
        worst = max(worst, float(np.nan_to_num(gap, nan=np.inf, posinf=np.inf).max(initial=0)))
    return worst


def unpack(pair: Pair) -> Pair:
    """Where a LayerNorm carries biases in its null direction, make them biases again."""
    a, a_carried, a_odd = _unpacked(pair.a)
    b, b_carried, b_odd = _unpacked(pair.b)
    return replace(pair, a=a, b=b, a_carried=a_carried, b_carried=b_carried, odd=a_odd | b_odd)


def _unpacked(
    unit: dict[str, Operand],
) -> tuple[dict[str, Operand], frozenset[Part], dict[str, tuple[Operand, Operand]]]:
    """The unit with biases, and gain and bias of what carried them: as they should be, as found."""
    seen: dict[str, tuple[Operand, Operand]] = {}
    carried = set()
    for part in _CARRY.parts_of(unit):
        gain, bias = part.empties
        # Most channels decide: an edited one must be found, not hide the rest.
        if _CARRY.distance(part, values(unit), FLOAT32) > 0:
            continue
        carried.add(part)
        for name, value in ((gain, 1.0), (bias, float(np.median(unit[bias].value)))):
            expected = replace(unit[name], value=np.full_like(unit[name].value, value))
            seen[name] = (expected, unit[name])
            unit = unit | {name: expected}
        unit = taken(unit, _FOLD, part)
        for name in part.changes:
            if name in unit:
                unit[name] = _without_noise(replace(unit[name], moved=False, unpacked=True))
    return unit, frozenset(carried), seen


def _without_noise(x: Operand) -> Operand:
    """Zero, where it is no more than what is left of zero after having been carried."""
    if x.value.ndim > 2 or (np.abs(x.value) > noise(x) * x.magnitude()).any():
        return x
    left = np.abs(x.value) / noise(x)  # taking it away is an error of its size
    return replace(x, value=np.zeros_like(x.value), floors=(*x.floors, left))
