"""Reading shuffled batches at 7B shapes, beside other ways to keep the same: `make bench-reader`.

The content is what the spec `default` stores of real signals (benchmarks/signals.py). Every peer
fills batch buffers that were made once, in the same shuffled order, in one process and thread
(libraries that bring threads of their own are held to one for each kind of work), page cache warm;
times are the best of several interleaved rounds, each of half a second of passes.
With `--cold` the files' pages are dropped from the cache before each round (posix_fadvise), so that
the disk is read, and a round is one pass.

Peers keep the encoded arrays raw (their users do not compress) and, as their users do, in float16.
"""

import dataclasses
import mmap
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import google_crc32c
import numpy as np
import numpy.typing as npt
import torch
import zarr
import zstandard
from numcodecs import zstd

from benchmarks.signals import CHANNELS, HEADS, ROWS, VISION, Signals, real_signals
from benchmarks.synthetic_cache import SEQUENCE, write_cache
from shared.array_layout import ArrayLayout
from shared.batch_reads import BatchBuffers
from shared.cache import Cache, open_cache
from shared.encodings import ENCODINGS
from shared.spec import CacheSpec
from shared.stored_array import StoredArray

Arrays = dict[str, npt.NDArray[Any]]
BATCH = 8
SPEC = Path(__file__).parents[1] / "cache_specs" / "default.yaml"


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to keep samples."""

    name: str
    "For the table."
    read: Callable[[Sequence[int]], Arrays]
    "Batch of samples by number."
    files: Path
    "Where its files are."
    streamed: bool = False
    "Whether it gives samples in its own order, not the one asked for."
    unmap: Callable[[], None] = lambda: None
    "Lets go of mapped pages, which otherwise stay in memory."

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(path.stat().st_size for path in self._paths())

    def drop_pages(self) -> None:
        """Take the files out of the page cache."""
        self.unmap()
        for path in self._paths():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)

    def _paths(self) -> list[Path]:
        return [path for path in self.files.rglob("*") if path.is_file()]


@click.command()
@click.option("--samples", default=256, show_default=True, help="Samples in each store.")
@click.option("--rounds", default=5, show_default=True, help="Interleaved rounds; the best counts.")
@click.option("--cold", is_flag=True, help="Drop the files' pages before each round.")
def main(samples: int, rounds: int, cold: bool) -> None:
    """Write all stores, read them, print a table."""
    signals = real_signals(min(samples, 64))
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as folder:
        ways = make_ways(Path(folder), signals, samples)
        check_equal(ways)
        order = np.random.default_rng(0).permutation(samples)
        best = {way.name: float("inf") for way in ways}
        for _ in range(rounds):
            for way in ways:
                if cold:
                    way.drop_pages()
                began = time.perf_counter()
                while True:
                    best[way.name] = min(best[way.name], _seconds(way, order))
                    if cold or time.perf_counter() - began > 0.5:
                        break
        rates = {way.name: samples / best[way.name] for way in ways}
        _print(ways, rates, samples, cold)
        _print_workers(open_cache(Path(folder) / "ours"), order, rounds)
        if not cold:
            _print_first_reads(Path(folder) / "many", signals, rounds)


def _print(ways: Sequence[Way], rates: dict[str, float], samples: int, cold: bool) -> None:
    state = "pages dropped before each round" if cold else "page cache warm"
    ours = ways[0]
    print(f"{samples} samples, batches of {BATCH}, shuffled, one thread, {state}\n")
    print("| way | samples/s | of ours | MB a sample | samples/s per MB, of ours |")
    print("|---|---|---|---|---|")
    for way in ways:
        rate, each = rates[way.name], way.size / samples / 1e6
        value = (rate / each) / (rates[ours.name] / (ours.size / samples / 1e6))
        print(
            f"| {way.name} | {rate:,.0f} | {rate / rates[ours.name]:.2f} | {each:.2f} "
            f"| {value:.2f} |"
        )


def _print_workers(cache: Cache, order: npt.NDArray[np.int64], rounds: int) -> None:
    """The reader in a DataLoader, as train-student uses it."""
    seconds = {
        workers: min(_loader_seconds(cache, order, workers) for _ in range(rounds))
        for workers in (1, 2)
    }
    print(f"\n2 DataLoader workers / 1: {seconds[1] / seconds[2]:.2f} ({os.cpu_count()} cores)")


def _print_first_reads(out: Path, signals: Sequence[Signals], rounds: int) -> None:
    """A shard's first sample, for which it is opened, and its second."""
    shards = 64
    write_cache(out, CacheSpec.load(SPEC), signals, samples=2 * shards, shards=shards)
    best, buffers = [float("inf")] * 2, BatchBuffers()
    for _ in range(rounds):
        cache = open_cache(out)
        for turn in range(2):
            begun = time.perf_counter()
            for key in cache.keys()[turn::2]:
                cache.read_batch([key], buffers=buffers)
            best[turn] = min(best[turn], (time.perf_counter() - begun) / shards)
    print(f"a shard's first sample {1e3 * best[0]:.1f} ms, its second {1e3 * best[1]:.1f} ms")


