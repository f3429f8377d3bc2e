"""`make setup`'s script, with a uv that only writes down what it was asked."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

UV = """#!/bin/sh
echo "$UV_DEFAULT_INDEX $*" >> calls
case "$*" in *--offline*) exit $(cat missing);; *--editable*) touch .venv/bin/medasst; chmod +x .venv/bin/medasst;; esac
[ "$*" = "${*%-r -*}" ] || cat > required
"""
PIP = """#!/bin/sh
[ -f pip.conf ] && cat pip.conf
"""


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A folder with the script, pyproject.toml, and a .venv of false programs."""
    programs = tmp_path / ".venv/bin"
    programs.mkdir(parents=True)
    for name in ("install.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy2(ROOT / name, tmp_path)
    (programs / "python").symlink_to(sys.executable)
    for name, text in (("uv", UV), ("pip", PIP)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    (tmp_path / "missing").write_text("1")
    return tmp_path


def install(checkout: Path, *words: str, **environment: str) -> subprocess.CompletedProcess:
    """Run the script; the calls of uv are in the file `calls`."""
    (checkout / "calls").unlink(missing_ok=True)
    command = ["./install.sh", *words]
    settings = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable} | environment
    return subprocess.run(command, cwd=checkout, env=settings, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("conf", "environment", "mirror"),
    [
        ("", {}, ""),
        ("https://a.example/simple", {}, "https://a.example/simple"),
        ("https://a.example/simple", {"PIP_INDEX_URL": "https://b.example"}, "https://b.example"),
        ("", {"PIP_INDEX_URL": "https://b.example", "UV_DEFAULT_INDEX": "https://c.example"}, "https://c.example"),
    ],
)
def test_the_first_time_everything_comes_from_pips_mirror(checkout, conf, environment, mirror):
    if conf:
        (checkout / "pip.conf").write_text(conf)
    run = install(checkout, **environment)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("Installing into .venv") and (", from the mirror" in run.stdout) == bool(mirror)
    calls = (checkout / "calls").read_text().splitlines()
    assert [call.split()[-1] for call in calls] == ["-", "."]
    assert all(call.startswith(f"{mirror} pip install ") and "constraints.txt" in call for call in calls)
    required = (checkout / "required").read_text()
    assert "llamafactory==0.9.5" in required and "pytest" in required and "evalscope" not in required


def test_where_all_is_there_nothing_is_said_and_no_index_asked(checkout):
    install(checkout)
    (checkout / "missing").write_text("0")
    run = install(checkout, "real,judge")
    assert (run.returncode, run.stdout) == (0, "")
    assert "--offline" in (checkout / "calls").read_text() and len((checkout / "calls").read_text().splitlines()) == 1
    required = (checkout / "required").read_text() if (checkout / "required").exists() else ""
    assert "evalscope" not in required  # nothing was installed


def test_another_extra_is_installed_into_what_is_there(checkout):
    install(checkout)
    run = install(checkout, "real,judge")
    assert (run.returncode, run.stdout) == (0, "")
    required = (checkout / "required").read_text()
    assert "evalscope" in required and "gguf" in required and "litellm" not in required


@pytest.mark.parametrize(
    ("words", "environment", "said"),
    [
        (["nope,real"], {}, "no extra 'nope' in pyproject.toml"),
        (["nope"], {"LANG": "zh_CN.UTF-8"}, "pyproject.toml 中没有 extra 'nope'"),
        ([], {"PYTHON": "nopython"}, "PYTHON is 'nopython', must be Python 3.11 or newer"),
        ([], {"PYTHON": "nopython", "MEDASST_LANG": "zh"}, "PYTHON 为 'nopython'，应为 Python 3.11"),
    ],
)
def test_a_mistake_is_one_line(checkout, words, environment, said):
    run = install(checkout, *words, **environment)
    assert run.returncode == 2 and said in run.stderr and len(run.stderr.splitlines()) == 1
    assert not (checkout / "calls").exists()
