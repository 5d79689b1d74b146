"""Reading a cache: `open_cache(path)`, then samples by key, in any order.

Needs no torch, no zarr and no teacher. Opening reads the shards' records only; arrays are read when
a sample is asked for.

    from shared.cache import open_cache

    cache = open_cache("my-cache")
    sample = cache.read(cache.keys()[0])
    sample.attention[0]     # [H, Q, V] float32: A_tv of the teacher's first layer

A trainer reads whole batches with `read_batch`: padded, still encoded, to be decoded on the device
with `shared.tensor_encodings.decode`. With `BatchBuffers` it reads into the same memory each time.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from jaxtyping import Float32, Int32, Shaped

from shared.agreement import StoredSequences, disagreement
from shared.batch_reads import BatchBuffers, BatchReads, Rows
from shared.encodings import ENCODINGS, Array, decode
from shared.errors import DamagedError
from shared.expected import IMAGE_SHA256, expected_arrays
from shared.identity import compare
from shared.index import IndexCollector, SampleIndex
from shared.progress import progress
from shared.prompt import IMAGE_TOKEN
from shared.reader import ShardReader
from shared.record import ShardRecord, iter_records, no_cache, spec_of
from shared.spec import CacheSpec

Signal = Literal["attention", "vision_tokens", "logprobs"]
SIGNALS: tuple[Signal, ...] = ("attention", "vision_tokens", "logprobs")

_OPEN_SHARDS = 8192
"""Shards whose indexes are kept: of 500 samples each, four million. One takes some 75 kB then, at a
7B teacher's shapes. With more shards than these, shuffled reads open them again and again."""


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


@dataclass(frozen=True, kw_only=True)
class EncodedBatch:
    """Several samples as they are stored, padded to one size. Made by `Cache.read_batch`.

    Stored arrays come by suffix, as `decode` takes them. N counts the samples with an image, R the
    response positions of all samples, one after another. A signal that was not asked for, or that
    no sample of the batch has, is empty or None.
    """

    input_ids: list[Int32[np.ndarray, " _"]]
    "Of each sample; the image is -200."
    labels: list[Int32[np.ndarray, " _"]]
    "Of each sample; -100 where ignored."
    attention: dict[int, dict[str, Shaped[np.ndarray, "N Q H ..."]]]
    "Layer -> stored arrays; rows behind a sample's own are zero, and decode to zero."
    vision_tokens: dict[str, Shaped[np.ndarray, "N ..."]]
    "Stored arrays, an image for each sample that has one."
    top_ids: Shaped[np.ndarray, "R K"] | None
    "In the smallest type that holds the vocabulary."
    top_logprobs: dict[str, Shaped[np.ndarray, "R ..."]]
    "Stored arrays."
    rest_logprobs: Float32[np.ndarray, " R"] | None
    "Log of the probability outside the top k."
    image_sha256: list[bytes | None]
    "Of each sample's image file in its tar; None for text only, or if its shard does not say."


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where one sample lies."""

    reader: ShardReader
    row: int
    image: int
    length: int
    "Tokens of its sequence, as the record says: no axis has more rows of it."

    @property
    def image_row(self) -> Rows:
        """The sample's row on the `image` axis."""
        return Rows(self.reader, self.image, self.image + 1)

    def rows(self, offsets: str) -> Rows:
        """The sample's rows on a flat axis."""
        self.reader.check_rows(offsets, self.row, self.row + 2)
        start, stop = self.reader.whole(offsets)[self.row : self.row + 2].tolist()
        if stop - start > self.length:
            raise self.reader.damaged(
                f"{offsets}: {stop - start} rows of a sample that has {self.length} tokens",
                digests_fit=True,
            )
        return Rows(self.reader, start, stop)


