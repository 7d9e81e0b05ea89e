"""Ctrl-C while a command is still importing exits as any other program does, without Python's traceback.

Imported first for that reason, and only by our commands: a library leaves signals alone.
"""

import os
import signal
import sys

_command = sys.argv[:1] == ["-m"] or os.path.basename(sys.argv[0]) == "muster"
if _command and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
