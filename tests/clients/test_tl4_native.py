"""TransformerLens 4's own way for an old HookedTransformer GPT-Neo: it says that all is well, and is
wrong. If this fails because that was mended: docs/transformerlens-4.md says otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest

from converter.verification.loading import has_hooked_transformer

NOISE = 1e-4


@pytest.mark.skipif(has_hooked_transformer(), reason="is about TransformerLens 4")
def test_as_the_page_says(tmp_path: Path) -> None:
    from scripts.tl4_native import measure

    native, rescaled, ours = measure(tmp_path)
    for row in (native, rescaled):
        assert row.keys == "<All keys matched successfully>"
        assert row.beyond > 0.5
    assert native.within > 0.5
    assert rescaled.within < NOISE
    assert max(ours.within, ours.beyond) < NOISE
