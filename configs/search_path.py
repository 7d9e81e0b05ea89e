"""An empty part of PYTHONPATH means the working directory to Python; to us and the processes we start it means nothing.

Files beside a config are not to be imported in the place of a library; `PYTHONPATH=$PYTHONPATH:/x` often has one.
"""

import os
import sys


def _leave_out_the_working_directory() -> None:
    given = os.environ.get("PYTHONPATH")
    if not given:  # Python takes no notice of one that is empty as a whole
        return
    named = [folder for folder in given.split(os.pathsep) if folder]
    if os.pathsep.join(named) == given:
        return
    os.environ["PYTHONPATH"] = os.pathsep.join(named)
    here = os.getcwd()
    if here in sys.path and here not in map(os.path.abspath, named):
        sys.path.reverse()
        sys.path.remove(here)  # the last: the first may be a script's own folder
        sys.path.reverse()
        if (ours := os.path.dirname(os.path.dirname(os.path.abspath(__file__)))) not in sys.path:
            sys.path.append(ours)


_leave_out_the_working_directory()
