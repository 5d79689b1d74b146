"""Every error that a user can cause, as one tree.

ProjectError
├── ConfigError          a spec, recipe or option that makes no sense
├── InputError           a tar, image folder or annotation file that cannot be used as a whole
├── CheckpointError      a model folder that is missing something or does not fit its config
├── CacheError           a cache that cannot be opened, read or written
│   ├── DamagedError     a file of the cache is not what its record says
│   └── MismatchError    two things that must agree do not; both values are named
└── TrainingError        a run that cannot start, go on or be resumed

UnusableSample is not part of the tree: it never reaches the user as an exception. Whoever reads
samples catches it, counts it and lists it with its reason.
"""


class ProjectError(Exception):
    """Base of all errors that the commands print as one line."""


class ConfigError(ProjectError):
    """A spec, recipe or option that makes no sense."""


class InputError(ProjectError):
    """A tar, image folder or annotation file that cannot be used as a whole."""


class CheckpointError(ProjectError):
    """A model folder that is missing something or does not fit its config."""


class CacheError(ProjectError):
    """A cache that cannot be opened, read or written."""


class DamagedError(CacheError):
    """A file of the cache is not what its record says."""


class MismatchError(CacheError):
    """Two things that must agree do not; the message names both values."""


class TrainingError(ProjectError):
    """A run that cannot start, go on or be resumed."""


class UnusableSample(Exception):
    """One sample cannot be used; the text is the reason that skip lists show.

    A reason may quote the sample, so it is cut and made one printable line.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(printable(reason, most=300))


def printable(text: str, most: int = 2000) -> str:
    """`text` as one line of at most `most` characters that says nothing to a terminal.

    Line ends, control characters and halves of characters are shown as escapes.
    """
    text = text[: most + 1]
    if not text.isprintable():
        text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return text if len(text) <= most else f"{text[: most - 3]}..."
