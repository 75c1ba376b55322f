"""The documents of a data set of the hub, or of one on disk that `datasets` reads or has saved.

Rows are streamed: what is not asked for is not downloaded. A hub id is read at the commit that its
main branch is at when the run starts, also when it is resumed; where the hub cannot be reached, at
the one last seen, whose tokens may be cached.
"""

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cast_serve.trainer.data.cache import note_commit, noted_commit
from cast_serve.trainer.data.files import Piece, cut
from cast_serve.trainer.data_source import DataSource, HubName
from cast_serve.trainer.errors import RunError, first_line

logger = logging.getLogger(__name__)


def hub_commits(
    sources: Iterable[DataSource], *, known: Mapping[str, str], cache: bool = True
) -> dict[str, str]:
    """The commit of every hub id among `sources`; `known` ones are not asked for.

    Raises:
        RunError: as revision.
    """
    found: dict[str, str] = {}
    for source in sources:
        hub = source.hub
        if hub is not None and hub.folder is None and hub.name not in found:
            found[hub.name] = known.get(hub.name) or revision(hub, cache=cache)
    return found


def revision(hub: HubName, *, cache: bool = True) -> str:
    """The commit of a hub id; with `cache` it is noted for when the hub cannot be reached.

    Raises:
        RunError: the hub cannot be reached, or has no such data set, and never had.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        sha = HfApi().dataset_info(hub.name, timeout=30).sha
    except (OSError, HfHubHTTPError, ValueError) as error:
        noted = noted_commit(hub.name) if cache else None
        if noted is not None:
            logger.warning(
                "hub:%s: %s; taking commit %s, last seen", hub.name, first_line(error), noted
            )
            return noted
        raise RunError(
            f"data: hub:{hub.name}: {first_line(error)}; check the name and the connection, or "
            "give a local copy as hub:./folder"
        ) from error
    assert sha is not None, "asked for without expand, so the answer has it"
    if cache:
        note_commit(hub.name, sha)
    return sha


def rows(hub: HubName, commit: str | None, *, text_key: str) -> Iterator[Piece]:
    """The documents in the data set's own order; `commit` is None for a folder.

    Raises:
        RunError: no such configuration, split or column; the connection is lost; a row is no text;
            it is a program, in files that `datasets` does not read, or behind a link; that is not
            installed.
    """
    if find_spec("datasets") is None:
        raise RunError(
            f"data: hub:{hub.name}: reading it needs datasets; install it: "
            "pip install 'cast-serve[train]'"
        )
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError
    from pyarrow import ArrowException

    empty = True
    number = 0
    try:
        table = _opened(hub, commit)
        names = table.column_names
        if names is not None and text_key not in names:
            raise RunError(
                f'data: hub:{hub.name} has no column "{text_key}"; set text_key to one of '
                f"{', '.join(names)}"
            )
        # Other columns may be images: not read, not decoded.
        for number, row in enumerate(table.select_columns([text_key]), start=1):
            if not isinstance(row[text_key], str):
                raise RunError(f'data: hub:{hub.name}: row {number} has no string: "{text_key}"')
            for piece in cut(row[text_key], f"data: hub:{hub.name}: row {number}"):
                empty = False
                yield piece
    except RunError:
        raise
    except (OSError, ValueError, DatasetsError, HfHubHTTPError, ArrowException) as error:
        place = f" after row {number}" if number else ""
        raise RunError(f"data: hub:{hub.name}{place}: {first_line(error)}") from error
    # What `datasets` says of a loading script, and (NotImplementedError) of some archives.
    except RuntimeError as error:
        raise RunError(
            f"data: hub:{hub.name}: {first_line(error)}; give its text as files, such as .parquet"
        ) from error
    if empty:
        raise RunError(f"data: hub:{hub.name}: holds no text")


def _opened(hub: HubName, commit: str | None) -> Any:
    from datasets import load_dataset, load_from_disk

    folder = hub.folder
    if folder is not None and _saved_to_disk(folder):
        saved = load_from_disk(str(folder))
        if not isinstance(saved, dict):
            return saved
        if hub.split not in saved:
            raise RunError(f"data: hub:{hub.name}: no split {hub.split}; has {', '.join(saved)}")
        return saved[hub.split]
    if folder is not None:
        _refuse_links(hub, folder)
    name = hub.name if folder is None else str(folder)
    return load_dataset(name, hub.config, split=hub.split, streaming=True, revision=commit)


def _refuse_links(hub: HubName, folder: Path) -> None:
    """`datasets` passes over what a link to a folder leads to, without a word."""
    for here, folders, _ in os.walk(folder):
        # What is hidden it passes over in any case.
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        for link in (Path(here, name) for name in folders):
            if link.is_symlink():
                raise RunError(
                    f"data: hub:{hub.name}: {link} is a link, and datasets reads no folder through "
                    "one; put the folder itself there, or name it as a source of its own"
                )


def _saved_to_disk(folder: Path) -> bool:
    return any((folder / mark).is_file() for mark in ("state.json", "dataset_dict.json"))
