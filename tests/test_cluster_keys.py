"""API keys: made once, stored as hashes, revoked within seconds."""

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from cluster.config import ClusterConfig, TenantConfig
from cluster.controller import PrefixCacheController
from cluster.errors import Unauthorized, Unavailable
from cluster.key_store import PREFIX, KeyStore, UnknownKey, hash_of, id_of
from cluster.keys import main
from cluster.limits import TenantLimits
from cluster.tenants import DEFAULT, Tenant, Tenants

LIMITS = TenantLimits(requests_per_minute=60, concurrency=2)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/var/ledger.db"


class _Controller:
    """Called as one calls Ray's actors."""

    def __init__(self, url: str) -> None:
        self.controller = PrefixCacheController(url, "secret")

    @property
    def keys(self) -> "_Controller":
        return self

    async def remote(self, known: int) -> object:
        return await self.controller.keys(known)


def _read(tenants: Tenants, url: str) -> None:
    async def body() -> None:
        controller = _Controller(url)
        await tenants.read(controller)
        await controller.controller.close()

    asyncio.run(body())


def test_a_key_is_made_listed_and_revoked(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["make", "acme", "--requests-per-minute", "60", "--concurrency", "2", "--url", url]) == 0
    key = capsys.readouterr().out.strip()
    assert key.startswith(PREFIX)
    assert len(key) > len(PREFIX) + 40
    assert main(["list", "--url", url]) == 0
    listed = capsys.readouterr().out
    assert id_of(hash_of(key)) in listed
    assert key not in listed
    tenants = Tenants(ClusterConfig())
    _read(tenants, url)
    assert tenants.of(f"Bearer {key}") == Tenant("acme", id_of(hash_of(key)))
    assert tenants.limits("acme") == LIMITS
    assert main(["revoke", id_of(hash_of(key)), "--url", url]) == 0
    _read(tenants, url)
    with pytest.raises(Unauthorized):
        tenants.of(f"Bearer {key}")
    with pytest.raises(Unauthorized):  # a service that had keys does not open when the last one goes
        tenants.of(None)
    assert main(["revoke", id_of(hash_of(key)), "--url", url]) == 1
    assert "has not been revoked" in capsys.readouterr().err


def test_the_key_itself_is_nowhere_in_the_database(url: str) -> None:
    store = KeyStore(url)
    key = store.make("acme")
    store.close()
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as database:
        dump = "\n".join(database.iterdump())
    assert hash_of(key) in dump
    assert key not in dump
    assert key.removeprefix(PREFIX) not in dump


def test_only_what_is_new_is_read(url: str) -> None:
    store = KeyStore(url)
    first = store.read(-1)
    assert first is not None
    assert (first.keys, first.any_made) == ({}, False)
    assert store.read(first.version) is None
    key = store.make("acme")
    second = store.read(first.version)
    assert second is not None
    assert second.keys == {hash_of(key): "acme"}
    store.limit("acme", LIMITS)
    third = store.read(second.version)
    assert third is not None
    assert third.limits == {"acme": LIMITS}
    store.revoke(id_of(hash_of(key)))
    fourth = store.read(third.version)
    assert fourth is not None
    assert (fourth.keys, fourth.any_made) == ({}, True)
    with pytest.raises(UnknownKey):
        store.revoke("000000000000")
    store.close()


def test_limits_are_replaced_as_a_whole(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    store = KeyStore(url)
    store.limit("acme", LIMITS)
    assert main(["limit", "acme", "--tokens-per-minute", "1000", "--url", url]) == 0
    assert store.limits() == {"acme": TenantLimits(tokens_per_minute=1000)}
    assert main(["make", "acme", "--url", url]) == 0
    assert store.limits() == {"acme": TenantLimits(tokens_per_minute=1000)}, "a key alone changes no limits"
    store.close()
    for wrong in ("0", "-1", "x", "1.5"):
        with pytest.raises(SystemExit):
            main(["limit", "acme", "--concurrency", wrong, "--url", url])
        assert "not a whole number of at least 1" in capsys.readouterr().err


class TestTenants:
    def test_configured_keys_hold_beside_stored_ones(self, url: str) -> None:
        config = ClusterConfig(tenants=[TenantConfig(name="old", keys=[hash_of("k")], limits=LIMITS)])
        store = KeyStore(url)
        key = store.make("new")
        tenants = Tenants(config)
        assert tenants.of("Bearer k").name == "old", "before the store was read"
        _read(tenants, url)
        assert (tenants.of("Bearer k").name, tenants.of(f"bearer  {key} ").name) == ("old", "new")
        assert tenants.limits("old") == LIMITS
        store.limit("old", TenantLimits(concurrency=9))
        store.close()
        _read(tenants, url)
        assert tenants.limits("old") == TenantLimits(concurrency=9)

    def test_open_only_while_no_key_was_ever_made(self, url: str) -> None:
        tenants = Tenants(ClusterConfig())
        with pytest.raises(Unavailable):
            tenants.of(None)
        _read(tenants, url)
        assert tenants.of(None).name == tenants.of("Bearer anything").name == DEFAULT
        closed = Tenants(ClusterConfig(keys_required=True))
        _read(closed, url)
        for header in (None, "Bearer anything", "Basic eDp5", "Bearer "):
            with pytest.raises(Unauthorized):
                closed.of(header)

    def test_a_namespace_is_of_the_tenant_not_of_the_key(self) -> None:
        assert Tenant("a", "1").namespace == Tenant("a", "2").namespace != Tenant("b", "1").namespace


def test_no_ledger_no_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["list", "--url", f"sqlite:///{tmp_path}/file/ledger.db"]) == 1
    assert "cannot be used" in capsys.readouterr().err
