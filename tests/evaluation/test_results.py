import json
import math

import pytest

from fastdllm.evaluation.plots import draw_accuracy
from fastdllm.evaluation.results import (
    ROW_FIELDS,
    caption,
    make_row,
    markdown,
    print_table,
    ratios,
    read_rows,
    table_lines,
    write_row,
)
from fastdllm.evaluation.scoring import score

from .rows import cell, fake_row


def rows():
    cells = [cell(mode="ar", label="tiny"), cell(), cell(reuse_k=2), cell(reuse_k=3, subset="last", reuse_mode="delta")]
    return [fake_row(one) for one in cells]


def test_ratios_are_recomputed_from_the_raw_counters(tmp_path):
    row = json.loads(write_row(tmp_path, rows()[1]).read_text())
    assert row["tokens_per_forward"] == 60 / (20 + 10)
    assert row["tokens_per_second"] == 60 / 4 and row["decode_tokens_per_second"] == 60 / 3
    assert ratios(row) == {name: row[name] for name in ratios(row)}


def test_autoregressive_rows_count_single_token_passes_and_have_no_append_passes():
    row = rows()[0]
    assert row["append_passes"] is None and row["tokens_per_forward"] == 60 / 20


def test_ratios_of_what_does_not_apply_are_null():
    nothing = dict.fromkeys(("counted_tokens", "denoise_passes", "append_passes", "decode_seconds"))
    assert set(ratios({**nothing, "seconds": 3.0}).values()) == {None}


def test_score_has_the_binomial_error_and_each_split():
    result = score([1, 0, 1, 1], ["a", "a", "b", None])
    assert result["accuracy"] == 0.75 and result["accuracy_stderr"] == pytest.approx(math.sqrt(0.75 * 0.25 / 4))
    assert result["accuracy_by_split"] == {"a": 0.5, "b": 1.0}
    assert score([1.0], [None])["accuracy_by_split"] is None


def test_a_row_has_every_field_and_no_other():
    assert set(make_row()) == set(ROW_FIELDS)
    with pytest.raises(ValueError, match="no field speed"):
        make_row(speed=1)


def test_a_half_written_or_foreign_file_is_not_a_row(tmp_path):
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ValueError, match="not a row"):
        read_rows(tmp_path)
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match="lacks the row fields"):
        read_rows(tmp_path)


@pytest.mark.parametrize("change", [{"revision": "fedcba9876543210"}, {"is_dirty": True}])
def test_tables_and_figures_refuse_mixed_revisions_unless_told_to_show_them(change, tmp_path):
    mixed = [*rows(), fake_row(cell(), **change)]
    for use in (table_lines, print_table, lambda some: draw_accuracy(some, tmp_path / "x.png")):
        with pytest.raises(ValueError, match="one code revision.*--show_mixed_revisions"):
            use(mixed)
    assert table_lines(mixed, show_mixed_revisions=True)[0][-1] == "revision"
    assert table_lines([*rows(), fake_row(cell(sub_block_size=16))])[0][-1] == "sub_block_size"


def test_the_table_names_model_tokens_and_decoding(capsys):
    print_table(rows())
    header, *lines = table_lines(rows())
    assert [line[2] for line in lines] == [
        "AR, token by token",
        "threshold 0.9, k1 (no reuse)",
        "threshold 0.9, k2 first (output)",
        "threshold 0.9, k3 last (delta)",
    ]
    assert lines[1][:2] == ["tiny", "1,000"] and "revision" not in header
    assert markdown([header, *lines]).count("\n| ") == 5
    assert "cpu, float32" in caption(rows()) and "4 problems" in caption(rows())


def test_adaptive_reuse_and_active_rows_are_named_where_they_are_unusual():
    adaptive = cell(schedule="adaptive", budget=0.1, reuse_mode="delta", subset="last")
    rows = [fake_row(one) for one in (adaptive, cell(active_rows="needed"), cell(reuse_k=2, active_rows="needed"))]
    assert [line[2] for line in table_lines(rows)[1:]] == [
        "threshold 0.9, adaptive 0.1 last (delta)",
        "threshold 0.9, k1 (no reuse), active rows needed",
        "threshold 0.9, k2 first (output)",
    ]