class _Batches(torch.utils.data.Dataset[int]):
    def __init__(self, cache: Cache) -> None:
        self.cache, self.keys = cache, cache.keys()

    def __getitem__(self, numbers: Sequence[int]) -> int:
        return len(self.cache.read_batch([self.keys[n] for n in numbers]).input_ids)


def _loader_seconds(cache: Cache, order: npt.NDArray[np.int64], workers: int) -> float:
    """Several passes, so that starting the workers does not count; the first batch starts them."""
    many = np.tile(order, 8)
    plan = [part.tolist() for part in np.split(many, range(BATCH, len(many), BATCH))]
    loader: Any = torch.utils.data.DataLoader(
        _Batches(cache), sampler=plan, batch_size=None, num_workers=workers, prefetch_factor=4
    )
    batches = iter(loader)
    next(batches)
    begun = time.perf_counter()
    for _ in batches:
        pass
    return time.perf_counter() - begun


def _seconds(way: Way, order: npt.NDArray[np.int64]) -> float:
    batches = np.split(order, range(BATCH, len(order), BATCH))
    begun = time.perf_counter()
    for numbers in batches:
        way.read(numbers.tolist())
    return time.perf_counter() - begun


def check_equal(ways: Sequence[Way]) -> None:
    """All ways that keep the encoded content give the same arrays."""
    expected = ways[0].read([3, 1])
    for way in ways[1:]:
        if way.streamed:
            continue
        found = way.read([3, 1])
        for name in expected:
            if name in found and found[name].dtype == expected[name].dtype:
                np.testing.assert_array_equal(found[name], expected[name])


def make_ways(folder: Path, signals: Sequence[Signals], samples: int) -> list[Way]:
    """Every store, written to disk; ours first."""
    spec = CacheSpec.load(SPEC)
    write_cache(folder / "ours", spec, signals, samples=samples, shards=1)
    cache, buffers = open_cache(folder / "ours"), BatchBuffers()
    encoded = [_arrays(cache, [number]) for number in range(samples)]
    encoded = [{name: array[0] for name, array in arrays.items()} for arrays in encoded]
    half = [_half(signals[n % len(signals)]) for n in range(samples)]
    inflater = zstandard.ZstdDecompressor()
    return [
        Way(
            name="this project", read=lambda ns: _arrays(cache, ns, buffers), files=folder / "ours"
        ),
        Way(
            name="this project, new memory",
            read=lambda ns: _arrays(cache, ns),
            files=folder / "ours",
        ),
        _zarr_same(folder / "ours", encoded[0]),
        _zarrs_same(folder / "ours", encoded[0]),
        _tensorstore_same(folder / "ours", encoded[0]),
        _zarr_samples(folder / "zarr", encoded),
        _checked(folder / "ours", cache),
        _memmap_zstd(
            folder / "memmap",
            encoded,
            "memmap + the same zstd",
            lambda frame, out: inflater.stream_reader(frame).readinto(out),
        ),
        _memmap_zstd(
            folder / "memmap-numcodecs", encoded, "memmap + numcodecs' zstd", zstd.decompress
        ),
        _torch_files(folder / "torch", encoded, "torch.save file a sample"),
        _safetensors(folder / "safetensors", encoded, "safetensors file a sample"),
        _hdf5(folder / "hdf5", encoded),
        _parquet(folder / "parquet", encoded),
        _webdataset(folder / "wds", encoded),
        _torch_files(folder / "torch16", half, "torch.save, float16"),
        _safetensors(folder / "safetensors16", half, "safetensors, float16"),
        _memmap_raw(folder / "memmap16", half, "memmap, float16"),
    ]


