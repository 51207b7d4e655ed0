"The state of the random number generators: put back, and run again from."
import random

import numpy as np
import pytest
import torch

from fastai_lsuv.keep.generators import Generators


def draw(): return random.random(), np.random.rand(), torch.rand(1).item()


def test_restore_makes_all_draw_the_same_again():
    g = Generators()
    first,second = draw(),draw()
    g.restore()
    assert draw() == first and draw() == second
    g.restore()
    assert draw() == first


def test_again_runs_from_the_state_and_leaves_the_generators_where_they_were():
    g = Generators()
    first = draw()
    there = Generators()
    want = draw()
    there.restore()
    for _ in range(2):
        with g.again():
            assert draw() == first
    assert draw() == want


def test_again_puts_back_when_anything_is_raised():
    g = Generators()
    draw()
    there = Generators()
    want = draw()
    there.restore()
    with pytest.raises(KeyboardInterrupt), g.again():
        draw()
        raise KeyboardInterrupt
    assert draw() == want


def test_again_inside_again():
    g = Generators()
    first = draw()
    with g.again():
        second = (draw(), draw())[1]
        with g.again():
            assert draw() == first
        third = draw()
    with g.again():
        assert [draw() for _ in range(3)] == [first, second, third]


def test_a_normal_number_that_was_drawn_ahead_is_kept():
    "Python's and numpy's `gauss` draw two numbers at a time."
    random.gauss(0, 1)
    np.random.randn()
    g = Generators()
    was = random.gauss(0, 1),np.random.randn()
    random.seed(9)
    np.random.seed(9)
    g.restore()
    assert (random.gauss(0, 1), np.random.randn()) == was
