"""Compiles the CPU kernels into the wheel, where there is a compiler. All else is in setup.cfg."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import sys
from pathlib import Path
from types import ModuleType

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

KERNELS = Path("regulate", "kernels", "cpu")


def kernel_builder() -> ModuleType:
    """Load the module that compiles, without its package, which needs torch."""
    spec = importlib.util.spec_from_file_location(
        "regulate_kernels_build", Path(__file__).parent / KERNELS / "build.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class Build(build_py):
    """Lays the compiled kernels beside their source; an editable installation compiles on first use."""

    def run(self) -> None:
        """Copy the modules, then compile."""
        super().run()
        self.compiled: list[Path] = []
        if not self.editable_mode:
            folder = Path(self.build_lib) / KERNELS / "compiled"
            shutil.rmtree(folder, ignore_errors=True)  # of an earlier build
            self.compiled = kernel_builder().make_for_wheel(folder, platform.machine())


class Wheel(bdist_wheel):
    """A wheel for any Python 3: of this platform with compiled kernels, else of any."""

    def run(self) -> None:
        """Compile before the wheel's kind is settled."""
        self.run_command("build_py")
        if self.get_finalized_command("build_py").compiled:
            self.root_is_pure = False
            self.distribution.has_ext_modules = lambda: True  # so that everything lies in one tree, platlib
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        """Name neither a version nor an ABI of Python: the kernels are called with ctypes."""
        python, abi, place = super().get_tag()
        return (python, abi, place) if self.root_is_pure else ("py3", "none", place)


setup(cmdclass={"build_py": Build, "bdist_wheel": Wheel})
