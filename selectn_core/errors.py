"""The errors a caller is expected to handle, each saying what to change."""


class SelectNError(Exception):
    """Base class of every expected error of this project."""


class ConfigError(SelectNError, ValueError):
    """A configuration value is not allowed; the message names the field, the value and what is allowed."""


class UnsupportedModel(SelectNError):
    """The model cannot be served with offloading; the message says which property of it is in the way."""


class DeviceMemoryExceeded(SelectNError, MemoryError):
    """An allocation does not fit the device's fixed memory; the message gives wanted, free and capacity bytes."""


class HostMemoryExceeded(SelectNError, MemoryError):
    """The weights do not fit where they were to go; the message says what limits it and what to set."""


class StoreRefused(SelectNError):
    """A file that should be a host store cannot be trusted or used; the message says which, why, and what to do."""


class LinkError(SelectNError):
    """A host-to-device copy failed, and repeating it did not help."""


class RequestError(SelectNError, ValueError):
    """A request asks for something that is not allowed.

    Attributes:
        field: the request field at fault, or None when it is the request as a whole.
    """

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class RequestTooLarge(RequestError):
    """The model could serve the request, but this device's memory never holds it."""


class EngineOverloaded(SelectNError):
    """The waiting queue is full; the request was not taken and may be sent again later."""


class EngineUnavailable(SelectNError):
    """The engine is not running (not started, closed, or failed beyond repair)."""