NAMES = {
    "attention": "attention_0", "attention__scale": "attention_0__scale",
    "vision": "vision_tokens", "vision__scale": "vision_tokens__scale",
    "vision__low": "vision_tokens__low", "ids": "input_ids", "labels": "labels",
}  # fmt: skip
"Name here -> array of the cache. Log-probabilities, 1 % of a sample, are left out."


NUM_ROWS = {
    "attention": ROWS, "attention__scale": ROWS, "ids": len(SEQUENCE), "labels": len(SEQUENCE)
}  # fmt: skip
"Rows of each sample in these; one in the others."


def _arrays(cache: Cache, numbers: Sequence[int], buffers: BatchBuffers | None = None) -> Arrays:
    keys = [f"sample-{n:08d}" for n in numbers]
    batch = cache.read_batch(keys, ("attention", "vision_tokens"), buffers)
    arrays = {f"attention{suffix}": part for suffix, part in batch.attention[0].items()}
    arrays |= {f"vision{suffix}": part for suffix, part in batch.vision_tokens.items()}
    return arrays | {"ids": np.stack(batch.input_ids), "labels": np.stack(batch.labels)}


def _half(sample: Signals) -> Arrays:
    return {
        "attention": sample.attention.half().numpy(), "vision": sample.vision_tokens.half().numpy()
    }  # fmt: skip


def _buffers(sample: Arrays) -> Arrays:
    """Aligned to 64 bytes, as torch's memory is. numpy's is aligned to 16 only: a copy to 1 to 31
    bytes further into a page than its source takes five times as long on some of AMD's processors.
    """
    return {
        name: torch.from_numpy(array).new_empty((BATCH, *array.shape)).numpy()
        for name, array in sample.items()
    }


def _filling(sample: Arrays, one: Callable[[int], Arrays]) -> Callable[[Sequence[int]], Arrays]:
    """Batches by a function that gives one sample: each copied into the batch's buffers."""
    buffers = _buffers(sample)

    def read(numbers: Sequence[int]) -> Arrays:
        for place, number in enumerate(numbers):
            for name, array in one(number).items():
                buffers[name][place] = array
        return {name: buffer[: len(numbers)] for name, buffer in buffers.items()}

    return read


def _checked(folder: Path, cache: Cache) -> Way:
    """The least that a checking reader does: the bytes of our files into memory, a checksum over
    them, and nothing else. It decodes nothing, so it is a bound and not a way.
    """
    (record,) = cache.records.values()
    arrays = []
    for ours, name in NAMES.items():
        metadata = (folder / record.data / name / "zarr.json").read_bytes()
        file = f"{name}/{ArrayLayout.parse(metadata).file}"
        stored = StoredArray.open(folder / record.data / name, metadata, record.files[file].size)
        arrays.append((os.open(stored.path, os.O_RDONLY), stored, NUM_ROWS.get(ours, 1)))
    buffers = np.empty((BATCH, 2**20), dtype=np.uint8)

    def read(numbers: Sequence[int]) -> Arrays:
        for number, buffer in zip(numbers, buffers, strict=False):
            for descriptor, stored, rows in arrays:
                each = stored.layout.chunk_rows
                first, last = number * rows // each, ((number + 1) * rows - 1) // each
                begin, end = int(stored.edges[first]), int(stored.edges[last + 1])
                assert os.preadv(descriptor, [buffer[: end - begin]], begin) == end - begin
                google_crc32c.value(buffer[: end - begin])
        return {}

    return Way(name="(pread and crc32c alone)", read=read, files=folder, streamed=True)


def _rows(number: int) -> dict[str, slice | int]:
    """What of each array belongs to a sample."""
    spans = {name: slice(number * n, (number + 1) * n) for name, n in NUM_ROWS.items()}
    return {name: spans.get(name, number) for name in NAMES}


