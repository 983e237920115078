"""The engine's traces against the plain decoders' own, and the file they are kept in."""

import json
from dataclasses import replace

import pytest

from fastdllm.decoding import record as record_module
from fastdllm.decoding.engine import DecodeConfig, Engine, Request
from fastdllm.decoding.record import record
from fastdllm.decoding.reference import causal_logits, decode_plain, decode_with_stale_keys
from fastdllm.decoding.reuse import ReuseConfig
from fastdllm.decoding.trace import Trace, read_trace, write_trace

from .test_engine import TIE, make_model, make_prompts

LIMIT = 30


def decode(byte_tokenizer, length=9, *, context="block", mode="diffusion", reuse=None, **options):
    model = make_model(context=context)
    request = Request(prompt=make_prompts([length])[0], max_new_tokens=LIMIT)
    options = dict(mode=mode, decode=DecodeConfig(**options), reuse=reuse or ReuseConfig())
    return model, request, *record(model, byte_tokenizer, request, **options)


def written(steps):
    return {token.place: token for step in steps for token in step.tokens}


@pytest.mark.parametrize("length", [5, 8, 16])
@pytest.mark.parametrize("reuse", [{}, {"reuse_k": 2, "subset": "middle"}, {"active_rows": "needed"}], ids=str)
def test_each_denoising_step_unmasks_what_the_plain_decoder_does_as_surely(byte_tokenizer, length, reuse):
    options = dict(threshold=0.4, sub_block_size=4)
    model, request, done, steps, _ = decode(byte_tokenizer, length, reuse=ReuseConfig(**reuse), **options)
    stops = Engine(model, byte_tokenizer).stop_ids
    plain = decode_with_stale_keys(
        model,
        request.prompt,
        max_new_tokens=LIMIT,
        stop_ids=stops,
        reuse_k=reuse.get("reuse_k", 1),
        is_trimmed="active_rows" in reuse,
        is_traced=True,
        **options,
    )
    assert plain.margins[0] > TIE and done.tokens == plain.tokens
    denoised = [step for step in steps if step.kind in ("full", "sub_block", "reuse")]
    assert len(denoised) == len(plain.trace) == done.denoise_passes
    for step, candidates in zip(denoised, plain.trace, strict=True):
        accepted = [one for one in candidates if one.is_accepted]
        assert [token.place for token in step.tokens] == [one.place for one in accepted]
        assert [token.token for token in step.tokens] == [one.token for one in accepted]
        confidences = [one.confidence for one in accepted]
        assert [token.confidence for token in step.tokens] == pytest.approx(confidences, rel=1e-4, abs=1e-6)
        for token in step.tokens:  # greedy: what else there was is less likely
            assert len(token.alternatives) == 4 and token.token not in [other.token for other in token.alternatives]
            assert token.confidence >= token.alternatives[0].probability >= token.alternatives[-1].probability
    found = written(steps)
    assert [found[len(request.prompt) + place].token for place in range(len(done.tokens))] == done.tokens


@pytest.mark.parametrize(
    ("options", "reused"),
    [
        ({"reuse_mode": "output"}, [0, 1, 2, 3]),
        ({"reuse_mode": "output_by_layer"}, [1, 2]),
        ({"reuse_mode": "delta"}, [1, 2]),
    ],
)
def test_layers_left_out_are_those_that_the_engine_did_not_count(byte_tokenizer, options, reused):
    reuse = ReuseConfig(reuse_k=2, subset="1,2", **options)
    model, _, done, steps, _ = decode(byte_tokenizer, reuse=reuse, threshold=1.0, sub_block_size=4)
    by_kind = {kind: [step for step in steps if step.kind == kind] for kind in {step.kind for step in steps}}
    assert {"full", "sub_block", "reuse", "append", "prefill"} == by_kind.keys()
    assert all(step.reused == (reused if step.kind == "reuse" else []) for step in steps)
    assert sum(model.num_layers - len(step.reused) for step in steps) == done.layers_run
    assert all(
        step.rows == (8 if step.kind in ("full", "append") else 4)
        for step in steps
        if len(step.reused) < 3 and step.kind != "prefill"
    )


def test_a_probe_belongs_to_the_step_that_it_decides(byte_tokenizer):
    reuse = ReuseConfig(schedule="adaptive", budget=2.0, reuse_mode="delta", subset="2,3")
    model, _, done, steps, _ = decode(byte_tokenizer, reuse=reuse, threshold=1.0, sub_block_size=4)
    denoised = [step for step in steps if step.kind in ("full", "sub_block", "reuse")]
    assert len(denoised) == done.denoise_passes and {"sub_block", "reuse"} <= {step.kind for step in denoised}
    assert sum(model.num_layers - len(step.reused) for step in steps) == done.layers_run


@pytest.mark.parametrize("options", [{"mode": "ar"}, {"policy": "verified", "draft_length": 3}], ids=str)
def test_token_by_token_each_token_has_the_probability_of_a_causal_pass(byte_tokenizer, options):
    model, request, done, steps, timing = decode(byte_tokenizer, context="causal", **options)
    probability = causal_logits(model, request.prompt + done.tokens).softmax(-1)
    found = written(steps)
    for place, token in enumerate(done.tokens, len(request.prompt)):
        assert found[place].token == token
        assert found[place].confidence == pytest.approx(float(probability[place - 1, token]), rel=1e-4, abs=1e-6)
    assert {step.kind for step in steps} == {"prefill", "verify" if "policy" in options else "token"}
    assert timing == "undisturbed"


