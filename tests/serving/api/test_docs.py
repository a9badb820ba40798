"""The examples of docs/serving.md are run: those of curl by curl, those of Python as they stand."""

# ruff: noqa: F811  (fixtures are imported)

import json
import pathlib
import re
import shlex
import shutil
import subprocess

import pytest
from PIL import Image

from tests.library.tiny_janus import folder, janus  # noqa: F401
from tests.serving.api.on_loopback import data_url
from tests.serving.api.tiny_server import LIMIT, MODEL, client, opened, pictures, port, raw, served  # noqa: F401


@pytest.mark.slow
def test_the_examples_of_the_docs(port):
    """As curl sends them."""
    curl = shutil.which("curl") or pytest.skip("there is no curl here")
    text = (pathlib.Path(__file__).resolve().parents[3] / "docs" / "serving.md").read_text(encoding="utf-8")
    commands = re.findall(r"```bash\ncurl (.*?)```", text, re.DOTALL)
    answers = []
    for command in commands:
        own = command.replace("\\\n", " ").replace(":8000", f":{port}").replace("Janus-Pro-7B", MODEL)
        args = [curl, "-sS", "--fail-with-body", "-H", "Authorization: Bearer secret", *shlex.split(own)]
        answers.append(json.loads(subprocess.run(args, capture_output=True, check=True, timeout=300).stdout))
    chat, drawn, described = answers
    assert described["openapi"]
    assert chat["choices"][0]["message"]["content"] and chat["usage"]["completion_tokens"] <= 60
    assert len(drawn["data"]) == 2 and drawn["seed"] == 0
    assert raw(port, "GET", drawn["data"][1]["url"].split(f":{port}")[1])[0] == 200


@pytest.mark.slow
def test_the_python_examples_of_the_docs(port, janus, pictures, monkeypatch, capsys, tmp_path):
    text = (pathlib.Path(__file__).resolve().parents[3] / "docs" / "serving.md").read_text(encoding="utf-8")
    of_client, of_engine = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for written, here in (
        (":8000", f":{port}"),
        ('api_key="none"', 'api_key="secret"'),
        ("data:image/png;base64,...", data_url(pictures[0])),
        ("Janus-Pro-7B", MODEL),
        ("stream=True", f"stream=True, max_tokens={LIMIT}"),
    ):
        assert written in of_client
        of_client = of_client.replace(written, here)
    made: dict = {}
    exec(of_client, made)
    assert capsys.readouterr().out and opened(made["drawn"].data[0].b64_json).shape == (16, 16, 3)
    monkeypatch.chdir(tmp_path)
    Image.fromarray(pictures[0]).save("bicycle.png")
    end = '    engine.submit(job, *drawings(janus, "a red bicycle", 4))\n'
    assert of_engine.endswith(end)
    # The example goes on as its reader's program does; here it is waited for.
    of_engine = of_engine.replace("slots=16", "slots=6").replace('["bicycle.png"]', f'["bicycle.png"], {LIMIT}')
    exec(of_engine + "    engine.close(60)\n", {"janus": janus})
    assert "Ended" in capsys.readouterr().out
