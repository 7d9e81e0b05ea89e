"""A private Ray with nothing that one machine has no use for, and out of reach of what ends a terminal's processes.

Private names of Ray 2.60; each is looked up when it is used, so that another version fails here and not in silence.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

from ray._private import node, services


class Lean(node.Node):
    """Without the dashboard's server, the autoscaler and the log monitor, each of which imports Ray anew."""

    def start_api_server(self, **options: Any) -> None:
        """The dashboard is off; what Ray starts all the same reports usage, which is off too."""

    def start_monitor(self) -> None:
        """It asks for more machines."""

    def start_log_monitor(self) -> None:
        """It copies the workers' output to the driver, which reads it from the run's folder."""


@contextlib.contextmanager
def lean() -> Iterator[None]:
    """Have `ray.init` start such a Ray while the block runs, each process in a session of its own.

    A signal to this process's group (`timeout`, a scheduler, systemd, a closed terminal) would otherwise end the GCS
    before a run has written its checkpoint. The processes still end with this one, as Ray asks the kernel for that.
    """
    apart = functools.partial(services.ConsolePopen, start_new_session=True)
    with patch.object(node, "Node", Lean), patch.object(services, "ConsolePopen", apart):
        yield
