"""API keys to tenants. The server alone derives a tenant's cache namespace, so no client can reach another's prefixes.

Keys come from the configuration and from the store that `cluster.keys` writes. A gateway keeps them all in memory and asks
every KEYS_S whether they have changed, so that no request waits for a database; a revoked key holds for at most
KEYS_S + CALL_TIMEOUT_S. While the store cannot be read the keys read last hold on, and before they were read nobody is let in
who is not in the configuration.
"""

import asyncio
import hashlib
import logging
from dataclasses import dataclass
from typing import Any

import ray

from cluster.config import ClusterConfig
from cluster.errors import Unauthorized, Unavailable
from cluster.key_store import KeyList, hash_of, id_of
from cluster.limits import TenantLimits
from cluster.records import LedgerUnavailable

log = logging.getLogger(__name__)

DEFAULT = "default"
KEYS_S = 2.0
CALL_TIMEOUT_S = 3.0


@dataclass(frozen=True)
class Tenant:
    name: str
    key_id: str  # first hex digits of the key's hash: enough to find it, useless to a thief

    @property
    def namespace(self) -> bytes:
        return hashlib.blake2b(self.name.encode(), digest_size=16, person=b"tenant").digest()


class Tenants:
    """Where no key is required and none was ever made any key, or none, is the tenant `default`."""

    def __init__(self, config: ClusterConfig) -> None:
        self._configured = {key.lower(): tenant.name for tenant in config.tenants for key in tenant.keys}
        self._limits = {tenant.name: tenant.limits for tenant in config.tenants}
        self._keys_required = config.keys_required or bool(config.tenants)
        self._stored: KeyList | None = None

    def of(self, authorization: str | None) -> Tenant:
        """The tenant of an Authorization header. Raises Unauthorized, and Unavailable while the keys are not known yet."""
        stored = self._stored
        if not self._keys_required:
            if stored is None:
                raise Unavailable("the API keys have not been read yet; try again later")
            if not stored.any_made:
                return Tenant(DEFAULT, "none")
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise Unauthorized("no API key: send 'Authorization: Bearer YOUR_KEY'")
        # Looked up by its hash: how long that takes says nothing of the key.
        digest = hash_of(key.strip())
        name = self._configured.get(digest) or (stored.keys.get(digest) if stored else None)
        if name is None:
            raise Unauthorized("this API key is not known")
        return Tenant(name, id_of(digest))

    def limits(self, name: str) -> TenantLimits:
        """The store's, or else the configuration's."""
        stored = self._stored.limits.get(name) if self._stored else None
        return stored or self._limits.get(name, TenantLimits())

    async def read(self, controller: Any) -> None:
        """Asks once for what has changed. Raises LedgerUnavailable, RayError and TimeoutError."""
        async with asyncio.timeout(CALL_TIMEOUT_S):
            known = -1 if self._stored is None else self._stored.version
            self._stored = await controller.keys.remote(known) or self._stored

    async def follow(self, controller: Any) -> None:
        """Asks again and again."""
        while True:
            try:
                await self.read(controller)
            except (LedgerUnavailable, ray.exceptions.RayError, TimeoutError) as error:
                log.warning("the API keys cannot be read: %s", error)
            await asyncio.sleep(KEYS_S)
