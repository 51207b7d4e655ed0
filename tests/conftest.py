"Every test starts from the same random numbers and leaves no figure open."
import random

import numpy as np
import pytest
import torch
from hypothesis import settings

# Examples are drawn from a fixed seed, and a slow first example (an import, a warm-up) is no failure.
settings.register_profile('tests', deadline=None, derandomize=True)
settings.load_profile('tests')


@pytest.fixture(autouse=True)
def same_start():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the networks here are small, and two threads wait for each other


@pytest.fixture
def axes():
    "Closes the figures that a test draws."
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    yield
    plt.close('all')


@pytest.fixture(scope='session')
def digits():
    "256 of scikit-learn's digits, 28x28 and normalized, and their labels."
    from sklearn.datasets import load_digits
    x, y = load_digits(return_X_y=True)
    x = torch.tensor(x[:256], dtype=torch.float32).view(-1, 1, 8, 8)
    x = torch.nn.functional.interpolate(x, size=28, mode='bilinear')
    return (x - x.mean())/x.std(), torch.tensor(y[:256])
