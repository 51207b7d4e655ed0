"What the plots of a recorder show: their numbers, labels, targets and colours."
from functools import partial

import numpy as np
import pytest
from matplotlib import pyplot as plt
from recording import Made, convnet, deep, recorded
from torch import nn

from fastai_lsuv.recorder.layers import label_of
from fastai_lsuv.recorder.plots import outstanding

pytestmark = pytest.mark.usefixtures('axes')  # closes the figures
recorder_of = partial(recorded, hist=True, grads=True, valid=True)


@pytest.fixture(autouse=True)
def drawn(axes):
    "Whatever a test plots can be drawn, and fits a notebook."
    yield
    for number in plt.get_fignums():
        plt.figure(number).canvas.draw()
        assert plt.figure(number).get_size_inches()[0]*100 <= 900


def texts(labels): return [t.get_text() for t in labels]


@pytest.mark.parametrize('name,module,label', [
    ('0', nn.Conv2d(3, 16, 3), '0 Conv2d 3>16'),
    ('head', nn.Linear(64, 10), 'head Linear 64>10'),
    ('', nn.Linear(64, 10), 'Linear 64>10'),
    ('rnn', nn.LSTM(20, 12), 'rnn LSTM 20>12'),
    ('attn', nn.MultiheadAttention(8, 2), 'attn MultiheadAttention 8>8'),
    ('1', nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 9, 1)), '1 Sequential 3>9'),
    ('1', nn.BatchNorm2d(16), '1 BatchNorm2d 16'),
    ('', nn.LayerNorm(8), 'LayerNorm 8'),
    ('act', nn.ReLU(), 'act ReLU'),
    ('lazy', nn.LazyLinear(7), 'lazy LazyLinear'),
    ('a.very.long.name.of.a.layer.deep.inside.0', nn.Linear(64, 10), '….name.of.a.layer.deep.inside.0 Linear 64>10'),
], ids=str)
def test_label_tells_name_kind_and_channels(name, module, label):
    assert label_of(name, module) == label and len(label) <= 44


@pytest.mark.parametrize('n', [1, 5, 100])
def test_plot_stats_draws_every_layer_and_the_targets(n):
    rec = recorder_of(deep(n))
    axs = rec.plot_stats()
    assert [a.get_title() for a in axs] == ['mean', 'std']
    for j, (a, target) in enumerate(zip(axs, (0., 1.))):
        *lines,dashed = a.lines
        assert len(lines) == n
        np.testing.assert_allclose(lines[n-1].get_ydata(), rec.layer_stats(n-1)[j])
        assert list(dashed.get_ydata()) == [target, target] and dashed.get_linestyle() == '--'


def test_few_layers_are_named_in_a_legend_and_differ_in_dashes():
    axs = recorder_of().plot_stats()
    assert texts(axs[0].figure.legends[0].get_texts()) == ['0 Conv2d 1>8', '2 Conv2d 8>8', '7 Linear 128>10']
    assert len({line.get_linestyle() for line in axs[0].lines[:3]}) == 3


def test_a_layer_that_stands_out_is_thick_and_named():
    model = deep(50)
    model[41].register_forward_hook(lambda m, a, o: o + 9)
    rec = recorder_of(model)
    a,i = rec.plot_stats('mean')[0],rec.names.index('41')
    assert texts(a.get_legend().get_texts())[0] == '41 Linear 16>16'
    assert a.lines[i].get_linewidth() > 2*a.lines[i-1].get_linewidth()


@pytest.mark.parametrize('log', [False, True])
def test_layers_stand_out_from_the_others_and_not_by_chance(log):
    values = np.exp(np.random.default_rng(0).normal(size=(30, 60))*0.1)
    assert outstanding(values, log) == outstanding(np.ones((3, 20)), log) == []
    assert outstanding(np.exp(np.linspace(-3, 3, 60))*values, True) == []  # nor do the ends of a trend
    values[:, [7, 30]] *= 5, 20
    values[3:, 5] = values[4] = np.nan
    assert outstanding(values, log) == [30, 7] and outstanding(values*np.nan, log) == []


