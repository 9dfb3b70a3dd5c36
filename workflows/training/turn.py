"""One training a root at a time: the second one is told who holds it."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from infra.errors import EnvironmentFailure
from infra.lease import Lease, hold
from infra.secrets import mask
from infra.storage import Store
from workflows.training.patience import Warnings

log = logging.getLogger(__name__)

LEASE = "lease/"
SECONDS = 120.0
"""A holder that has not renewed its lease for so long is gone."""


@dataclass
class Turn:
    """The right to write a stage's checkpoints, renewed by whoever has it."""

    lease: Lease
    clock: Callable[[], float] = time.monotonic
    _renewed: float = field(default_factory=time.monotonic)
    _warnings: Warnings = field(default_factory=Warnings)

    def keep(self) -> None:
        """Renew it when it is time; called often.

        Raises:
            EnvironmentFailure: somebody else has taken over.
        """
        if self.clock() - self._renewed < SECONDS / 4:
            return
        self._renewed = self.clock()
        try:
            self.lease.extend(SECONDS)
        except EnvironmentFailure as error:
            if "was taken over" in str(error):
                raise
            line = self._warnings.say(f"could not renew the lease: {mask(str(error).splitlines()[0])}")
            if line is not None:  # the store is away for everybody
                log.warning("%s", line)


@contextmanager
def take_turn(
    folder: Store, what: str, say: Callable[[str], None] | None = None, patience_seconds: float = SECONDS + 10
) -> Iterator[Turn]:
    """Hold the stage's lease.

    Args:
        folder: of the stage on the root.
        say: told when a holder on another machine, who may be gone, is waited for; None waits for nobody.

    Raises:
        EnvironmentFailure: somebody holds it (named).
    """
    store = folder.child(LEASE.rstrip("/"))
    with ExitStack() as stack:
        try:
            lease = stack.enter_context(hold(store, what, seconds=SECONDS, patience_seconds=0))
        except EnvironmentFailure as error:
            # One on this machine is alive, or it would have been passed over.
            here = f"@{socket.gethostname()} (" in str(error)
            if say is None or here or " is under way by " not in str(error):
                raise
            say(f"  {str(error).splitlines()[0]}; waiting up to {patience_seconds:.0f} s, should it be gone")
            lease = stack.enter_context(hold(store, what, seconds=SECONDS, patience_seconds=patience_seconds))
        yield Turn(lease)
