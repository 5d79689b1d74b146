"""Reading a cache: `open_cache(path)`, then samples by key, in any order.

Needs no torch and no teacher. Opening reads the shards' records only; arrays are read when a sample
is asked for.

    from shared.cache import open_cache

    cache = open_cache("my-cache")
    sample = cache.read(cache.keys()[0])
    sample.attention[0]     # [H, Q, V] float32: A_tv of the teacher's first layer
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from jaxtyping import Float32, Int32

from shared.errors import CacheError, MismatchError
from shared.record import ShardRecord, compare, read_records, spec_of
from shared.spec import CacheSpec
from shared.store import ShardReader

_OPEN_SHARDS = 256
"Shards kept open at the same time; each holds a few kilobytes."


@dataclass(frozen=True, kw_only=True)
class CachedSample:
    """One sample's teacher signals and the sequence that the teacher saw."""

    key: str
    "The sample's key in its tar."
    input_ids: Int32[np.ndarray, " T"]
    "Token ids; the image is the one token -200, not expanded."
    labels: Int32[np.ndarray, " T"]
    "Ids to learn; -100 where ignored."
    vision_start: int | None
    "Position of the image, and of the first vision token once expanded; None for text only."
    attention: dict[int, Float32[np.ndarray, "H Q V"]]
    "Layer -> attention weights from text after the image to vision tokens; empty for text only."
    vision_tokens: Float32[np.ndarray, "V C"] | None
    "Projected vision tokens; None for text only or if the spec stores none."
    top_ids: Int32[np.ndarray, "R K"] | None
    "The k likeliest tokens at each response position, likeliest first; None if not stored."
    top_logprobs: Float32[np.ndarray, "R K"] | None
    "Their log-probabilities in nats."
    rest_logprobs: Float32[np.ndarray, " R"] | None
    "Log of the probability outside the top k; None if not stored or if k is the whole vocabulary."


class Cache:
    """An opened cache. Made by `open_cache`."""

    def __init__(self, root: Path, records: Mapping[str, ShardRecord]) -> None:
        self.root = root
        "The cache's folder."
        self.records = records
        "Shard name -> record."
        first = next(iter(records.values()))
        self.identity: Mapping[str, Any] = first.identity
        "What decided the bytes: spec, teacher, tokenizer, image processor, numerics."
        self.spec: CacheSpec = spec_of(first)
        "What is stored."
        self._where = _locate(root, records)
        self._open: OrderedDict[str, ShardReader] = OrderedDict()

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, key: str) -> bool:
        return key in self._where

    def keys(self) -> list[str]:
        """Keys of all samples, shard by shard."""
        return list(self._where)

    def num_tokens(self, key: str) -> int:
        """Length of a sample's sequence, vision tokens counted; from the record alone."""
        shard, row = self._locate(key)
        return self.records[shard].lengths[row]

    def has_image(self, key: str) -> bool:
        """Whether the sample has an image; from the record alone."""
        shard, row = self._locate(key)
        return self.records[shard].images[row] >= 0

    def read(self, key: str) -> CachedSample:
        """One sample.

        Raises:
            KeyError: no such sample.
            DamagedError: a file is missing or its bytes are not what was written.
        """
        shard, row = self._locate(key)
        reader = self._reader(shard)
        start, stop = _span(reader, "token_offsets", row)
        vision_start = int(reader.whole("vision_start")[row])
        top_ids, top_logprobs, rest = self._logprobs(reader, row)
        image = self.records[shard].images[row]
        return CachedSample(
            key=key,
            input_ids=reader.rows("input_ids", start, stop),
            labels=reader.rows("labels", start, stop),
            vision_start=vision_start if vision_start >= 0 else None,
            attention=self._attention(reader, row) if image >= 0 else {},
            vision_tokens=self._vision_tokens(reader, image) if image >= 0 else None,
            top_ids=top_ids,
            top_logprobs=top_logprobs,
            rest_logprobs=rest,
        )

    def _attention(self, reader: ShardReader, row: int) -> dict[int, npt.NDArray[np.float32]]:
        spec = self.spec.attention
        if spec is None:
            return {}
        start, stop = _span(reader, "query_offsets", row)
        return {
            layer: reader.decoded(f"attention_{layer}", start, stop, spec.encoding).swapaxes(0, 1)
            for layer in spec.layers
        }

    def _vision_tokens(self, reader: ShardReader, image: int) -> npt.NDArray[np.float32] | None:
        spec = self.spec.vision_tokens
        if spec is None:
            return None
        tokens: npt.NDArray[np.float32] = reader.decoded(
            "vision_tokens", image, image + 1, spec.encoding
        )[0]
        return tokens

    def _logprobs(self, reader: ShardReader, row: int) -> tuple[Any, Any, Any]:
        spec = self.spec.logprobs
        if spec is None:
            return None, None, None
        start, stop = _span(reader, "response_offsets", row)
        rest = (
            reader.decoded("rest_logprobs", start, stop, "float32")
            if "rest_logprobs/zarr.json" in reader.record.files
            else None
        )
        return (
            reader.rows("top_ids", start, stop),
            reader.decoded("top_logprobs", start, stop, spec.encoding),
            rest,
        )

    def _locate(self, key: str) -> tuple[str, int]:
        try:
            return self._where[key]
        except KeyError:
            raise KeyError(f"{self.root}: no sample {key!r}") from None

    def _reader(self, shard: str) -> ShardReader:
        reader = self._open.pop(shard, None) or ShardReader(
            root=self.root, record=self.records[shard]
        )
        self._open[shard] = reader
        if len(self._open) > _OPEN_SHARDS:
            self._open.popitem(last=False)
        return reader


def open_cache(path: str | Path) -> Cache:
    """Open a cache for reading.

    Raises:
        CacheError: there is no cache, or one key stands in two shards.
        DamagedError: a record cannot be read.
        MismatchError: shards of different builds lie in one folder; both values are named.
    """
    root = Path(path)
    records = read_records(root)
    if not records:
        raise CacheError(f"{root}: no cache here (no records/*.json); make one with build-cache")
    first, *others = records.values()
    for record in others:
        compare(
            f"{root}: shard {record.name}", record.identity, first.identity,
            f"Shard {first.name} is the other side; keep builds that differ in their own folders.",
        )  # fmt: skip
    return Cache(root, records)


def _locate(root: Path, records: Mapping[str, ShardRecord]) -> dict[str, tuple[str, int]]:
    where: dict[str, tuple[str, int]] = {}
    for record in records.values():
        for row, key in enumerate(record.keys):
            if key in where:
                raise MismatchError(
                    f"{root}: sample {key!r} stands in shard {where[key][0]} and in {record.name}; "
                    "keys must differ: pack the data again with cache-tools pack"
                )
            where[key] = (record.name, row)
    return where


def _span(reader: ShardReader, offsets: str, row: int) -> tuple[int, int]:
    edges = reader.whole(offsets)
    return int(edges[row]), int(edges[row + 1])