def test_the_axis_is_logarithmic_where_std_differs_a_lot():
    model = convnet()
    model[2].register_forward_hook(lambda m, a, o: o*1e-4)
    axs = recorder_of(model).plot_stats(('std', 'grad_std', 'mean'))
    assert [a.get_yscale() for a in axs] == ['log', 'log', 'linear']
    assert [a.get_yscale() for a in recorder_of().plot_stats('std')] == ['linear']


def test_plots_take_axes_of_the_user_and_wrap_their_own_panels():
    rec = recorder_of()
    _,axs = plt.subplots(1, 4)
    assert rec.plot_stats('grad_std', ax=axs[0])[0] is axs[0]
    assert rec.color_dim(1, ax=axs[1]) is axs[1]
    assert rec.dead_chart(ax=axs[2]) is axs[2]
    assert rec.plot_layer_stats(1, ax=axs[1:])[0].get_title() == '2 Conv2d 8>8: mean'
    axs = rec.plot_stats(('mean', 'std', 'near_zero', 'dead', 'grad_mean', 'grad_std', 'grad_zero'))
    assert len(axs) == 7 and axs[0].get_subplotspec().get_gridspec().get_geometry() == (3, 3)


def test_the_dead_chart_has_a_row_for_each_layer():
    rec = recorder_of(deep(100))
    a = rec.dead_chart()
    want = rec.df().query("phase == 'train'").pivot(index='layer', columns='step', values='dead').loc[rec.names]
    np.testing.assert_array_equal(a.images[0].get_array(), want)
    assert a.get_xlabel() == 'step' and a.get_title() == 'dead share (≤ 0.05 or std/10)'
    assert 'dead share' in a.images[0].colorbar.ax.get_ylabel()
    assert texts(a.get_yticklabels())[0] == '1 Linear 64>16' and len(a.get_yticks()) <= 34
    assert rec.dead_chart(phase='valid', figsize=(3, 2)).figure.get_size_inches().tolist() == [3, 2]


def test_layer_stats_are_plotted_with_label_axes_and_targets():
    rec = recorder_of()
    axs = rec.plot_layer_stats(1)
    assert axs[0].figure.get_suptitle() == '2 Conv2d 8>8'
    assert [a.get_title() for a in axs] == ['mean', 'std', 'share near zero (≤ 0.05)']
    assert {a.get_xlabel() for a in axs} == {'step'}
    for a, values in zip(axs, rec.layer_stats(1)): assert list(a.lines[0].get_ydata()) == list(values)
    assert [len(a.lines) for a in axs] == [2, 2, 1]


def test_a_histogram_is_plotted_with_label_axes_and_colour_bar():
    rec = recorder_of()
    a = rec.color_dim(1)
    image = a.images[0]
    np.testing.assert_array_equal(image.get_array(), rec.hist(1))
    assert image.origin == 'lower' and image.get_extent() == [-0.5, 5.5, -10, 10]
    assert (a.get_title(), a.get_xlabel(), a.get_ylabel()) == ('2 Conv2d 8>8', 'step', 'activation')
    assert image.colorbar.ax.get_ylabel() == 'log(1 + elements)'


@pytest.mark.parametrize('n', [1, 5, 110])
def test_the_grid_of_histograms_has_a_panel_for_each_layer(n):
    rec = recorder_of(deep(n))
    axs = rec.color_dim()
    assert len(axs) == n and axs[0].get_title() == ('1 Linear 64>16' if n > 1 else '1 Linear 64>10')
    np.testing.assert_array_equal(axs[n-1].images[0].get_array(), rec.hist(n-1))


def test_empty_panels_say_why():
    model = Made(lambda m, x: m.head(m.far(x.flatten(1))), far=nn.Linear(64, 10), idle=nn.Linear(2, 2),
                 head=nn.Linear(10, 10))
    nn.init.constant_(model.far.bias, 50.)
    assert [a.texts[0].get_text() for a in recorder_of(model).color_dim()[:2]] == ['nothing in -10 to 10', 'not seen']


def test_long_titles_keep_the_end_that_tells():
    name = 'a_rather_long_name_of_a_backbone_of_an_encoder_of_images'
    model = Made(lambda m, x: getattr(m, name)(x), **{name: convnet()})
    titles = [a.get_title() for a in recorder_of(model).color_dim()]
    assert [t[0] for t in titles] == ['…']*3 and titles[0].endswith('images.0 Conv2d 1>8') and len(titles[0]) <= 30
