"""An image that was replaced by another of equal size is refused before the student sees it."""

import dataclasses
import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.cache import Cache, open_cache
from shared.errors import MismatchError
from shared.samples import index_tar, read_image
from tests.student_train.support import (
    aligned,
    distance,
    gradients_of,
    log_lines,
    mixed_samples,
    recipe,
    tensors_of,
    train,
    training_set,
)
from tests.support import edit_record, error_line, png, record, write_tar

BROKEN = b"no image"


@pytest.fixture
def copies(tars: list[Path], tmp_path: Path) -> list[Path]:
    """Tars to be changed."""
    return [Path(shutil.copy(tar, tmp_path / tar.name)) for tar in tars]


def replace_image(tar: Path, key: str, image: bytes) -> tuple[str, str]:
    """Put another image in the place of a sample's; sha256 of the old and the new."""
    index = index_tar(tar)
    (entry,) = (entry for entry in index.samples if entry.key == key)
    old = read_image(tar, entry)
    assert entry.image is not None
    assert old is not None
    new = image.ljust(entry.image.size, b"\0")
    content = bytearray(tar.read_bytes())
    content[entry.image.offset : entry.image.offset + entry.image.size] = new
    tar.write_bytes(content)
    assert index_tar(tar).sha256 == index.sha256
    return hashlib.sha256(old).hexdigest(), hashlib.sha256(new).hexdigest()


def without_digests(cache: Path, folder: Path, *shards: str) -> Path:
    """The cache as an earlier writer would have made these shards."""

    def drop(values: dict[str, Any]) -> None:
        files = values["files"].items()
        values["files"] = {name: file for name, file in files if "image_sha256/" not in name}

    root = folder / "cache"
    shutil.copytree(cache, root)
    for shard in shards:
        shutil.rmtree(root / record(cache, shard).data / "image_sha256")
        edit_record(root, shard, drop)
    return root


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("image", [png(99, (5, 5)), BROKEN], ids=["another", "broken"])
def test_a_run_ends_with_the_sample_its_tar_and_both_digests(
    workers: int, image: bytes, copies: list[Path], full_path: Path, tmp_path: Path
) -> None:
    old, new = replace_image(copies[1], "s018", image)

    line = error_line(
        train(tmp_path / "run", copies, full_path, workers=workers, global_batch=24, micro_batch=4)
    )

    assert (
        f"sample 's018': its image in {copies[1]} has sha256 {new}, the one that the cache was "
        f"built from {old}; train on the tars"
    ) in line


def test_of_two_samples_that_share_an_image_the_one_that_was_changed_is_named(
    copies: list[Path], full_path: Path
) -> None:
    cache = open_cache(full_path)
    rows = dict(zip(cache.keys(), record(full_path, "mixed-0").images, strict=False))
    assert rows["s000"] == rows["s006"] >= 0
    replace_image(copies[0], "s006", png(99, (5, 5)))
    samples = training_set(copies, recipe(), cache)

    assert len(samples[[0, 12]].pixels) == 2
    with pytest.raises(MismatchError, match="sample 's006'"):
        samples[[0, 6]]


def test_a_cache_without_digests_is_trained_on_as_before(
    tars: list[Path], full_path: Path, tmp_path: Path
) -> None:
    old = without_digests(full_path, tmp_path, "mixed-0", "mixed-1")

    assert train(tmp_path / "run", tars, old, "--set", "max_steps=1").exit_code == 0


def test_only_shards_with_digests_are_compared(
    copies: list[Path], full_path: Path, tmp_path: Path
) -> None:
    cache = open_cache(without_digests(full_path, tmp_path, "mixed-0"))
    for tar, key in zip(copies, ("s006", "s018"), strict=True):
        replace_image(tar, key, png(99, (5, 5)))
    samples = training_set(copies, recipe(), cache)

    assert len(samples[[6, 15, 17]].pixels) == 2
    with pytest.raises(MismatchError, match="sample 's018'"):
        samples[[6, 18]]


@pytest.fixture
def beside_broken(copies: list[Path], full_path: Path, tmp_path: Path) -> Cache:
    """A cache that knows no digest of s006's image, which is broken in the tars now."""
    replace_image(copies[0], "s006", BROKEN)
    return open_cache(without_digests(full_path, tmp_path, "mixed-0"))


def test_a_broken_image_without_a_digest_is_left_out_with_its_targets(
    copies: list[Path], beside_broken: Cache
) -> None:
    batch = training_set(copies, recipe(), beside_broken)[[0, 6, 15]]

    assert [sample.key for sample in batch.skipped] == ["s006"]
    assert batch.targets is not None
    assert len(batch.targets.vision_tokens[""]) == len(batch.pixels) == 2


def test_a_batch_of_which_nothing_can_be_used_adds_nothing(
    copies: list[Path], beside_broken: Cache
) -> None:
    samples = training_set(copies, recipe(), beside_broken)

    empty, good = samples[[6]], samples[[0, 15]]
    terms, gradients = gradients_of(aligned(recipe(), beside_broken), [empty, good], recipe())

    expected, whole = gradients_of(aligned(recipe(), beside_broken), [good], recipe())
    assert terms == expected
    assert distance(whole, gradients) == 0


def test_broken_images_change_no_result_with_the_micro_batch(
    copies: list[Path], tmp_path: Path
) -> None:
    replace_image(copies[0], "s006", BROKEN)
    losses = []
    for micro_batch in (1, 4):
        out = tmp_path / str(micro_batch)
        changes = {"global_batch": 12, "micro_batch": micro_batch, "log_every": 1}
        done = train(out, copies, None, **changes)
        assert done.exit_code == 0, done.output
        losses.append([line["loss"] for line in log_lines(out)])

    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_images_of_a_tar_that_was_accepted_by_name_are_not_compared(
    copies: list[Path], full_path: Path, tmp_path: Path
) -> None:
    replace_image(copies[0], "s006", png(99, (5, 5)))
    with copies[0].open("ab") as tar:
        tar.write(bytes(10240))
    options = ("--accept-mismatch", "tar", "--set", "max_steps=1")

    done = train(tmp_path / "run", copies, full_path, *options, global_batch=24, micro_batch=4)

    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("number", "image", "says"),
    [(2, ("s002.png", png(5)), "none when the cache was built, one"),
     (3, None, "one when the cache was built, none")],
    ids=["an image more", "an image less"],
)  # fmt: skip
def test_a_sample_that_gained_or_lost_its_image_is_refused(
    number: int, image: tuple[str, bytes] | None, says: str, full_path: Path, tmp_path: Path
) -> None:
    samples = mixed_samples(24)
    members = [member for member in samples[number] if not member[0].endswith(".png")]
    samples[number] = [*members, image] if image else members
    other = write_tar(tmp_path / "other.tar", *samples)
    cache = open_cache(full_path)

    for options in ({}, {"accepted_tars": frozenset({"other.tar"})}):
        changed = dataclasses.replace(training_set([other], recipe(), cache), **options)
        with pytest.raises(MismatchError, match=f"'s00{number}': images: {says} in .*other.tar"):
            changed[[0, number, 6]]


def test_targets_beside_a_broken_image_are_those_of_the_samples_that_are_left(
    copies: list[Path], beside_broken: Cache
) -> None:
    samples = training_set(copies, recipe(), beside_broken)

    for (where, found), (_, expected) in zip(
        tensors_of(samples[[0, 6, 15]]), tensors_of(samples[[0, 15]]), strict=True
    ):
        assert torch.equal(found, expected), where
