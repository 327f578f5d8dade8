"""Every error a user can meet, as one tree.

RayfunnelError                 a sentence: what came, what was expected, what to do next
├── ConfigError                a config file or --set value is wrong; carries all faults at once
├── DataError                  an input file cannot be read as declared
├── NotFittedError             a model or channel is asked before fit() or load()
├── BundleError                a bundle is damaged, foreign or of another schema
│   └── VersionAbsentError     a stage was asked for a version that it does not hold
├── StoreError                 the feature store refused or did not answer
│   └── StoreUnavailableError  it did not answer in time, or the connection is gone
├── TrainingError              a training run cannot go on (NaN loss, bad checkpoint)
├── RetrainRefusedError        a retrained version did not pass its gate; the serving one stays
└── RequestError               a request of a client is wrong; becomes a 4xx with a code
"""

from collections.abc import Sequence


class RayfunnelError(Exception):
    """Base of all errors whose text is written for a person."""


class ConfigError(RayfunnelError):
    """All faults of a configuration, reported together; `faults` holds one line each."""

    def __init__(self, faults: str | Sequence[str]) -> None:
        self.faults = (faults,) if isinstance(faults, str) else tuple(faults)
        super().__init__("\n".join(self.faults))


class DataError(RayfunnelError):
    """An input file cannot be read as declared."""


class NotFittedError(RayfunnelError):
    """A model or channel is asked before fit() or load()."""


class BundleError(RayfunnelError):
    """A bundle is damaged, foreign or of another schema."""


class VersionAbsentError(BundleError):
    """A stage was asked for a bundle version that it does not hold."""


class StoreError(RayfunnelError):
    """The feature store refused a call."""


class StoreUnavailableError(StoreError):
    """The feature store did not answer in time, or the connection is gone."""


class TrainingError(RayfunnelError):
    """A training run cannot go on."""


class RetrainRefusedError(RayfunnelError):
    """A retrained version did not pass its gate; the serving one stays."""


class RequestError(RayfunnelError):
    """A client's request is wrong. `code` is machine-readable, `status` the HTTP status."""

    def __init__(self, code: str, message: str, *, field: str | None = None, status: int = 422) -> None:
        super().__init__(message)
        self.code, self.field, self.status = code, field, status
