"""Finds the compiled extension, and says what to do where it is missing."""

from __future__ import annotations

import importlib
from typing import Any


class NativeLibraryError(ImportError):
    """The extension `runtime.native._osp` is not there, or does not load; the message says why and what to do."""


class KernelError(ValueError):
    """No kernel of that name, or none that this processor runs; the message lists those it does."""


def load_library() -> Any:
    """The module `runtime.native._osp`.

    Raises:
        NativeLibraryError: it cannot be imported.
    """
    try:
        return importlib.import_module("runtime.native._osp")
    except ImportError as error:
        raise NativeLibraryError(
            f"the native engine is not built on this machine ({error}); install a C++20 compiler (g++ 12 or newer) "
            "and install osp-runtime again, or choose another engine with --engine"
        ) from error
