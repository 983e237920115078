"""benchmarks/decode_speed.py: a replayed trace reveals what it says, rows hold what they promise."""

import importlib
import json
from pathlib import Path

import pytest
import torch

from fastdllm.decoding.engine import DecodeConfig, Engine, Request
from fastdllm.decoding.state import COUNTERS
from fastdllm.model import BlockDiffusionLM

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
MASK = 3


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


class WatchedEngine(Engine):
    """Notes how many tokens each denoising step of each slot revealed, and which places were still masked after it."""

    def _advance(self, rows):
        before = self.state.counts.clone()
        super()._advance(rows)
        grown = (self.state.counts - before).tolist()
        for row in rows:
            counts = dict(zip(COUNTERS, grown[row.slot], strict=True))
            if counts["denoise_passes"]:
                self.revealed.setdefault(row.index, []).append(counts["computed_tokens"])


@pytest.mark.parametrize("batch_size", [1, 3])
def test_each_denoising_step_reveals_what_the_trace_says(load, tiny_qwen, byte_tokenizer, batch_size):
    replay, speed = load("replay"), load("decode_speed")
    model = BlockDiffusionLM(tiny_qwen, mask_token_id=MASK)
    engine = WatchedEngine(model, byte_tokenizer, decode=DecodeConfig(policy="fixed"), batch_size=batch_size)
    engine.stop_ids, engine.steps_class, engine.revealed = frozenset({-1}), replay.replaying(speed.TRACE), {}
    prompts = [list(range(10, 10 + 32 * (1 + index))) for index in range(3)]
    done = list(engine.run(Request(prompt=prompt, max_new_tokens=96) for prompt in prompts))
    assert [engine.revealed[answer.index] for answer in done] == [3 * speed.TRACE] * 3
    for answer in done:
        assert (len(answer.tokens), answer.denoise_passes, answer.append_passes) == (96, 3 * 13, 2)
        assert answer.full_passes == 3 * 4  # tokens come from left to right: one for each sub-block


def test_the_published_threshold_accepts_what_the_trace_says_from_left_to_right(load):
    threshold = load("replay").ReplayedThreshold([2, 1])
    for accepted in ([[1, 1, 0, 0], [0, 1, 0, 1]], [[1, 0, 0, 0], [0, 1, 0, 0]]):
        confidence = torch.tensor([[0.1, 0.2, 0.3, 0.4], [-torch.inf, 0.1, -torch.inf, 0.9]])
        assert torch.equal(confidence > threshold, torch.tensor(accepted).bool())
        assert confidence.argmax(-1).tolist() == [0, 1]  # what is accepted besides, is accepted already
    assert threshold.num_steps == 2


@pytest.mark.parametrize("trace", [[], [31], [7, 8, 8, 7], [7, 8, 8, 8, 1], [3, 5, 7, 8, 8], [7, 0, 8, 8, 8]])
def test_a_trace_that_does_not_fill_the_sub_blocks_is_refused(load, trace):
    with pytest.raises(ValueError, match="trace must hold"):
        load("decode_speed").SpeedConfig(trace=trace)


def test_rows_hold_their_fields_and_make_a_report(load, tmp_path, capsys):
    speed, report = load("decode_speed"), load("decode_report")
    cells = ["tiny/token/1x1/c128", "tiny/full/32x1/c128", "tiny/answers/fastdllm*/b1"]
    options = dict(cells=cells, passes=2, repeats=1, prompt_tokens=32, new_tokens=32, output=str(tmp_path / "rows"))
    speed.measure(speed.SpeedConfig(**options))
    assert "Left out" not in capsys.readouterr().out
    rows = {row["cell"]: row for row in report.read_rows((tmp_path / "rows").glob("*.json"))}
    assert len(rows) == 4 and all(tuple(row) == report.ROW_FIELDS for row in rows.values())
    full, answers = rows["tiny/full/32x1/c128"], rows["tiny/answers/fastdllm/b1"]
    assert full["rows"] == 32 and full["ms_per_forward"] > 0 and full["bandwidth_fraction"] > 0
    assert answers["tokens"] == 32 and answers["tokens_per_forward"] == pytest.approx(32 / 13)
    assert rows["tiny/answers/fastdllm_ar/b1"]["tokens_per_forward"] == 1
    speed.measure(speed.SpeedConfig(report=True, output=str(tmp_path / "rows")))
    written = (tmp_path / "results.md").read_text()
    assert "| tiny | full | 32 | 1 | 128 |" in written and (tmp_path / "batches.png").stat().st_size > 1000
    (tmp_path / "results.md").write_text(written.replace("**Command.**", "**Verdict.** Ours."))
    report.write_report(tmp_path / "rows")
    assert (tmp_path / "results.md").read_text() == written.replace("**Command.**", "**Verdict.** Ours.")
    (tmp_path / "results.md").write_text("# No comments\n")
    with pytest.raises(ValueError, match="results.md has no comment <!-- report: decode_speed"):
        report.write_report(tmp_path / "rows")
    assert json.loads((tmp_path / "rows/tiny-token-1x1-c128.json").read_text())["engine"] == "fastdllm_ar"


