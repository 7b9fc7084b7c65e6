"""API keys to tenants. The server alone derives a tenant's cache namespace, so no client can reach another's prefixes."""

import hashlib
import hmac
from dataclasses import dataclass

from cluster.config import TenantConfig
from cluster.errors import Unauthorized

DEFAULT = "default"


@dataclass(frozen=True)
class Tenant:
    name: str
    key_id: str  # first hex digits of the key's hash: enough to find it, useless to a thief

    @property
    def namespace(self) -> bytes:
        return hashlib.blake2b(self.name.encode(), digest_size=16, person=b"tenant").digest()


class Tenants:
    """Without configured tenants any key, or none, is the tenant `default`."""

    def __init__(self, tenants: list[TenantConfig]) -> None:
        self._by_hash = {key_hash.lower(): tenant.name for tenant in tenants for key_hash in tenant.keys}

    def of(self, authorization: str | None) -> Tenant:
        """The tenant of an Authorization header. Raises Unauthorized."""
        if not self._by_hash:
            return Tenant(DEFAULT, "none")
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise Unauthorized("no API key: send 'Authorization: Bearer YOUR_KEY'")
        digest = hashlib.sha256(key.strip().encode()).hexdigest()
        for known, name in self._by_hash.items():
            if hmac.compare_digest(known, digest):
                return Tenant(name, digest[:12])
        raise Unauthorized("this API key is not known")
