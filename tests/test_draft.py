"""The drafting objective against a slow reference, its masks against loops, its operations against torch's counter."""

import dataclasses
from functools import partial

import pytest
import torch
from conftest import make_qwen
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from fastdllm import masks
from fastdllm.adapter import AdapterSettings, adapter_weights, add_adapter
from fastdllm.draft import NO_ANCHOR, DraftConfig, DraftSize, clean_places, draft_flops, draft_windows, draw_anchors
from fastdllm.model import BlockDiffusionLM, PassSize, forward_flops, keys_and_values, run_rows
from fastdllm.training.drafting import DraftPass
from fastdllm.training.meter import DraftMeter

MASK, L = 259, 24
DRAFT = DraftConfig(window=4, rows_per_token=1.0, decay=0.7)


def make_batch(seed=0):
    """Two samples of 24 places: two documents (8 of them padded) and padding; one document that answers in turns."""
    torch.manual_seed(seed)
    document = torch.tensor([[1] * 8 + [2] * 12 + [0] * 4, [1] * 24])
    position = torch.stack([torch.cat([torch.arange(8), torch.arange(12), torch.arange(4)]), torch.arange(24)])
    tokens = torch.randint(0, 256, (2, L))
    is_response = torch.zeros(2, L, dtype=torch.bool)
    is_response[0, 3:7] = is_response[0, 11:18] = is_response[1, 5:13] = is_response[1, 15:24] = True
    tokens[0, 7] = tokens[0, 18:24] = MASK  # padding
    anchors = [draw_anchors(seed, row, is_response[row], document[row], DRAFT.num_windows(L)) for row in range(2)]
    return dict(
        tokens=tokens, document=document, position=position, is_response=is_response, anchor=torch.stack(anchors)
    )


def make_model(seed=0, size=0.3):
    model = BlockDiffusionLM(
        make_qwen(seed, initializer_range=0.2).double(), block_size=4, mask_token_id=MASK, context_attention="causal"
    )
    add_adapter(model, AdapterSettings(rank=4, alpha=8.0), seed=1)
    for weight in adapter_weights(model).values():
        weight.data = weight.data.double()
        if not weight.any():  # as if it were trained
            weight.data = size * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)).double()
    return model


def slow_loss(model, batch, draft):
    """Each window alone: one plain pass over its document up to the anchor and the window, gated by token."""
    total, count = 0.0, 0
    for sample in range(2):
        for anchor in batch["anchor"][sample].tolist():
            if anchor == NO_ANCHOR:
                continue
            number = batch["document"][sample, anchor]
            inside = batch["document"][sample] == number
            tokens, response = batch["tokens"][sample][inside], batch["is_response"][sample][inside]
            p = int(batch["position"][sample, anchor])
            row = torch.cat([tokens[: p + 1], torch.full((draft.window,), MASK)])[None]
            allowed = torch.ones(len(row[0]), len(row[0]), dtype=torch.bool).tril()
            allowed[p + 1 :, p + 1 :] = True
            hidden = model.hidden_states(row, torch.arange(len(row[0]))[None], allowed[None, None])
            logits = model.qwen.lm_head(hidden)[0]
            for j in range(1, draft.window + 1):
                if p + j + 1 < len(tokens) and response[p + j + 1]:
                    total = total + draft.decay ** (j - 1) * F.cross_entropy(logits[p + j], tokens[p + j + 1])
                    count += 1
    return total, count


def gradients(model, loss):
    weights = adapter_weights(model)
    return dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_loss_and_gradients_equal_the_slow_reference(recompute):
    batch, model = make_batch(), make_model()
    expected, count = slow_loss(model, batch, DRAFT)
    drafting = DraftPass(model, DRAFT)
    drafting.use_training_form(recompute, is_compiled=False)
    scores = drafting(batch)
    assert int((scores.targets.weight > 0).sum()) == count > 20
    assert_close(scores.total, expected, atol=1e-6, rtol=1e-7)  # float64, but the library's norms are float32
    theirs = gradients(model, expected)
    for name, ours in gradients(model, scores.total).items():
        assert theirs[name].abs().max() > 1e-3
        assert_close(ours, theirs[name], atol=1e-5, rtol=1e-4)  # the library's norms are float32


