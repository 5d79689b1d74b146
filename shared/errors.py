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
    """One sample cannot be used; the text is the reason that skip lists show."""
