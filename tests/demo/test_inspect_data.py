import io
import json

from rich.console import Console

from fastdllm.data.datamodule import DataConfig
from fastdllm.demo.inspect_data import MASKED, inspect_data, main
from fastdllm.draft import DraftConfig
from fastdllm.objective import ObjectiveConfig


def test_both_views_are_shown_and_mask_each_response_token_once(tmp_path, byte_tokenizer):
    row = {"prompt": "One and one?", "response": "That makes two."}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    data = DataConfig(path=str(tmp_path / "a.jsonl"), sample_length=128, cache_dir=str(tmp_path), num_workers=0)
    output = io.StringIO()
    mask_token_id = byte_tokenizer.convert_tokens_to_ids("|<MASK>|")
    inspect_data(
        data,
        ObjectiveConfig(block_size=16),
        0,
        byte_tokenizer,
        mask_token_id,
        rows=1,
        console=Console(file=output, width=100),
    )
    shown = output.getvalue().split("sample 0")[1:]
    assert len(shown) == 3  # clean, view a, view b
    assert "One and one?" in shown[0].replace("│", "") and MASKED not in shown[0]
    assert shown[1].count(MASKED) + shown[2].count(MASKED) == len("That makes two.") + 2


def test_the_command_reads_a_training_config(tmp_path, byte_tokenizer, tiny_qwen, capsys):
    tiny_qwen.save_pretrained(tmp_path / "model")
    byte_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "p", "response": "r"}))
    (tmp_path / "run.yaml").write_text(
        f"name: x\ncheckpoint: {tmp_path}/model\nmax_steps: 1\n"
        f"data: {{path: {tmp_path}/a.jsonl, cache_dir: {tmp_path}/prepared, sample_length: 64}}\n"
    )
    main(["--config", str(tmp_path / "run.yaml"), "--rows", "1"])
    assert "view b" in capsys.readouterr().out


def test_windows_are_marked_in_the_clean_text(tmp_path, byte_tokenizer):
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "One and one?", "response": "That makes two."}))
    data = DataConfig(path=str(tmp_path / "a.jsonl"), sample_length=64, cache_dir=str(tmp_path), num_workers=0)
    output, mask_token_id = io.StringIO(), byte_tokenizer.convert_tokens_to_ids("|<MASK>|")
    console = Console(file=output, width=100)
    draft = DraftConfig(window=16, rows_per_token=1.0)
    inspect_data(data, draft, 0, byte_tokenizer, mask_token_id, rows=1, console=console)
    text = output.getvalue()
    assert "4 of 4 windows of 16 mask rows drawn" in text and "view a" not in text
    assert text.split("sample 0")[1].count("│") == 4
