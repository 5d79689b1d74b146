"""Padded batches of samples whose images stand in different places."""

import numpy as np
import torch

from shared.mobilevlm import NUM_VISION
from shared.prompt import IGNORE, IMAGE_TOKEN
from shared.sequence import SequenceBatch, pad_sequences


def batch(*samples: list[int]) -> SequenceBatch:
    """All tokens but the image are learned."""
    ids = [np.array(values, dtype=np.int32) for values in samples]
    return pad_sequences(ids, [np.where(one == IMAGE_TOKEN, IGNORE, one) for one in ids])


def test_each_sample_has_its_own_place_of_the_image_and_its_own_number_of_text_rows() -> None:
    found = batch([1, 5, 6, IMAGE_TOKEN, 7], [1, 8, 9], [1, IMAGE_TOKEN, 2, 3])

    assert found.vision_start.tolist() == [3, -1, 1]
    assert found.lengths.tolist() == [4 + NUM_VISION, 3, 3 + NUM_VISION]
    assert found.num_text_rows.tolist() == [1, 0, 2]
    assert found.first_text_row == 1 + NUM_VISION
    expected = torch.zeros(3, 4 + NUM_VISION, dtype=torch.bool)
    expected[0, 3 : 3 + NUM_VISION] = expected[2, 1 : 1 + NUM_VISION] = True
    torch.testing.assert_close(found.vision_mask, expected)
    assert (found.labels[expected] == IGNORE).all()
    assert found.labels[1, 3:].unique().tolist() == [IGNORE]
    assert found.ids[1].tolist() == [1, 8, 9] + [0] * (1 + NUM_VISION)


def test_without_an_image_there_is_no_text_row() -> None:
    found = batch([1, 5], [1, 8, 9])

    assert found.first_text_row == 0
    assert found.num_text_rows.tolist() == [0, 0]
    assert not found.vision_mask.any()


def test_a_position_is_learned_from_if_the_next_token_has_a_label() -> None:
    found = pad_sequences(
        [np.array([1, 5, 6]), np.array([1, 7])],
        [np.array([IGNORE, IGNORE, 6]), np.array([IGNORE, 7])],
    )

    assert found.response_mask.tolist() == [[False, True, False], [True, False, False]]
