"""Makes a model that can fill in the middle of the starter model: some of its unused control tokens get other names.

What it fills in is nonsense, since it was never trained for it; all else is as in a real one.
"""

from __future__ import annotations

from pathlib import Path

from gguf_writer import STRING, Array, File, Tensor

from llamaserve.registry.gguf import GGUFArray, read_header

REPOSITORY, SEPARATOR, PREFIX, SUFFIX, MIDDLE, PAD = 3, 5, 7, 8, 9, 10
NAMES = {
    REPOSITORY: "<|repo_name|>",
    4: "<|unused|>",
    SEPARATOR: "<|file_sep|>",
    PREFIX: "<|fim_prefix|>",
    SUFFIX: "<|fim_suffix|>",
    MIDDLE: "<|fim_middle|>",
    PAD: "<|fim_pad|>",
}


def write_fim_model(starter: Path, path: Path) -> None:
    """Write the starter model's file anew, with these names of tokens."""
    header = read_header(starter)
    metadata: dict[str, object] = {}
    for key, value in header.metadata.items():
        metadata[key] = Array(value.type, header.read_array(key)) if isinstance(value, GGUFArray) else value
    tokens = [NAMES.get(number, text) for number, text in enumerate(header.tokens())]
    metadata["tokenizer.ggml.tokens"] = Array(STRING, tokens)
    tensors = [Tensor(each.name, each.shape, each.type, b"", each.offset) for each in header.tensors]
    weights = starter.read_bytes()[header.data_offset :]
    path.write_bytes(File(metadata, tensors).head() + weights)
