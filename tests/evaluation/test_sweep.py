import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from fastdllm.evaluation import sweep
from fastdllm.evaluation.sweep import (
    GRID,
    UNHASHED,
    USUAL,
    cell_state,
    cells_to_run,
    forced_cells,
    make_cell,
    make_cells,
    points,
    run_cells,
    status_lines,
)

from .rows import cell, fake_row

SETTINGS = {**USUAL, "label": "tiny", "task": "toy", "mode": "diffusion", "reuse_k": 1, "subset": "first"}
SETTINGS |= {"schedule": "fixed", "budget": 0.0}
ROOT = Path(__file__).resolve().parents[2]
HASH = "c0ffee"


def cells_over(**axes):
    return make_cells([{**SETTINGS, **point} for point in points(axes)])


def test_cells_that_mean_the_same_are_one():
    assert cell(subset="first") == cell(subset="last") == cell(subset="middle", reuse_mode="delta")
    assert cell(top_p=0.5) == cell(top_p=0.9)  # greedy
    assert cell(mode="ar", threshold=0.5, reuse_k=1) == cell(mode="ar", threshold=0.9, sub_block_size=4)
    assert cell(reuse_k=2, subset="first").digest != cell(reuse_k=2, subset="last").digest
    assert cell(policy="factor", threshold=0.5) == cell(policy="factor", threshold=0.9)
    assert cell(use_block_cache=False) == cell(use_block_cache=False, reuse_k=3, subset="last", reuse_mode="attn")
    assert cell(use_block_cache=False) == cell(use_block_cache=False, schedule="adaptive", budget=0.1)
    assert cell(use_block_cache=False) == cell(use_block_cache=False, active_rows="needed")
    verified = cell(policy="verified")
    assert verified == cell(policy="verified", threshold=0.5, sub_block_size=4, use_block_cache=False, fuse_append=True)
    assert verified == cell(policy="verified", reuse_k=3, subset="last") != cell(policy="verified", draft_length=4)
    assert cell(draft_length=4, draft_groups="0") == cell()
    assert cell(reuse_k=2) == cell(reuse_k=2, active_rows="needed") == cell(reuse_k=2, budget=0.3)
    adaptive = {"schedule": "adaptive", "budget": 0.1, "reuse_mode": "delta"}
    assert cell(**adaptive) == cell(**adaptive, reuse_k=3, active_rows="needed") != cell(**{**adaptive, "budget": 0.2})


def test_every_setting_that_differs_shows_in_the_name():
    other = {
        "engine": "transformers", "threshold": 0.8, "use_block_cache": False, "sub_block_size": 16, "temperature": 0.5,
        "batch_size": 4, "max_new_tokens": 9, "limit": 3, "prompt": "lm_eval", "device": "cpu", "dtype": "float16",
        "label": "x", "task": "y", "mode": "ar", "reuse_k": 2, "policy": "other",
        "policy_parameter": 0.4, "fuse_append": True, "schedule": "adaptive", "active_rows": "needed", "repeat": 2,
        "adapter": "z",
    }  # fmt: skip
    drafts = {"draft_length": 4, "draft_groups": "0,8"}
    assert {*other, *drafts, "subset", "reuse_mode", "top_p", "seed", "budget"} == set(SETTINGS)
    assert cell(seed=1) == cell()  # greedy decoding draws nothing
    names = [cell(**{key: value}).name for key, value in other.items()]
    names += [cell().name, cell(reuse_k=2, subset="last").name, cell(reuse_k=2, subset="1,2").name]
    names += [cell(reuse_k=2, reuse_mode="delta").name, cell(temperature=0.5, top_p=0.5).name]
    names += [cell(policy="verified").name] + [cell(policy="verified", **{k: v}).name for k, v in drafts.items()]
    names += [cell(temperature=0.5, seed=1).name, cell(schedule="adaptive", budget=0.1).name]
    assert len(set(names)) == len(names)
    assert cell(threshold=0.8, limit=200).name == "tiny-toy-k1-threshold=0.8-limit=200"
    assert cell(label="a/b", reuse_k=2, subset="1,2").name == "a_b-toy-k2_layers1+2"


def test_the_grid_is_seven_cells_under_nine_names():
    cells = cells_over(**GRID)
    assert len(cells) == 7
    names = [name for one in cells for name in one.grid_names]
    assert names == [f"k{k}_{subset}" for k in (1, 2, 3) for subset in ("first", "middle", "last")]


