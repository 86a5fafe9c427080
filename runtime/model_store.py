"""From what a user calls a model to the directory that holds it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BUNDLED_MODELS = ("demo", "demo-16bit")
"""Models that come with the package: the demo model in W4A4, and the same model before quantization."""

DEFAULT_MODEL = "demo"

_BUNDLE = Path(__file__).parent / "models"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
# All that a checkpoint consists of. Pickled weights and remote code are never fetched.
_CHECKPOINT_FILES = ("*.json", "*.safetensors", "*.jinja")


class ModelNotFoundError(ValueError):
    """No model goes by that name; the message says what was tried and what to do."""


def resolve_model(name: str) -> Path:
    """The checkpoint directory of a model.

    A bundled name always means the bundled model, whatever the working directory holds: write `./demo` for a
    directory of that name.

    Args:
        name: a bundled name, a directory, or a Hugging Face name `owner/name`, which is downloaded into the
            Hugging Face cache, or found there.

    Raises:
        ModelNotFoundError: nothing goes by that name, or it cannot be looked up or downloaded.
    """
    if name in BUNDLED_MODELS:
        return _bundled(name)
    try:
        path = Path(name).expanduser()
        is_directory, exists = path.is_dir(), path.exists()
    except (OSError, RuntimeError) as error:  # too long a name, a folder one may not enter, ~ of an unknown user
        raise ModelNotFoundError(f"no model {name!r}: {_reason(error)}") from None
    if is_directory:
        return path
    if exists:
        raise ModelNotFoundError(f"{name} is a file; a model is a directory with config.json in it")
    if _HUB_NAME.fullmatch(name):
        return _downloaded(name)
    raise ModelNotFoundError(
        f"no model {name!r}: it is neither a directory, nor a bundled model ({', '.join(BUNDLED_MODELS)}), "
        "nor a Hugging Face name of the form owner/name"
    )


def recorded_quality(provenance: Mapping[str, Any]) -> dict[str, Any] | None:
    """What osp.json says was measured when the checkpoint was made; None where it says nothing that can be used."""
    quality = provenance.get("quality")
    return quality if isinstance(quality, dict) else None


def _bundled(name: str) -> Path:
    path = _BUNDLE / name
    if not (path / "config.json").exists():
        raise ModelNotFoundError(f"the bundled model {name!r} is not part of this installation; give a directory")
    return path


def _downloaded(name: str) -> Path:
    # Imported here: it is slow to import, and a model on disk needs none of it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    absent = f"no directory {name!r} here, and no such model"
    try:
        return Path(snapshot_download(name, allow_patterns=list(_CHECKPOINT_FILES)))
    except GatedRepoError:
        raise ModelNotFoundError(
            f"{name} is gated on Hugging Face; ask for access there, then run `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise ModelNotFoundError(f"{absent} on Hugging Face; a private one needs `hf auth login`") from None
    except LocalEntryNotFoundError:
        raise ModelNotFoundError(
            f"{absent} in the Hugging Face cache, and Hugging Face cannot be reached to download it"
        ) from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ModelNotFoundError(f"{name} cannot be downloaded from Hugging Face: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """The first line of an error's message; libraries append links and advice that do not help here."""
    message = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return message.strip().partition("\n")[0] or type(error).__name__