def test_cells_of_reuse_stand_beside_their_bounds(load, tmp_path, capsys):
    speed, report = load("decode_speed"), load("decode_report")
    options = dict(repeats=1, prompt_tokens=32, new_tokens=64, output=str(tmp_path / "rows"))
    speed.measure(speed.SpeedConfig(cells=["tiny/reuse/*/b1"], **options))
    rows = {row["engine"]: row for row in report.read_rows((tmp_path / "rows").glob("*.json"))}
    assert rows.keys() == load("decode_bench").REUSES.keys() and len({row["tokens"] for row in rows.values()}) == 1
    head, *lines = report.reuse_table(list(rows.values()))
    bounds = {line[1]: [float(number) for number in line[-2:]] for line in lines}
    assert bounds["none"] == [1, 1] and bounds["attn_k2"][0] == 1
    assert bounds["output_k3"][0] > bounds["output_k2"][0] > bounds["delta_k2"][0] > 1
    assert bounds["trim"][1] > 1 == bounds["trim"][0]
    assert "bound by rows" in capsys.readouterr().out


def test_the_crossover_lies_between_the_batches_where_the_order_changes(load):
    crossover = load("decode_report").crossover
    assert crossover({1: 200.0, 16: 400.0}, {1: 100.0, 16: 800.0}) == pytest.approx(4)
    assert crossover({1: 200.0, 16: 900.0}, {1: 100.0, 16: 800.0}) is None


def test_cells_are_chosen_by_name_and_a_name_of_none_is_refused(load):
    speed = load("decode_speed")
    default = speed.chosen_cells(speed.SpeedConfig())
    assert {cell.shape for cell in default} == {"qwen2.5-0.5b", "qwen2.5-1.5b"}
    assert not any(cell.engine == "published" for cell in default)
    assert {cell.rows for cell in default} == {0, 1, 8, 32, 64, 128}
    with pytest.raises(ValueError, match="no cell is called"):
        speed.SpeedConfig(cells=["qwen2.5-1.5b/fill/*"])
    with pytest.raises(ValueError, match="--published"):
        speed.SpeedConfig(cells=["*/published/*"])
    with pytest.raises(ValueError, match="only passes"):
        speed.SpeedConfig(profile=True)


@pytest.mark.parametrize("draft_length", [3, 8])
def test_each_verifying_pass_accepts_what_the_trace_says(load, tiny_qwen, byte_tokenizer, draft_length):
    trace = [2, 0, 5, 1, 9, 3, 0]
    model = BlockDiffusionLM(tiny_qwen, mask_token_id=MASK, context_attention="causal")
    decode = DecodeConfig(policy="verified", draft_length=draft_length)
    engine = WatchedEngine(model, byte_tokenizer, decode=decode, batch_size=2)
    engine.stop_ids, engine.steps_class = frozenset({-1}), load("replay").accepting(trace)
    engine.revealed = {}
    prompts = [list(range(10, 20 + index)) for index in range(3)]
    requests = [Request(prompt=prompt, max_new_tokens=40, seed=seed) for seed, prompt in enumerate(prompts)]
    for done in engine.run(requests):
        assert len(done.tokens) == 40
        revealed = [number - 1 for number in engine.revealed[done.index]]
        asked = [trace[(n + 31 * done.index) % 7] for n in range(len(revealed))]
        # the first pass has no drafts, the last ones are cut by the limit
        assert revealed[0] == 0 and revealed[1:-2] == [min(number, draft_length) for number in asked][1:-2]
        assert done.accepted_drafts == sum(revealed)


def test_accepted_drafts_are_drawn_by_a_rate_or_by_what_was_measured(load, tmp_path):
    draw, file = load("replay").draw_accepted, tmp_path / "row.json"
    drawn = torch.tensor(draw(0.75, ""))
    assert drawn.float().mean() == pytest.approx(3, rel=0.15) and (drawn >= 4).float().mean() == pytest.approx(
        0.75**4, rel=0.15
    )
    assert draw(0.0, "") == [0] * len(drawn) and draw(0.75, "") == drawn.tolist()
    file.write_text(json.dumps({"accepted_counts": [10, 0, 30]}))
    measured = torch.tensor(draw(0.5, str(file)))
    assert set(measured.tolist()) == {0, 2} and (measured == 2).float().mean() == pytest.approx(0.75, rel=0.1)
    file.write_text("{}")
    for arguments, message in (((1.0, ""), "acceptance must be in"), ((0.5, str(file)), "has no accepted_counts")):
        with pytest.raises(ValueError, match=message):
            draw(*arguments)


def test_verified_cells_stand_beside_ar_and_passes_give_a_cost_table(load, tmp_path, capsys):
    speed, report = load("decode_speed"), load("decode_report")
    cells = ["tiny/verified/d4/b1", "tiny/verified/chosen/b1", "tiny/answers/fastdllm_ar/b1"]
    cells += ["tiny/verify/1x1/c128", "tiny/verify/16x1/c128"]
    options = dict(passes=2, repeats=1, prompt_tokens=32, new_tokens=32, output=str(tmp_path))
    speed.measure(speed.SpeedConfig(cells=cells, acceptance=0.9, **options))
    rows = {row["cell"]: row for row in report.read_rows(tmp_path.glob("*.json"))}
    assert rows.keys() == set(cells)
    ours, plain = rows["tiny/verified/d4/b1"], rows["tiny/answers/fastdllm_ar/b1"]
    assert ours["tokens"] == 32 and ours["tokens_per_forward"] > 2
    assert ours["speedup_over_own_ar"] == ours["tokens_per_second"] / plain["tokens_per_second"]
    assert ours["speedup_over_transformers"] is None and "speedup_over_own_ar" not in plain
    said = capsys.readouterr().out
    assert "Left out" not in said and "PASS_COSTS of tiny: ((1, " in said and "of own AR" in said
    assert {row for row in load("decode_bench").PLANS} == {1, 7, 16, 31, 64, 81, 127, 256}