def test_only_missing_stale_and_forced_cells_run_and_each_row_is_written_at_once(tmp_path):
    cells, ran = cells_over(**GRID), []

    def measure(one):
        if len(ran) == 3:
            raise KeyboardInterrupt
        ran.append(one.name)
        return fake_row(one)

    with pytest.raises(KeyboardInterrupt):
        run_cells(cells_to_run(cells, tmp_path, HASH), tmp_path, HASH, measure)
    assert sorted(path.stem for path in tmp_path.glob("*.json")) == sorted(ran)
    left = cells_to_run(cells, tmp_path, HASH)
    assert [one.name for one, _ in left] == [one.name for one in cells[3:]]
    assert {reason for _, reason in left} == {"missing"}
    forced = cells_to_run(cells[:3], tmp_path, HASH, forced_cells(cells, "k1_middle,k2_first"))
    assert [(one.grid_names[0], reason) for one, reason in forced] == [("k1_first", "forced"), ("k2_first", "forced")]
    assert len(cells_to_run(cells, tmp_path, HASH, forced_cells(cells, "all"))) == 7


def test_a_row_of_other_settings_or_weights_is_stale_and_says_why(tmp_path):
    one = cell()
    run_cells([(one, "missing")], tmp_path, HASH, fake_row)
    assert cell_state(one, tmp_path, HASH) == "done"
    assert cell_state(one, tmp_path, "other") == "stale: the checkpoint changed"
    changed = fake_row(one, config={**one.settings, "seed": 7}, config_digest="1")
    run_cells([(one, "forced")], tmp_path, HASH, lambda _: changed)
    assert cell_state(one, tmp_path, HASH) == "stale: seed changed"


def test_a_row_from_when_weights_had_formats_is_done_if_it_has_the_models_own(tmp_path):
    one = cell()
    for value, state in (("model", "done"), ("int8", "stale: weight_format changed")):
        old = {**one.settings, "weight_format": value}
        run_cells([(one, "forced")], tmp_path, HASH, lambda _, old=old: fake_row(one, config=old))
        assert cell_state(one, tmp_path, HASH) == state
        assert (make_cell(old).digest == one.digest) == (value == "model")


def test_status_counts_measurements_and_shows_all_names(tmp_path):
    cells = cells_over(**GRID)
    run_cells([(cells[0], "missing")], tmp_path, HASH, fake_row)
    lines = status_lines(cells, tmp_path, HASH)
    assert len(lines) == 10 and sum(" done " in line for line in lines[:-1]) == 3
    assert lines[-1].startswith("1 of 7")


def test_force_of_an_unknown_cell_lists_the_known_ones():
    with pytest.raises(ValueError, match="k9.*k1_first"):
        forced_cells(cells_over(**GRID), "k9")
    assert forced_cells([cell()], "") == set()
    assert sweep.short_name(cell(mode="ar").settings) == "ar"


def test_a_name_that_several_cells_share_forces_them_all():
    cells = cells_over(reuse_k=[1, 2], batch_size=[1, 32])
    assert forced_cells(cells, "k2_first") == {cells[2].name, cells[3].name}


def test_cells_are_the_product_of_the_axes_each_once():
    cells = cells_over(threshold=[0.8, 0.9], batch_size=[1, 32])
    assert [(one.settings["threshold"], one.settings["batch_size"]) for one in cells] == [
        (0.8, 1), (0.8, 32), (0.9, 1), (0.9, 32),
    ]  # fmt: skip
    cells = cells_over(policy=["threshold", "factor"], threshold=[0.8, 0.9])
    assert [(one.settings["policy"], one.settings["threshold"]) for one in cells] == [
        ("threshold", 0.8), ("threshold", 0.9), ("factor", None),
    ]  # fmt: skip
    assert points({}) == [{}]


def test_repeats_run_all_cells_once_and_then_all_again():
    cells = make_cells([{**SETTINGS, "threshold": value} for value in (0.8, 0.9)], repeat=3)
    assert [(one.settings["repeat"], one.settings["threshold"]) for one in cells] == [
        (1, 0.8), (1, 0.9), (2, 0.8), (2, 0.9), (3, 0.8), (3, 0.9),
    ]  # fmt: skip
    assert cells[1].name == "tiny-toy-k1" and cells[3].name == "tiny-toy-k1-repeat=2"
    assert len({one.digest for one in cells}) == 6


COMMITTED = [
    path
    for path in (*ROOT.glob("data/*/rows/*.json"), *ROOT.glob("experiments/*/rows/**/*.json"))
    if "config_digest" in json.loads(path.read_text())  # others are of benchmarks
]


