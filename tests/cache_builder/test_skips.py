"""`--max-skipped`: a build that loses more than it should stops before the shard that crosses."""

from pathlib import Path

import pytest

from cache_builder.build import build_cache
from cache_builder.skips import SkipBudget, SkipLimit, frequent_reasons
from shared.errors import ConfigError, InputError
from shared.record import Skipped
from tests.support import (
    ALIGN_ONLY,
    TEACHER,
    annotation,
    build,
    builder,
    command,
    error_line,
    record,
    sample,
    text_sample,
    write_tar,
)

LIMIT = "--max-skipped"


def tar(folder: Path, name: str, good: int, bad: int) -> Path:
    """Bad samples: half of them an image that is none, half too long a text."""
    long = annotation("what " + "boat " * 3000, "red")
    samples = [text_sample(f"{name}-good-{n}") for n in range(good)]
    samples += [
        sample(f"{name}-bad-{n}", image=b"") if n % 2 == 0 else
        sample(f"{name}-bad-{n}", long, image=None)
        for n in range(bad)
    ]  # fmt: skip
    return write_tar(folder / f"{name}.tar", *samples)


def committed(out: Path) -> list[str]:
    return sorted(path.stem for path in out.glob("records/*.json"))


@pytest.mark.parametrize(
    ("text", "samples", "allowed"),
    [
        ("1%", 10, 1), ("1%", 100, 1), ("1%", 101, 2), ("1%", 1_000_000, 10_000), ("1%", 0, 0),
        ("0.1%", 665_000, 665), ("0%", 10, 0), ("100%", 10, 10), ("2.5 %", 1000, 25),
        ("0", 10, 0), ("3", 10, 3), ("3", 1, 3),
    ],
)  # fmt: skip
def test_a_share_is_of_all_samples_and_rounded_up(text: str, samples: int, allowed: int) -> None:
    assert SkipLimit.parse(text).allowed(samples) == allowed


@pytest.mark.parametrize("text", ["", "%", "0.01", "-1", "101%", "1e3", "few", "1%%", "\u0663"])
def test_what_is_neither_share_nor_count_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected a share as '1%' or a count as '20'"):
        SkipLimit.parse(text)


def test_one_bad_sample_of_ten_does_not_stop_a_build(tmp_path: Path) -> None:
    data = tar(tmp_path, "t", good=9, bad=1)

    assert command(tmp_path / "cache", data, ALIGN_ONLY, TEACHER, LIMIT, "1%").exit_code == 0


def test_the_shard_that_crosses_the_limit_is_not_committed_and_the_line_says_why(
    tmp_path: Path,
) -> None:
    data = [tar(tmp_path, "t-0", 9, 1), tar(tmp_path, "t-1", 5, 5), tar(tmp_path, "t-2", 9, 0)]
    out = tmp_path / "cache"

    line = error_line(command(out, data, ALIGN_ONLY, TEACHER, LIMIT, "10%"))

    assert committed(out) == ["t-0"]
    assert len(list((out / "data").iterdir())) == 1
    assert "6 of 29 samples cannot be used so far, --max-skipped 10% allows 3: " in line
    assert "4 x image of zero bytes (t-0-bad-0, t-1-bad-0, t-1-bad-2, ...); 2 x " in line
    assert "tokens, at most 2048 (t-1-bad-1, t-1-bad-3)" in line
    assert "Shards that are built stay: go on with a larger --max-skipped, or correct " in line
    assert line.endswith("follow it to other places, and other tars need other shards)")


def test_a_raised_limit_continues_the_build(tmp_path: Path) -> None:
    data = [tar(tmp_path, "t-0", 9, 1), tar(tmp_path, "t-1", 5, 5)]
    out = tmp_path / "cache"
    error_line(command(out, data, ALIGN_ONLY, TEACHER, LIMIT, "0.1%"))

    result = command(out, data, ALIGN_ONLY, TEACHER, LIMIT, "6")

    assert "1 shards built, 1 were there" in result.stdout
    assert len(record(out, "t-1").skipped) == 5


