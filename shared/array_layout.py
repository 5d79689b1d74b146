"""The one profile of Zarr v3 that a shard's arrays have (`cache_specs/format.md`).

One shard file per array whose inner chunks are whole rows, in order and without gaps, each zstd and
then crc32c. Metadata that says anything else is refused, so a cache from a stranger gets no other
codec, shape or place to read from.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

MAX_ARRAY_BYTES = 2**40
"Decoded size of one array; a 7B shard of 500 samples has 0.6 GB."
MAX_CHUNK_BYTES = 2**27
"Decoded size of one inner chunk; a 7B image in float32 is 2.4 MB."
_DTYPES = ("uint8", "uint16", "uint32", "int32", "int64", "float16", "float32")


@dataclass(frozen=True, kw_only=True)
class ArrayLayout:
    """What a `zarr.json` of our profile leaves open."""

    shape: tuple[int, ...]
    "Of the whole array."
    dtype: np.dtype[Any]
    "Of its values, little endian."
    chunk_rows: int
    "Rows of the first axis in one inner chunk."

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @cached_property
    def chunk_bytes(self) -> int:
        """Bytes of one inner chunk, decoded."""
        return self.chunk_rows * self.row_bytes

    @property
    def num_chunks(self) -> int:
        """Inner chunks; an array without rows still has one in its index."""
        return max(1, -(-self.shape[0] // self.chunk_rows))

    @property
    def file(self) -> str:
        """The one shard file, relative to the array's folder."""
        return "/".join(["c", *"0" * len(self.shape)])

    @classmethod
    def parse(cls, text: bytes) -> "ArrayLayout":
        """From the bytes of a `zarr.json`.

        Raises:
            ValueError: it is not the metadata of an array as this project writes them.
        """
        found = json.loads(text)
        try:
            shape, dtype = found["shape"], found["data_type"]
            sharding = found["codecs"][0]["configuration"]
            chunk, level = sharding["chunk_shape"], sharding["codecs"][1]["configuration"]["level"]
            names = found["dimension_names"]
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError("zarr.json is not that of a sharded array") from error
        _check_sizes(shape, chunk, dtype)
        if type(level) is not int or found != _metadata(shape, dtype, chunk, level, names):
            raise ValueError("zarr.json differs from the arrays of cache_specs/format.md")
        return cls(shape=tuple(shape), dtype=np.dtype(dtype).newbyteorder("<"), chunk_rows=chunk[0])


def _check_sizes(shape: Any, chunk: Any, dtype: Any) -> None:
    if dtype not in _DTYPES:
        raise ValueError(f"data_type is {dtype!r}, expected one of {', '.join(_DTYPES)}")
    for name, sizes, least in (("shape", shape, 0), ("chunk_shape", chunk, 1)):
        whole = isinstance(sizes, list) and all(type(size) is int for size in sizes)
        if not whole or not 1 <= len(sizes) <= 4 or min(sizes) < least:
            raise ValueError(
                f"{name} is {str(sizes)[:80]}, expected 1 to 4 whole numbers from {least} on"
            )
    if chunk[1:] != shape[1:]:
        raise ValueError(f"chunks of {chunk} in an array of {shape}: chunks must be whole rows")
    itemsize = np.dtype(dtype).itemsize
    for what, sizes, limit in (
        ("an array", shape, MAX_ARRAY_BYTES), ("a chunk", chunk, MAX_CHUNK_BYTES)
    ):  # fmt: skip
        if math.prod(sizes) * itemsize > limit:
            raise ValueError(f"{what} of {sizes} {dtype} is larger than {limit} bytes")


def _metadata(
    shape: Sequence[int], dtype: str, chunk: Sequence[int], level: int, names: object
) -> dict[str, Any]:
    """The whole `zarr.json` of an array of our profile, as zarr-python writes it."""
    rows = max(1, -(-shape[0] // chunk[0])) * chunk[0]
    plain = {"name": "bytes"}
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    inner = [
        plain if dtype == "uint8" else little,
        {"name": "zstd", "configuration": {"level": level, "checksum": False}},
        {"name": "crc32c"},
    ]
    sharding = {
        "chunk_shape": list(chunk),
        "codecs": inner,
        "index_codecs": [little, {"name": "crc32c"}],
        "index_location": "start",
    }
    return {
        "shape": list(shape),
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [rows, *shape[1:]]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0,
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "attributes": {},
        "dimension_names": names,
        "zarr_format": 3,
        "node_type": "array",
        "storage_transformers": [],
    }
