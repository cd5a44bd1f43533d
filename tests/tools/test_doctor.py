"""`regulate doctor` says what is so, and `regulate timm` runs a script as Python does."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata

import pytest
import torch

from regulate import __version__, kernels
from regulate.kernels.cpu import library
from regulate.kernels.cuda import gpu
from regulate.tools import doctor
from regulate.tools.cli import main

pytestmark = pytest.mark.slow

SCRIPT = """
import sys
import timm
import beside
if __name__ == "__main__":
    print(sys.argv[1:], timm.is_model("regulated_resnet18"), beside.NAME)
    if sys.argv[1:] == ["fail"]:
        raise ValueError("of the script")
    sys.exit(7)
"""


def line(name, text=None):
    (found,) = [one for one in (text or doctor.report()).splitlines() if one.strip().startswith(name)]
    return found.strip().removeprefix(name).strip()


def test_ten_lines_of_what_is_here(capsys):
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert len(said.splitlines()) == 10
    assert max(map(len, said.splitlines())) <= 200
    assert line("regulate", said).startswith(__version__)
    assert line("torch", said).startswith(f"{torch.__version__}, {torch.get_num_threads()} threads")
    assert f"timm {metadata.version('timm')}" in line("beside it", said)
    expected = f"yes: float32 on the CPU, {kernels.instruction_set()}, compiled on this machine"
    assert line("native", said) == expected


def test_what_is_missing_is_named_with_its_reason(monkeypatch):
    monkeypatch.setattr(library, "_found", "no C++ compiler was found")

    def without(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "version", without)
    said = doctor.report()
    assert line("native", said) == "no: no C++ compiler was found"
    assert line("beside it", said) == "nothing"
    advice = line("to install", said)
    assert advice.startswith("g++ or clang++, for the native kernels; pip install 'torch-regulate[")
    assert "for timm, torchvision, matplotlib, huggingface_hub" in advice


def test_every_extra_that_it_names_is_there():
    try:
        extras = metadata.metadata(doctor.DISTRIBUTION).get_all("Provides-Extra")
    except metadata.PackageNotFoundError:
        pytest.skip("this is not installed under its name")
    assert set(doctor.COMPANIONS.values()) <= set(extras)


@pytest.mark.parametrize(("works", "said"), [(True, "yes: CUDA"), (False, "no: its trial failed, see the warning")])
def test_triton_is_tried_where_there_is_a_gpu(works, said, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a device")
    monkeypatch.setattr(gpu, "works", lambda device: works)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: object())
    assert line("triton") == said
    assert line("torch").endswith("a device")
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    assert line("triton") == "no: triton is not installed"
    assert "triton, for CUDA" in line("to install")


def script(folder, *arguments):
    (folder / "train.py").write_text(SCRIPT)
    (folder / "beside.py").write_text("NAME = 'beside'")
    command = [sys.executable, "-m", "regulate", "timm", str(folder / "train.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_script_runs_as_it_would_alone(tmp_path):
    done = script(tmp_path, "--model", "regulated_resnet18", "--help", "-b", "8")
    assert done.stdout == "['--model', 'regulated_resnet18', '--help', '-b', '8'] True beside\n", done.stderr
    assert done.returncode == 7
    done = script(tmp_path, "fail")
    assert "Traceback" in done.stderr
    assert "ValueError: of the script" in done.stderr
    assert done.returncode == 1


def test_a_script_that_is_not_there(capsys):
    with pytest.raises(SystemExit):
        main(["timm", "nothing.py", "--model", "x"])
    said = capsys.readouterr().err
    assert "there is no script nothing.py" in said
    assert "github.com/huggingface/pytorch-image-models" in said
