"""Caches as a stranger could make them: each a change to a real one, with every digest put right.

Whoever opens such a cache must get one of our errors, without delay, without much memory, and
without anything outside the cache being read or written. `CASES` names what was tried.
"""

import json
import os
import pickle
import shutil
import socket
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zarr
from numcodecs import zstd

from shared.bounds import MAX_PROBE_IMAGE, MAX_PROBE_TEXT
from shared.images import ImageProcessor, decode_image, pixels_digest
from shared.sealed import MAX_BYTES, seal
from shared.store import put_array
from tests.support import CLIP, edit_record, png, record

SHARD = "ref-000000"
ARRAY = "attention_0"
TEN_GB = 10 * 2**30


class Bomb:
    """An object whose pickle, once loaded, makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (os.mkdir, (str(self.path),))


@dataclass(frozen=True)
class Forge:
    """A copy of a real cache, and a folder beside it that must stay as it is."""

    root: Path
    "The cache, to be changed."
    outside: Path
    "A folder outside it, with a copy of the cache inside."

    @property
    def data(self) -> Path:
        """Data folder of the shard that is forged."""
        (found,) = self.root.glob(f"data/{SHARD}-????????")
        return found

    @property
    def record(self) -> Path:
        """Record of that shard."""
        return self.root / "records" / f"{SHARD}.json"

    @property
    def chunks(self) -> Path:
        """The shard file of one array."""
        (found,) = (path for path in self.data.glob(f"{ARRAY}/c/**/*") if path.is_file())
        return found

    def edit(self, change: Callable[[dict[str, Any]], object]) -> None:
        """Change the record's values."""
        edit_record(self.root, SHARD, change)

    def write_record(self, rest: bytes) -> None:
        """A record of any text, with the right digest in front."""
        self.record.write_bytes(b'{"sha256":"%s",' % sha256(rest).hexdigest().encode() + rest)

    def write(self, path: Path, content: bytes) -> None:
        """Another content for a file of the data folder, its size and digest put right."""
        path.write_bytes(content)
        name = path.relative_to(self.data).as_posix()
        stored = {"size": len(content), "sha256": sha256(content).hexdigest()}
        self.edit(lambda values: values["files"].update({name: stored}))

    def edit_metadata(self, change: Callable[[dict[str, Any]], object], array: str = ARRAY) -> None:
        """Change an array's zarr.json."""
        path = self.data / array / "zarr.json"
        values = json.loads(path.read_bytes())
        change(values)
        self.write(path, json.dumps(values).encode())

    def drop_array(self, array: str) -> None:
        """One array less."""
        shutil.rmtree(self.data / array)
        self.edit(
            lambda record: [
                record["files"].pop(name)
                for name in list(record["files"])
                if name.startswith(f"{array}/")
            ]
        )

    def write_array(self, array: str, values: Any) -> None:
        """Another whole array."""
        old = json.loads((self.data / array / "zarr.json").read_bytes())
        self.drop_array(array)
        group = zarr.open_group(str(self.data), mode="a")
        names = [*old["dimension_names"], "more", "and_more"][: values.ndim]
        put_array(group, array, values, tuple(names))
        for path in (self.data / array).rglob("*"):
            if path.is_file():
                self.write(path, path.read_bytes())

    @property
    def chunk_bytes(self) -> int:
        """What a chunk has to inflate to."""
        values = json.loads((self.data / ARRAY / "zarr.json").read_bytes())
        rows = values["codecs"][0]["configuration"]["chunk_shape"]
        return int(np.prod(rows)) * np.dtype(values["data_type"]).itemsize

    def write_chunk(self, frame: bytes) -> None:
        """A shard file whose chunks are all this one, index and checksums right."""
        count = int.from_bytes(self.chunks.read_bytes()[:8], "little") // 16
        pieces = [frame + crc(frame)] * count
        begin = 16 * len(pieces) + 4
        entries = []
        for piece in pieces:
            entries += [begin, len(piece)]
            begin += len(piece)
        self.write(self.chunks, index(*entries) + b"".join(pieces))

    def edit_index(self, change: Callable[[Any], object]) -> None:
        """Change the chunk index; its checksum is put right."""
        content = bytearray(self.chunks.read_bytes())
        length = int.from_bytes(content[:8], "little") - 4
        table = np.frombuffer(content[:length], dtype="<u8").copy()
        change(table)
        content[: length + 4] = index(*table.tolist())
        self.write(self.chunks, bytes(content))


