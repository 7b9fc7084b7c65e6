"""API keys and tenants' limits in the ledger's database. A key is never stored, only its sha256.

That is enough for a key of 256 random bits: there is nothing to guess, so a slow hash would only cost time. Every change
moves a version on, so that a gateway that asks often reads one row. Knows nothing of HTTP or of who asks.
"""

import hashlib
import secrets
import time
from typing import Any

import msgspec
import sqlalchemy as sa

from cluster.ledger_tables import Database
from cluster.limits import TenantLimits

PREFIX = "sk-lightship-"
KEY_BYTES = 32
ID_CHARS = 12  # of the hash, in hex: enough to find a key, useless to a thief

METADATA = sa.MetaData()
KEYS = sa.Table(
    "api_keys",
    METADATA,
    sa.Column("hash", sa.Text, primary_key=True),
    sa.Column("key_id", sa.Text, nullable=False, unique=True),
    sa.Column("tenant", sa.Text, nullable=False),
    sa.Column("made_ms", sa.BigInteger, nullable=False),
    sa.Column("revoked_ms", sa.BigInteger),
)
LIMITS = sa.Table(
    "tenant_limits",
    METADATA,
    sa.Column("tenant", sa.Text, primary_key=True),
    *[sa.Column(name, sa.BigInteger) for name in TenantLimits.__struct_fields__],
)
VERSION = sa.Table(
    "api_keys_version",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True),  # 0: one row, also where two processes make it at once
    sa.Column("version", sa.BigInteger, nullable=False),
)


class UnknownKey(ValueError):
    """There is no such key, or it is revoked already. The sentence says which."""


class StoredKey(msgspec.Struct, frozen=True, kw_only=True):
    key_id: str
    tenant: str
    made_ms: int  # since the epoch
    revoked_ms: int | None


class KeyList(msgspec.Struct, frozen=True, kw_only=True):
    """What a gateway needs: whose the keys are that hold, by hash, and tenants' limits. `any_made`: now or ever."""

    version: int
    keys: dict[str, str]
    limits: dict[str, TenantLimits]
    any_made: bool


def hash_of(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def id_of(key_hash: str) -> str:
    """What a key is called where it must not be shown."""
    return key_hash[:ID_CHARS]


class KeyStore:
    """Makes its tables where there are none. Raises LedgerUnavailable, here and from every method. For any thread."""

    def __init__(self, url: str) -> None:
        self._database = Database(url)
        self._database.make_folder()
        with self._database.write() as connection:
            METADATA.create_all(connection)
            if connection.execute(sa.select(VERSION.c.version)).first() is None:
                connection.execute(VERSION.insert().values(id=0, version=0))

    def make(self, tenant: str) -> str:
        """A new key of this tenant. Nobody can say it again: only its hash stays here."""
        key = PREFIX + secrets.token_urlsafe(KEY_BYTES)
        row = {"hash": hash_of(key), "key_id": id_of(hash_of(key)), "tenant": tenant, "made_ms": _now_ms()}
        with self._database.write() as connection:
            connection.execute(KEYS.insert().values(row))
            _move_on(connection)
        return key

    def revoke(self, key_id: str) -> None:
        """Raises UnknownKey."""
        held = sa.and_(KEYS.c.key_id == key_id, KEYS.c.revoked_ms.is_(None))
        with self._database.write() as connection:
            if connection.execute(KEYS.update().where(held).values(revoked_ms=_now_ms())).rowcount != 1:
                raise UnknownKey(f"there is no key {key_id!r} that has not been revoked")
            _move_on(connection)

    def limit(self, tenant: str, limits: TenantLimits) -> None:
        """This tenant's limits from now on, all of them."""
        with self._database.write() as connection:
            connection.execute(LIMITS.delete().where(LIMITS.c.tenant == tenant))
            connection.execute(LIMITS.insert().values(tenant=tenant, **msgspec.structs.asdict(limits)))
            _move_on(connection)

    def all(self) -> list[StoredKey]:
        """Every key that was ever made, oldest first."""
        query = sa.select(KEYS.c.key_id, KEYS.c.tenant, KEYS.c.made_ms, KEYS.c.revoked_ms)
        with self._database.begin() as connection:
            rows = connection.execute(query.order_by(KEYS.c.made_ms, KEYS.c.key_id)).mappings()
            return [StoredKey(**row) for row in rows]

    def limits(self) -> dict[str, TenantLimits]:
        with self._database.begin() as connection:
            return _limits(connection)

    def read(self, known: int) -> KeyList | None:
        """Everything; None where nothing has changed since version `known`."""
        with self._database.begin() as connection:
            version: int = connection.execute(sa.select(VERSION.c.version)).scalar_one()
            if version == known:
                return None
            rows = connection.execute(sa.select(KEYS.c.hash, KEYS.c.tenant, KEYS.c.revoked_ms)).all()
            return KeyList(
                version=version,
                keys={row.hash: row.tenant for row in rows if row.revoked_ms is None},
                limits=_limits(connection),
                any_made=bool(rows),
            )

    def close(self) -> None:
        self._database.close()


def _limits(connection: sa.Connection) -> dict[str, TenantLimits]:
    rows: list[dict[str, Any]] = [dict(row) for row in connection.execute(sa.select(LIMITS)).mappings()]
    return {row.pop("tenant"): TenantLimits(**row) for row in rows}


def _move_on(connection: sa.Connection) -> None:
    connection.execute(VERSION.update().values(version=VERSION.c.version + 1))


def _now_ms() -> int:
    return time.time_ns() // 10**6
