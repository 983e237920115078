import json

from fastdllm.evaluation.store import SampleStore, digest

IDENTITY = {"config_digest": "abc", "checkpoint_hash": "c0ffee"}
FIRST, SECOND = ("toy", 0, 0, "d0"), ("toy", 1, 0, "d1")


def filled(path):
    store = SampleStore(path, IDENTITY)
    store.add(FIRST, {"text": "eins\u2028\n"}, seconds=1.5, decode_seconds=1.0)
    store.add(SECOND, [-0.1, True], seconds=0.5)
    return store


def test_what_was_added_is_there_before_the_store_is_closed(tmp_path):
    filled(tmp_path / "samples" / "x.partial.jsonl")
    again = SampleStore(tmp_path / "samples" / "x.partial.jsonl", IDENTITY)
    assert again.samples == {FIRST: {"text": "eins\u2028\n"}, SECOND: [-0.1, True]}
    assert (again.seconds, again.decode_seconds) == (2.0, 1.0)


def test_a_file_cut_anywhere_loses_only_the_sample_that_was_cut(tmp_path):
    path = tmp_path / "x.partial.jsonl"
    filled(path).close()
    whole = path.read_bytes()
    ends = [place for place, byte in enumerate(whole) if byte == ord("\n")]
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        store = SampleStore(path, IDENTITY)
        assert list(store.samples) == [FIRST, SECOND][: max(0, sum(end < length for end in ends) - 1)]
        store.add(SECOND, "anew", seconds=4.0)
        store.close()
        assert SECOND in SampleStore(path, IDENTITY).samples
    assert len(list(tmp_path.glob("*.jsonl"))) == 1


def test_samples_of_another_measurement_are_set_aside_with_a_message(tmp_path, capsys):
    path = tmp_path / "x.partial.jsonl"
    filled(path).close()
    text = path.read_text()
    for number, identity in enumerate(({**IDENTITY, "config_digest": "other"}, {**IDENTITY, "device": "cpu"}), 1):
        store = SampleStore(path, identity)
        assert not store.samples and store.seconds == 0
        message = capsys.readouterr().out
        assert ("config_digest" if number == 1 else "config_digest, device") in message and "set aside as" in message
        store.close()
        assert (tmp_path / f"x.partial.{number}.jsonl").exists()
    assert (tmp_path / "x.partial.1.jsonl").read_text() == text


def test_of_two_lines_for_one_sample_the_first_counts(tmp_path):
    path = tmp_path / "x.partial.jsonl"
    store = filled(path)
    store.add(FIRST, "again", seconds=9.0)
    store.close()
    assert len(path.read_text().splitlines()) == 3
    with path.open("a") as file:
        file.write(json.dumps({"key": FIRST, "sample": "again", "seconds": 9.0, "decode_seconds": 0.0}) + "\n")
    again = SampleStore(path, IDENTITY)
    assert again.samples[FIRST]["text"].startswith("eins") and again.seconds == 2.0


def test_a_line_that_is_no_json_costs_that_line_alone(tmp_path):
    path = tmp_path / "x.partial.jsonl"
    filled(path).close()
    header, first, second = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([header, b"\0\xff" * 20, second]) + b"\n")
    assert list(SampleStore(path, IDENTITY).samples) == [SECOND]


def test_removed_is_gone_and_digests_tell_what_was_read_apart(tmp_path):
    store = filled(tmp_path / "x.partial.jsonl")
    store.remove()
    assert not list(tmp_path.glob("*.jsonl"))
    assert len({digest([1, 2], [3]), digest([1], [2, 3]), digest([1, 2, 3])}) == 3