def crc(content: bytes) -> bytes:
    """The checksum that stands behind a chunk."""
    return int(google_crc32c.value(content)).to_bytes(4, "little")


def index(*entries: int) -> bytes:
    """A shard's index: offset and size in turn."""
    table = np.array(entries, dtype="<u8").tobytes()
    return table + crc(table)


def frame_of_zeros(size: int, said: int | None) -> bytes:
    """A zstd frame of `size` zeros in a few bytes for each 128 kB; its header says `said`."""
    block, count = 2**17, size // 2**17
    known = said is not None
    head = b"\x28\xb5\x2f\xfd" + bytes([0xC0 if known else 0x00, 0x38])
    head += said.to_bytes(8, "little") if said is not None else b""
    body = ((block << 3) | 2).to_bytes(3, "little") + b"\0"
    last = ((block << 3) | 3).to_bytes(3, "little") + b"\0"
    return head + body * (count - 1) + last


def deep(levels: int) -> bytes:
    """JSON of lists in lists."""
    return b'"a":' + b"[" * levels + b"]" * levels + b"}"


def link(path: Path, target: Path) -> None:
    """A link in the place of a file or folder."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.symlink_to(target)


def pipe(path: Path) -> None:
    """A named pipe in the place of a file: opening it waits for a writer."""
    path.unlink()
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    """A socket in the place of a file."""
    path.unlink()
    here = os.open(path.parent, os.O_RDONLY)
    try:  # by descriptor: a socket's path may be 108 bytes long
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(f"/proc/self/fd/{here}/{path.name}")
    finally:
        os.close(here)


def sized(path: Path, size: int) -> None:
    """A file of zeros that takes no room."""
    path.write_bytes(b"")
    os.truncate(path, size)


def _files(name: str) -> Callable[[Forge], None]:
    stored = {"size": 1, "sha256": "0" * 64}
    return lambda forge: forge.edit(lambda values: values["files"].update({name: stored}))


def _field(**fields: Any) -> Callable[[Forge], None]:
    return lambda forge: forge.edit(lambda values: values.update(fields))


def _spec(**fields: Any) -> Callable[[Forge], None]:
    """In all records: where one differs from another, that is refused first."""

    def make(forge: Forge) -> None:
        for path in forge.root.glob("records/*.json"):
            edit_record(forge.root, path.stem, lambda v: v["identity"]["spec"].update(fields))

    return make


def _metadata(**fields: Any) -> Callable[[Forge], None]:
    return lambda forge: forge.edit_metadata(lambda values: values.update(fields))


def _codecs(*codecs: dict[str, Any]) -> Callable[[Forge], None]:
    def change(values: dict[str, Any]) -> None:
        values["codecs"][0]["configuration"]["codecs"] = list(codecs)

    return lambda forge: forge.edit_metadata(change)


def _chunk_shape(*sizes: int) -> Callable[[Forge], None]:
    def change(values: dict[str, Any]) -> None:
        values["codecs"][0]["configuration"]["chunk_shape"] = list(sizes)

    return lambda forge: forge.edit_metadata(change)


def _offsets(name: str, *edges: int) -> Callable[[Forge], None]:
    return lambda forge: forge.write_array(name, np.array(edges, dtype=np.int64))


def _top_ids_of(forge: Forge, change: Callable[[Any], Any]) -> None:
    """Other second ids."""
    ids: Any = zarr.open_group(str(forge.data), mode="r")["top_ids"]
    values = ids[...]
    values[:, 1:2] = change(values)
    forge.write_array("top_ids", values)


def _larger_vocabulary(forge: Forge) -> None:
    """The likeliest tokens that are stored are not all any more: the rest's mass must be there."""
    for path in forge.root.glob("records/*.json"):
        edit_record(forge.root, path.stem, _one_token_more)


