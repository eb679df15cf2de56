"""Passwords in URLs of datasets are used, and written nowhere."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.commands import ROOT, run_command
from helpers.pretrained import ALIGNED, tool, write_run
from helpers.tasks import SCORE
from helpers.training import QUICK
from helpers.training import TINY as TINY_YAML
from helpers.web import serve
from shards.core import passwords
from shards.core.cli import Parser
from shards.core.errors import ConfigError, DatasetError, UserError
from shards.core.settings import check
from shards.format import layout
from slim.config import PretrainSettings, load_config, load_run

SECRET = "s3cr%20et-word"
SPOKEN = "s3cr et-word"


@pytest.fixture(autouse=True)
def _nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIM_URLS", "")


@pytest.fixture
def web(dataset: Path) -> Iterator[str]:
    """A dataset on a server that asks for a user and a password, or a token: its address without `http://`."""
    with serve(dataset, login=f"me:{SPOKEN}", token="T0KEN") as web:
        yield web.url.removeprefix("http://")


def secret_free(text: str) -> bool:
    return not any(word in text for word in (SECRET, SPOKEN, "T0KEN", "s3cr"))


@pytest.mark.parametrize("form", ["http://me:{secret}@{web}", "http://{web}?token=T0KEN"])
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


@pytest.mark.parametrize("word", ["{url}", "data={url}", "--data={url}"])
def test_arguments_of_commands_hold_no_password(word: str) -> None:
    parser = Parser("probe", "", "")
    parser.add_argument("words", nargs="*")
    parser.add_settings("")
    parser.add_argument("--data")
    args = parser.parse_args([word.format(url=f"https://me:{SECRET}@host/a,b?token=T0KEN")])
    assert [*args.words, *args.settings, f"--data={args.data}"][0] == word.format(url="https://host/a,b")
    assert passwords.options("https://host/a,b/x")["params"] == {"token": "T0KEN"}
    for plain in ("label=a?b=c", "C:/a?b", "--out=/a:b@c", "x"):
        assert passwords.keep_in_word(plain) == plain


def test_wrong_arguments_are_printed_without_password(capsys: pytest.CaptureFixture[str]) -> None:
    url = f"https://me:{SECRET}@host/a?token=T0KEN"
    for words in ([url], ["--dta", url], [f"--dta={url}"], [f"data=[{url}"]):
        with pytest.raises((SystemExit, ConfigError)) as refused:
            Parser("probe", "", "").parse_args(words)
        assert secret_free(capsys.readouterr().err + str(refused.value))
    with pytest.raises(ConfigError) as error:
        load_config("tiny", [f"data=[{url},{url}"])
    assert secret_free(error.value.line()) and "https://me:***@host/a?***" in error.value.line()


def secret_files(folder: Path) -> list[Path]:
    """The files in a folder that hold a secret, also as base64."""
    basic = base64.b64encode(f"me:{SPOKEN}".encode())
    words = (SECRET.encode(), SPOKEN.encode(), b"T0KEN", b"s3cr", basic)
    found = [path for path in folder.rglob("*") if path.is_file()]
    assert found
    return [path for path in found if any(word in path.read_bytes() for word in words)]


def test_a_run_is_pretrained_and_resumed_from_a_url_with_secrets(web: str, tmp_path: Path) -> None:
    """They are in no file of the run and its mirror, also not in wandb's, and in nothing that a command prints."""
    url, out = f"http://me:{SECRET}@{web}?token=T0KEN", tmp_path / "run"

    def pretrain(data: str, *more: str) -> subprocess.CompletedProcess:
        words = [
            TINY_YAML,
            f"data={data}",
            f"run.out={out}",
            *QUICK,
            "run.wandb=offline",
            f"run.mirror={tmp_path / 'm'}",
        ]
        done = run_command("tools/pretrain.py", *words, *more, "--json")
        assert secret_free(done.stdout + done.stderr), done.stderr
        return done

    done = pretrain(url, "run.steps=2")
    assert done.returncode == 0, done.stderr
    assert (out / "wandb").is_dir() and not secret_files(tmp_path)
    done = pretrain(f"http://{web}", "run.steps=4", "run.extend=constant")
    told = (
        f"error: http://{web}/manifest.json: got 401 Unauthorized, expected a readable file. Give the URL with its user"
    )
    assert done.returncode == 2 and done.stderr.startswith(told) and done.stderr.count("\n") == 1, done.stderr
    done = pretrain(url, "run.steps=4", "run.extend=constant")
    assert done.returncode == 0 and json.loads(done.stdout.splitlines()[-1])["step"] == 4, done.stderr
    done = run_command("tools/report.py", out, "--paths", "--data")
    assert done.returncode == 0 and secret_free(done.stdout + done.stderr), done.stderr
    assert not secret_files(tmp_path)


def test_results_of_a_run_on_a_url_hold_no_secret(web: str, dataset: Path, tmp_path: Path) -> None:
    url, run = f"http://me:{SECRET}@{web}?token=T0KEN", write_run(tmp_path / "run", dataset, ALIGNED)
    task = tmp_path / "score.yaml"
    task.write_text(json.dumps(SCORE | {"split": {"folds": 3, "repeats": 1}}))
    for words in (
        ("probe.py", run, "--data", url, "--task", task, "--random-seeds", 1),
        ("explain.py", run, f"--data={url}", "--task", task, "--subjects", 1),
        ("plan.py", TINY_YAML, f"data={url}", *QUICK),
        ("report.py", run, "--paths", "--data"),
    ):
        done = tool(*words, "--json")
        assert done.returncode == 0 and secret_free(done.stdout + done.stderr), done.stderr
        assert not secret_files(tmp_path)


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
