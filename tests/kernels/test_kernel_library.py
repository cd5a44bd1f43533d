"""How the native kernels' library comes about: compiled once, kept where only its user writes, checked before use."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest

from regulate.kernels.cpu import build

from ..processes import command, python
from .compilers import compiler

pytestmark = [pytest.mark.gate, pytest.mark.usefixtures("quickly_compiled")]

STEP = "import torch, regulate; torch.manual_seed(0); h, c = regulate.ConvLSTMCell(4)(torch.ones(1, 4, 3, 3)); "
SHOW = STEP + "print(round(h.sum().item(), 4), regulate.kernels.why_no_native())"
# The same, and where the library that was loaded lies.
WHERE = SHOW + "; print(*{line.split()[-1] for line in open('/proc/self/maps') if 'kernels' in line and '.so' in line})"
ALONE = "regulate compiles its CPU kernels for this process alone, as their cache cannot be used: "
WITHOUT = "regulate computes without its CPU kernels: "


@pytest.fixture(scope="module")
def expected():
    """What the step comes to, by a library that works."""
    number, reason = python(SHOW).stdout.split()
    assert reason == "None"
    return number


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A cache with a library in it."""
    cache = tmp_path_factory.mktemp("cache")
    assert python(SHOW, XDG_CACHE_HOME=str(cache)).stdout.endswith("None\n")
    return cache


@pytest.fixture
def cache(filled, tmp_path):
    """A copy of that."""
    subprocess.run(["cp", "-a", str(filled), str(tmp_path / "cache")], check=True)
    return tmp_path / "cache"


def only_file(cache):
    (path,) = (cache / "regulate").iterdir()
    assert path.suffix == ".so"
    return path


def test_it_is_compiled_once_and_says_so(tmp_path, expected):
    for count in (1, 0):
        done = python(SHOW, XDG_CACHE_HOME=str(tmp_path))
        assert done.stdout == f"{expected} None\n"
        assert done.stderr.count("regulate compiles its CPU kernels with") == count
        assert len(done.stderr.splitlines()) == count
    path = only_file(tmp_path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    # Nothing compiles where the library is there already.
    assert python(SHOW, XDG_CACHE_HOME=str(tmp_path), TMPDIR="/nowhere").stdout == f"{expected} None\n"


def test_processes_that_start_together_compile_it_once(tmp_path, expected):
    log = tmp_path / "log"
    script = f'case "$*" in *-shared*) echo once >> {log};; esac; exec {build.compiler()[0]} "$@"'
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "CXX": compiler(tmp_path, script)}
    started = [
        subprocess.Popen(command(SHOW), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(8)
    ]
    done = [process.communicate(timeout=300) for process in started]
    assert [out for out, _ in done] == [f"{expected} None\n"] * 8
    assert sum(error.count("regulate compiles") for _, error in done) == 1
    assert log.read_text() == "once\n"
    only_file(tmp_path)


@pytest.mark.parametrize("size", [0, 10_000])
def test_a_damaged_one_is_made_again(cache, size, expected):
    whole = only_file(cache).read_bytes()
    only_file(cache).write_bytes(whole[:size])
    assert python(SHOW, XDG_CACHE_HOME=str(cache)).stdout == f"{expected} None\n"
    assert len(only_file(cache).read_bytes()) == len(whole)


def test_one_that_others_could_have_written_is_made_again(cache, expected):
    os.chmod(only_file(cache), 0o777)
    os.chmod(cache / "regulate", 0o777)
    done = python(SHOW, XDG_CACHE_HOME=str(cache))
    assert done.stdout == f"{expected} None\n"
    assert "regulate compiles its CPU kernels with" in done.stderr
    assert stat.S_IMODE(only_file(cache).stat().st_mode) == 0o700
    assert stat.S_IMODE((cache / "regulate").stat().st_mode) == 0o700


def loaded_elsewhere(done, cache, expected, reason):
    """Whether the step was right, by a library that was not in the cache, with one warning."""
    result, where = done.stdout.splitlines()
    assert result == f"{expected} None"
    assert where
    assert str(cache) not in where
    assert done.stderr.count(ALONE) == 1
    assert reason in done.stderr
    return True


def test_nothing_of_another_user_is_loaded(cache, tmp_path, expected):
    me_another = f"import os; os.geteuid = lambda: {os.geteuid() + 1}; "
    (tmp_path / "tmp").mkdir()
    done = python(me_another + WHERE, XDG_CACHE_HOME=str(cache), TMPDIR=str(tmp_path / "tmp"))
    assert loaded_elsewhere(done, cache, expected, "belongs to another user")
    assert not list((tmp_path / "tmp").iterdir())


def test_nothing_is_loaded_from_where_others_can_replace_it(cache, expected):
    os.chmod(cache, 0o777)
    done = python(WHERE, XDG_CACHE_HOME=str(cache))
    assert loaded_elsewhere(done, cache, expected, "everybody may replace what lies in")
    os.chmod(cache, 0o1777)  # as /tmp is
    assert str(cache) in python(WHERE, XDG_CACHE_HOME=str(cache)).stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_nothing_is_loaded_from_where_another_user_can_replace_it(cache, expected):
    os.chown(cache, 4242, -1)
    assert loaded_elsewhere(python(WHERE, XDG_CACHE_HOME=str(cache)), cache, expected, "another user may replace what")


def test_without_locks_a_build_leaves_that_of_another_process_alone(tmp_path, expected):
    """It may go on at the same time."""
    other = tmp_path / "regulate" / "build-other"
    other.mkdir(parents=True)
    without = "import fcntl; fcntl.flock = lambda *_: (_ for _ in ()).throw(OSError('no locks')); "
    assert python(without + SHOW, XDG_CACHE_HOME=str(tmp_path)).stdout == f"{expected} None\n"
    assert other.is_dir()


def test_a_killed_build_leaves_nothing(tmp_path, expected):
    hang = compiler(tmp_path, "sleep 600 & wait")
    process = subprocess.Popen(
        command(SHOW),
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path), "CXX": hang},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("regulate/*/")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert list(tmp_path.glob("regulate/*/"))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert python(SHOW, XDG_CACHE_HOME=str(tmp_path)).stdout == f"{expected} None\n"
    only_file(tmp_path)


