"""Compile the kernels in src/normdrop/csrc; everything else about the package is in pyproject.toml.

The extension is optional. It uses LibTorch's stable ABI and CPython's limited API, so that one
build serves every torch from 2.10 and every Python from 3.10. Where torch or a C++ compiler is
missing, or the compilation fails, the package installs without it and runs on plain PyTorch.

A source named `*_kernels.cpp` is compiled once for each instruction set in `INSTRUCTION_SETS`, in
a namespace of that name; the processor is asked at run time. Every other source is compiled once,
for the baseline.

Environment:
    NORMDROP_REQUIRE_KERNELS=1              a build without kernels is an error
    NORMDROP_WITHOUT_KERNELS=1              do not try
    NORMDROP_SANITIZE=address,undefined     compile with these sanitizers
    NORMDROP_INSTRUCTION_SETS=baseline,avx2 compile for fewer than all, to be quicker
"""

from __future__ import annotations

import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:  # Since setuptools 70.1; earlier it is the wheel package's.
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:
    from wheel.bdist_wheel import bdist_wheel

SOURCES = Path("src/normdrop/csrc")
OLDEST_TORCH = "0x020a000000000000"  # 2.10: LibTorch's stable ABI as of that version
OLDEST_PYTHON = "0x030a0000"

INSTRUCTION_SETS = {"baseline": []}
if platform.machine().lower() in {"x86_64", "amd64"} and sys.platform != "win32":
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    INSTRUCTION_SETS["avx512"] = [
        *INSTRUCTION_SETS["avx2"],
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
    ]

if chosen := os.environ.get("NORMDROP_INSTRUCTION_SETS"):
    INSTRUCTION_SETS = {name: INSTRUCTION_SETS[name] for name in ["baseline", *chosen.split(",")]}

# Contraction is off: what is fused is said by `fma` in simd.h, so that forward and backward,
# which both work out the activation's sign, cannot disagree. Python's own flags ask for debugging
# information, which is nine tenths of the file and a third of the time; -g0 takes that back.
FLAGS = ["-std=c++17", "-O2", "-g0", "-Wall", "-Wextra", "-ffp-contract=off", "-fno-math-errno"]
FLAGS += ["-fno-trapping-math", "-fvisibility=hidden", "-fvisibility-inlines-hidden"]


def torch_folder() -> Path | None:
    """The installed torch, or None."""
    try:
        import torch
    except ImportError:
        return None
    return Path(torch.__file__).parent


class BuildKernels(build_ext):
    """Compile for several instruction sets and link into one file."""

    def build_extension(self, ext: Extension) -> None:
        folder = torch_folder()
        if folder is None:
            self.give_up("torch is not importable while building (use --no-build-isolation)")
            return
        try:
            self.compile_and_link(ext, folder)
        except Exception as error:
            self.give_up(str(error))

    def compile_and_link(self, ext: Extension, torch: Path) -> None:
        sanitizers = os.environ.get("NORMDROP_SANITIZE", "")
        flags, link_flags = list(FLAGS), []
        if sanitizers:
            flags += [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-g", "-O1"]
            flags += ["-fno-omit-frame-pointer"]
            link_flags += [f"-fsanitize={sanitizers}"]
        macros = [("TORCH_TARGET_VERSION", OLDEST_TORCH), ("Py_LIMITED_API", OLDEST_PYTHON)]
        macros += [(f"NORMDROP_HAVE_{name.upper()}", "1") for name in INSTRUCTION_SETS]
        # Torch's headers as system headers: their warnings are not ours.
        flags += [f"-isystem{torch / 'include'}"]
        newest_header = max(p.stat().st_mtime for p in [*SOURCES.rglob("*.h"), Path(__file__)])

        def compile_one(job: tuple[str, str | None]) -> str:
            source, isa = job
            folder = Path(self.build_temp) / (sanitizers.replace(",", "-") or "release")
            folder = folder / "+".join(INSTRUCTION_SETS) / (isa or "common")
            target = folder / Path(source).with_suffix(".o")
            newest = max(newest_header, Path(source).stat().st_mtime)
            if target.exists() and target.stat().st_mtime > newest and not self.force:
                return str(target)
            extra = [("NORMDROP_ISA", isa)] if isa else []
            (compiled,) = self.compiler.compile(
                [source],
                output_dir=str(folder),
                macros=macros + extra,
                include_dirs=ext.include_dirs + self.include_dirs,
                extra_postargs=flags + INSTRUCTION_SETS[isa or "baseline"],
                depends=ext.depends,
            )
            return str(compiled)

        jobs: list[tuple[str, str | None]] = []
        for source in sorted(ext.sources, key=lambda s: "_kernels" not in s):
            kernels = source.endswith("_kernels.cpp")
            jobs += [(source, isa) for isa in (INSTRUCTION_SETS if kernels else [None])]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, jobs))
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            libraries=["torch_cpu"],
            library_dirs=[str(torch / "lib")],
            extra_postargs=link_flags,
            target_lang="c++",
        )

    def give_up(self, reason: str) -> None:
        if os.environ.get("NORMDROP_REQUIRE_KERNELS") == "1":
            raise RuntimeError(f"normdrop: the kernels could not be built: {reason}")
        print(f"normdrop: installing without kernels: {reason}", file=sys.stderr)

    def copy_extensions_to_source(self) -> None:
        # After a build that gave up there is nothing to copy for an editable install.
        if all(
            (Path(self.build_lib) / self.get_ext_filename(e.name)).exists() for e in self.extensions
        ):
            super().copy_extensions_to_source()

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]

    def get_output_mapping(self) -> dict[str, str]:
        mapping = super().get_output_mapping()
        return {built: copy for built, copy in mapping.items() if Path(built).exists()}


class LimitedWheel(bdist_wheel):
    """Tag the wheel for every Python from 3.10."""

    def finalize_options(self) -> None:
        if self.distribution.has_ext_modules():
            self.py_limited_api = "cp310"
        super().finalize_options()


wanted = os.environ.get("NORMDROP_WITHOUT_KERNELS") != "1" and torch_folder() is not None
if not wanted and os.environ.get("NORMDROP_REQUIRE_KERNELS") == "1":
    raise RuntimeError("normdrop: kernels are required, but torch is not importable while building")

setup(
    ext_modules=[
        Extension(
            "normdrop._C",
            sources=[path.as_posix() for path in sorted(SOURCES.rglob("*.cpp"))],
            depends=[path.as_posix() for path in sorted(SOURCES.rglob("*.h"))],
            include_dirs=[SOURCES.as_posix()],
            language="c++",
            py_limited_api=True,
        )
    ]
    if wanted
    else [],
    exclude_package_data={"": ["*.cpp", "*.h"]},
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": LimitedWheel},
)
