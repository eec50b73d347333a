"""A checkpoint's tokenizer, as the libraries take it."""

from __future__ import annotations

from typing import Any

from converter.checkpoint import Checkpoint
from converter.checkpoint.source import TOKENIZER_FILES
from converter.verification.quiet import quiet


@quiet()
def local_tokenizer(checkpoint: Checkpoint) -> Any:
    """The tokenizer in the checkpoint's directory, or the one given with a model; or None.
    transformers makes up a one-token GPT-2 tokenizer for a directory that has none."""
    from transformers import AutoTokenizer

    source = checkpoint.source
    if source.live:
        return source.tokenizer
    if not source.is_directory or not any((source.path / n).is_file() for n in TOKENIZER_FILES):
        return None
    return AutoTokenizer.from_pretrained(source.path, local_files_only=True)


def lens_tokenizer(checkpoint: Checkpoint) -> Any:
    """The same, for TransformerLens; None where it could not take it: it loads a tokenizer again
    from its files, to make it prepend a token."""
    tokenizer = local_tokenizer(checkpoint)
    known = tokenizer is not None and tokenizer.init_kwargs.get("name_or_path")
    return tokenizer if known else None


def placeholder_tokenizer() -> Any:
    """boot_transformers insists on one; verification only ever passes token ids."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    end = "<|endoftext|>"
    core = Tokenizer(WordLevel({end: 0}, unk_token=end))
    # No bos_token: TransformerLens would load the tokenizer a second time, from its files.
    fast: Any = PreTrainedTokenizerFast
    return fast(tokenizer_object=core, eos_token=end, pad_token=end)
