"""API keys from the command line. A key is printed once, when it is made, and is stored as a hash only.

    python -m cluster.keys make TENANT [--requests-per-minute N] [--tokens-per-minute N] [--concurrency N]
    python -m cluster.keys limit TENANT [the same]      replaces the tenant's limits; one that is left out is lifted
    python -m cluster.keys list
    python -m cluster.keys revoke KEY_ID

All with --url, the ledger's. A running service follows within seconds: see `cluster.tenants`.
"""

import argparse
import sys
from collections.abc import Sequence
from datetime import UTC, datetime

import msgspec
from rich.console import Console
from rich.table import Table

from cluster.config import LedgerConfig
from cluster.key_store import KeyStore, UnknownKey, hash_of, id_of
from cluster.limits import TenantLimits
from cluster.records import LedgerUnavailable

LIMITS = TenantLimits.__struct_fields__


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        store = KeyStore(options.url)
        try:
            _run(store, options)
        finally:
            store.close()
    except (LedgerUnavailable, UnknownKey) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _run(store: KeyStore, options: argparse.Namespace) -> None:
    if options.command == "list":
        Console().print(_table(store))
        return
    if options.command == "revoke":
        store.revoke(options.key_id)
        print(f"Key {options.key_id} is revoked.")
        return
    limits = TenantLimits(**{name: getattr(options, name) for name in LIMITS})
    if options.command == "limit" or limits != TenantLimits():
        store.limit(options.tenant, limits)
    if options.command == "make":
        key = store.make(options.tenant)
        print(f"Key {id_of(hash_of(key))} of {options.tenant}; it is not shown again:", file=sys.stderr)
        print(key)
    else:
        print(f"Tenant {options.tenant}: {_describe(limits)}.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cluster.keys", description="Make and revoke API keys.")
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("make", help="make a key and print it, once")
    limit = commands.add_parser("limit", help="replace a tenant's limits")
    revoke = commands.add_parser("revoke", help="let a key hold no longer")
    revoke.add_argument("key_id", help="as `list` shows it")
    for command in (make, limit):
        command.add_argument("tenant", type=_name)
        for name in LIMITS:
            command.add_argument(f"--{name.replace('_', '-')}", type=_count, metavar="N")
    for command in (make, limit, revoke, commands.add_parser("list", help="show keys and limits")):
        command.add_argument(
            "--url", default=LedgerConfig().url, help="the ledger's SQLAlchemy URL (default: %(default)s)"
        )
    return parser


def _name(text: str) -> str:
    if not text.strip() or not text.isprintable():
        raise argparse.ArgumentTypeError(
            "a tenant's name must have a visible character and no others than printable"
        )
    return text


def _count(text: str) -> int:
    try:
        return msgspec.convert({"concurrency": int(text)}, TenantLimits).concurrency or 0
    except (ValueError, msgspec.ValidationError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1") from None


def _table(store: KeyStore) -> Table:
    limits = store.limits()
    table = Table("key", "tenant", "made (UTC)", "revoked (UTC)", "limits of the tenant")
    for key in store.all():
        revoked = "" if key.revoked_ms is None else _time(key.revoked_ms)
        described = _describe(limits.get(key.tenant, TenantLimits()))
        table.add_row(key.key_id, key.tenant, _time(key.made_ms), revoked, described)
    return table


def _describe(limits: TenantLimits) -> str:
    named = {name.replace("_", " "): value for name, value in msgspec.structs.asdict(limits).items()}
    return ", ".join(f"{name} {value}" for name, value in named.items() if value is not None) or "no limits"


def _time(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")


if __name__ == "__main__":
    raise SystemExit(main())
