"""A device without enough memory, as one of our own errors."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from shared.errors import ProjectError


@contextmanager
def fitting(
    what: str, device: torch.device, advice: str, error: type[ProjectError]
) -> Iterator[None]:
    """Raise `error` if the block needs more memory than the device has.

    Args:
        what: what needs it, with the verb: "batches of 4 need".
        advice: what to do about it.
    """
    try:
        yield
    except torch.OutOfMemoryError as reason:
        raise error(f"{what} more memory than {device} has; {advice}") from reason