def _one_token_more(record: dict[str, Any]) -> None:
    identity = record["identity"]
    identity["teacher"]["vocab_size"] = identity["spec"]["logprobs"]["top_k"] + 1


def _edited(name: str, change: Callable[[Any], object]) -> Callable[[Forge], None]:
    """Other values of a small array."""

    def make(forge: Forge) -> None:
        array: Any = zarr.open_group(str(forge.data), mode="r")[name]
        values = array[...]
        change(values)
        forge.write_array(name, values)

    return make


def _moved(name: str) -> Callable[[Forge], None]:
    """A row of one sample goes to the other: the edge between them is another."""

    def move(edges: Any) -> None:
        edges[1] -= 1

    return _edited(name, move)


def _put_last(value: int) -> Callable[[Any], None]:
    return lambda values: values.__setitem__(-1, value)


def _zeros(name: str, dtype: str, *shape: int) -> Callable[[Forge], None]:
    return lambda forge: forge.write_array(name, np.zeros(shape, dtype=dtype))


def _index(change: Callable[[Any], object]) -> Callable[[Forge], None]:
    return lambda forge: forge.edit_index(change)


def _set(position: int, value: int) -> Callable[[Any], object]:
    return lambda table: table.__setitem__(position, value)


def _huge_chunk(forge: Forge) -> None:
    """A chunk of 1 GiB, nearly all of it a hole in the file."""
    size = 2**30
    forge.write(forge.chunks, index(20, size))
    os.truncate(forge.chunks, 20 + size)
    name = forge.chunks.relative_to(forge.data).as_posix()
    forge.edit(lambda values: values["files"][name].update(size=20 + size))


def _pickle(place: Callable[[Forge], Path]) -> Callable[[Forge], None]:
    def make(forge: Forge) -> None:
        path, content = place(forge), pickle.dumps(Bomb(forge.outside / "made"))
        if path.is_relative_to(forge.data):
            forge.write(path, content)
        else:
            path.write_bytes(content)

    return make


def _pickled_chunk(forge: Forge) -> None:
    forge.write_chunk(zstd.compress(pickle.dumps(Bomb(forge.outside / "made")), 3))


def _device(forge: Forge) -> None:
    link(forge.chunks, Path("/dev/zero"))