def test_an_interrupted_build_leaves_nothing(tmp_path):
    stopped = compiler(tmp_path, "kill -INT $PPID; sleep 600 & wait")
    # A shell starts what runs in its background with SIGINT ignored.
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    done = python(heard + SHOW, XDG_CACHE_HOME=str(tmp_path), CXX=stopped)
    assert done.returncode != 0
    assert "KeyboardInterrupt" in done.stderr
    assert not list((tmp_path / "regulate").iterdir())


def test_a_cache_that_cannot_be_written(tmp_path, expected):
    file = tmp_path / "file"
    file.touch()
    (tmp_path / "tmp").mkdir()
    done = python(WHERE, XDG_CACHE_HOME=str(file), TMPDIR=str(tmp_path / "tmp"))
    assert loaded_elsewhere(done, file, expected, "Not a directory")
    assert not list((tmp_path / "tmp").iterdir())


def test_no_home(expected):
    """A process may run as a user that is not listed anywhere."""
    nobody = "import os, pwd; pwd.getpwuid = lambda uid: (_ for _ in ()).throw(KeyError(uid)); os.environ.pop('HOME'); "
    done = python(nobody + WHERE, XDG_CACHE_HOME="")
    assert loaded_elsewhere(done, Path.home() / ".cache", expected, "home")


def test_a_relative_home_is_none(tmp_path, monkeypatch, expected):
    monkeypatch.chdir(tmp_path)
    root = str(Path(__file__).parents[2])
    done = python(WHERE, XDG_CACHE_HOME="", HOME="here", PYTHONPATH=root)
    assert loaded_elsewhere(done, tmp_path / "here", expected, "HOME is no absolute path, it is 'here'")
    assert not (tmp_path / "here").exists()


def test_the_reason_is_the_error_and_not_the_last_line(tmp_path, expected):
    script = "echo 'a.cpp:1: error: No space left on device' >&2; echo 'compilation terminated.' >&2; exit 1"
    done = python(SHOW, CXX=compiler(tmp_path, script), XDG_CACHE_HOME=str(tmp_path))
    assert "error: No space left on device" in done.stdout


def test_a_relative_cache_is_none(tmp_path, monkeypatch):
    """The working directory may be anybody's."""
    monkeypatch.chdir(tmp_path)
    root = str(Path(__file__).parents[2])
    python(SHOW, XDG_CACHE_HOME="here", HOME=str(tmp_path / "home"), PYTHONPATH=root)
    assert not (tmp_path / "here").exists()
    assert (tmp_path / "home" / ".cache" / "regulate").is_dir()


@pytest.mark.parametrize(
    ("cxx", "reason"),
    [
        ("false", "false made no library: exit status 1"),
        ("true", "true ended without an error and without a library"),
        ("/nowhere/c++", "No such file or directory"),
        ("/", "Permission denied"),
        ("'g++", 'CXX is no command: No closing quotation; it is "\'g++"'),
    ],
)
def test_a_strange_compiler(cxx, reason, tmp_path, expected):
    done = python(SHOW, CXX=cxx, XDG_CACHE_HOME=str(tmp_path))
    assert done.stdout.startswith(f"{expected} ")
    assert reason in done.stdout
    assert done.stderr.count(WITHOUT) == 1
    assert not list(tmp_path.glob("regulate/*"))


def test_no_compiler(tmp_path, expected):
    done = python(SHOW, CXX="", PATH="", XDG_CACHE_HOME=str(tmp_path))
    assert done.stdout == f"{expected} no C++ compiler was found; install g++ or set CXX\n"
    assert done.stderr.count(WITHOUT) == 1


def test_what_a_compiler_makes_must_be_a_library_with_the_kernels(tmp_path, expected):
    empty = f"{build.compiler()[0]} -shared -x c /dev/null -o"
    for made, reason in (("echo nothing >", "kernels"), (empty, "has no regulate_step")):
        script = f'while [ "$1" != -o ]; do shift; done; {made} "$2"'  # what follows -o
        done = python(SHOW, CXX=compiler(tmp_path, script), XDG_CACHE_HOME=str(tmp_path))
        assert done.stdout.startswith(f"{expected} ")
        assert reason in done.stdout
        assert done.stderr.count(WITHOUT) == 1
        shutil.rmtree(tmp_path / "regulate")