def test_an_append_that_brings_the_next_step_along_writes_more_than_one_token(byte_tokenizer):
    _, _, _, steps, _ = decode(byte_tokenizer, 5, fuse_append=True, threshold=1.0, sub_block_size=4)
    plain = decode(byte_tokenizer, 5, threshold=1.0, sub_block_size=4)
    assert max(len(step.tokens) for step in steps if step.kind == "append") > 1
    ours, theirs = written(steps), written(plain[3])
    assert {place: token.token for place, token in ours.items()} == {p: token.token for p, token in theirs.items()}
    for place, token in ours.items():
        assert token.confidence == pytest.approx(theirs[place].confidence, rel=1e-4, abs=1e-6)


def test_seconds_are_those_of_a_run_that_records_nothing(byte_tokenizer, monkeypatch):
    seen = []
    step = record_module._RecordingEngine._step

    def slow(self, *arguments):
        record_module.time.sleep(0.02)
        seen.append(self)
        return step(self, *arguments)

    monkeypatch.setattr(record_module._RecordingEngine, "_step", slow)
    _, _, _, steps, timing = decode(byte_tokenizer, threshold=0.4, sub_block_size=4)
    ends = [step.seconds for step in steps]
    assert timing == "undisturbed" and ends == sorted(ends) and ends[0] > 0
    assert ends[-1] < 0.02 * len(seen)  # recording alone took longer


def test_an_engine_that_runs_ahead_of_its_host_is_timed_pass_by_pass(byte_tokenizer, monkeypatch):
    set_up = Engine._set_up

    def ahead(self, waiting):  # as with CUDA graphs: one kind of pass, and one pass more than the host knows of
        set_up(self, waiting)
        self._is_universal, self._lag = True, int(not isinstance(self, record_module._RecordingEngine))

    monkeypatch.setattr(Engine, "_set_up", ahead)
    _, _, done, steps, timing = decode(byte_tokenizer, threshold=0.4, sub_block_size=4)
    ends = [step.seconds for step in steps]
    assert timing == "undisturbed" and ends == sorted(set(ends))
    assert len(steps) == done.prefill_passes + done.denoise_passes + done.append_passes


def test_a_run_that_went_another_way_is_timed_by_its_recording_and_says_so(byte_tokenizer, monkeypatch, capsys):
    time = record_module._TimedEngine.time

    def other(self, request):
        completion, ends = time(self, request)
        return (completion, ends) if self.steps_class else (replace(completion, denoise_passes=0), [])

    monkeypatch.setattr(record_module._TimedEngine, "time", other)
    _, _, _, steps, timing = decode(byte_tokenizer, threshold=0.4, sub_block_size=4)
    assert timing == "while_recording" and steps and "tie" in capsys.readouterr().out


def test_engine_and_uncached_decoder_write_the_same_tokens(byte_tokenizer):
    options = dict(threshold=0.4, sub_block_size=4)
    model, request, done, steps, _ = decode(byte_tokenizer, use_block_cache=False, **options)
    plain = decode_plain(
        model, request.prompt, max_new_tokens=LIMIT, stop_ids=Engine(model, byte_tokenizer).stop_ids, **options
    )
    assert done.tokens == plain.tokens and {step.kind for step in steps} == {"prefill", "full", "append"}


@pytest.fixture
def trace(byte_tokenizer):
    model, request, done, steps, timing = decode(byte_tokenizer, threshold=0.4, sub_block_size=4)
    return Trace(
        label="tiny",
        mode="diffusion",
        device="cpu",
        dtype="float32",
        timing=timing,
        num_layers=model.num_layers,
        block_size=model.block_size,
        num_prompt_tokens=len(request.prompt),
        prompt="p",
        text=done.text,
        num_tokens=len(done.tokens),
        steps=steps,
    )


def test_a_trace_is_read_as_it_was_written(trace, tmp_path):
    write_trace(tmp_path / "a.json", trace)
    assert read_trace(tmp_path / "a.json") == trace


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("format"), "must have format fastdllm-trace, got None"),
        (lambda c: c.update(version=2), "must have version 1, got 2"),
        (lambda c: c.update(colour=2), r"exactly the keys .*wrong are, got \['colour'\]"),
        (lambda c: c["steps"][0].pop("rows"), r"trace.steps\[0\] must have exactly the keys .*got \['rows'\]"),
        (lambda c: c["steps"][1].update(kind="leap"), r"steps\[1\].kind must be one of prefill, .*got 'leap'"),
        (lambda c: c["steps"][1].update(seconds=-1), r"steps\[1\].seconds must not be below"),
        (lambda c: c["steps"][1].update(seconds="1"), r"steps\[1\].seconds must be float or int, got '1'"),
        (lambda c: c["steps"][1].update(seconds=True), r"steps\[1\].seconds must be float or int, got True"),
        (lambda c: c["steps"][1].update(reused=[4]), r"steps\[1\].reused must name layers of 4, got \[4\]"),
        (lambda c: c["steps"].append(c["steps"][-1]), "must write each place behind the prompt once"),
        (lambda c: c.update(mode="both"), "mode must be diffusion or ar, got 'both'"),
        (lambda c: c.update(steps={}), r"trace.steps must be a list, got \{\}"),
    ],
)
def test_what_is_not_a_trace_is_refused_with_the_place(trace, tmp_path, change, message):
    write_trace(tmp_path / "a.json", trace)
    content = json.loads((tmp_path / "a.json").read_text())
    change(content)
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        read_trace(tmp_path / "a.json")


def test_a_file_that_is_not_there_or_not_json_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.json: no such file; make traces with"):
        read_trace(tmp_path / "none.json")
    (tmp_path / "cut.json").write_text('{"format": "fast')
    with pytest.raises(ValueError, match="cut.json is not JSON"):
        read_trace(tmp_path / "cut.json")
