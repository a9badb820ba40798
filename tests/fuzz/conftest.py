"""`bounded`; with FUZZ_REPORT, a file, each module adds a line of what it tried: inputs, refused, slowest, largest."""

import json
import os

import pytest

from tests.fuzz.bounded import Bounded


@pytest.fixture(scope="module")
def bounded(request):
    bounded = Bounded()
    yield bounded
    bounded.close()
    if report := os.environ.get("FUZZ_REPORT"):
        figures = {"module": request.module.__name__, "inputs": bounded.inputs, "refused": bounded.refused}
        figures |= {"slowest_seconds": round(bounded.slowest, 3), "largest_mebibytes": round(bounded.largest, 1)}
        with open(report, "a") as file:
            file.write(json.dumps(figures) + "\n")
