"""Of two processes that run the tests, one runs all tests of a file, and one all files that start a Ray."""

from collections import defaultdict
from types import SimpleNamespace

from sharing_out import ROOT, OneRay, starts_ray


class Process:
    """Takes what it is given, and runs it at once when asked to."""

    shutting_down = False

    def __init__(self, name: str) -> None:
        self.gateway = SimpleNamespace(id=name)
        self.given: list[int] = []

    def send_runtest_some(self, indices: list[int]) -> None:
        self.given += indices

    def shutdown(self) -> None:
        self.shutting_down = True


def test_a_file_and_all_that_starts_a_ray_stay_in_one_process(pytestconfig):
    files = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "tests" / "cluster").rglob("test_*.py"))]
    tests = [f"{file}::test_{number}[{at}]" for file in files for number, at in enumerate(("a@b", "c::d", "e"))]
    options = {"tx": ["popen", "popen"], "loadscopereorder": True}
    config = SimpleNamespace(getvalue=options.get, option=SimpleNamespace(**options))
    scheduler = pytestconfig.hook.pytest_xdist_make_scheduler(config=config, log=None)
    assert isinstance(scheduler, OneRay)
    processes = [Process("a"), Process("b")]
    for process in processes:
        scheduler.add_node(process)
        scheduler.add_node_collection(process, tests)
    scheduler.schedule()
    ran, run = defaultdict(set), [0, 0]
    while any(run[number] < len(process.given) for number, process in enumerate(processes)):
        for number, process in enumerate(processes):
            if run[number] < len(process.given):
                index = process.given[run[number]]
                run[number] += 1
                file = tests[index].partition("::")[0]
                ran["ray" if starts_ray(ROOT / file) else file].add(number)
                scheduler.mark_test_complete(process, index)
    assert sum(run) == len(tests)
    assert {"ray", "tests/cluster/test_cli.py"} <= set(ran)
    assert {name: each for name, each in ran.items() if len(each) > 1} == {}
