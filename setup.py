"""Decides what to compile; all metadata is in pyproject.toml.

``ANISO_CUDA``: ``auto`` (default: CUDA kernels when the installed torch has CUDA and nvcc is found), ``1`` (they must
be built) or ``0``. ``ANISO_NATIVE``: ``0`` compiles nothing, ``1`` makes a failed build an error. Otherwise the package
installs without torch or a compiler too: on its reference backend, saying so.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).resolve().parent
# sm_90a is what Hopper's own instructions need; it has no forward-compatible PTX. Newer chips compile the PTX of sm_80,
# which the portable kernels are content with.
CUDA_ARCHITECTURES = "8.0+PTX;9.0a"


def notice(text: str) -> None:
    print(f"aniso_ext: {text}", file=sys.stderr)


def choose_cuda(torch: object) -> bool:
    from torch.utils.cpp_extension import CUDA_HOME

    wanted = os.environ.get("ANISO_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"aniso_ext: ANISO_CUDA must be auto, 0 or 1, got {wanted!r}")
    possible = torch.version.cuda is not None and CUDA_HOME is not None
    if wanted == "1" and not possible:
        raise SystemExit("aniso_ext: ANISO_CUDA=1 needs nvcc and a torch built with CUDA; ANISO_CUDA=0 is CPU only")
    return possible and wanted != "0"


def native_build() -> dict[str, object]:
    """Extension modules and their build command; empty where nothing can be compiled."""
    if os.environ.get("ANISO_NATIVE", "1") == "0":
        notice("ANISO_NATIVE=0: no kernels are compiled, the reference backend runs")
        return {}
    try:
        import torch
        from pybind11.setup_helpers import Pybind11Extension
        from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension
    except ImportError as error:
        notice(f"no kernels are compiled ({error}): install requirements-build.txt, then use --no-build-isolation")
        return {}
    if shutil.which(os.environ.get("CXX", "c++").split()[-1]) is None:
        notice("no C++ compiler found: no kernels are compiled, the reference backend runs")
        return {}

    with_cuda = choose_cuda(torch)
    architectures = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES) if with_cuda else "none"
    core = Path("csrc/core")
    kernels = sorted(core.glob("cpu/*.cpp"))
    bindings = sorted(Path("csrc/torch").glob("*.cpp"))
    if not with_cuda:
        bindings = [path for path in bindings if not path.name.startswith(("cuda", "hopper"))]
    includes = [str(HERE / core / "include")]
    compile_flags = [
        "-O3",
        "-std=c++17",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-fopenmp-simd",
        "-fvisibility=hidden",
        f"-ffile-prefix-map={HERE}=.",
        f"-ffile-prefix-map={Path(torch.__file__).parent}=torch",
        "-g0",
        "-Wall",
    ]
    macros = [("TORCH_TARGET_VERSION", "0x020a000000000000")]
    options: dict[str, object] = {"include_dirs": includes, "py_limited_api": True}
    if with_cuda:
        operators = CUDAExtension(
            "aniso_ext._C",
            [str(path) for path in [*kernels, *bindings, *sorted(core.glob("cuda/*.cu"))]],
            define_macros=[*macros, ("USE_CUDA", None)],
            extra_compile_args={"cxx": compile_flags, "nvcc": ["-O3", "-std=c++17", "--expt-relaxed-constexpr"]},
            **options,
        )
    else:
        operators = CppExtension(
            "aniso_ext._C",
            [str(path) for path in [*kernels, *bindings]],
            define_macros=macros,
            extra_compile_args={"cxx": compile_flags},
            **options,
        )
    facts = Pybind11Extension(
        "aniso_ext._build_info",
        ["csrc/python/build_info.cpp", str(core / "cpu" / "cpu_features.cpp")],
        include_dirs=includes,
        cxx_std=17,
        define_macros=[
            ("ANISO_TORCH_VERSION", torch.__version__),
            ("ANISO_CUDA_VERSION", torch.version.cuda if with_cuda else "none"),
            ("ANISO_CUDA_ARCHITECTURES", architectures),
        ],
    )

    class OptionalBuild(BuildExtension):
        """A build that falls back to the reference backend when the compiler fails, unless kernels were demanded."""

        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                if os.environ.get("ANISO_CUDA") == "1" or os.environ.get("ANISO_NATIVE") == "1":
                    raise
                notice(f"the kernels did not compile ({error}); the package installs on the reference backend")

    return {"ext_modules": [operators, facts], "cmdclass": {"build_ext": OptionalBuild}}


setup(**native_build())
