"""schemathesis asks what it makes of the server's own description: 5,000 requests, right and wrong, in every way."""

# ruff: noqa: F811  (fixtures are imported)

import os
import subprocess
import sys
import urllib.request

import numpy as np
import pytest

from janus_jax.serving.engine import Engine
from tests.library.tiny_janus import folder, janus  # noqa: F401
from tests.serving.api.on_loopback import data_url, on_loopback

for name in ("fastapi", "prometheus_client", "uvicorn", "schemathesis"):
    pytest.importorskip(name)

from janus_jax.serving.api.app import make_app  # noqa: E402
from janus_jax.serving.api.served import Limits, Served  # noqa: E402

pytestmark = pytest.mark.slow
MODEL, KEY, REQUESTS = "tiny", "secret", 5000
# A description in JSON's terms cannot say that a partial image needs a stream, or what fits the context: what it allows
# may still be refused, so a request that is right by it need not succeed.
EXCLUDED = "positive_data_acceptance"
# By the description a model is any text, and a conversation any turns: right ones give way to some that there are.
HOOKS = f"""
import schemathesis

PICTURE = {{"type": "image_url", "image_url": {{"url": {data_url(np.zeros((8, 8, 3), np.uint8))!r}}}}}
TEXT = {{"type": "text", "text": "What is it?"}}

@schemathesis.hook
def before_call(context, case, kwargs):
    # What is wrong stays as it is.
    if case.meta is None or case.meta.generation.mode.value != "positive" or not isinstance(case.body, dict):
        return
    if "messages" in case.body:
        count = len(case.body["messages"])
        case.body = {{**case.body, "messages": [{{"role": "user", "content": [TEXT, PICTURE][: 1 + count % 2]}}]}}
    if case.body.get("model"):
        case.body = {{**case.body, "model": {MODEL!r}}}
"""


def counted(port: int) -> dict[tuple[str, str], int]:
    """How many requests were answered, by route and status."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers={"Authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if line.startswith("janus_requests_total{")]
    return {tuple(labels.split('"')[1::2]): int(float(value)) for labels, value in pairs}


def test_five_thousand_requests(janus, tmp_path):
    (tmp_path / "hooks.py").write_text(HOOKS, encoding="utf-8")
    with Engine(janus, slots=5, max_queue=40) as engine:
        engine.warm_up()
        served = Served(engine, {MODEL: None}, Limits(max_tokens=8), api_key=KEY)
        app = make_app(served)
        with on_loopback(app) as port:
            command = [
                *(sys.executable, "-m", "schemathesis.cli", "run", f"http://127.0.0.1:{port}/openapi.json"),
                *("-H", f"Authorization: Bearer {KEY}", "--checks", "all", "--exclude-checks", EXCLUDED),
                *("--phases", "examples,coverage,fuzzing", "--max-examples", "1250", "--workers", "1", "--seed", "1"),
                *("--continue-on-failure", "--no-shrink", "--suppress-health-check", "all"),
                *("--generation-database", "none", "--request-timeout", "120", "--no-color"),
            ]
            environment = os.environ | {"SCHEMATHESIS_HOOKS": str(tmp_path / "hooks.py")}
            ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=3600)
            counts = counted(port)
            assert engine.healthy
    assert ran.returncode == 0, ran.stdout[-20000:] + ran.stderr[-2000:]
    assert sum(counts.values()) >= REQUESTS
    assert not [status for _, status in counts if status.startswith("5")], counts
    described = set(app.openapi()["paths"])
    assert described <= {route.replace(":path", "") for route, _ in counts}, counts
    # Right ones were among them, and wrong ones.
    for route in ("/v1/chat/completions", "/v1/images/generations"):
        assert counts[route, "200"] > 100 and counts[route, "400"] > 100, counts
    assert engine.idle
