"""Opening a cache of a million samples in a thousand shards: `make bench-open`.

Only records are written: opening reads nothing else. Each is what a build writes for a tar of a
thousand samples at a 7B teacher's shapes. Time and memory are of a fresh process that opens the
cache, finds 10,000 keys and ends; the same process without a cache is given beside it.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import click

from benchmarks.synthetic_cache import identity
from shared.record import FORMAT, RECORDS, ShardRecord, StoredFile, TarFacts
from shared.spec import CacheSpec

_DIGEST = "0123456789abcdef" * 4
_ARRAYS = {
    "input_ids": 1, "labels": 1, "token_offsets": 1, "query_offsets": 1, "response_offsets": 1,
    "attention_0": 3, "attention_0__scale": 2, "vision_tokens": 3, "vision_tokens__scale": 2,
    "vision_tokens__low": 2, "top_ids": 2, "top_logprobs": 2, "top_logprobs__scale": 1,
    "rest_logprobs": 1, "image_sha256": 2,
}  # fmt: skip
_CHILD = """
import json, pathlib, sys, time
import numpy
begun = time.perf_counter()
from shared.cache import open_cache
imported = time.perf_counter()
samples = 0
if sys.argv[1]:
    cache = open_cache(sys.argv[1])
    samples = len(cache)
opened = time.perf_counter()
found = sum(f"{n * 97:012d}" in cache for n in range(10_000)) if samples else 0
looked = time.perf_counter()
status = pathlib.Path("/proc/self/status").read_text()
peak = 1024 * int(status.split("VmHWM:")[1].split()[0])
print(json.dumps([imported - begun, opened - imported, looked - opened, peak, samples, found]))
"""


@click.command()
@click.option("--shards", default=1000, show_default=True, help="Records.")
@click.option("--samples", default=1000, show_default=True, help="Samples in each.")
def main(shards: int, samples: int) -> None:
    """Write records, open them, print a table."""
    with tempfile.TemporaryDirectory() as folder:
        size = write_records(Path(folder), shards, samples)
        print(f"{shards:,} records of {samples:,} samples, {size / 1e6:.1f} MB of JSON\n")
        print("| | import s | open s | 10,000 keys found s | peak memory MB |")
        print("|---|---|---|---|---|")
        for name, path in (("without a cache", ""), ("with the cache", folder)):
            imported, opened, looked, peak, number, found = _run(path)
            if path and (number != shards * samples or found != min(10_000, number // 97 + 1)):
                raise SystemExit(f"{number} samples, {found} keys found")
            print(f"| {name} | {imported:.2f} | {opened:.2f} | {looked:.2f} | {peak / 1e6:.0f} |")


def write_records(root: Path, shards: int, samples: int) -> int:
    """Records as builds write them; returns their size in bytes."""
    spec = CacheSpec.load(Path(__file__).parents[1] / "cache_specs" / "default.yaml")
    (root / RECORDS).mkdir(parents=True)
    files = {f"{name}/zarr.json": StoredFile(size=1700, sha256=_DIGEST) for name in _ARRAYS}
    for name, axes in _ARRAYS.items():
        files["/".join([name, "c", *"0" * axes])] = StoredFile(size=10**8, sha256=_DIGEST)
    size = 0
    for shard in range(shards):
        name = f"shard-{shard:06d}"
        record = ShardRecord(
            format=FORMAT, name=name, data=f"data/{name}-{shard:08x}", identity=identity(spec),
            tar=TarFacts(name=f"{name}.tar", size=10**8, sha256=_DIGEST, index_sha256=_DIGEST),
            keys=tuple(f"{shard * samples + n:012d}" for n in range(samples)),
            lengths=tuple(200 + n % 500 for n in range(samples)),
            images=tuple(n // 2 for n in range(samples)), skipped=(), files=files, probe=(),
        )  # fmt: skip
        path = root / RECORDS / f"{name}.json"
        path.write_bytes(record.to_json())
        size += path.stat().st_size
    return size


def _run(path: str) -> list[float]:
    child = subprocess.run(
        [sys.executable, "-c", _CHILD, path], check=True, capture_output=True, text=True
    )
    return list(json.loads(child.stdout))


if __name__ == "__main__":
    main()
