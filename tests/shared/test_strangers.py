"""A stranger's cache is data only: every kind of forgery is one of our errors, in one line."""

from pathlib import Path

import pytest

from cache_builder.cli import cache_tools
from shared.cache import open_cache
from shared.errors import ProjectError
from tests.malicious import CASES, QUIET_CASES, Forge, forge, outside_of
from tests.support import invoke


def read_all(root: Path) -> None:
    cache = open_cache(root)
    for key in cache.keys():  # noqa: SIM118  (a Cache is not a dict)
        cache.read(key)


def run_all_tools(forged: Forge) -> None:
    """Each ends well, or in one line that cannot steer a terminal."""
    for arguments in (["info"], ["verify", "--decode"], ["gc"], ["repair"]):
        result = invoke(cache_tools, *arguments, str(forged.root))

        assert result.exit_code in (0, 1)
        assert all(line.isprintable() for line in result.stdout.splitlines())
        errors = [line for line in result.stderr.splitlines() if line.startswith("Error")]
        assert len(errors) == result.exit_code


@pytest.mark.parametrize("case", CASES)
def test_reading_refuses_and_the_tools_stay_civil(
    cache_path: Path, tmp_path: Path, case: str
) -> None:
    forged = forge(cache_path, tmp_path, case)
    before = outside_of(forged)

    with pytest.raises(ProjectError) as error:
        read_all(forged.root)

    assert str(error.value).isprintable()
    run_all_tools(forged)
    assert outside_of(forged) == before


@pytest.mark.parametrize("case", QUIET_CASES)
def test_what_no_reader_looks_at_does_not_stop_reading(
    cache_path: Path, tmp_path: Path, case: str
) -> None:
    forged = forge(cache_path, tmp_path, case)
    before = outside_of(forged)

    read_all(forged.root)

    run_all_tools(forged)
    assert outside_of(forged) == before