def test_compiled_layers_give_the_same_and_are_compiled_once(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # traces; generates no code
    batches, model = [make_batch(seed) for seed in range(4)], make_model()
    plain, compiled = DraftPass(model, DRAFT), DraftPass(model, DRAFT)
    compiled.use_training_form("selective", is_compiled=True)
    counters, num_graphs = torch._dynamo.utils.counters["stats"], []
    for batch in batches:
        expected, found = plain(batch), compiled(batch)
        assert_close(found.total, expected.total)
        theirs, ours = gradients(model, expected.total), gradients(model, found.total)
        assert all(torch.allclose(ours[name], theirs[name], atol=1e-5, rtol=1e-4) for name in ours)
        num_graphs.append(counters["unique_graphs"])
    assert num_graphs[0] == num_graphs[-1] >= 3  # clean rows, clean keys and values, windows


def test_windows_by_hand():
    batch = make_batch()
    batch["anchor"] = torch.tensor([[2, 4, 13, NO_ANCHOR], [10, 14, 21, NO_ANCHOR]])
    windows = draft_windows(batch, DRAFT)
    position, weight = windows.position.view(2, 4, 4), windows.targets.weight.view(2, 4, 4)
    assert position[0, :3].tolist() == [[3, 4, 5, 6], [5, 6, 7, 8], [6, 7, 8, 9]]  # place 13 has position 5
    assert windows.targets.token.view(2, 4, 4)[0, 0, :3].tolist() == batch["tokens"][0, 4:7].tolist()
    one, two, three = 1.0, 0.7, 0.7**2
    expected = [
        [[one, two, three, 0], [one, 0, 0, 0], [one, two, three, 0], [0] * 4],  # responses end at 6, and at 17
        [[one, 0, 0, two**3], [one, two, three, two**3], [one, 0, 0, 0], [0] * 4],  # a turn between 12 and 15
    ]
    assert_close(weight, torch.tensor(expected))
    first, last = (places.view(2, 4, 4)[..., 0] for places in windows.seen)
    assert first[0].tolist() == [0, 0, 8, 0] and last[0].tolist() == [2, 4, 13, -1]


def test_anchors_are_a_function_of_seed_and_index_inside_responses():
    batch = make_batch()
    is_response, document = batch["is_response"][1], batch["document"][1]
    candidates = {p for p in range(22) if is_response[p + 1] and is_response[p + 2]}
    draws = [draw_anchors(3, index, is_response, document, 6) for index in range(60)]
    torch.rand(5)  # the global generator must not matter
    assert all(torch.equal(draw, draw_anchors(3, index, is_response, document, 6)) for index, draw in enumerate(draws))
    assert not torch.equal(draws[0], draws[1]) and not torch.equal(
        draws[0], draw_anchors(4, 0, is_response, document, 6)
    )
    assert {int(place) for draw in draws for place in draw} == candidates
    for draw in draws:
        assert (draw.diff() > 0).all() and len(draw) == 6
    few = draw_anchors(0, 0, is_response, document, 20).tolist()
    assert few == sorted(candidates) + [NO_ANCHOR] * (20 - len(candidates))
    across = torch.ones(6, dtype=torch.bool), torch.tensor([1, 1, 1, 2, 2, 2])
    assert draw_anchors(0, 0, *across, 4).tolist() == [0, 3, NO_ANCHOR, NO_ANCHOR]  # never over a document's end


def test_nothing_leaks_from_later_tokens_or_other_documents():
    batch, model = make_batch(), make_model()
    batch["anchor"] = torch.tensor([[2, 3, 10, 13], [4, 10, 14, 18]])
    drafting = DraftPass(model, DRAFT)

    def moved_by(sample, place):
        changed = batch | {"tokens": batch["tokens"].clone()}
        changed["tokens"][sample, place] = (changed["tokens"][sample, place] + 1) % 256
        before, after = (drafting(some) for some in (batch, changed))
        is_same_target = before.targets.token == after.targets.token  # what is predicted may change; compare the rest
        moved = ((before.loss - after.loss).abs() > 1e-9) & is_same_target
        return moved.view(2, 4, 4).any(-1).tolist()

    nothing = [False] * 4
    assert moved_by(0, 1) == [[True, True, False, False], nothing]  # the first document's windows alone
    assert moved_by(0, 12) == [[False, False, False, True], nothing]
    assert moved_by(1, 11) == [nothing, [False, False, True, True]]
    assert moved_by(1, 10) == [nothing, [False, True, True, True]]  # an anchor is seen by its own window
    assert moved_by(1, 19) == [nothing, nothing]  # behind every anchor


def test_nothing_of_clean_rows_is_kept_but_what_attention_reads():
    drafting, kept = DraftPass(make_model(), DRAFT), []
    batch = make_batch()
    batch["anchor"] = batch["anchor"][:, :5]

    def keep(tensor):
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        drafting(batch)
    places = {shape for shape in kept if L in shape}
    with_context = {shape for shape in kept if L + 20 in shape}
    assert not places  # hidden states of clean rows would be [2, 24, 32]
    assert (2, 2, L + 20, 8) in with_context and all(shape[-1] in (8, L + 20) for shape in with_context)
    assert any(shape[-2:] == (20, 32) for shape in kept)  # while those of the windows are


def allowed_by_words(anchor, window, document, position, query, key, num_clean):
    """The predicate's text for one pair: window row `query`, key `key` of clean rows and then windows."""
    own_anchor = anchor[query // window]
    if key >= num_clean:
        return (key - num_clean) // window == query // window
    return own_anchor != NO_ANCHOR and document[key] == document[own_anchor] and position[key] <= position[own_anchor]


def test_windows_see_their_document_up_to_the_anchor_and_themselves():
    batch = make_batch()
    windows = draft_windows(batch, DRAFT)
    dense = masks.dense_attention_mask(masks.draft_attention(windows.seen, L, 4), 2, 2 * L, torch.device("cpu"), L)
    clean = masks.dense_attention_mask(
        masks.draft_attention(clean_places(batch["position"]), L, 0), 2, L, torch.device("cpu")
    )
    for sample in range(2):
        anchor, document, position = (batch[name][sample] for name in ("anchor", "document", "position"))
        for query in range(L):
            for key in range(2 * L):
                expected = allowed_by_words(anchor, 4, document, position, query, key, L)
                assert bool(dense[sample, 0, query, key]) == bool(expected)
            for key in range(L):
                expected = document[key] == document[query] and position[key] <= position[query]
                assert bool(clean[sample, 0, query, key]) == bool(expected)


@pytest.mark.parametrize("window", [16, 128])
def test_block_masks_equal_dense_masks_for_one_batch_after_another(window):
    cpu, draft = torch.device("cpu"), DraftConfig(window=window)
    position = torch.cat([torch.arange(96), torch.arange(288)])[None]
    document = torch.tensor([[1] * 96 + [2] * 288])
    builders = [masks.DraftMaskBuilder(1, 256, 384, size, cpu) for size in (window,)]
    builders.append(masks.DraftMaskBuilder(1, 384, 384, 0, cpu))
    for seed in range(2):
        batch = dict(tokens=document, document=document, position=position, is_response=position > 20 * (1 + seed))
        anchors = draw_anchors(seed, 0, batch["is_response"][0], document[0], 256 // window - seed)
        batch["anchor"] = F.pad(anchors, (0, seed), value=NO_ANCHOR)[None]
        for builder, seen in zip(builders, (draft_windows(batch, draft).seen, clean_places(position)), strict=True):
            num_queries, num_keys = builder.lengths
            predicate = masks.draft_attention(seen, 384, builder.window)
            dense = masks.dense_attention_mask(predicate, 1, num_keys, cpu, num_queries)
            query, (key, value) = torch.randn(1, 2, num_queries, 16), torch.randn(2, 1, 2, num_keys, 16)
            expected = F.scaled_dot_product_attention(query, key, value, attn_mask=dense)
            ours = builder.build(seen)
            assert_close(flex_attention(query, key, value, block_mask=ours), expected)
            tiles = dense.view(1, 1, num_queries // 128, 128, num_keys // 128, 128)
            is_full = tiles.all(5).all(3)
            assert torch.equal(ours.to_dense().bool(), tiles.any(5).any(3))
            assert torch.equal(ours.full_kv_num_blocks, is_full.sum(-1).int())
            for row in range(num_queries // 128):
                listed = ours.full_kv_indices[0, 0, row, : ours.full_kv_num_blocks[0, 0, row]].tolist()
                assert sorted(listed) == is_full[0, 0, row].nonzero()[:, 0].tolist()
    with pytest.raises(ValueError, match="multiple of 128 rows, got 72; .* draft.rows_per_token"):
        masks.DraftMaskBuilder(1, 72, 128, 4, cpu)


def test_operations_equal_those_that_torch_counts():
    model, (B, S, R) = make_model(), (2, 10, 8)
    tokens, positions = torch.randint(0, 256, (B, S)), torch.arange(S).expand(B, -1)
    layers, everything = model.qwen.model.layers, torch.ones(B, 1, 1, 1, dtype=torch.bool)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        with torch.no_grad():
            clean, rotary = model.embed(tokens, positions)
        rows, row_rotary = model.embed(torch.full((B, R), MASK), torch.arange(R).expand(B, -1))
        for number, layer in enumerate(layers):
            with torch.no_grad():
                model.gate.rows = False
                if number == len(layers) - 1:
                    context = keys_and_values(layer, clean, rotary)
                else:
                    clean, context = run_rows(layer, clean, rotary, everything.expand(-1, -1, S, S))
            model.gate.rows = True
            rows, _ = run_rows(layer, rows, row_rotary, everything.expand(-1, -1, R, S + R), context)
        model.qwen.lm_head(model.norm(rows)).sum().backward()
    size = DraftSize(B * S, B * R, B * S * S, B * R * S, B * R * R)
    num_updates = sum(weight.numel() for weight in adapter_weights(model).values() if weight.ndim > 1)
    config = model.qwen.config
    # autograd also gives gradients to the clean keys and values in the joined tensor, which nothing asks for
    spare = forward_flops(config, PassSize(0, 0, B * R * S, B * R * S, 0))
    assert draft_flops(config, size, num_updates) + spare == counter.get_total_flops()


def test_the_meter_counts_accepted_drafts_by_hand():
    batch, model = make_batch(), make_model()
    scores = DraftPass(model, DRAFT)(batch)
    correct = torch.zeros(12, 4, dtype=torch.bool)
    correct[0], correct[1] = torch.tensor([True, True, False, True]), torch.tensor([True, False, True, True])
    weight = torch.ones(12, 4)
    weight[0, 3], weight[2:] = 0.0, 0.0
    targets = scores.targets._replace(weight=weight.flatten())
    loss = torch.arange(48.0)
    meter = DraftMeter(torch.device("cpu"), window=4)
    meter.add(
        scores._replace(is_correct=correct.flatten(), targets=targets, loss=loss), torch.tensor(2.5), torch.ones(2)
    )
    values = meter.read()
    assert values["accepted_length"] == 1.5  # two and one, over two windows
    assert values["masked_accuracy"] == 5 / 7 and values["loss"] == 2.5
    assert (values["loss_by_row/01"], values["loss_by_row/04"]) == (2.0, 7.0)
    assert (values["accuracy_by_row/02"], values["accuracy_by_row/03"]) == (0.5, 0.5)


def test_a_sample_has_as_many_window_rows_as_asked_for():
    shapes = [dataclasses.replace(DRAFT, rows_per_token=share).sample_shape(L) for share in (0.5, 1.0, 2.0)]
    assert [shape.num_targets for shape in shapes] == [12, 24, 48]
    assert {shape.num_rows for shape in shapes} == {L}


def test_wrong_settings_are_refused():
    for wrong in ({"window": 12}, {"window": 256}, {"rows_per_token": 0.0}, {"decay": 0.0}, {"decay": 1.1}):
        with pytest.raises(ValueError, match=f"draft.{next(iter(wrong))} must"):
            dataclasses.replace(DRAFT, **wrong)
