"What a recorder says when it is asked for something that it cannot do."
import pytest
from matplotlib import pyplot as plt
from recording import fit, learner

from fastai_lsuv.recorder import ActivationStatsRecorder


@pytest.mark.parametrize('kw,error,match', [
    (dict(every=0), ValueError, 'every: got 0'), (dict(every=1.5), ValueError, 'every: got 1.5'),
    (dict(every=True), ValueError, 'every: got True'), (dict(max_steps=1), ValueError, 'max_steps: got 1'),
    (dict(near_zero='x'), TypeError, "near_zero: got 'x'"), (dict(hist=(10, 0)), TypeError, r'hist: got \(10, 0\)'),
    (dict(hist=(0, 0, 1)), ValueError, 'hist: got'), (dict(hist=(10, 1, 1)), ValueError, 'hist: got'),
    (dict(hist=0), ValueError, 'hist: got .*fastai'), (dict(hist='yes'), TypeError, "hist: got 'yes'"),
    (dict(sample=0), ValueError, 'sample: got 0.*None'), (dict(sample=0.5), ValueError, 'sample: got 0.5'),
])
def test_bad_options(kw, error, match):
    with pytest.raises(error, match=match):
        ActivationStatsRecorder(**kw)


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


@pytest.mark.parametrize('reader', ['hist', 'color_dim(0)', 'color_dim'])
def test_without_histograms_their_readers_say_so(reader):
    rec = ActivationStatsRecorder()
    with pytest.raises(ValueError, match='no histograms are recorded; pass `hist=True` .* then fit'):
        READERS[reader](rec)
    fit(learner(cbs=rec))
    with pytest.raises(ValueError, match='hist=True'):
        READERS[reader](rec)


def test_bad_questions():
    rec = ActivationStatsRecorder()
    fit(learner(cbs=rec))
    with pytest.raises(ValueError, match='i: got 3.*below 3.*0, 2, 7'):
        rec.layer_stats(3)
    with pytest.raises(ValueError, match="i: got 'conv'"):
        rec.plot_layer_stats('conv')
    with pytest.raises(ValueError, match='valid=True'):
        rec.layer_stats(0, 'valid')
    with pytest.raises(ValueError, match="phase: got 'test'"):
        rec.layer_stats(0, 'test')
    with pytest.raises(ValueError, match="stats: got 'grad_std'; it takes mean, std, near_zero, dead; .*grads=True"):
        rec.plot_stats('grad_std')
    with pytest.raises(ValueError, match="stats: got 'median'; it takes mean, std, near_zero, dead$"):
        rec.plot_stats('median')
    with pytest.raises(ValueError, match='ax: got 1 axes; this plot draws on 3'):
        rec.plot_layer_stats(0, ax=plt.figure().gca())
    with pytest.raises(ValueError, match='modules'):
        fit(learner(cbs=ActivationStatsRecorder('nowhere')))
    plt.close('all')


def test_a_layer_is_asked_for_by_place_or_by_name():
    rec = ActivationStatsRecorder()
    fit(learner(cbs=rec))
    assert rec.layer_stats(-1) == rec.layer_stats('7') == rec.layer_stats(2)
