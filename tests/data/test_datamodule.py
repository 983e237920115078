import json
import pickle
from types import SimpleNamespace

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from fastdllm.data import datamodule
from fastdllm.data.datamodule import AdaptDataModule, BatchPlan, DataConfig, StepSampler, TrainingSamples
from fastdllm.objective import ObjectiveConfig

FAST = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


class Recorder(LightningModule):
    """Learns nothing; remembers what it saw."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen, self.batches, self.validated = [], [], []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.trainer.global_step, batch["index"].tolist(), batch["step_targets"].tolist()))
        self.batches.append(batch)
        return self.weight * 1.0

    def validation_step(self, batch, batch_idx):
        self.validated.append(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def rows(count=60):
    return [{"prompt": f"What is {i} and {i}?", "response": f"It is {2 * i}. " * (i % 3 + 1)} for i in range(count)]


@pytest.fixture
def make_module(tmp_path, byte_tokenizer):
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows())))
    (tmp_path / "other.jsonl").write_text("\n".join(map(json.dumps, rows(7))))

    def make(seed=3, micro_batch_size=2, **fields):
        defaults = {
            "path": str(tmp_path / "train.jsonl"),
            "sample_length": 256,
            "cache_dir": str(tmp_path / "prepared"),
        }
        config = DataConfig(**{**defaults, "num_workers": 0, "loader_workers": 0, **fields})
        mask_token_id = byte_tokenizer.convert_tokens_to_ids("|<MASK>|")
        return AdaptDataModule(
            config,
            byte_tokenizer,
            mask_token_id=mask_token_id,
            objective=ObjectiveConfig(block_size=8),
            seed=seed,
            micro_batch_size=micro_batch_size,
        )

    return make


def fit(module, steps, accumulate=2, resume=None, **changes):
    recorder = Recorder()
    fields = {**FAST, "max_steps": steps, "accumulate_grad_batches": accumulate, "enable_checkpointing": False}
    trainer = Trainer(**{**fields, "use_distributed_sampler": False, **changes})
    trainer.fit(recorder, datamodule=module, ckpt_path=resume)
    return recorder, trainer


def opened(module, rank=0, world_size=1, accumulate=2, max_steps=4):
    """The module as if a trainer of that rank had set it up."""
    root_device = torch.device("cpu")
    module.prepare_data()
    module.trainer = SimpleNamespace(
        global_rank=rank,
        world_size=world_size,
        accumulate_grad_batches=accumulate,
        max_steps=max_steps,
        global_step=0,
        strategy=SimpleNamespace(root_device=root_device),
    )
    return module


def indices(loader):
    return [batch["index"].tolist() for batch in loader]


def test_a_run_sees_every_global_index_once_and_in_order(make_module):
    recorder, trainer = fit(make_module(), steps=3)
    assert [(step, seen) for step, seen, _ in recorder.seen] == [
        (0, [0, 1]),
        (0, [2, 3]),
        (1, [4, 5]),
        (1, [6, 7]),
        (2, [8, 9]),
        (2, [10, 11]),
    ]
    assert trainer.global_step == 3


@pytest.mark.parametrize("loader_workers", [0, 1])
def test_a_resumed_run_continues_with_the_next_index_and_stops_at_the_same_step(make_module, tmp_path, loader_workers):
    whole, _ = fit(make_module(), steps=6)
    keep = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    fit(make_module(), steps=4, callbacks=[keep], enable_checkpointing=True)
    again, trainer = fit(make_module(loader_workers=loader_workers), steps=6, resume=str(tmp_path / "step=2.ckpt"))
    assert again.seen == whole.seen[4:]
    assert trainer.global_step == 6
    for name, value in whole.batches[-1].items():
        torch.testing.assert_close(again.batches[-1][name], value, rtol=0, atol=0)


def test_a_resume_beside_a_validation_skips_no_batch(make_module, tmp_path):
    every = {"val_check_interval": 4, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0}
    whole, _ = fit(make_module(validation_samples=3), steps=6, **every)
    keep = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    fit(make_module(validation_samples=3), steps=4, callbacks=[keep], enable_checkpointing=True, **every)
    for step in (2, 4):
        again, _ = fit(make_module(validation_samples=3), steps=6, resume=str(tmp_path / f"step={step}.ckpt"), **every)
        assert again.seen == whole.seen[2 * step :]


def test_two_resumes_equal_none(make_module, tmp_path):
    whole, _ = fit(make_module(), steps=6, accumulate=1)
    seen = []
    for steps in (2, 4, 6):
        keep = ModelCheckpoint(dirpath=tmp_path, filename=f"{steps}", every_n_train_steps=2)
        resume = str(tmp_path / f"{steps - 2}.ckpt") if steps > 2 else None
        part, _ = fit(make_module(), steps, 1, resume, callbacks=[keep], enable_checkpointing=True)
        seen += part.seen
    assert seen == whole.seen


@pytest.mark.parametrize("world_size, micro_batch_size, accumulate", [(1, 8, 1), (2, 2, 2), (4, 1, 2)])
def test_the_samples_of_an_optimizer_step_do_not_depend_on_who_reads_them(world_size, micro_batch_size, accumulate):
    plans = [BatchPlan(micro_batch_size, accumulate, world_size, rank) for rank in range(world_size)]
    for step in range(3):
        read = [index for plan in plans for micro in range(accumulate) for index in plan.indices(step, micro)]
        assert sorted(read) == list(range(8 * step, 8 * step + 8))


def test_a_micro_batch_is_contiguous_over_the_ranks():
    assert BatchPlan(2, 3, 4, 1).indices(step=5, micro_batch=2) == [5 * 24 + 2 * 8 + 2, 5 * 24 + 2 * 8 + 3]


def test_the_sampler_counts_all_micro_batches_but_starts_at_its_step():
    sampler = StepSampler(BatchPlan(2, 3, 1, 0), start_step=2, max_steps=4)
    assert len(sampler) == 12 and len(list(sampler)) == 6 and next(iter(sampler)) == [12, 13]


def test_ranks_see_the_samples_that_one_process_sees(make_module):
    alone = [batch for batch in opened(make_module(micro_batch_size=4)).train_dataloader()]
    by_rank = [list(opened(make_module(), rank, world_size=2).train_dataloader()) for rank in range(2)]
    for number, batch in enumerate(alone):
        for name, value in batch.items():
            torch.testing.assert_close(torch.cat([part[number][name] for part in by_rank]), value, rtol=0, atol=0)


def test_step_targets_count_what_the_whole_step_supervises(make_module):
    batches = list(opened(make_module(), accumulate=3, max_steps=5).train_dataloader())
    for first in range(0, len(batches), 3):
        step = batches[first : first + 3]
        targets = sum(int((batch["is_response"] & (batch["position"] >= 1)).sum()) for batch in step)
        assert all((batch["step_targets"] == targets).all() for batch in step)


def test_batches_do_not_depend_on_the_loader_workers(make_module):
    alone = list(opened(make_module()).train_dataloader())
    workers = list(opened(make_module(loader_workers=2)).train_dataloader())
    for one, other in zip(alone, workers, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_prepared_data_and_workers_are_where_and_as_many_as_asked(make_module, tmp_path, monkeypatch):
    module, asked = make_module(cache_dir=str(tmp_path / "here"), num_workers=3, loader_workers=1), []
    prepare = datamodule.prepare_documents

    def prepare_alone(source, tokenizer, folder, num_workers):
        asked.append(num_workers)
        return prepare(source, tokenizer, folder, 0)

    monkeypatch.setattr(datamodule, "prepare_documents", prepare_alone)
    assert opened(module).train_dataloader().num_workers == 1
    assert asked == [3] and len(list((tmp_path / "here").iterdir())) == 1


def test_order_is_a_function_of_seed_and_epoch(make_module):
    samples = opened(make_module()).training
    count = len(samples)
    numbers = [TrainingSamples(samples, 3, 4).sample_number(index) for index in range(2 * count)]
    assert sorted(numbers[:count]) == sorted(numbers[count:]) == list(range(count))
    assert numbers[:count] != numbers[count:]
    late = TrainingSamples(samples, 3, 4)
    assert [late.sample_number(index) for index in reversed(range(2 * count))] == numbers[::-1]
    assert [TrainingSamples(samples, 4, 4).sample_number(index) for index in range(count)] != numbers[:count]


def test_steps_longer_than_an_epoch_are_counted_right(make_module):
    samples = TrainingSamples(opened(make_module()).training, 0, 10 * 60)
    targets = samples.samples.packing.num_targets
    assert samples.step_targets(1) == sum(int(targets[samples.sample_number(i)]) for i in range(600, 1200))


def test_the_noise_differs_between_epochs(make_module):
    module = opened(make_module())
    samples = TrainingSamples(module.training, 3, 4)
    number = samples.sample_number(0)
    again = next(i for i in range(len(module.training), 10**6) if samples.sample_number(i) == number)
    assert torch.equal(samples[0]["tokens"], samples[again]["tokens"])
    assert not torch.equal(samples[0]["noise_level"], samples[again]["noise_level"])


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_the_validation_set_without_repeating_a_target(make_module, world_size):
    loaders = [
        list(opened(make_module(validation_samples=4), rank, world_size).val_dataloader()) for rank in range(world_size)
    ]
    assert len({len(batches) for batches in loaders}) == 1
    batches = [batch for batches in loaders for batch in batches]
    targets = sum(int((batch["is_response"] & (batch["position"] >= 1)).sum()) for batch in batches)
    assert targets == int(batches[0]["step_targets"][0]) > 0


def test_validation_is_the_same_in_every_run(make_module):
    first, _ = fit(make_module(seed=1, validation_samples=3), steps=2)
    second, _ = fit(make_module(seed=2, validation_samples=3), steps=2)
    for one, other in zip(first.validated, second.validated, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_separate_validation_file_is_used_and_limited(make_module, tmp_path):
    module = opened(make_module(validation_path=str(tmp_path / "other.jsonl")))
    assert module.validation.documents.meta["documents"] == 7
    assert len(opened(make_module()).validation) == 0
    (tmp_path / "other.jsonl").write_text("\n".join(map(json.dumps, rows(40))))
    module = opened(make_module(validation_path=str(tmp_path / "other.jsonl")))
    limited = opened(make_module(validation_path=str(tmp_path / "other.jsonl"), validation_samples=1))
    assert len(limited.validation) == 1 < len(module.validation)


def test_the_run_says_how_many_epochs_it_asks_for(make_module, capsys):
    module = make_module()
    fit(module, steps=50)
    epochs = 200 / len(module.training)
    num_tokens = round(epochs * module.tokens_per_epoch)
    assert f"{num_tokens:,} tokens in 200 samples: {epochs:.2f} epochs" in capsys.readouterr().out
    assert module.tokens_per_epoch == module.training.packing.num_tokens.sum()


def test_validation_documents_that_are_left_out_are_counted(make_module, tmp_path, capsys):
    long = {"prompt": "What?", "response": "It is. " * 99}
    (tmp_path / "other.jsonl").write_text("\n".join(map(json.dumps, [*rows(40), long])))
    module = make_module(validation_path=str(tmp_path / "other.jsonl"), validation_samples=1)
    fit(module, steps=1)
    num_surplus = 40 - len(module.validation.packing.documents)
    line = f"1 validation samples, {num_surplus} documents beyond them not used; 1 documents too long (drop), 0 without"
    assert num_surplus > 30 and line in capsys.readouterr().out


@pytest.mark.parametrize(("prepare_per_node", "num_prepared"), [(False, 1), (True, 2)])
def test_one_process_of_the_job_prepares_or_one_of_each_node(make_module, prepare_per_node, num_prepared):
    module, prepared = make_module(prepare_per_node=prepare_per_node), []
    for node in range(2):
        trainer = Trainer(**FAST)
        trainer.strategy.node_rank = node
        trainer.datamodule, module.prepare_data = module, lambda node=node: prepared.append(node)
        trainer._data_connector.prepare_data()
    assert len(prepared) == num_prepared


def test_a_node_without_the_prepared_data_is_told_what_to_do(make_module, tmp_path):
    module = make_module()
    module.trainer = SimpleNamespace(strategy=SimpleNamespace(broadcast=lambda _: [tmp_path / "elsewhere"]))
    with pytest.raises(FileNotFoundError, match="elsewhere, which .* share data.cache_dir, or .*prepare_per_node"):
        module.setup("fit")


def test_an_endless_trainer_is_refused(make_module):
    with pytest.raises(ValueError, match="max_steps"):
        opened(make_module(), max_steps=-1).train_dataloader()


def test_samples_are_pickled_by_folder(make_module):
    samples = opened(make_module()).training
    samples[0]
    assert len(pickle.dumps(samples.documents)) < 500
    assert torch.equal(
        torch.as_tensor(pickle.loads(pickle.dumps(samples))[0]["tokens"]), torch.as_tensor(samples[0]["tokens"])
    )