class Cache:
    """An opened cache. Made by `open_cache`. Threads may share it; it can be pickled."""

    def __init__(self, root: Path, records: Mapping[str, ShardRecord], index: SampleIndex) -> None:
        """`records` may be without their samples: the index knows those."""
        self.root = root
        "The cache's folder."
        self.records = records
        "Shard name -> record, without `keys`, `lengths` and `images`."
        first = next(iter(records.values()))
        self.identity: Mapping[str, Any] = first.identity
        "What decided the bytes: spec, teacher, tokenizer, image processor, numerics."
        self.spec: CacheSpec = spec_of(first)
        "What is stored."
        self._index = index
        self._expected = expected_arrays(self.spec, self.identity["teacher"])
        self._reader = lru_cache(maxsize=_OPEN_SHARDS)(self._open)

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, key: str) -> bool:
        return self._index.find(key) is not None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_reader"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._reader = lru_cache(maxsize=_OPEN_SHARDS)(self._open)

    def keys(self) -> list[str]:
        """Keys of all samples, shard by shard."""
        return list(self._index.keys())

    @property
    def lengths(self) -> Int32[np.ndarray, " samples"]:
        """Tokens of each sample's sequence, vision tokens counted, in the order of `keys`."""
        return self._index.lengths

    @property
    def with_image(self) -> npt.NDArray[np.bool_]:
        """Whether each sample has an image, in the order of `keys`."""
        return self._index.images >= 0

    def read(self, key: str) -> CachedSample:
        """One sample.

        Raises:
            KeyError: no such sample.
            DamagedError: a file is missing or its bytes are not what was written.
            CacheError: the system does not let it be read.
        """
        return _decoded(key, self.read_batch([key]), self.spec)

    def read_batch(
        self,
        keys: Sequence[str],
        signals: Collection[Signal] = SIGNALS,
        buffers: BatchBuffers | None = None,
    ) -> EncodedBatch:
        """Samples in this order, of the named signals only.

        Args:
            buffers: memory to read into; by default new memory.

        Raises:
            KeyError: no such sample.
            ValueError: no such signal.
            DamagedError: a file is missing or its bytes are not what was written.
            CacheError: the system does not let it be read.
        """
        if not set(signals) <= set(SIGNALS):
            raise ValueError(f"signals {sorted(signals)}, expected some of {SIGNALS}")
        places = [self._place(key) for key in keys]
        with_image = [place for place in places if place.image >= 0]
        tokens = [place.rows("token_offsets") for place in places]
        reads = BatchReads(buffers or BatchBuffers())
        attention, vision_tokens, logprobs = (
            self.spec.encodings.get(signal) if signal in signals else None for signal in SIGNALS
        )
        queries = [place.rows("query_offsets") for place in with_image if attention]
        images = [place.image_row for place in with_image if vision_tokens]
        all_responses = [place.rows("response_offsets") for place in places if logprobs]
        # A shard without any response may be without the arrays of responses.
        responses = [r for r in all_responses if r.start != r.stop or r.reader.has("top_ids")]
        has_rest = bool(responses) and self._has_rest
        batch = EncodedBatch(
            input_ids=reads.one_by_one("input_ids", tokens),
            labels=reads.one_by_one("labels", tokens),
            attention={
                layer: _stored(f"attention_{layer}", attention, queries, reads.padded)
                for layer in self.spec.attention_layers
                if queries
            },
            vision_tokens=_stored("vision_tokens", vision_tokens, images, reads.single),
            top_ids=reads.joined("top_ids", responses) if responses else None,
            top_logprobs=_stored("top_logprobs", logprobs, responses, reads.joined),
            rest_logprobs=reads.joined("rest_logprobs", responses) if has_rest else None,
            image_sha256=[_image_sha256(place) for place in places],
        )
        reads.run()
        if places:
            self._check_agreement(keys, places, batch, queries, all_responses)
        if batch.top_ids is not None:
            self._check_top_ids(keys, batch.top_ids)
        return batch

    def _check_agreement(
        self,
        keys: Sequence[str],
        places: Sequence[_Place],
        batch: EncodedBatch,
        queries: Sequence[Rows],
        responses: Sequence[Rows],
    ) -> None:
        teacher, each = self.identity["teacher"], iter(queries)
        stored = StoredSequences(
            input_ids=batch.input_ids,
            labels=batch.labels,
            lengths=[place.length for place in places],
            images=[place.image for place in places],
            query_rows=[next(each).number if place.image >= 0 else 0 for place in places]
            if queries
            else None,
            response_rows=[rows.number for rows in responses] if responses else None,
            vocabulary=teacher["vocab_size"],
            num_vision=teacher["vision_tokens"],
        )
        wrong = disagreement(stored)
        if wrong is not None:
            number, what = wrong
            raise places[number].reader.damaged(
                f"sample {keys[number]!r}: {what}", digests_fit=True
            )

    def _check_top_ids(self, keys: Sequence[str], top_ids: Array) -> None:
        """A loss would count a token twice that stands twice, or index beyond the logits."""
        ids = np.sort(top_ids, axis=-1)
        vocabulary = self.identity["teacher"]["vocab_size"]
        if ids.size and ids[:, -1].max() >= vocabulary:
            wrong = f"id {ids.max()}, expected less than {vocabulary}"
        elif (ids[:, 1:] == ids[:, :-1]).any():
            wrong = "the same id twice for one response position"
        else:
            return
        raise DamagedError(
            f"{self.root}: top_ids of {' or '.join(map(repr, keys[:3]))} hold {wrong}; cache-tools "
            "verify --decode says which shard"
        )

    @property
    def _has_rest(self) -> bool:
        """Whether the likeliest tokens are not all: not asked of the shards, which might lie."""
        vocabulary: int = self.identity["teacher"]["vocab_size"]
        return self.spec.logprobs is not None and self.spec.logprobs.top_k < vocabulary

    def _place(self, key: str) -> _Place:
        found = self._index.find(key)
        if found is None:
            raise KeyError(f"{self.root}: no sample {key!r}")
        number, shard, row = found
        reader = self._reader(self._index.shards[shard])
        image, length = int(self._index.images[number]), int(self._index.lengths[number])
        return _Place(reader=reader, row=row, image=image, length=length)

    def _open(self, shard: str) -> ShardReader:
        return ShardReader(root=self.root, record=self.records[shard], expected=self._expected)


