"""Points of a curve from a file: `trajectory.json`, a CSV, or a JSON object of two lists."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from neuron_sparsity.errors import RunFolderError
from neuron_sparsity.laws.linear import Array

__all__ = ["Points", "read_points"]

_SCHEMA = 1
_MAX_BYTES = 1 << 26
_EXPECTED = (
    "trajectory.json, a CSV with the columns tokens,activation_ratio, or a JSON object with the lists "
    '"token_passed" and "activation_ratio"'
)

_OF_A_STUDY = Path("runs", "NAME", "track")


class Points(NamedTuple):
    """A curve as it was read: `fit_law(*points)` fits it.

    Attributes:
        tokens: Training tokens, [point].
        activation_ratio: Activation ratio, [point].
    """

    tokens: Array
    activation_ratio: Array


def read_points(path: str | Path) -> Points:
    r"""Return the points in a file, in its order: nothing is sorted, dropped or averaged.

    What is read: `trajectory.json` of a run folder, or the folder; a CSV whose header has the columns `tokens` and
    `activation_ratio`; a JSON object with the lists `token_passed` and `activation_ratio`, as in SparsingLawData.

    Args:
        path: The file or run folder.

    Returns:
        Tokens (plain, not billions) and activation ratios.

    Raises:
        RunFolderError: If the file is missing, cannot be read, is damaged, of a newer schema, or holds no such points.

    Example:
        >>> import pathlib, tempfile
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "curve.csv"
        >>> _ = file.write_text("tokens,activation_ratio\n1e9,0.10\n2e9,0.09\n")
        >>> read_points(file).activation_ratio
        array([0.1 , 0.09])
    """
    path = Path(path).expanduser()
    if path.is_dir():
        if (path / "study.json").is_file():
            raise RunFolderError(f"{path} holds a study, of several curves; pass one of them, {path / _OF_A_STUDY}")
        path = path / "trajectory.json"
        if path.exists() and not path.is_file():
            raise RunFolderError(f"{path} is no file; pass {_EXPECTED}")
    try:
        with path.open("rb") as file:  # a pipe will do, such as that of `fit <(...)`; one without end will not
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise RunFolderError(f"{path} holds more than {_MAX_BYTES >> 20} MiB; pass {_EXPECTED}")
        text = content.decode("utf-8-sig")
    except FileNotFoundError:
        raise RunFolderError(f"{path} does not exist; pass {_EXPECTED}") from None
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or a name with a NUL in it
        raise RunFolderError(f"{path} cannot be read as text ({error}); pass {_EXPECTED}") from None
    if text.lstrip()[:1] in ("{", "["):
        tokens, ratios = _from_json(path, text)
    else:
        tokens, ratios = _from_csv(path, text)
    if len(tokens) != len(ratios):
        raise RunFolderError(f"{path} has {len(tokens)} token counts and {len(ratios)} ratios; give one ratio a count")
    if not tokens:
        raise RunFolderError(f"{path} holds no points; pass {_EXPECTED}")
    return Points(_numbers(path, "tokens", tokens), _numbers(path, "activation_ratio", ratios))


def _from_json(path: Path, text: str) -> tuple[list[Any], list[Any]]:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RunFolderError(f"{path} is damaged ({error}); write it again") from None
    if not isinstance(data, dict):
        raise RunFolderError(f"{path} holds a JSON list; pass {_EXPECTED}")
    if isinstance(data.get("points"), list):
        schema = data.get("schema", _SCHEMA)
        if schema != _SCHEMA:
            raise RunFolderError(
                f"{path} has schema {schema}, and this version reads {_SCHEMA}; update neuron-sparsity"
            )
        points = data["points"]
        for i, point in enumerate(points):
            missing = [key for key in ("tokens", "activation_ratio") if not isinstance(point, dict) or key not in point]
            if missing:
                raise RunFolderError(
                    f"{path}: point {i} has no {' and no '.join(missing)}; measure it again or remove it"
                )
        return [point["tokens"] for point in points], [point["activation_ratio"] for point in points]
    if isinstance(data.get("runs"), list):
        raise RunFolderError(f"{path} holds a study, of several curves; pass one of them, {path.parent / _OF_A_STUDY}")
    if isinstance(data.get("token_passed"), list) and isinstance(data.get("activation_ratio"), list):
        return data["token_passed"], data["activation_ratio"]
    raise RunFolderError(f"{path} has the keys {_listed(data)}; pass {_EXPECTED}")


def _from_csv(path: Path, text: str) -> tuple[list[Any], list[Any]]:
    rows = csv.DictReader(text.splitlines(), skipinitialspace=True)
    names = [name.strip() for name in rows.fieldnames or ()]
    if not {"tokens", "activation_ratio"} <= set(names):
        raise RunFolderError(f"{path} has the columns {_listed(names)}; pass {_EXPECTED}")
    rows.fieldnames = names
    try:
        read = list(rows)
    except csv.Error as error:
        raise RunFolderError(f"{path} is no CSV ({error}); pass {_EXPECTED}") from None
    return [row["tokens"] for row in read], [row["activation_ratio"] for row in read]


def _numbers(path: Path, name: str, values: Sequence[Any]) -> Array:
    numbers = np.empty(len(values))
    for i, value in enumerate(values):
        try:
            if isinstance(value, bool):
                raise ValueError
            numbers[i] = float(value)
        except (TypeError, ValueError, OverflowError):
            shown = "nothing" if value in (None, "") else repr(value)[:40]
            raise RunFolderError(
                f"{path}: point {i} has {shown} for {name}; give a number or remove the point"
            ) from None
    return numbers


def _listed(names: Sequence[Any] | dict[str, Any]) -> str:
    shown = [str(name)[:30] for name in list(names)[:6]]
    return ", ".join(shown) or "(none)"
