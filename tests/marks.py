"""Marks of tests that need one generation of TransformerLens."""

from __future__ import annotations

import pytest

from converter.verification.loading import has_hooked_transformer

needs_hooked = pytest.mark.skipif(
    not has_hooked_transformer(), reason="TransformerLens 4 has no HookedTransformer"
)
