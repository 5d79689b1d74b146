"""Chunks that zstd left as they are: their content read straight to where it is wanted.

Codes of 8 and 6 bits have nothing to squeeze, so their frames are made of raw blocks (RFC 8878,
3.1.1.2.2): content between a few bytes of framing. Those bytes are the same in every such chunk of
an array, so a chunk's size in the index tells whether it is one; framing and checksum confirm it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce

import numpy as np
import numpy.typing as npt
from google_crc32c import extend as crc32c_extend

Bytes = npt.NDArray[np.uint8]

CHECKSUM = 4
"Bytes of the crc32c behind a chunk."
_BLOCK = 2**17
"Bytes of a block's content, at most."
_SMALLEST = 2**15
"""Content that is worth scattering: less is copied as fast, and a stranger's chunks of a byte would
take 700 bytes of memory each to be read so."""
_WINDOW = 2**19
"What zstd remembers at negative levels, by which codes of 8 and 6 bits are written."


@dataclass(frozen=True, kw_only=True)
class RawChunks:
    """What such a chunk of one size looks like. Made by `of`."""

    size: int
    "Bytes of its content."
    blocks: list[tuple[bytes, int]]
    """What stands before each of its blocks, and bytes of the block's content; none if chunks of
    this size are not read so."""

    @classmethod
    def of(cls, size: int) -> "RawChunks":
        """For chunks of `size` bytes of content."""
        return cls(size=size, blocks=_blocks(size) if size >= _SMALLEST else [])

    @cached_property
    def framing(self) -> bytes:
        """All that stands before its blocks."""
        return b"".join(header for header, _ in self.blocks)

    @cached_property
    def around(self) -> int:
        """Bytes of it in the file that are not content: framing and checksum."""
        return len(self.framing) + CHECKSUM

    def among(self, sizes: npt.NDArray[np.int64]) -> bytes:
        """For each chunk 1 if its size in the file is that of raw blocks, else 0."""
        is_raw: npt.NDArray[np.bool_] = sizes == self.size + self.around
        return (is_raw & bool(self.blocks)).tobytes()

    def beside(self, number: int) -> int:
        """Bytes of memory that `scattered` needs for what is not wanted."""
        return number * self.around + 2 * self.size

    def scattered(
        self, number: int, low: int, wanted: Bytes, beside: Bytes
    ) -> tuple[list[Bytes], list[list[Bytes | bytes]]]:
        """Where the bytes of chunks go that lie one behind the other.

        Args:
            number: of chunks.
            low: of the content of all of them, the first byte that is wanted.
            wanted: where that goes, and what follows it.
            beside: memory for the rest: first for what lies around the content of all chunks.

        Returns:
            Memory for all their bytes, in the file's order; and for each chunk what its checksum
            covers: the framing as it has to be, and the memory that its content is read into.
        """
        spare = beside[number * self.around :]
        before, behind = spare[:low], spare[self.size :]
        pieces: list[Bytes] = []
        covered: list[list[Bytes | bytes]] = []
        place, begin, high = 0, -low, len(wanted)
        gap = 0  # bytes since the last content: a checksum, then a header
        for _ in range(number):
            chunk: list[Bytes | bytes] = []
            for header, size in self.blocks:
                gap += len(header)
                pieces.append(beside[place : place + gap])
                place, gap = place + gap, 0
                end = begin + size
                if begin >= 0 and end <= high:
                    content = [wanted[begin:end]]
                else:
                    content = [*_at_an_edge(begin, end, wanted, before, behind)]
                pieces += content
                chunk += [header, *content]
                begin = end
            gap = CHECKSUM
            covered.append(chunk)
        pieces.append(beside[place : place + gap])
        return pieces, covered

    def are_whole(self, covered: Sequence[Sequence[Bytes | bytes]], beside: Bytes) -> bool:
        """Whether chunks that were read are raw blocks and undamaged: what lies around their
        content is the expected framing, and the checksum of framing and content.
        """
        around = [
            self.framing + reduce(crc32c_extend, chunk, 0).to_bytes(CHECKSUM, "little")
            for chunk in covered
        ]
        return beside[: len(covered) * self.around].tobytes() == b"".join(around)


def _at_an_edge(
    begin: int, end: int, wanted: Bytes, before: Bytes, behind: Bytes
) -> Iterator[Bytes]:
    """Where bytes `[begin, end)` go of which not all are wanted: those are `[0, len(wanted))`."""
    high = len(wanted)
    if begin < 0:  # in the first chunk only
        yield before[begin + len(before) : min(end, 0) + len(before)]
    if max(begin, 0) < min(end, high):
        yield wanted[max(begin, 0) : min(end, high)]
    if end > high:  # in the last chunk only
        yield behind[max(begin, high) - high : end - high]


def _blocks(size: int) -> list[tuple[bytes, int]]:
    """Header and bytes of content of each block as zstd writes them; the frame's header in front of
    the first.
    """
    if size < 2**16 + 256:
        frame = b"\x28\xb5\x2f\xfd\x60" + (size - 256).to_bytes(2, "little")
    elif size <= _WINDOW:
        frame = b"\x28\xb5\x2f\xfd\xa0" + size.to_bytes(4, "little")
    else:  # no single segment any more: the window's size stands in front
        frame = b"\x28\xb5\x2f\xfd\x80\x48" + size.to_bytes(4, "little")
    blocks = []
    for begin in range(0, size, _BLOCK):
        content = min(_BLOCK, size - begin)
        header = (content << 3 | (begin + _BLOCK >= size)).to_bytes(3, "little")
        blocks.append((header if begin else frame + header, content))
    return blocks
