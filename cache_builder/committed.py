"""Records of a cache that other builds may be adding to while this one runs."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from shared.identity import compare
from shared.record import ShardRecord, record_names

_ADVICE = "Build into another folder, or use what this cache was built with."


class Committed:
    """The records, each compared with this build's identity once, when it is first seen."""

    def __init__(
        self, root: Path, identity: Mapping[str, Any], unknown: Collection[str] = ()
    ) -> None:
        """
        Args:
            identity: of the build.
            unknown: sections and values that `identity` lacks, as they are not known yet.

        Raises:
            DamagedError: a record cannot be read.
            MismatchError: a shard was built with something else; both values are named.
        """
        self.records: dict[str, ShardRecord] = {}
        "Shard name -> record."
        self._root = root
        self._identity = identity
        self._unknown = unknown
        self.refresh()

    def refresh(self) -> None:
        """Look for records that came since. Errors as in `__init__`."""
        for name in record_names(self._root):
            if name not in self.records:
                record = ShardRecord.load(self._root, name)
                compare(
                    f"{self._root}: shard {name}", record.identity, self._identity, _ADVICE,
                    accept=self._unknown,
                )  # fmt: skip
                self.records[name] = record
