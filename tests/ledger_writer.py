"""A process that opens and settles requests until each is in the ledger, however often the database goes away.

python ledger_writer.py URL NAME COUNT      writes a line for each request once its settlement is on disk
"""

import random
import sys
import time

from ledger_records import opening, settlement

from cluster.ledger import Ledger, LedgerUnavailable
from cluster.records import Opening, Settlement

GIVE_UP_S = 60.0


def main(url: str, name: str, count: int) -> None:
    generator = random.Random(name)
    ledger: Ledger | None = None
    for number in range(count):
        for record in (opening(f"{name}-{number}"), settlement(f"{name}-{number}")):
            deadline = time.monotonic() + GIVE_UP_S
            while True:
                try:
                    ledger = ledger or Ledger(url)
                    _append(ledger, record)
                    break
                except (
                    LedgerUnavailable
                ):  # gone, or another writer came first: it may be there or not, so again
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(generator.uniform(0.0, 0.02))
        sys.stdout.write(f"{name}-{number}\n")
        sys.stdout.flush()


def _append(ledger: Ledger, record: Opening | Settlement) -> None:
    (answer,) = ledger.append([record])
    if isinstance(answer, Exception):
        raise answer


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
