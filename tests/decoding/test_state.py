"""What is drawn: numbers that fill [0, 1) evenly, as a function of seed, draw and place alone."""

import torch

from fastdllm.decoding.state import uniform_draws


def test_draws_fill_the_unit_interval_evenly_and_do_not_depend_on_one_another():
    seed = torch.arange(20000)
    draws = [uniform_draws(seed, torch.full_like(seed, number), 2) for number in range(2)]
    columns = torch.cat(draws, dim=1)  # [20000, 4]: two draws of two places
    assert bool(((columns >= 0) & (columns < 1)).all())
    for column in columns.T:
        shares = torch.histc(column, 20, 0, 1) / len(seed)
        assert bool(((shares - 0.05).abs() < 5 * (0.05 * 0.95 / len(seed)) ** 0.5).all())
    cells = ((columns * 2).long() * torch.tensor([1, 2, 4, 8])).sum(1)  # which halves, together
    shares = torch.bincount(cells, minlength=16) / len(seed)
    assert bool(((shares - 1 / 16).abs() < 5 * (1 / 16 / len(seed)) ** 0.5).all())


def test_a_draw_depends_on_seed_draw_and_place_alone():
    seed, draws = torch.tensor([3, 3, 8]), torch.tensor([0, 1, 1])
    together = uniform_draws(seed, draws, 5)
    assert torch.equal(uniform_draws(seed[1:2], draws[1:2], 3)[0], together[1, :3])
    assert len(set(together.flatten().tolist())) == 15
