"""Python takes an empty part of PYTHONPATH for the working directory; we and the processes we start ignore it.

Otherwise files beside a config could be imported instead of a library, and `PYTHONPATH=$PYTHONPATH:/x` often has an
empty part.
"""

import os
import sys


def _leave_out_the_working_directory() -> None:
    given = os.environ.get("PYTHONPATH")
    if not given:  # Python ignores PYTHONPATH when it is empty as a whole
        return
    named = [folder for folder in given.split(os.pathsep) if folder]
    if os.pathsep.join(named) == given:
        return
    os.environ["PYTHONPATH"] = os.pathsep.join(named)
    here = os.getcwd()
    if here in sys.path and here not in map(os.path.abspath, named):
        sys.path.reverse()
        sys.path.remove(here)  # the last occurrence: the first may be a script's own folder
        sys.path.reverse()
        if (ours := os.path.dirname(os.path.dirname(os.path.abspath(__file__)))) not in sys.path:
            sys.path.append(ours)


_leave_out_the_working_directory()
