"""The tests hold arrays to the shapes that signatures state (tests/conftest.py)."""

import pytest
import torch
from jaxtyping import TypeCheckError

from shared.sequence import SequenceBatch


def test_a_shape_that_is_not_the_stated_one_is_an_error() -> None:
    one, two = torch.zeros(3, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.int64)

    with pytest.raises(TypeCheckError, match="ids"):
        SequenceBatch(ids=one, labels=two, lengths=two[:, 0], vision_start=two[:, 0])
