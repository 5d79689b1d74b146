"""`make build-costs` in its short form: that it runs, not what it measures."""

from click.testing import CliRunner

from benchmarks.build import main


def test_the_short_run_prints_every_ratio() -> None:
    result = CliRunner().invoke(
        main, ["--short", "--turns", "1", "--tars", "2", "--samples", "3", "--threads", "1"]
    )

    assert result.exit_code == 0, result.output
    for title in ("build / tower alone", "max(teacher, encode and write)", "build / whole forward"):
        assert title in result.stdout
