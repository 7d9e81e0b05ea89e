"""One browser for each file of tests that drive it."""

import pytest
from browsers import launched


@pytest.fixture(scope="module")
def browser():
    with launched() as found:
        yield found