@pytest.mark.parametrize("path", COMMITTED, ids=[path.stem for path in COMMITTED])
def test_a_committed_row_keeps_its_name_and_its_digest_and_is_done(path):
    row = json.loads(path.read_text())
    one = make_cell(row["config"])
    assert one.name == row["cell"]
    if path.stem == row["cell"]:  # three files were renamed by hand
        assert cell_state(one, path.parent, row["checkpoint_hash"]) == "done"
    if "fuse_append" in row["config"]:  # others are from before appends could be fused, which digests of today hold
        assert one.digest == row["config_digest"]


def test_rows_of_several_generations_are_committed():
    assert len(COMMITTED) >= 15
    configs = [json.loads(path.read_text())["config"] for path in COMMITTED]
    assert {"fuse_append" in config for config in configs} == {True, False}


def test_what_came_later_is_in_a_digest_only_where_it_is_unusual():
    assert cell().digest == cell(**UNHASHED).digest
    unusual = [cell(repeat=2), cell(active_rows="needed"), cell(reuse_k=2), cell(schedule="adaptive", budget=0.1)]
    assert len({one.digest for one in [cell(), *unusual]}) == 5


def sweep_in_a_process(folder, cells, force="", seconds=0.01, meet=None):
    """Start a process that runs what is missing and writes the name of each cell that it measures into a log.

    At its first cell it waits for the others at the barrier `meet`.
    """
    met = []

    def measure(one):
        if meet and not met:
            met.append(meet.wait(timeout=60))
        with (folder / "log").open("a") as log:
            log.write(f"{one.name}\n")
        time.sleep(seconds)
        return fake_row(one)

    def work():
        run_cells(cells_to_run(cells, folder, HASH, forced_cells(cells, force)), folder, HASH, measure)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def log_of(folder):
    return (folder / "log").read_text().split() if (folder / "log").exists() else []


def wait_for_log(folder, length):
    until = time.monotonic() + 20
    while len(log_of(folder)) < length:
        assert time.monotonic() < until
        time.sleep(0.005)


@pytest.mark.parametrize("force", ["", "all"])
def test_two_processes_measure_every_cell_of_a_grid_once(tmp_path, force):
    cells, meet = cells_over(**GRID), multiprocessing.get_context("fork").Barrier(2)
    if force:
        run_cells(cells_to_run(cells, tmp_path, HASH), tmp_path, HASH, lambda one: fake_row(one, revision="old"))
    for process in [sweep_in_a_process(tmp_path, cells, force, meet=meet) for _ in range(2)]:
        process.join()
        assert process.exitcode == 0
    assert sorted(log_of(tmp_path)) == sorted(one.name for one in cells)
    assert all(cell_state(one, tmp_path, HASH) == "done" for one in cells)
    assert not list(tmp_path.glob(".*.lock"))


def test_a_cell_of_another_process_is_skipped_and_named_at_the_end(tmp_path, capsys):
    cells = cells_over(batch_size=[1, 2])
    other = sweep_in_a_process(tmp_path, cells[:1], seconds=60)
    wait_for_log(tmp_path, 1)
    assert run_cells(cells_to_run(cells, tmp_path, HASH), tmp_path, HASH, fake_row) == cells[:1]
    printed = capsys.readouterr().out
    assert f"[1/2] {cells[0].name}: skipped, process {other.pid} on" in printed
    assert f"still run by others: {cells[0].name} (process {other.pid} on" in printed.splitlines()[-1]
    os.kill(other.pid, signal.SIGKILL)
    other.join()
    assert run_cells(cells_to_run(cells, tmp_path, HASH), tmp_path, HASH, fake_row) == []  # the dead hold nothing
    assert all(cell_state(one, tmp_path, HASH) == "done" for one in cells)


def test_a_cell_whose_process_dies_meanwhile_is_measured_in_the_end(tmp_path):
    cells = cells_over(batch_size=[1, 2])
    other = sweep_in_a_process(tmp_path, cells[:1], seconds=60)
    wait_for_log(tmp_path, 1)
    ran = []

    def measure(one):
        if not ran:
            os.kill(other.pid, signal.SIGKILL)
            other.join()
        ran.append(one.name)
        return fake_row(one)

    assert run_cells(cells_to_run(cells, tmp_path, HASH), tmp_path, HASH, measure) == []
    assert ran == [cells[1].name, cells[0].name]


def test_a_row_that_came_since_the_listing_is_not_measured_again(tmp_path, capsys):
    cells = cells_over(batch_size=[1, 2])
    listed = cells_to_run(cells, tmp_path, HASH)
    sweep.write_row(tmp_path, fake_row(cells[0]))
    ran = []
    run_cells(listed, tmp_path, HASH, lambda one: ran.append(one) or fake_row(one))
    assert ran == [cells[1]] and "done by another process meanwhile" in capsys.readouterr().out