def _zarr_same(folder: Path, sample: Arrays) -> Way:
    group = zarr.open_group(str(next((folder / "data").iterdir())), mode="r")
    arrays: dict[str, Any] = {ours: group[theirs] for ours, theirs in NAMES.items()}

    def one(number: int) -> Arrays:
        return {name: arrays[name][rows] for name, rows in _rows(number).items()}

    return Way(name="the same files, zarr-python", read=_filling(sample, one), files=folder)


def _zarrs_same(folder: Path, sample: Arrays) -> Way:
    """zarr-python with its codecs and its reading done by a Rust library.

    It does not compare checksums of inner chunks when it reads a part of a shard: a bit that was
    flipped by hand came through (zarrs 0.2.3).
    """
    pipeline = {
        "codec_pipeline.path": "zarrs.ZarrsCodecPipeline",
        "codec_pipeline.strict": True,  # refuse what it cannot do, not let zarr-python do it
        "codec_pipeline.chunk_concurrent_maximum": 1,
        "threading.max_workers": 1,
    }
    with zarr.config.set(pipeline):  # an array keeps the pipeline that it was opened with
        return dataclasses.replace(
            _zarr_same(folder, sample), name="the same files, zarrs (unchecked)"
        )


def _tensorstore_same(folder: Path, sample: Arrays) -> Way:
    """All of a batch is asked for before any of it is waited for; its indexes are not kept."""
    import tensorstore

    limits = {name: {"limit": 1} for name in ("data_copy_concurrency", "file_io_concurrency")}
    context = tensorstore.Context(limits)
    group = next((folder / "data").iterdir())
    arrays = {
        ours: tensorstore.open(
            {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{group / theirs}/"}},
            context=context, read=True,
        ).result()
        for ours, theirs in NAMES.items()
    }  # fmt: skip
    buffers = _buffers(sample)

    def read(numbers: Sequence[int]) -> Arrays:
        coming = [
            (buffers[name][place], arrays[name][rows].read())
            for place, number in enumerate(numbers)
            for name, rows in _rows(number).items()
        ]
        for out, values in coming:
            out[...] = values.result()
        return {name: buffer[: len(numbers)] for name, buffer in buffers.items()}

    return Way(name="the same files, tensorstore", read=read, files=folder)


def _zarr_samples(folder: Path, samples: Sequence[Arrays]) -> Way:
    group = zarr.open_group(str(folder), mode="w", zarr_format=3)
    for name, first in samples[0].items():
        values = np.stack([sample[name] for sample in samples])
        array = group.create_array(
            name, shape=values.shape, dtype=values.dtype, chunks=(1, *first.shape),
            shards=values.shape,
        )  # fmt: skip
        array[...] = values
    arrays: dict[str, Any] = dict(group.arrays())

    def one(number: int) -> Arrays:
        return {name: array[number] for name, array in arrays.items()}

    return Way(name="zarr-python, a chunk a sample", read=_filling(samples[0], one), files=folder)


def _memmap_zstd(
    folder: Path,
    samples: Sequence[Arrays],
    name: str,
    inflate: Callable[[npt.NDArray[np.uint8], npt.NDArray[Any]], object],
) -> Way:
    """The least that a reader of compressed samples does that checks nothing."""
    folder.mkdir()
    compressor = zstandard.ZstdCompressor(ENCODINGS["sqrt6"].zstd_level)
    edges, blobs = {}, {}
    for part in samples[0]:
        pieces = [compressor.compress(sample[part].tobytes()) for sample in samples]
        (folder / part).write_bytes(b"".join(pieces))
        edges[part] = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])]).tolist()
        blobs[part] = np.memmap(folder / part, dtype=np.uint8, mode="r")
    buffers = _buffers(samples[0])

    def read(numbers: Sequence[int]) -> Arrays:
        for place, number in enumerate(numbers):
            for part, buffer in buffers.items():
                begin, end = edges[part][number : number + 2]
                inflate(blobs[part][begin:end], buffer[place])
        return {name: buffer[: len(numbers)] for name, buffer in buffers.items()}

    return Way(name=name, read=read, files=folder, unmap=lambda: _unmap(blobs))


def _unmap(maps: Arrays) -> None:
    for mapped in maps.values():
        mapped._mmap.madvise(mmap.MADV_DONTNEED)


