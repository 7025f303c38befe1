"""A small file that appears whole or not at all."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from aniso_ext.data.shards import unusable


def replace_file(path: Path, content: bytes) -> None:
    """Put a file in its place, whose folder is made if missing; the bytes are on the disk before they have the name.

    Raises:
        DataError: it cannot be written; what was there stays.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        reason = f"cannot be written ({error.strerror or error})"
        raise unusable(path, reason, "check the space and permissions") from None
    finally:
        temporary.unlink(missing_ok=True)
