"""The type of arguments and options that are an expert map: a file, or the name of a map."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from ...errors import UsageError
from ...models.shipped_maps import map_path
from .system_text import UserPath


class MapPath(UserPath):
    """A map's file by its path or name (`map_path`)."""

    name = "map"

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path. Fails for a name that no map has."""
        given = super().convert(value, param, ctx)
        try:
            return map_path(os.fsdecode(given))
        except UsageError as error:
            self.fail(f"{error}.", param, ctx)


MAP = MapPath()
