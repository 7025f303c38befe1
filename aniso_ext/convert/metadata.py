"""Metadata of a clip-retrieval folder: copied beside the stand-ins byte for byte."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from aniso_ext.convert.plan import Plan
from aniso_ext.data.locations import Draft, Location, make_folders, remove_folders, why
from aniso_ext.data.shards import unusable
from aniso_ext.errors import InputError

_BLOCK = 1 << 20


def check_metadata(plan: Plan, on_existing: str, on_bad: str) -> None:
    """Refuse, before anything is written, a conversion after which metadata would be wrong or lost.

    Raises:
        InputError: rows may be dropped, so metadata would no longer describe them.
        DataError: another file lies where one is to go.
    """
    if plan.metadata and on_bad == "drop":
        source = plan.metadata[0][0].parent
        raise InputError(
            f"on_bad='drop' would leave {source} with more rows than the stand-ins: pass on_bad='zero', or convert the "
            f"folder {plan.folder.name} alone"
        )
    if on_existing != "overwrite":
        for source, place in plan.metadata:
            if place.exists() and not _same(source, place):
                reason = f"exists already and is not a copy of {source}"
                raise unusable(place, reason, "choose another output or on_existing='overwrite'")


def copy_metadata(plan: Plan) -> None:
    """Copy what is not there yet; a file is whole, with the hash of its source, or not there.

    Raises:
        DataError: a file cannot be read or written, or the copy is not equal to its source.
    """
    for source, place in plan.metadata:
        if not (place.exists() and _same(source, place)):
            _copy(source, place)


def _copy(source: Location, place: Location) -> None:
    made: list[Location] = []
    digest = hashlib.sha256()
    try:
        made = make_folders(place.parent)
        with Draft(place) as draft:
            with draft.path.open("wb") as file:
                for block in _blocks(source):
                    digest.update(block)
                    file.write(block)
            draft.publish()
        if _sha256(place) != digest.hexdigest():
            place.unlink(missing_ok=True)
            raise unusable(place, f"is not equal to {source} after it was copied", "check the disk and run again")
    except OSError as error:
        raise unusable(place, f"cannot be written ({why(error)})", "check the space and run again to resume") from None
    except BaseException:
        remove_folders(made)
        raise


def _same(source: Location, place: Location) -> bool:
    return place.stat().st_size == source.stat().st_size and _sha256(place) == _sha256(source)


def _sha256(place: Location) -> str:
    digest = hashlib.sha256()
    for block in _blocks(place):
        digest.update(block)
    return digest.hexdigest()


def _blocks(place: Location) -> Iterator[bytes]:
    try:
        with place.open("rb") as file:
            while block := file.read(_BLOCK):
                yield block
    except OSError as error:
        raise unusable(place, f"cannot be read ({why(error)})", "check the permissions") from None
