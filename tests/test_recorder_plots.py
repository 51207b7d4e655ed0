"What the plots of a recorder show: their numbers, labels, targets and colours."
import matplotlib
import numpy as np
import pytest
from recording import convnet, deep, fit, learner
from torch import nn

from fastai_lsuv.recorder import ActivationStatsRecorder
from fastai_lsuv.recorder.plots import outstanding
from fastai_lsuv.recorder.layers import label_of

matplotlib.use('Agg')
from matplotlib import pyplot as plt  # noqa: E402

pytestmark = pytest.mark.usefixtures('axes')  # closes the figures


def recorder_of(model=None, **kwargs):
    rec = ActivationStatsRecorder(hist=True, grads=True, valid=True, **kwargs)
    fit(learner(model or convnet(), cbs=rec))
    return rec


def draw_all():
    for number in plt.get_fignums():
        plt.figure(number).canvas.draw()


def texts(labels):
    return [t.get_text() for t in labels]


# ---- Labels ----

@pytest.mark.parametrize('name,module,label', [
    ('0', nn.Conv2d(3, 16, 3), '0 Conv2d 3>16'),
    ('head', nn.Linear(64, 10), 'head Linear 64>10'),
    ('', nn.Linear(64, 10), 'Linear 64>10'),
    ('rnn', nn.LSTM(20, 12), 'rnn LSTM 20>12'),
    ('attn', nn.MultiheadAttention(8, 2), 'attn MultiheadAttention 8>8'),
    ('1', nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 9, 1)), '1 Sequential 3>9'),
    ('act', nn.ReLU(), 'act ReLU'),
    ('lazy', nn.LazyLinear(7), 'lazy LazyLinear'),
    ('a.very.long.name.of.a.layer.deep.inside.0', nn.Linear(64, 10), '….name.of.a.layer.deep.inside.0 Linear 64>10'),
])
def test_label_tells_name_kind_and_channels(name, module, label):
    assert label_of(name, module) == label
    assert len(label) <= 44


# ---- All layers over time ----

@pytest.mark.parametrize('n', [1, 5, 100])
def test_plot_stats_draws_every_layer_and_the_targets(n):
    rec = recorder_of(deep(n))
    axs = rec.plot_stats()
    assert [a.get_title() for a in axs] == ['mean', 'std']
    for j, (a, target) in enumerate(zip(axs, (0., 1.))):
        *lines, dashed = a.lines
        assert len(lines) == n
        np.testing.assert_allclose(lines[n-1].get_ydata(), rec.layer_stats(n-1)[j])
        assert list(dashed.get_ydata()) == [target, target] and dashed.get_linestyle() == '--'
    draw_all()


def test_few_layers_are_named_in_a_legend_and_differ_in_dashes():
    axs = recorder_of().plot_stats()
    assert texts(axs[0].figure.legends[0].get_texts()) == ['0 Conv2d 1>8', '2 Conv2d 8>8', '7 Linear 128>10']
    assert len({line.get_linestyle() for line in axs[0].lines[:3]}) == 3


def test_a_layer_that_stands_out_is_thick_and_named():
    model = deep(50)
    model[41].register_forward_hook(lambda m, a, o: o + 9)
    rec = recorder_of(model)
    a = rec.plot_stats('mean')[0]
    assert texts(a.get_legend().get_texts())[0] == '41 Linear 16>16'
    i = rec.names.index('41')
    assert a.lines[i].get_linewidth() > 2*a.lines[i-1].get_linewidth()


@pytest.mark.parametrize('log', [False, True])
def test_layers_stand_out_from_the_others_and_not_by_chance(log):
    rng = np.random.default_rng(0)
    values = np.exp(rng.normal(size=(30, 60))*0.1)
    assert outstanding(values, log) == []
    assert outstanding(np.exp(np.linspace(-3, 3, 60))*values, True) == []  # nor do the ends of a trend
    values[:, 7] *= 5
    values[:, 30] *= 20
    values[3:, 5] = np.nan
    values[4] = np.nan
    assert outstanding(values, log) == [30, 7]
    assert outstanding(np.full((3, 20), np.nan), log) == []
    assert outstanding(np.ones((3, 20)), log) == []


def test_the_axis_is_logarithmic_where_std_differs_a_lot():
    model = convnet()
    model[2].register_forward_hook(lambda m, a, o: o*1e-4)
    axs = recorder_of(model).plot_stats(('std', 'grad_std', 'mean'))
    assert [a.get_yscale() for a in axs] == ['log', 'log', 'linear']
    assert [a.get_yscale() for a in recorder_of().plot_stats('std')] == ['linear']