def open_cache(path: str | Path) -> Cache:
    """Open a cache for reading.

    Raises:
        CacheError: there is no cache, or one key stands in two shards.
        DamagedError: a record cannot be read.
        MismatchError: shards of different builds lie in one folder; both values are named.
    """
    root = Path(path)
    records: dict[str, ShardRecord] = {}
    samples = IndexCollector()
    first: ShardRecord | None = None
    for record in progress("open", "shard", iter_records(root)):
        first = first or record
        compare(
            f"{root}: shard {record.name}", record.identity, first.identity,
            f"Shard {first.name} is the other side; keep builds that differ in their own folders.",
        )  # fmt: skip
        samples.add(record)
        records[record.name] = record.without_samples()
    if not records:
        raise no_cache(root, "records/*.json")
    return Cache(root, records, samples.index())


def _stored(
    name: str,
    encoding: str | None,
    samples: Sequence[Rows],
    read: Callable[[str, Sequence[Rows]], Array],
) -> dict[str, Array]:
    """A signal's stored arrays by suffix; none if it is not read or no sample has it."""
    if encoding is None or not samples:
        return {}
    return {suffix: read(name + suffix, samples) for suffix in ("", *ENCODINGS[encoding].siblings)}


def _image_sha256(place: _Place) -> bytes | None:
    reader = place.reader
    if place.image < 0 or not reader.has(IMAGE_SHA256):
        return None
    reader.check_rows(IMAGE_SHA256, place.image, place.image + 1)
    return bytes(reader.whole(IMAGE_SHA256)[place.image])


def _decoded(key: str, batch: EncodedBatch, spec: CacheSpec) -> CachedSample:
    ids = batch.input_ids[0]
    images = np.flatnonzero(ids == IMAGE_TOKEN)
    vision, logprobs = spec.vision_tokens, spec.logprobs
    return CachedSample(
        key=key,
        input_ids=ids,
        labels=batch.labels[0],
        vision_start=int(images[0]) if len(images) else None,
        attention={
            layer: decode(spec.attention.encoding, parts)[0].swapaxes(0, 1)
            for layer, parts in batch.attention.items()
            if spec.attention
        },
        vision_tokens=decode(vision.encoding, batch.vision_tokens)[0]
        if vision and batch.vision_tokens
        else None,
        top_ids=None if batch.top_ids is None else batch.top_ids.astype(np.int32),
        top_logprobs=decode(logprobs.encoding, batch.top_logprobs)
        if logprobs and batch.top_logprobs
        else None,
        rest_logprobs=batch.rest_logprobs,
    )
