"""Makes DeepSeek's kernels importable from a folder with the binaries of an unpacked vLLM wheel. Knows nothing of operators.

Where `flash_mla` and `deep_gemm` are installed nothing of this is needed.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch


def add_peers(folder: str | Path) -> None:
    """`import flash_mla` and `import deep_gemm` work afterwards. FileNotFoundError names what the folder lacks.

    folder: has vllm/_flashmla_C.abi3.so, vllm/third_party/flashmla and vllm/third_party/deep_gemm. deep_gemm compiles its kernels when
    they are first called and needs nvcc.
    """
    root = Path(folder).resolve() / "vllm"
    library = root / "_flashmla_C.abi3.so"
    interface = root / "third_party" / "flashmla" / "flash_mla_interface.py"
    for path in (library, interface, root / "third_party" / "deep_gemm"):
        if not path.exists():
            raise FileNotFoundError(path)
    torch.ops.load_library(str(library))
    sys.modules["flash_mla"] = _load_interface(interface)
    sys.path.append(str(root / "third_party"))  # last: the folder holds other packages too


def _load_interface(path: Path) -> ModuleType:
    """The wheel's copy of flash_mla imports `vllm._flashmla_C` for its side effect alone, which load_library has had."""
    stubs = {name: ModuleType(name) for name in ("vllm", "vllm._flashmla_C")}
    stubs["vllm"].__path__ = []
    present = {name: sys.modules[name] for name in stubs if name in sys.modules}
    spec = importlib.util.spec_from_file_location("flash_mla", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.update(stubs)
    try:
        spec.loader.exec_module(module)
    finally:
        for name in stubs:
            del sys.modules[name]
        sys.modules.update(present)
    return module