def test_repeats_of_a_cell_are_one_line_with_mean_and_spread():
    again = [fake_row(cell(repeat=number), tokens_per_second=speed) for number, speed in ((1, 15.0), (2, 21.0))]
    header, line, other = table_lines([*again, fake_row(cell(reuse_k=2))])
    assert line[3:6] == ["75.0 % (30.1 to 95.4)", "2.00", "18.0 (15.0 to 21.0)"]
    assert header[-1] == "repeats" and (line[-1], other[-1]) == ("2", "1") and other[5] == "15.0"
    again[1]["accuracy"] = 0.5
    assert table_lines(again)[1][3] == "62.5 % (repeats: 50.0 to 75.0)"
    assert "repeats: mean" in caption(again) and "repeats" not in caption(again[:1])


def test_rows_of_two_devices_or_checkpoints_are_no_repeats_of_one_another():
    for change in ({"device": "other"}, {"checkpoint_hash": "other"}, {"revision": "fedcba9876543210"}):
        lines = table_lines([fake_row(cell()), fake_row(cell(repeat=2), **change)], show_mixed_revisions=True)
        assert len(lines) == 3 and "repeats" not in lines[0]


def speed_ups(rows, **options):
    header, *lines = table_lines(rows, **options)
    return [line[header.index("of our AR") : header.index("of transformers' AR") + 1] for line in lines]


def test_a_speed_up_is_over_the_baseline_of_either_engine_under_the_same_conditions():
    ours = [fake_row(cell(mode="ar", repeat=n), tokens_per_second=speed) for n, speed in ((1, 20.0), (2, 30.0))]
    theirs = fake_row(cell(mode="ar", engine="transformers"), tokens_per_second=5.0)
    diffusion = fake_row(cell(), tokens_per_second=50.0)
    assert speed_ups([*ours, theirs, diffusion]) == [["1.00", "5.00"], ["0.20", "1.00"], ["2.00", "10.00"]]
    assert speed_ups([diffusion]) == [["-", "-"]]
    for change in ({"device": "other"}, {"batch_size": 1}, {"num_samples": 5}, {"revision": "fedcba9876543210"}):
        assert speed_ups([fake_row(cell(), **change), *ours], show_mixed_revisions=True)[0] == ["-", "-"]
    assert speed_ups([fake_row(cell(max_new_tokens=9)), *ours])[0] == ["-", "-"]


def test_of_two_baselines_the_one_with_the_rows_weights_counts_else_none():
    small = fake_row(cell(mode="ar", label="small"), checkpoint_hash="1", tokens_per_second=20.0)
    large = fake_row(cell(mode="ar", label="large"), checkpoint_hash="2", tokens_per_second=10.0)
    own, other = (fake_row(cell(), checkpoint_hash=digest, tokens_per_second=40.0) for digest in "23")
    assert [line[0] for line in speed_ups([small, large, own, other])] == ["1.00", "1.00", "4.00", "-"]


def test_tokens_counted_and_computed_stand_beside_each_other_and_the_terminal_leaves_dashes_out(capsys):
    header, line = table_lines([fake_row(cell())])
    assert (line[header.index("tokens counted")], line[header.index("computed")]) == ("60", "64")
    print_table([fake_row(cell())])
    printed = capsys.readouterr().out
    assert "computed" in printed and "AR" not in printed


def test_rows_of_two_tasks_say_which():
    lines = table_lines([fake_row(cell()), fake_row(cell(task="other"))])
    assert [line[-1] for line in lines] == ["task", "toy", "other"]


def test_the_figure_is_a_small_png(tmp_path):
    path = draw_accuracy(rows(), tmp_path / "figure.png")
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size < 200_000
    with pytest.raises(ValueError, match="at least one row"):
        draw_accuracy([], path)
