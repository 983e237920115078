"""A row becomes a run of TensorBoard: read back by TensorBoard's own reader."""

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from fastdllm.evaluation.events import write_events

from .rows import cell, fake_row


def read(folder):
    """Return the scalars and the hyper-parameters of a run."""
    events = EventAccumulator(str(folder)).Reload()
    scalars = {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    content = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    session = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info
    values = {name: getattr(value, value.WhichOneof("kind")) for name, value in session.hparams.items()}
    return scalars, values


def test_a_row_is_a_run_with_its_settings_and_metrics(tmp_path):
    write_events(tmp_path / "cell", fake_row(cell(threshold=0.8)))
    scalars, settings = read(tmp_path / "cell")
    assert scalars == {
        "evaluation/accuracy": [0.75], "evaluation/tokens_per_forward": [2.0], "evaluation/tokens_per_second": [15.0],
    }  # fmt: skip
    assert settings["threshold"] == 0.8 and settings["task"] == "toy" and settings["data_tokens"] == 1000
    assert "subset" not in settings  # does not apply at reuse_k 1


def test_a_row_measured_again_replaces_its_events_and_what_it_lacks_is_left_out(tmp_path):
    write_events(tmp_path, fake_row(cell()))
    write_events(tmp_path, fake_row(cell(), accuracy=0.5, tokens_per_forward=None))
    scalars, _ = read(tmp_path)
    assert scalars == {"evaluation/accuracy": [0.5], "evaluation/tokens_per_second": [15.0]}