def test_a_plot_can_be_drawn_on_axes_of_the_user():
    rec = recorder_of()
    _, axs = plt.subplots(1, 4)
    assert rec.plot_stats('grad_std', ax=axs[0])[0] is axs[0]
    assert rec.color_dim(1, ax=axs[1]) is axs[1]
    assert rec.dead_chart(ax=axs[2]) is axs[2]
    assert rec.plot_layer_stats(1, ax=axs[1:])[0].get_title() == '2 Conv2d 8>8: mean'


def test_the_dead_chart_has_a_row_for_each_layer():
    rec = recorder_of(deep(100))
    a = rec.dead_chart()
    want = rec.df().query("phase == 'train'").pivot(index='layer', columns='step', values='dead').loc[rec.names]
    np.testing.assert_array_equal(a.images[0].get_array(), want)
    assert a.get_xlabel() == 'step' and a.get_title() == 'dead share (≤ 0.05 or std/10)'
    assert 'dead share' in a.images[0].colorbar.ax.get_ylabel()
    assert texts(a.get_yticklabels())[0] == '1 Linear 64>16' and len(a.get_yticks()) <= 34
    assert rec.dead_chart(phase='valid', figsize=(3, 2)).figure.get_size_inches().tolist() == [3, 2]
    draw_all()


# ---- One layer ----

def test_layer_stats_are_plotted_with_label_axes_and_targets():
    rec = recorder_of()
    axs = rec.plot_layer_stats(1)
    assert axs[0].figure.get_suptitle() == '2 Conv2d 8>8'
    assert [a.get_title() for a in axs] == ['mean', 'std', 'share near zero (≤ 0.05)']
    assert {a.get_xlabel() for a in axs} == {'step'}
    for a, values in zip(axs, rec.layer_stats(1)):
        assert list(a.lines[0].get_ydata()) == list(values)
    assert [len(a.lines) for a in axs] == [2, 2, 1]
    draw_all()


def test_a_histogram_is_plotted_with_label_axes_and_colour_bar():
    rec = recorder_of()
    a = rec.color_dim(1)
    image = a.images[0]
    np.testing.assert_array_equal(image.get_array(), rec.hist(1))
    assert image.origin == 'lower' and image.get_extent() == [-0.5, 5.5, -10, 10]
    assert (a.get_title(), a.get_xlabel(), a.get_ylabel()) == ('2 Conv2d 8>8', 'step', 'activation')
    assert image.colorbar.ax.get_ylabel() == 'log(1 + elements)'
    draw_all()


@pytest.mark.parametrize('n', [1, 5, 110])
def test_the_grid_of_histograms_has_a_panel_for_each_layer(n):
    rec = recorder_of(deep(n))
    axs = rec.color_dim()
    assert len(axs) == n and axs[0].get_title() == ('1 Linear 64>16' if n > 1 else '1 Linear 64>10')
    np.testing.assert_array_equal(axs[n-1].images[0].get_array(), rec.hist(n-1))
    draw_all()


# ---- Room

def test_panels_wrap_and_fit_a_notebook():
    rec = recorder_of()
    stats = 'mean', 'std', 'near_zero', 'dead', 'grad_mean', 'grad_std', 'grad_zero'
    axs = rec.plot_stats(stats)
    assert len(axs) == 7 and axs[0].get_subplotspec().get_gridspec().get_geometry() == (3, 3)
    for a in (axs[0], rec.plot_layer_stats(0)[0], rec.color_dim(0), rec.color_dim()[0], rec.dead_chart()):
        assert a.figure.get_size_inches()[0]*100 <= 900
    draw_all()


def test_empty_panels_say_why():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.far, self.idle, self.head = nn.Linear(64, 10), nn.Linear(2, 2), nn.Linear(10, 10)
            nn.init.constant_(self.far.bias, 50.)

        def forward(self, x): return self.head(self.far(x.flatten(1)))
    axs = recorder_of(Idle()).color_dim()
    assert [a.texts[0].get_text() for a in axs[:2]] == ['nothing in -10 to 10', 'not seen']
    draw_all()


def test_long_titles_keep_the_end_that_tells():
    inner = nn.ModuleDict({'a_rather_long_name_of_a_backbone': convnet()})
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder_of_images = inner

        def forward(self, x): return self.encoder_of_images['a_rather_long_name_of_a_backbone'](x)
    titles = [a.get_title() for a in recorder_of(Deep()).color_dim()]
    assert [t[0] for t in titles] == ['…']*3 and titles[0].endswith('backbone.0 Conv2d 1>8') and len(titles[0]) <= 30