def _texts(text: str, *more: str) -> Callable[[Forge], None]:
    """As many copies of a short text as a record may hold."""

    def make(forge: Forge) -> None:
        piece = f'"{text}"'.encode()
        pieces = [piece] * ((MAX_BYTES - 200) // (len(piece) + 1))
        forge.write_record(
            b'"a":[' + b",".join([*(f'"{m}"'.encode() for m in more), *pieces]) + b"]}"
        )

    return make


def _in_identity(
    begin: bytes, piece: Callable[[int], bytes], end: bytes
) -> Callable[[Forge], None]:
    """A value in a record's identity, of as many pieces as a record may hold."""

    def make(forge: Forge) -> None:
        before, section, behind = forge.record.read_bytes()[77:].partition(b'"image_processor":{')
        room = MAX_BYTES - len(before) - len(behind) - 1000
        pieces = []
        for number in count():
            pieces.append(piece(number))
            room -= len(pieces[-1]) + 1
            if room < 0:
                break
        more = b'"more":' + begin + b",".join(pieces) + end
        forge.write_record(before + section + more + b"," + behind)

    return make


def _other_encoding(encoding: str) -> Callable[[Forge], None]:
    def make(forge: Forge) -> None:
        content = b"{" + forge.record.read_bytes()[77:]
        # Its first byte stands behind the digest's `,` in place of `{`.
        forge.write_record(content.decode().encode(encoding).removeprefix(b"{"))

    return make


def _valid_but_large(forge: Forge) -> None:
    values = json.loads(forge.record.read_bytes())
    del values["sha256"]
    values["identity"]["teacher"]["note"] = "a" * 10**8
    forge.record.write_bytes(seal(values))


def _own_lengths(forge: Forge) -> None:
    """A vocabulary-sized array in place of a small one: read as a whole when it is first asked."""
    metadata = forge.data / "token_offsets" / "zarr.json"
    values = json.loads(metadata.read_bytes())
    rows = 2**36
    values["shape"] = [rows]
    values["chunk_grid"]["configuration"]["chunk_shape"] = [rows]
    values["codecs"][0]["configuration"]["chunk_shape"] = [2**24]
    forge.write(metadata, json.dumps(values).encode())


def _conversation(question: str) -> bytes:
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": "so"}]
    return json.dumps({"id": "x", "conversations": turns}).encode()


def _png() -> bytes:
    return png(99, (16, 16))


def _large_png(side: int) -> bytes:
    """A header that promises `side` x `side` pixels, and a few of them."""
    content = bytearray(png(99, (16, 16)))
    content[16:24] = side.to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


def _put_annotation(forge: Forge, text: bytes) -> None:
    _put_piece(forge, "probe_annotation", text)


def _put_image(forge: Forge, image: bytes, *, fits: bool = False) -> None:
    _put_piece(forge, "probe_image", image)
    if fits:
        digest = pixels_digest(ImageProcessor(CLIP, "pad")(decode_image(image)))
        forge.edit(lambda values: values["probe"][0].update(pixels_sha256=digest))


def _put_piece(forge: Forge, array: str, piece: bytes) -> None:
    """In place of the first sample's, and nothing for the others."""
    samples = len(json.loads(forge.record.read_bytes())["probe"])
    edges = [0] + [len(piece)] * samples
    forge.write_array(array, np.frombuffer(piece or b"x", dtype=np.uint8))
    forge.write_array(f"{array}_offsets", np.array(edges, dtype=np.int64))


def _probe_edges(piece: str, first: int, second: int) -> Callable[[Forge], None]:
    def make(forge: Forge) -> None:
        samples = len(json.loads(forge.record.read_bytes())["probe"])
        edges = [first] + [second] * samples
        forge.write_array(f"probe_{piece}_offsets", np.array(edges, dtype=np.int64))

    return make


def _drop_array(forge: Forge, array: str) -> None:
    def drop(values: dict[str, Any]) -> None:
        files = values["files"].items()
        values["files"] = {name: file for name, file in files if not name.startswith(f"{array}/")}

    shutil.rmtree(forge.data / array)
    forge.edit(drop)


DISAGREEMENTS: dict[str, Callable[[Forge], None]] = {
    "an edge of the query rows is moved": _moved("query_offsets"),
    "an edge of the response rows is moved": _moved("response_offsets"),
    "ids: a token beyond the vocabulary": _edited("input_ids", _put_last(10**6)),
    "ids: a negative token": _edited("input_ids", _put_last(-7)),
    "ids: a second image": _edited("input_ids", _put_last(-200)),
    "labels: a token beyond the vocabulary": _edited("labels", _put_last(10**6)),
    "labels: the image is to be learned": _edited("labels", _put_last(-200)),
    "labels: one less is learned": _edited("labels", _put_last(-100)),
    "images: none, of samples with one": lambda f: f.edit(
        lambda v: v.update(images=[-1] * len(v["keys"]), probe=[])
    ),
    "lengths: a token more": lambda f: f.edit(
        lambda v: v.update(lengths=[length + 1 for length in v["lengths"]])
    ),
}
"Arrays that are sound, of a sample that they do not fit together in: it would train on other rows."

CASES: dict[str, Callable[[Forge], None]] = {
    **DISAGREEMENTS,
    # Paths that leave the cache
    "record: data is an absolute path": _field(data="/etc"),
    "record: data goes up by `..`": _field(data=f"data/../../outside/data/{SHARD}-01234567"),
    "record: a file is an absolute path": _files("/etc/passwd"),
    "record: a file goes up by `..`": _files("labels/../../../outside/canary"),
    "record: a file with a backslash": _files("labels\\..\\..\\canary"),
    "record: a file with a NUL": _files("labels\0"),
    "record: name goes up by `..`": _field(name=f"../records/{SHARD}"),
    "record: tar is an absolute path": _field(
        tar={"name": "/etc/passwd", "size": 1, "sha256": "0" * 64, "index_sha256": "0" * 64}
    ),
    # Links
    "the folder of the records is a link": lambda f: link(
        f.root / "records", f.outside / "cache" / "records"
    ),
    "a record is a link": lambda f: link(
        f.record, f.outside / "cache" / "records" / f"{SHARD}.json"
    ),
    "the folder of the data is a link": lambda f: link(
        f.root / "data", f.outside / "cache" / "data"
    ),
    "a shard's data folder is a link": lambda f: link(
        f.data, f.outside / "cache" / "data" / f.data.name
    ),
    "an array's folder is a link": lambda f: link(
        f.data / ARRAY, f.outside / "cache" / "data" / f.data.name / ARRAY
    ),
    "an array's file is a link": lambda f: link(
        f.chunks, f.outside / "cache" / f.chunks.relative_to(f.root)
    ),
    "an array's zarr.json is a link": lambda f: link(
        f.data / ARRAY / "zarr.json", f.outside / "cache" / "data" / f.data.name / ARRAY
    ),
    "a link in a circle": lambda f: link(f.data / ARRAY, f.data / ARRAY),
    # What is no file
    "a record is a named pipe": lambda f: pipe(f.record),
    "a record is a folder": lambda f: (f.record.unlink(), f.record.mkdir()),
    "a record is a socket": lambda f: unix_socket(f.record),
    "an array's file is a named pipe": lambda f: pipe(f.chunks),
    "an array's zarr.json is a named pipe": lambda f: pipe(f.data / ARRAY / "zarr.json"),
    "an array's file is a socket": lambda f: unix_socket(f.chunks),
    "an array's file is a link to /dev/zero": _device,
    # JSON
    "record: 100 MB of zeros": lambda f: sized(f.record, 10**8),
    "record: 100 MB of valid JSON": _valid_but_large,
    "record: 8 million empty lists": lambda f: f.write_record(b'"a":[' + b"[]," * 5_000_000),
    "record: 100,000 lists in one another": lambda f: f.write_record(deep(100_000)),
    "record: 900 lists in one another": lambda f: f.write_record(deep(900)),
    "record: an identity of 500 levels": lambda f: f.edit(
        lambda v: v["identity"]["teacher"].update(more=json.loads("[" * 500 + "]" * 500))
    ),
    "record: a number of 5000 digits": lambda f: f.write_record(b'"a":' + b"9" * 5000 + b"}"),
    "record: a number of 400 digits in the identity": lambda f: f.edit(
        lambda values: values["identity"]["image_processor"].update(more=10**399)
    ),
    "record: UTF-16": _other_encoding("utf-16-le"),
    "record: NaN": lambda f: f.write_record(b'"a":NaN}'),
    "record: a key twice": lambda f: f.write_record(b'"format":1,"format":1}'),
    "record: half a character in a sample's key": _field(keys=["\ud800", "s1"]),
    "record: terminal codes in a sample's key": _field(keys=["\x1b[2J", "s1"]),
    "record: negative lengths": _field(lengths=[-1, 5]),
    "record: a length of 2^62": _field(lengths=[2**62, 5]),
    "record: an image that is not there": _field(images=[0, 2**31]),
    "record: a file of -1 bytes": _field(files={"zarr.json": {"size": -1, "sha256": "0" * 64}}),
    "record: a probe of no sample of the shard": _field(
        probe=[{"key": "x", "pixels_sha256": None}]
    ),
    "record: a probe of one sample twice": lambda f: f.edit(
        lambda v: v["probe"].append(v["probe"][0])
    ),
    "record: a probe with an image, of a sample without": lambda f: f.edit(
        lambda v: v.update(images=[-1] * len(v["images"]))
    ),
    "record: an identity without a teacher": lambda f: f.edit(
        lambda v: v["identity"].update(teacher={})
    ),
    "record: a spec of another kind": lambda f: f.edit(
        lambda v: v["identity"].update(spec={"template": ["v1"]})
    ),
    "spec: sequences of 2^62 tokens": _spec(max_tokens=2**62),
    "spec: 2^40 log-probabilities": _spec(logprobs={"top_k": 2**40, "encoding": "float32"}),
    "spec: layer 2^31": _spec(attention={"layers": [0, 2**31], "encoding": "float32"}),
    "spec: 5,000 layers": _spec(attention={"layers": [*range(5000)], "encoding": "float32"}),
    "zarr.json: 100 MB": lambda f: f.write(f.data / ARRAY / "zarr.json", b" " * 10**8),
    "zarr.json: 30,000 lists in one another": lambda f: f.write(
        f.data / ARRAY / "zarr.json", b"[" * 30_000
    ),
    # Array metadata
    "array of shape 2^40": _metadata(shape=[2**40, 4, 144]),
    "small array of 2^36 rows": _own_lengths,
    "chunk of 2^40 rows": _chunk_shape(2**40, 4, 144),
    "chunk of no rows": _chunk_shape(0, 4, 144),
    "chunk of a part of a row": _chunk_shape(1, 1, 1),
    "array of negative shape": _metadata(shape=[-1, 4, 144]),
    "array of 40 axes": _metadata(shape=[1] * 40),
    "array of objects": _metadata(data_type="object"),
    "array of texts": _metadata(data_type="string"),
    "array of a structure": _metadata(data_type={"name": "structured", "configuration": {}}),
    "array of another number format": _metadata(data_type="int64"),
    "codec: pickle": _codecs({"name": "numcodecs.pickle", "configuration": {"protocol": 5}}),
    "codec: gzip": _codecs({"name": "bytes"}, {"name": "gzip", "configuration": {"level": 5}}),
    "codec: no checksum": _codecs({"name": "bytes", "configuration": {"endian": "little"}}),
    "codec: one that is not known": _codecs({"name": "https://example.org/codec"}),
    "chunks under another name": _metadata(
        chunk_key_encoding={"name": "v2", "configuration": {"separator": "/../../"}}
    ),
    "a storage transformer": _metadata(storage_transformers=[{"name": "https://example.org/x"}]),
    "attributes": _metadata(attributes={"a": 1}),
    # Chunks
    "chunk that inflates to 10 GB and says so": lambda f: f.write_chunk(
        frame_of_zeros(TEN_GB, TEN_GB)
    ),
    "chunk that inflates to 10 GB and says less": lambda f: f.write_chunk(
        frame_of_zeros(TEN_GB, f.chunk_bytes)
    ),
    "chunk that inflates to 10 GB and does not say": lambda f: f.write_chunk(
        frame_of_zeros(TEN_GB, None)
    ),
    "chunk of nothing": lambda f: f.write_chunk(b""),
    "chunk of two frames, the second of 10 GB": lambda f: f.write_chunk(
        zstd.compress(bytes(f.chunk_bytes), 3) + frame_of_zeros(TEN_GB, TEN_GB)
    ),
    "chunk that inflates to less than it should": lambda f: f.write_chunk(
        zstd.compress(bytes(f.chunk_bytes - 1), 3)
    ),
    "chunk of no zstd frame": lambda f: f.write_chunk(b"boat" * 100),
    "index: a chunk behind the end of the file": _index(_set(1, 2**40)),
    "index: a chunk at 2^63": _index(_set(0, 2**63)),
    "index: a chunk over the index": _index(_set(0, 0)),
    "index: a chunk that is said to be missing": _index(lambda t: t.fill(2**64 - 1)),
    "index: sizes that overflow": _index(lambda t: t.fill(2**63 - 1)),
    "index: a chunk of 1 GiB": _huge_chunk,
    "file of 3 bytes": lambda f: f.write(f.chunks, b"abc"),
    "file of no bytes": lambda f: f.write(f.chunks, b""),
    # Edges of the ragged arrays
    "edges at 2^40": _offsets("token_offsets", 0, 2**40, 2**41),
    "edges below zero": _offsets("token_offsets", -(2**40), 5, 9),
    "edges that go back": _offsets("query_offsets", 0, 9, 3),
    "edges that are too few": _offsets("response_offsets", 0),
    "edges of 2^63 - 1": _offsets("response_offsets", 0, 2**63 - 1, 2**63 - 1),
    # Arrays of another kind
    "edges as floats": _zeros("token_offsets", "float32", 4),
    "edges of two axes": _zeros("query_offsets", "int64", 4, 2),
    "edges: more than a shard has samples": _zeros("token_offsets", "int64", 100_002),
    "ids as floats of two axes": _zeros("input_ids", "float32", 200, 2),
    "labels of one byte": _zeros("labels", "uint8", 200),
    "vision tokens of another width": _zeros("vision_tokens", "float32", 2, 144, 5),
    "attention of one axis": _zeros(ARRAY, "float32", 50),
    "top ids of one axis": _zeros("top_ids", "uint16", 50),
    "top ids: one token twice": lambda f: _top_ids_of(f, lambda ids: ids[:, :1]),
    "top ids: a token beyond the vocabulary": lambda f: _top_ids_of(f, lambda _: 512),  # it has 512
    "no rest of the log-probabilities": _larger_vocabulary,
    "rows beyond the record's lengths": lambda f: f.edit(
        lambda v: v.update(lengths=[1] * len(v["keys"]))
    ),
    "identity: a vocabulary of 2^62": lambda f: f.edit(
        lambda v: v["identity"]["teacher"].update(vocab_size=2**62)
    ),
    # Pickles
    "pickle in place of a record": _pickle(lambda f: f.record),
    "pickle in place of an array's file": _pickle(lambda f: f.chunks),
    "pickle in place of a zarr.json": _pickle(lambda f: f.data / ARRAY / "zarr.json"),
    "pickle inside a chunk": _pickled_chunk,
}
"Name -> how it is made. Reading all samples must refuse each."

OTHER_PROBES: dict[str, Callable[[Forge], None]] = {
    "probe: another text": lambda f: _put_annotation(f, _conversation("why is the boat there")),
    "probe: a text that is no JSON": lambda f: _put_annotation(f, b"{" * 100),
    "probe: no text": lambda f: _put_annotation(f, b""),
    "probe: a text of 500,000 lists": lambda f: _put_annotation(f, b"[" + b"[]," * 300_000),
    "probe: another image": lambda f: _put_image(f, _png()),
    "probe: an image that is none": lambda f: _put_image(f, b"no image"),
    "probe: no image": lambda f: _put_image(f, b""),
    "probe: an image of 60,000 x 60,000": lambda f: _put_image(f, _large_png(60_000)),
    "probe: another pixels_sha256": lambda f: f.edit(
        lambda v: v["probe"][0].update(pixels_sha256="0" * 64)
    ),
}
"Inputs that do not give what the shard holds."

MISSHAPEN_PROBES: dict[str, Callable[[Forge], None]] = {
    "probe: edges that go back": _probe_edges("image", 9, 5),
    "probe: edges below zero": _probe_edges("image", -5, 5),
    "probe: edges beyond the end": _probe_edges("annotation", 0, 10**6),
    "probe: edges of 2^63 - 1": _probe_edges("annotation", 0, 2**63 - 1),
    "probe: an image beyond the bound": _probe_edges("image", 0, MAX_PROBE_IMAGE + 1),
    "probe: a text beyond the bound": _probe_edges("annotation", 0, MAX_PROBE_TEXT + 1),
    "probe: edges of another type": lambda f: f.write_array(
        "probe_image_offsets", np.zeros(3, dtype=np.int32)
    ),
    "probe: too few edges": lambda f: f.write_array("probe_annotation_offsets", np.zeros(1, "<i8")),
    "probe: texts of another type": lambda f: f.write_array(
        "probe_annotation", np.zeros(10**4, dtype=np.float32)
    ),
    "probe: images that are missing": lambda f: _drop_array(f, "probe_image"),
}
"Inputs that cannot be taken out."

PROBE_CASES = {**OTHER_PROBES, **MISSHAPEN_PROBES}
"What a start of train-student must refuse."

DECODE_CASES: dict[str, Callable[[Forge], None]] = {
    "probe: another image, its pixels_sha256 put right": lambda f: _put_image(f, _png(), fits=True),
    "image digests of zeros": lambda f: f.write_array("image_sha256", np.zeros((2, 32), np.uint8)),
    "image digests: one too many": lambda f: f.write_array(
        "image_sha256", np.zeros((3, 32), np.uint8)
    ),
}
"What a start of train-student cannot know. `verify --decode` must refuse each."

SLOW_CASES: dict[str, Callable[[Forge], None]] = {
    "record: 16 MiB of two-letter texts": _texts("ab"),
    "record: an identity with 16 MiB of one-letter texts": _in_identity(
        b"[", lambda _: b'"a"', b"]"
    ),
    "record: an identity with 16 MiB of numbers with large exponents": _in_identity(
        b"[", lambda _: b"1e308", b"]"
    ),
    "record: an identity with 16 MiB of names in one object": _in_identity(
        b"{", lambda number: b'"%x":1' % number, b"}"
    ),
    "record: 16 MiB of one letter, read with 4 bytes each": _texts("ā", "\U0001f600"),
    "record: a probe of 100,000 samples": _field(
        probe=[{"key": f"{n}", "pixels_sha256": None} for n in range(100_000)]
    ),
}
"More of the same that take seconds; not in the test suite."

QUIET_CASES: dict[str, Callable[[Forge], None]] = {
    "plan: 100 MB": lambda f: sized(next(f.root.glob("plans/*")), 10**8),
    "plan: 100,000 lists in one another": lambda f: next(f.root.glob("plans/*")).write_bytes(
        b"[" * 100_000
    ),
    "plan: a shard `../..`": lambda f: next(f.root.glob("plans/*")).write_text(
        '{"shards":["../.."]}'
    ),
    "plan is a link": lambda f: link(next(f.root.glob("plans/*")), f.outside / "canary"),
    "plan is a named pipe": lambda f: pipe(next(f.root.glob("plans/*"))),
    "the folder of the plans is a link": lambda f: link(f.root / "plans", f.outside),
    "pickle in place of a plan": _pickle(lambda f: next(f.root.glob("plans/*"))),
    "pickle beside an array's file": lambda f: (f.data / ARRAY / "c.pkl").write_bytes(
        pickle.dumps(Bomb(f.outside / "made"))
    ),
    "pickle in place of the group's zarr.json": _pickle(lambda f: f.data / "zarr.json"),
    "terminal codes in a skip reason": lambda f: f.edit(
        lambda v: v["skipped"].append({"key": "x\ud800", "reason": "\x1b[2J\n\ud800"})
    ),
}
"What no reader of samples looks at: reading goes on, `info` and `verify` stay civil."


def forge(cache: Path, folder: Path, case: str) -> Forge:
    """A forged copy of `cache` in `folder`."""
    root, outside = folder / "cache", folder / "outside"
    shutil.copytree(cache, root)
    shutil.copytree(cache, outside / "cache")
    (outside / "canary").write_text("alive")
    made = Forge(root=root, outside=outside)
    assert record(root, SHARD)  # what is changed is whole
    {**CASES, **SLOW_CASES, **QUIET_CASES, **PROBE_CASES, **DECODE_CASES}[case](made)
    return made


def outside_of(forged: Forge) -> dict[str, bytes | None]:
    """Everything in the folder that must stay as it is."""
    return {
        str(path.relative_to(forged.outside)): path.read_bytes() if path.is_file() else None
        for path in sorted(forged.outside.rglob("*"))
    }
