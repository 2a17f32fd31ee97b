"""Where the table of nodes is read: a Redis, behind a Protocol."""

from __future__ import annotations

from contextlib import suppress
from types import ModuleType
from typing import Any, Protocol
from urllib.parse import unquote, unquote_plus, urlsplit

from kvoffload.config import MembershipSettings
from kvoffload.errors import PeerError, UnsupportedError
from kvoffload.l2.nodes_table import MOST_BYTES


class TableUnreadable(PeerError):
    """The table could not be read. The text says why, without any part of the URL's credentials."""


class TableSource(Protocol):
    """What Membership reads."""

    async def read(self) -> bytes | None:
        """The table as it is now; None if there is none. Raises `TableUnreadable`. Connects by itself, and anew after trouble."""

    async def close(self) -> None:
        """Drop the connection."""


class RedisTable:
    """The table of ``settings``, by redis-py, on asyncio. One connection, no retries of its own, each step within ``timeout_ms``."""

    def __init__(self, settings: MembershipSettings) -> None:
        self._settings = settings
        self._without_secrets = Scrubber(settings)
        self._client: Any = None

    async def read(self) -> bytes | None:
        try:
            redis = _redis()
            if self._client is None:
                from redis.asyncio import Redis
                from redis.asyncio.retry import Retry

                self._client = open_client(Redis, Retry, self._settings)
        except (UnsupportedError, PeerError) as error:
            raise TableUnreadable(str(error)) from None
        try:
            # Not GET: whatever somebody keeps under this key, no more than a table's worth of it comes here.
            data: bytes = await self._client.getrange(self._settings.key, 0, MOST_BYTES)
        except (redis.RedisError, OSError, TimeoutError) as error:
            raise TableUnreadable(self._without_secrets(f"Redis: {error or type(error).__name__}")) from None
        return data or None

    async def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            with suppress(_redis().RedisError, OSError):  # it was going anyway
                await client.aclose()


def open_client(kind: Any, retry: Any, settings: MembershipSettings) -> Any:
    """A client of class ``kind`` (of redis or redis.asyncio, whose ``Retry`` goes with it), not connected. Raises `PeerError`."""
    from redis.backoff import NoBackoff

    if settings.url is None:
        raise PeerError("there is no l2.membership.url")
    seconds = settings.timeout_ms / 1e3
    try:
        return kind.from_url(
            settings.url.get_secret_value(),
            socket_timeout=seconds,
            socket_connect_timeout=seconds,
            retry=retry(NoBackoff(), 0),
            protocol=2,  # nothing of 3 is needed, and servers before Redis 6 do not know it
        )
    except (ValueError, TypeError):
        # urllib and redis-py quote what they could not take, which may be a part of the password.
        raise PeerError(
            "l2.membership.url is no URL of a Redis: redis://[user:password@]host:port/database, rediss:// with TLS, or unix://path; "
            "characters such as / # @ : in a password must be percent-encoded"
        ) from None


def _redis() -> ModuleType:
    try:
        import redis
    except ImportError as error:
        raise UnsupportedError("reading the table of nodes needs redis: pip install kvoffload[redis]") from error
    return redis


class Scrubber:
    """Takes the URL and the password of ``settings`` out of foreign texts."""

    def __init__(self, settings: MembershipSettings) -> None:
        url = settings.url.get_secret_value() if settings.url is not None else ""
        secrets = {url}
        try:
            parts = urlsplit(url)
            options = [option.partition("=") for option in parts.query.split("&")]
            given = [parts.password or "", *(value for name, _, value in options if name.endswith("password"))]
        except ValueError:
            given = []
        for password in given:
            secrets |= {password, unquote(password), unquote_plus(password)}
        self._secrets = sorted(secrets - {""}, key=len, reverse=True)

    def __call__(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text
