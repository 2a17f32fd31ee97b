"""The error tree, split by who must act on it."""

from __future__ import annotations


class KVOffloadError(Exception):
    """Anything that kvoffload raises on purpose."""


class ConfigError(KVOffloadError, ValueError):
    """A setting is unknown, malformed or impossible: whoever configures kvoffload must change it."""


class MisuseError(KVOffloadError, ValueError):
    """A caller broke the contract of a public function (wrong shape, wrong state, closed runtime)."""


class UnsupportedError(KVOffloadError):
    """This engine, model, layout or machine is one that kvoffload cannot serve: the connector stays off."""


class LayoutError(UnsupportedError):
    """The KV tensors' layout is unknown or failed the start-up proof."""


class CapacityError(KVOffloadError):
    """There is not enough memory for what was asked."""


class PeerError(KVOffloadError):
    """Another process or machine broke the protocol, went away, or did not answer in time."""


class CopyError(KVOffloadError):
    """A copy between engine blocks and slots failed; nothing it should have written may be used."""


class EngineLost(CopyError):
    """It is not known that a copy has ended: the device may touch its slots and blocks later, and nothing is copied any more."""


class InternalError(KVOffloadError):
    """An invariant of kvoffload itself does not hold: a bug, please report it."""
