"""A grid as canonical cells: what is done, what is stale, what is left to run.

A cell is the canonical form of one measurement's settings: settings that cannot change it are null, so two ways of
asking for the same thing are one cell, with one name and one row.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdllm.decoding.policies import VERIFIED
from fastdllm.evaluation.results import Row, read_row, write_row
from fastdllm.runtime import lock_file

Settings = dict[str, Any]
GRID = {"reuse_k": [1, 2, 3], "subset": ["first", "middle", "last"]}
IN_ROWS = ("policy", "threshold", "sub_block_size", "use_block_cache", "reuse_k", "subset", "reuse_mode")
DRAFTS = ("draft_length", "draft_groups")
DIFFUSION_ONLY = (*IN_ROWS, *DRAFTS, "policy_parameter", "fuse_append", "schedule", "budget", "active_rows")
GENERATION_ONLY = ("policy", "threshold", "sub_block_size", "use_block_cache")
ROW_SETTINGS = ("label", "engine", "task", "mode", *IN_ROWS, "batch_size")  # also fields of a row
# What a cell's name leaves out when it has this value; everything else in the settings is spelt in the name.
USUAL = {
    "engine": "fastdllm",
    "adapter": None,
    "policy": "threshold",
    "threshold": 0.9,
    "policy_parameter": None,
    "fuse_append": False,
    "draft_length": 7,
    "draft_groups": "all",
    "reuse_mode": "output",
    "active_rows": "all",
    "use_block_cache": True,
    "sub_block_size": 8,
    "temperature": 0.0,
    "top_p": None,
    "batch_size": 32,
    "max_new_tokens": 0,
    "limit": 0,
    "prompt": "published",
    "device": "cuda",
    "dtype": "bfloat16",
    "seed": 0,
    "repeat": 1,
}
# Settings that a digest holds only where they are unusual: it was taken without them before they existed.
UNHASHED = {"schedule": "fixed", "budget": None, "active_rows": "all", "repeat": 1}
UNHASHED |= {"draft_length": 7, "draft_groups": "all", "adapter": None}
# Settings that rows from before them lack, with what was measured then.
ADDED = {"policy_parameter": None, "fuse_append": False, **UNHASHED}
# Settings that are gone and that rows from their time hold, with what all cells of today do.
REMOVED = {"weight_format": "model"}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One measurement to make: its canonical settings and the names it goes by."""

    settings: Settings
    """Canonical: what does not apply is None."""
    grid_names: tuple[str, ...]
    """`k1_first`, `k1_middle` and `k1_last` are one cell; any other has one name."""

    @property
    def name(self) -> str:
        """File name of the row, without `.json`: label, task, decoding, then all that is unusual."""
        settings = self.settings
        parts = [settings["label"], settings["task"].replace(",", "+"), short_name(settings)]
        parts += [f"{key}={settings[key]}" for key, usual in USUAL.items() if settings[key] not in (usual, None)]
        return re.sub(r"[^\w.+=-]", "_", "-".join(parts))

    @property
    def digest(self) -> str:
        """16 hex digits over the canonical settings."""
        usual = UNHASHED | REMOVED
        hashed = {
            key: value for key, value in self.settings.items() if key not in usual or value not in (usual[key], None)
        }
        return hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()[:16]


def short_name(settings: Settings) -> str:
    """Return `ar`, `k1`, `k2_first` or `adaptive_0.1_last`; an explicit subset `4,5,6` becomes `k2_layers4+5+6`."""
    if settings["mode"] == "ar":
        return "ar"
    if settings["reuse_k"] == 1:
        return "k1"
    subset = settings["subset"]
    when = f"adaptive_{settings['budget']}" if settings["schedule"] == "adaptive" else f"k{settings['reuse_k']}"
    return f"{when}_{subset if subset in GRID['subset'] else 'layers' + subset.replace(',', '+')}"


def make_cell(settings: Mapping[str, Any]) -> Cell:
    """Return the cell of these settings, with all that cannot change the measurement set to None.

    Without the sub-block cache every step is a full pass, so what would be reused is k = 1 there.
    """
    canonical = {**ADDED, **settings}
    if canonical["mode"] == "ar":
        canonical.update(dict.fromkeys(DIFFUSION_ONLY))
    else:
        canonical.update(_canonical_reuse(canonical))
    if canonical["policy"] != "threshold":
        canonical["threshold"] = None
    if canonical["policy"] != VERIFIED:
        canonical.update(dict.fromkeys(DRAFTS))
    if canonical["temperature"] == 0:
        canonical.update(top_p=None, seed=None)
    is_shared = canonical["reuse_k"] == 1
    names = tuple(f"k1_{subset}" for subset in GRID["subset"]) if is_shared else (short_name(canonical),)
    return Cell(settings=canonical, grid_names=names)


def _canonical_reuse(settings: Settings) -> Settings:
    """Return the settings of reuse, and of what it needs, that stand for the given ones in diffusion."""
    nothing = {"budget": None, "subset": None, "reuse_mode": None}
    if settings["policy"] == VERIFIED:  # has no blocks, so none of what belongs to them
        unused = dict.fromkeys(("active_rows", "sub_block_size", "use_block_cache", "fuse_append", "policy_parameter"))
        return {**nothing, **unused, "schedule": "fixed", "reuse_k": 1}
    if not settings["use_block_cache"]:
        return {**nothing, "schedule": "fixed", "reuse_k": 1, "active_rows": None}
    if settings["schedule"] == "adaptive":
        return {"reuse_k": None, "active_rows": None}
    return nothing if settings["reuse_k"] == 1 else {"budget": None, "active_rows": None}


