"""A PostgreSQL of a test's own: Debian's package, in a temporary folder, on a Unix socket there, as a user that is not root."""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

MISSING = (
    "POSTGRESQL IS MISSING, so the ledger was not tested on it: apt-get install postgresql. "
    ".ci/run installs it and does not skip."
)
USER = "postgres"  # made by the package
START_S = 60.0


def bin_folder() -> Path | None:
    """Where the newest `initdb` is; Debian keeps it out of the path."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[4]))
    if found:
        return found[-1].parent
    on_path = shutil.which("initdb")
    return Path(on_path).resolve().parent if on_path else None


class Postgres:
    """One database cluster, running or not."""

    def __init__(self, folder: Path, programs: Path) -> None:
        self._folder = folder
        self._data = folder / "data"
        self._programs = programs
        self._user = USER if os.getuid() == 0 else None
        self.url = f"postgresql+psycopg://{USER}@/postgres?host={folder}"

    def create(self) -> None:
        self._run("initdb", "-D", self._data, "-U", USER, "-A", "trust", "-E", "UTF8", "--locale=C")
        settings = ["listen_addresses = ''", f"unix_socket_directories = '{self._folder}'"]
        with (self._data / "postgresql.conf").open("a") as file:
            file.write("\n".join(settings) + "\n")

    def start(self) -> None:
        """Also after `kill`: what the dead one left behind is first let go by its own processes."""
        deadline = time.monotonic() + START_S
        while True:
            try:
                self._run("pg_ctl", "-D", self._data, "-l", self._folder / "log", "-w", "-s", "start")
                return
            except subprocess.CalledProcessError:
                if time.monotonic() > deadline:
                    raise AssertionError((self._folder / "log").read_text()) from None
                time.sleep(0.1)

    def kill(self) -> None:
        """As when the power goes: the postmaster first, then all that it had started."""
        postmaster = int((self._data / "postmaster.pid").read_text().split()[0])
        children = Path(f"/proc/{postmaster}/task/{postmaster}/children").read_text().split()
        for process in (postmaster, *map(int, children)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def stop(self) -> None:
        self._run("pg_ctl", "-D", self._data, "-m", "immediate", "-w", "-s", "stop")

    def _run(self, program: str, *arguments: str | Path) -> None:
        command = [self._programs / program, *arguments]
        subprocess.run(
            command,
            check=True,
            cwd=self._folder,
            user=self._user,
            group=self._user,
            extra_groups=[] if self._user else None,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )


@contextlib.contextmanager
def running_postgres() -> Iterator[Postgres]:
    """One that runs until the block ends."""
    programs = bin_folder()
    assert programs is not None, MISSING
    folder = Path(tempfile.mkdtemp(prefix="lightship-postgres-"))  # a socket's path must be short
    try:
        if os.getuid() == 0:
            shutil.chown(folder, USER, USER)
        postgres = Postgres(folder, programs)
        postgres.create()
        postgres.start()
        try:
            yield postgres
        finally:
            postgres.stop()
    finally:
        shutil.rmtree(folder)
