"""From text to batches: sources, tokenizers, prepared (tokenised) data, the loader."""