def points(axes: Mapping[str, Sequence[Any]]) -> list[Settings]:
    """Return every combination of the axes' values, the last axis varying fastest; one empty one without axes."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def make_cells(settings: Sequence[Mapping[str, Any]], repeat: int = 1) -> list[Cell]:
    """Return the cells of all these settings, each once, and then all again for each further repeat.

    So a drift of the machine meets all cells alike.
    """
    numbered = [make_cell({**one, "repeat": number}) for number in range(1, repeat + 1) for one in settings]
    return list({cell.name: cell for cell in numbered}.values())


def cell_state(cell: Cell, folder: Path, checkpoint_hash: str) -> str:
    """Return "done", "missing", or "stale: why" where the row there was made with other settings or weights."""
    row = read_row(folder / f"{cell.name}.json")
    if row is None:
        return "missing"
    made = make_cell(row["config"]).settings | row["config"]  # completed, where the row is older than a setting
    wanted = REMOVED | cell.settings
    changed = sorted(key for key in made.keys() | cell.settings.keys() if made.get(key) != wanted.get(key))
    if changed:
        return f"stale: {', '.join(changed)} changed"
    return "done" if row["checkpoint_hash"] == checkpoint_hash else "stale: the checkpoint changed"


def forced_cells(cells: Sequence[Cell], force: str) -> set[str]:
    """Return the names of the cells that `force` reruns: "" none, "all", or grid names such as "k2_middle,k3_last".

    Raises:
        ValueError: a name that is not in these cells.
    """
    if force in ("", "all"):
        return {cell.name for cell in cells} if force else set()
    by_name: dict[str, set[str]] = {}
    for cell in cells:
        for name in (*cell.grid_names, short_name(cell.settings), cell.name):
            by_name.setdefault(name, set()).add(cell.name)
    unknown = [name for name in force.split(",") if name not in by_name]
    if unknown:
        raise ValueError(f"force names no cell here: {', '.join(unknown)}; there are {', '.join(by_name)}, or all.")
    return set().union(*(by_name[name] for name in force.split(",")))


def cells_to_run(
    cells: Sequence[Cell], folder: Path, checkpoint_hash: str, forced: Collection[str] = ()
) -> list[tuple[Cell, str]]:
    """Return the cells that have no valid row, or whose name is among the forced ones, each with the reason."""
    states = [(cell, cell_state(cell, folder, checkpoint_hash)) for cell in cells]
    return [
        (cell, "forced" if cell.name in forced else state)
        for cell, state in states
        if cell.name in forced or state != "done"
    ]


def run_cells(
    cells: Sequence[tuple[Cell, str]], folder: Path, checkpoint_hash: str, measure: Callable[[Cell], Row]
) -> list[Cell]:
    """Measure each cell that no other process measures; return those that others still run at the end.

    A row is written at once, so that a killed sweep loses only the cell it was at, and under the cell's lock: of
    several processes on one folder one measures it, and the others find it done.
    """
    seen = {cell.name: _written_at(cell, folder) for cell, _ in cells}
    holders: dict[str, str] = {}

    def attempt(number: int, cell: Cell, reason: str) -> None:
        place, lock = f"[{number}/{len(cells)}] {cell.name}", folder / f".{cell.name}.lock"
        with lock_file(lock) as holder:
            holders[cell.name] = holder
            if holder:
                print(f"{place}: skipped, {holder} runs it", flush=True)
                return
            try:
                is_old = reason == "forced" and _written_at(cell, folder) == seen[cell.name]
                if not is_old and cell_state(cell, folder, checkpoint_hash) == "done":
                    print(f"{place}: done by another process meanwhile", flush=True)
                    return
                print(f"{place} ({reason})", flush=True)
                print(f"wrote {write_row(folder, measure(cell))}", flush=True)
            finally:
                lock.unlink()

    for number, (cell, reason) in enumerate(cells, 1):
        attempt(number, cell, reason)
    for number, (cell, reason) in enumerate(cells, 1):
        if holders[cell.name]:  # by now it is done, or its process has died, or it still runs
            attempt(number, cell, reason)
    running = [cell for cell, _ in cells if holders[cell.name]]
    if running:
        print(
            "still run by others: " + ", ".join(f"{cell.name} ({holders[cell.name]})" for cell in running), flush=True
        )
    return running


def _written_at(cell: Cell, folder: Path) -> int | None:
    """Return when the cell's row was written, in nanoseconds, None without one."""
    path = folder / f"{cell.name}.json"
    return path.stat().st_mtime_ns if path.exists() else None


def status_lines(cells: Sequence[Cell], folder: Path, checkpoint_hash: str) -> list[str]:
    """Return one line per grid name (k = 1 under all three subsets) and a last line with the count of done cells."""
    states = {cell.name: cell_state(cell, folder, checkpoint_hash) for cell in cells}
    lines = [f"{name:<12} {states[cell.name]:<10} {cell.name}.json" for cell in cells for name in cell.grid_names]
    num_done = sum(state == "done" for state in states.values())
    return [*lines, f"{num_done} of {len(cells)} measurements done in {folder}"]