def _memmap_raw(folder: Path, samples: Sequence[Arrays], name: str) -> Way:
    folder.mkdir()
    maps: Arrays = {}
    for part in samples[0]:
        np.stack([sample[part] for sample in samples]).tofile(folder / part)
        shape = (len(samples), *samples[0][part].shape)
        maps[part] = np.memmap(folder / part, dtype=samples[0][part].dtype, mode="r", shape=shape)

    def one(number: int) -> Arrays:
        return {part: values[number] for part, values in maps.items()}

    return Way(name=name, read=_filling(samples[0], one), files=folder, unmap=lambda: _unmap(maps))


def _torch_files(folder: Path, samples: Sequence[Arrays], name: str) -> Way:
    folder.mkdir()
    for number, sample in enumerate(samples):
        tensors = {part: torch.from_numpy(array) for part, array in sample.items()}
        torch.save(tensors, folder / f"{number}.pt")

    def one(number: int) -> Arrays:
        loaded = torch.load(folder / f"{number}.pt", weights_only=True)
        return {part: tensor.numpy() for part, tensor in loaded.items()}

    return Way(name=name, read=_filling(samples[0], one), files=folder)


def _safetensors(folder: Path, samples: Sequence[Arrays], name: str) -> Way:
    from safetensors.numpy import load_file, save_file

    folder.mkdir()
    for number, sample in enumerate(samples):
        save_file(sample, folder / f"{number}.safetensors")

    def one(number: int) -> Arrays:
        return load_file(folder / f"{number}.safetensors")

    return Way(name=name, read=_filling(samples[0], one), files=folder)


def _hdf5(folder: Path, samples: Sequence[Arrays]) -> Way:
    import h5py

    folder.mkdir()
    with h5py.File(folder / "all.h5", "w") as file:
        for name in samples[0]:
            file[name] = np.stack([sample[name] for sample in samples])
    opened = h5py.File(folder / "all.h5", "r")
    buffers = _buffers(samples[0])

    def read(numbers: Sequence[int]) -> Arrays:
        for place, number in enumerate(numbers):
            for name, buffer in buffers.items():
                opened[name].read_direct(buffer, np.s_[number], np.s_[place])
        return {name: buffer[: len(numbers)] for name, buffer in buffers.items()}

    return Way(name="HDF5, one file", read=read, files=folder)


def _parquet(folder: Path, samples: Sequence[Arrays]) -> Way:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    columns = {name: [sample[name].tobytes() for sample in samples] for name in samples[0]}
    pq.write_table(pa.table(columns), folder / "all.parquet", row_group_size=1)
    path = folder / "all.parquet"
    opened = [pq.ParquetFile(path, memory_map=True)]

    def again() -> None:
        opened.clear()
        opened.append(pq.ParquetFile(path, memory_map=True))

    def one(number: int) -> Arrays:
        group = opened[0].read_row_group(number)
        return {
            name: np.frombuffer(group[name][0].as_buffer(), first.dtype).reshape(first.shape)
            for name, first in samples[0].items()
        }

    return Way(
        name="Parquet, a row group a sample",
        read=_filling(samples[0], one),
        files=folder,
        unmap=again,
    )


def _webdataset(folder: Path, samples: Sequence[Arrays]) -> Way:
    """A tar cannot be asked for a sample: it is streamed, in its order, and that is timed."""
    import webdataset

    folder.mkdir()
    path = folder / "all.tar"
    with webdataset.TarWriter(str(path)) as tar:
        for number, sample in enumerate(samples):
            members = {f"{name}.npy": array for name, array in sample.items()}
            tar.write({"__key__": f"{number:08d}", **members})
    stream: list[Any] = []

    def following(_: int) -> Arrays:
        if not stream:
            dataset = webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False)
            stream.append(iter(dataset.decode()))
        try:
            sample = next(stream[0])
        except StopIteration:
            stream.clear()
            return following(0)
        return {name: sample[f"{name}.npy"] for name in samples[0]}

    read = _filling(samples[0], following)
    return Way(name="WebDataset of .npy, streamed", read=read, files=folder, streamed=True)


if __name__ == "__main__":
    assert (HEADS, VISION, CHANNELS) == (32, 144, 4096)
    sys.exit(main())
