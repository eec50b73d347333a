"""One unit of both checkpoints, in `hooked` axes and float64."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import ml_dtypes
import numpy as np

from converter.checkpoint import Checkpoint
from converter.dtypes import CODES, cast, same_bits
from converter.explaining.operand import Operand, fold, parts
from converter.layout.ops import axes
from converter.processing import homeless
from converter.processing.carry import CARRIERS
from converter.processing.fold_ln import NORMS

POSITIONS = "pos_embed.W_pos"


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
    a_carried: frozenset[str] = frozenset()
    b_carried: frozenset[str] = frozenset()
    """LayerNorms that carried biases; `unpack` made the biases explicit."""
    odd: dict[str, tuple[Operand, Operand]] = field(default_factory=dict)
    """Tensors of such LayerNorms that are not quite what carries biases: expected, found."""

    def identical(self, name: str) -> bool:
        return self.raw[name] == 0


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
        if key == POSITIONS:
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
        if (
            name in ("attn.W_Q", "attn.b_Q")
            and layer is not None
            and checkpoint.config.score_divisors
        ):
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
    a, a_odd = _unpacked(pair.a)
    b, b_odd = _unpacked(pair.b)
    return replace(
        pair,
        a=a,
        b=b,
        a_carried=frozenset(norm for norm in CARRIERS if f"{norm}.w" in a_odd),
        b_carried=frozenset(norm for norm in CARRIERS if f"{norm}.w" in b_odd),
        odd=a_odd | b_odd,
    )


def _unpacked(
    unit: dict[str, Operand],
) -> tuple[dict[str, Operand], dict[str, tuple[Operand, Operand]]]:
    """The unit with biases, and gain and bias of what carried them: as they should be, as found."""
    seen: dict[str, tuple[Operand, Operand]] = {}
    for norm in CARRIERS:
        if f"{norm}.w" not in unit:
            continue
        gain, bias = unit[f"{norm}.w"], unit[f"{norm}.b"]
        c = float(np.median(bias.value))
        usual = (gain.value == 1) & (bias.value == c)
        # Most channels decide: an edited one must be found, not hide the rest.
        if c == 0 or usual.mean() <= 0.5 or homeless({n: x.value for n, x in unit.items()}):
            continue
        for name, value, found in ((f"{norm}.w", 1.0, gain), (f"{norm}.b", c, bias)):
            expected = replace(found, value=np.full_like(found.value, value))
            seen[name] = (expected, found)
            unit = unit | {name: expected}
        touched = {f"{norm}.w", f"{norm}.b", *(n for pair in NORMS[norm] for n in pair)}
        unit = {
            n: replace(x, moved=False, unpacked=True) if n in touched else x
            for n, x in fold(unit, norm).items()
        }
    return unit, seen
