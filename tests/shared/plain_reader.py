"""A reader of one sample written from cache_specs/format.md and cache_specs/encodings/ alone.

It uses nothing of this project: json and struct, zstd, and numpy for float32. That it gives the
golden values shows that those pages are enough.
"""

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numcodecs import zstd


def crc32c(content: bytes) -> int:
    """Castagnoli, reflected (RFC 3720, appendix B.4)."""
    crc = 0xFFFFFFFF
    for byte in content:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def checked(piece: bytes) -> bytes:
    assert crc32c(piece[:-4]) == struct.unpack("<I", piece[-4:])[0]
    return piece[:-4]


def read_record(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    assert content[:11] == b'{"sha256":"'
    assert content[75:77] == b'",'
    assert hashlib.sha256(content[77:]).hexdigest() == content[11:75].decode()
    values: dict[str, Any] = json.loads(content)
    assert values["format"] == 1
    return values


def rows(folder: Path, array: str, start: int, stop: int) -> Any:
    """Rows of the first axis."""
    meta = json.loads((folder / array / "zarr.json").read_text())
    shape, dtype = meta["shape"], np.dtype(meta["data_type"]).newbyteorder("<")
    chunk = meta["codecs"][0]["configuration"]["chunk_shape"][0]
    content = folder.joinpath(array, "c", *"0" * len(shape)).read_bytes()
    count = -(-shape[0] // chunk)
    index = struct.unpack(f"<{2 * count}Q", checked(content[: 16 * count + 4]))
    out = b""
    for number in range(start // chunk, -(-stop // chunk)):
        begin, size = index[2 * number : 2 * number + 2]
        out += bytes(zstd.decompress(checked(content[begin : begin + size])))
    skipped = start // chunk * chunk
    return np.frombuffer(out, dtype).reshape(-1, *shape[1:])[start - skipped : stop - skipped]


def unpack6(packed: Any) -> Any:
    a, b, c = np.split(packed, 3, axis=-1)
    fourth = a >> 6 | b >> 6 << 2 | c >> 6 << 4
    return np.concatenate([a & 63, b & 63, c & 63, fourth], axis=-1).astype(np.float32)


def bfloat16(bits: Any) -> Any:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def read_sample(cache: Path, shard: str, key: str, layer: int) -> dict[str, Any]:
    """A sample of sqrt6, channel6 and logprob8."""
    record = read_record(cache / "records" / f"{shard}.json")
    folder, number = cache / record["data"], record["keys"].index(key)

    def own(name: str, axis: str) -> Any:
        edges = rows(folder, f"{axis}_offsets", number, number + 2)
        return rows(folder, name, int(edges[0]), int(edges[1]))

    image = record["images"][number]
    attention, logprobs = f"attention_{layer}", "top_logprobs"
    roots = unpack6(own(attention, "query"))
    roots *= bfloat16(own(f"{attention}__scale", "query"))[..., None]
    log_roots = own(logprobs, "response").astype(np.float32)
    log_roots *= bfloat16(own(f"{logprobs}__scale", "response"))[..., None]
    codes, scale, low = (
        rows(folder, f"vision_tokens{suffix}", image, image + 1)[0]
        for suffix in ("", "__scale", "__low")
    )
    return {
        "input_ids": own("input_ids", "token"),
        "labels": own("labels", "token"),
        attention: (roots * roots).swapaxes(0, 1),
        "vision_tokens": unpack6(codes) * bfloat16(scale) + low,
        "top_ids": own("top_ids", "response"),
        logprobs: -(log_roots * log_roots),
        "rest_logprobs": own("rest_logprobs", "response"),
    }
