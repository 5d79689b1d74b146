"""Chunks that zstd left as they are: their content read straight to where it is wanted.

Codes of 8 and 6 bits have nothing to squeeze, so their frames are made of raw blocks (RFC 8878,
3.1.1.2.2): content between a few bytes of framing. Those bytes are the same in every such chunk of
an array, so a chunk's size in the index tells whether it is one, and its framing confirms it.
"""

from dataclasses import dataclass

import google_crc32c
import numpy as np
import numpy.typing as npt

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
    headers: list[bytes]
    "What stands before each of its blocks; nothing if chunks of this size are not read so."
    around: int
    "Bytes of it in the file that are not content."
    framing: bytes
    "All of these but the checksum."
    begun: int
    "crc32c of the first of `headers`, with which a chunk begins."

    @classmethod
    def of(cls, size: int) -> "RawChunks":
        """For chunks of `size` bytes of content."""
        headers = _headers(size) if size >= _SMALLEST else []
        framing = b"".join(headers)
        begun = google_crc32c.value(headers[0]) if headers else 0
        around = len(framing) + CHECKSUM
        return cls(size=size, headers=headers, around=around, framing=framing, begun=begun)

    def among(self, sizes: npt.NDArray[np.int64]) -> bytes:
        """For each chunk of these sizes in the file, 1 if it can be such a one, else 0."""
        is_raw: npt.NDArray[np.bool_] = sizes == self.size + self.around
        return (is_raw & bool(self.headers)).tobytes()

    def beside(self, number: int) -> int:
        """Bytes of memory that `scattered` needs for what is not wanted."""
        return number * self.around + 2 * self.size

    def scattered(self, number: int, low: int, wanted: Bytes, beside: Bytes) -> list[list[Bytes]]:
        """Where the bytes of each chunk go, in the file's order: the first header, content and what
        stands between, the checksum.

        Args:
            number: of chunks, one behind the other.
            low: of the content of all of them, the first byte that is wanted.
            wanted: where that goes, and what follows it.
            beside: memory for the rest: first for the framing of all chunks.
        """
        high = low + len(wanted)
        spare = beside[number * self.around :]  # what lies before the wanted bytes, and behind them
        chunks, place = [], 0
        for offset in range(0, number * self.size, self.size):
            pieces = []
            for begin, header in zip(
                range(offset, offset + self.size, _BLOCK), self.headers, strict=True
            ):
                end = min(begin + _BLOCK, offset + self.size)
                pieces.append(beside[place : place + len(header)])
                place += len(header)
                if low <= begin and end <= high:
                    pieces.append(wanted[begin - low : end - low])
                    continue
                if begin < low:  # in the first chunk only
                    pieces.append(spare[begin : min(end, low)])
                if max(begin, low) < min(end, high):
                    pieces.append(wanted[max(begin, low) - low : min(end, high) - low])
                if high < end:  # in the last chunk only
                    behind = self.size - offset
                    pieces.append(spare[behind + max(begin, high) : behind + end])
            pieces.append(beside[place : place + CHECKSUM])
            place += CHECKSUM
            chunks.append(pieces)
        return chunks

    def checksums(self, number: int, beside: Bytes) -> list[int] | None:
        """Of each chunk, from what was read beside its content; None if it is no raw chunk."""
        table = beside[: number * self.around].reshape(number, -1)
        if table[:, :-CHECKSUM].tobytes() != self.framing * number:
            return None
        sums: list[int] = table[:, -CHECKSUM:].copy().view("<u4").ravel().tolist()
        return sums


def _headers(size: int) -> list[bytes]:
    """Of the frame and its first block, and of each further block, as zstd writes them."""
    if size < 2**16 + 256:
        frame = b"\x28\xb5\x2f\xfd\x60" + (size - 256).to_bytes(2, "little")
    elif size <= _WINDOW:
        frame = b"\x28\xb5\x2f\xfd\xa0" + size.to_bytes(4, "little")
    else:  # no single segment any more: the window's size stands in front
        frame = b"\x28\xb5\x2f\xfd\x80\x48" + size.to_bytes(4, "little")
    blocks = [
        (min(_BLOCK, size - begin) << 3 | (begin + _BLOCK >= size)).to_bytes(3, "little")
        for begin in range(0, size, _BLOCK)
    ]
    return [frame + blocks[0], *blocks[1:]]
