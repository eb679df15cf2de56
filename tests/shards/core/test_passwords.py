"""Passwords in URLs of datasets are used, and written nowhere."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from helpers.commands import ROOT, run_command
from shards.core import passwords
from shards.core.errors import DatasetError, UserError
from shards.core.settings import check
from shards.format import layout
from slim.config import PretrainSettings, load_run

SECRET = "s3cr%20et-word"
SPOKEN = "s3cr et-word"


@pytest.fixture(autouse=True)
def _nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIM_URLS", "")


@pytest.fixture
def web(dataset: Path):
    """A dataset on a server that asks for a name and a password, or a token."""

    class Handler(SimpleHTTPRequestHandler):
        def send_head(self):
            basic = "Basic " + base64.b64encode(f"me:{SPOKEN}".encode()).decode()
            if self.headers.get("Authorization") != basic and "token=T0KEN" not in self.path:
                self.send_error(401)
                return None
            return super().send_head()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(dataset)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()


def secret_free(text: str) -> bool:
    return not any(word in text for word in (SECRET, SPOKEN, "T0KEN", "s3cr"))


@pytest.mark.parametrize("form", ["http://me:{secret}@{web}", "http://{web}/?token=T0KEN"])
def test_a_password_is_used_and_not_written(web: str, form: str) -> None:
    url = form.format(web=web, secret=SECRET)
    settings = check(PretrainSettings, {"data": url, "model": TINY, "run": {"out": "a"}}, "test")
    path = settings.data[0].path
    assert secret_free(settings.model_dump_json()) and web in path
    assert layout.read_manifest(path)["format"] == layout.FORMAT  # by what was kept
    child = "import sys; from shards.format.layout import read_manifest; print(read_manifest(sys.argv[1])['format'])"
    done = subprocess.run([sys.executable, "-c", child, path], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == str(layout.FORMAT), done.stderr
    os.environ["SLIM_URLS"] = ""
    with pytest.raises(DatasetError, match="401"):
        layout.read_manifest(path)  # as the configuration of the run has it
    assert layout.read_manifest(url)["format"] == layout.FORMAT  # given again


TINY = {"embed": 16, "heads": 2, "depths": (1, 1), "unit": (5, 2, 2, 2), "strides": ((5, 1, 1, 1),), "local_stages": 1}


@pytest.mark.parametrize(
    ("url", "bare", "told"),
    [
        ("s3://KEY:SECRET@bucket/a", "s3://bucket/a", {"key": "KEY", "secret": "SECRET"}),
        ("ftp://me:word@host/a", "ftp://me@host/a", {"username": "me", "password": "word"}),
        ("https://host/a?sig=x%2Fy&b=1", "https://host/a", {"params": {"sig": "x/y", "b": "1"}}),
        ("https://me@host/a", "https://me@host/a", {}),
        ("s3://bucket/a", "s3://bucket/a", {}),
        ("/data/a?b:c@d", "/data/a?b:c@d", {}),
        ("relative/a:b@c", "relative/a:b@c", {}),
    ],
)
def test_what_is_kept_of_a_url(url: str, bare: str, told: dict) -> None:
    assert passwords.keep(url) == bare and passwords.keep(bare) == bare
    assert passwords.options(bare) == told == passwords.options(f"{bare}/manifest.json")
    assert passwords.options("https://elsewhere/a") == {}


def test_messages_hide_what_was_kept_and_what_looks_like_a_password() -> None:
    passwords.keep(f"https://me:{SECRET}@host/a?token=T0KEN")
    for text in (SECRET, SPOKEN, "T0KEN", f"https://other:{SECRET}@x/"):
        assert secret_free(UserError("a", text, text, text).line())
    assert UserError("https://you:unknown@x/", "", 1, 2).line() == "https://you:***@x/: got 1, expected 2"


def test_a_command_that_fails_does_not_print_it(web: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ("configs/pretrain/tiny.yaml", f"data=http://me:{SECRET}wrong@{web}", f"run.out={out}", "--json")
    done = run_command("tools/pretrain.py", *words)
    assert done.returncode == 2 and secret_free(done.stdout + done.stderr), done.stderr
    assert "401" in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_run_folder_holds_no_password(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps({"data": f"https://me:{SECRET}@host/a", "model": TINY, "run": {"out": "a"}}))
    assert load_run(path).data[0].path == "https://host/a"
