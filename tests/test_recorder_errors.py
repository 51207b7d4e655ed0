"What a recorder says when it is asked for something that it cannot do."
import pytest
from matplotlib import pyplot as plt
from recording import recorded

from fastai_lsuv.recorder import ActivationStatsRecorder

pytestmark = pytest.mark.usefixtures('axes')


@pytest.mark.parametrize('kw,error,match', [
    (dict(every=0), ValueError, 'every: got 0'), (dict(every=1.5), ValueError, 'every: got 1.5'),
    (dict(every=True), ValueError, 'every: got True'), (dict(max_steps=1), ValueError, 'max_steps: got 1'),
    (dict(near_zero='x'), TypeError, "near_zero: got 'x'"), (dict(hist=(10, 0)), TypeError, r'hist: got \(10, 0\)'),
    (dict(hist=(0, 0, 1)), ValueError, 'hist: got'), (dict(hist=(10, 1, 1)), ValueError, 'hist: got'),
    (dict(hist=0), ValueError, 'hist: got .*fastai'), (dict(hist='yes'), TypeError, "hist: got 'yes'"),
    (dict(sample=0), ValueError, 'sample: got 0.*None'), (dict(sample=0.5), ValueError, 'sample: got 0.5'),
    (dict(with_hist=True), TypeError, "with_hist: .*Recorder has no such argument; did you mean 'hist'"),
    (dict(grad=True), TypeError, "grad: .*Recorder has no such argument; did you mean 'grads'"),
    (dict(max_step=1), TypeError, "max_step: .*Recorder has no such argument; did you mean 'max_steps'"),
    (dict(xyzzy=1), TypeError, "xyzzy: ActivationStatsRecorder has no such argument; it takes modules"),
], ids=str)
def test_bad_options(kw, error, match):
    with pytest.raises(error, match=match): ActivationStatsRecorder(**kw)


READERS = {
    'df': lambda r: r.df(), 'pairs': lambda r: r.pairs, 'layer_stats': lambda r: r.layer_stats(0),
    'hist': lambda r: r.hist(0), 'diagnose': lambda r: r.diagnose(), 'plot_stats': lambda r: r.plot_stats(),
    'plot_layer_stats': lambda r: r.plot_layer_stats(0), 'color_dim(0)': lambda r: r.color_dim(0),
    'color_dim': lambda r: r.color_dim(), 'dead_chart': lambda r: r.dead_chart(),
}


@pytest.mark.parametrize('reader', READERS)
def test_before_a_fit_every_reader_says_that_nothing_is_recorded(reader):
    with pytest.raises(ValueError, match='nothing is recorded yet: call `learn.fit` with this callback attached'):
        READERS[reader](ActivationStatsRecorder(hist=True))
    assert not plt.get_fignums()


def test_bad_questions():
    rec = recorded()
    for ask, says in {
        lambda: rec.layer_stats(3): 'i: got 3.*below 3.*0, 2, 7',
        lambda: rec.plot_layer_stats('conv'): "i: got 'conv'",
        lambda: rec.layer_stats(0, 'valid'): 'valid=True',
        lambda: rec.layer_stats(0, 'test'): "phase: got 'test'",
        lambda: rec.plot_stats('grad_std'): "got 'grad_std'; it takes mean, std, near_zero, dead; .*grads=True",
        lambda: rec.plot_stats('median'): "stats: got 'median'; it takes mean, std, near_zero, dead$",
        lambda: rec.plot_layer_stats(0, ax=plt.figure().gca()): 'ax: got 1 axes; this plot draws on 3',
        lambda: recorded(modules='nowhere'): 'modules',
    }.items():
        with pytest.raises(ValueError, match=says): ask()
    for reader in ('hist', 'color_dim(0)', 'color_dim'):
        for r in (rec, ActivationStatsRecorder()):
            with pytest.raises(ValueError, match='no histograms are recorded; pass `hist=True` .* then fit'):
                READERS[reader](r)