def test_what_earlier_runs_skipped_in_the_same_tars_counts(tmp_path: Path) -> None:
    """Else killing and continuing would let any number through."""
    data = [tar(tmp_path, f"t-{n}", good=4, bad=1) for n in range(3)]
    out = tmp_path / "cache"
    for number in (1, 2):
        assert command(out, data[:number], ALIGN_ONLY, TEACHER, LIMIT, "2").exit_code == 0

    assert "3 of 15 samples" in error_line(command(out, data, ALIGN_ONLY, TEACHER, LIMIT, "2"))
    assert committed(out) == ["t-0", "t-1"]
    # Other tars' losses are their own builds' matter.
    assert command(out, data[2:], ALIGN_ONLY, TEACHER, LIMIT, "1").exit_code == 0


def test_what_the_headers_tell_stops_a_build_before_the_teacher_runs(tmp_path: Path) -> None:
    good = tar(tmp_path, "t-0", good=5, bad=0)
    lost = [[(f"lost-{n}.png", b"x")] for n in range(5)]
    bad = write_tar(tmp_path / "t-1.tar", *lost)

    line = error_line(command(tmp_path / "cache", [good, bad], ALIGN_ONLY, TEACHER, LIMIT, "1%"))

    assert "5 of 10 samples" in line
    assert "5 x no .json beside it (lost-0, lost-1, lost-2, ...)" in line
    assert not (tmp_path / "cache").exists()


def test_a_bad_limit_is_one_line_before_anything_is_loaded(tmp_path: Path) -> None:
    data = tar(tmp_path, "t", good=1, bad=0)

    line = error_line(command(tmp_path / "cache", data, ALIGN_ONLY, tmp_path, LIMIT, "few"))

    assert "--max-skipped 'few'" in line


def test_reasons_that_differ_in_numbers_are_one_reason() -> None:
    skipped = [Skipped(key=f"k{n}", reason=f"{3000 + n} tokens, at most 2048") for n in range(4)]
    skipped += [
        Skipped(key="a", reason="b"),
        Skipped(key="c", reason="d"),
        Skipped(key="e", reason="f"),
    ]

    assert frequent_reasons(skipped) == [
        "4 x 3000 tokens, at most 2048 (k0, k1, k2, ...)",
        "1 x b (a)",
        "1 x d (c)",
        "1 x other reasons",
    ]


def test_a_budget_counts_each_shard_once() -> None:
    budget = SkipBudget.of(SkipLimit.parse("2"), [], {})

    budget.spend([Skipped(key="a", reason="b")])
    budget.spend([Skipped(key="c", reason="b")])

    assert [sample.key for sample in budget.skipped] == ["a", "c"]


def test_what_the_headers_of_a_built_tar_tell_is_counted_once(tmp_path: Path) -> None:
    data = write_tar(tmp_path / "t.tar", text_sample("good"), [("lost.png", b"x")])
    out = tmp_path / "cache"
    assert command(out, data, ALIGN_ONLY, TEACHER, LIMIT, "1").exit_code == 0

    assert command(out, data, ALIGN_ONLY, TEACHER, LIMIT, "1").exit_code == 0


def test_what_another_build_skipped_meanwhile_counts(tmp_path: Path) -> None:
    first = write_tar(tmp_path / "a.tar", sample("good"), sample("bad", image=b""))
    data = [first, *(tar(tmp_path, f"t-{n}", good=1, bad=1) for n in range(2))]
    out, one = tmp_path / "cache", builder(ALIGN_ONLY)

    def other(*_: object) -> None:
        if not committed(out):
            assert build(out, data[1:], ALIGN_ONLY).skipped == 2

    one.teacher._model.tower.register_forward_pre_hook(other)

    with pytest.raises(InputError, match="3 of 6 samples cannot be used so far"):
        build_cache(one, data, out, max_skipped=SkipLimit.parse("2"))
