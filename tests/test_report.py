"The report: rows, tables, warning, plot."
import re
import warnings

import numpy as np
import pytest
import torch
from networks import NETWORKS, cnn
from torch import nn

from fastai_lsuv import LSUVReport, lsuv_init
from fastai_lsuv.report.report import STATUSES, Row
from fastai_lsuv.statuses import ADVICE, Status

pytestmark = pytest.mark.usefixtures('axes')
nan, inf = float('nan'), float('inf')
RANGES = dict(std_range=(0.9, 1.1), mean_range=(-0.2, 0.2))


def row(k, status='ok', mean=0., std=1., before=(None, None), **kwargs):
    called = status != 'not called'
    fields = dict(name=f'blocks.{k}.conv', kind='Conv2d', shape=(32, 64, 8, 8) if called else (),
                  mean=mean if called else nan, std=std if called else nan, mean_before=before[0],
                  std_before=before[1], passes=int(status in ('ok', 'off')), status=status)
    return Row(**{**fields, **kwargs})


def run(*rows, order='std mean', n_passes=2, **kwargs):
    "The report of a run. Rows may be given by their status."
    return LSUVReport([r if isinstance(r, Row) else row(k, r) for k, r in enumerate(rows)], order, n_passes, **kwargs)


def soup_of(report):
    bs4 = pytest.importorskip('bs4')
    return bs4.BeautifulSoup(report._repr_html_(), 'html.parser')


# --- what it holds

def test_rows_of_a_real_report():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8*36, 4))
    r = lsuv_init(model, torch.randn(16, 3, 8, 8), baseline=True)
    assert len(r) == 2 and [x.name for x in r] == ['0', '3'] and r[0] is r['0'] is r[-2] and r[:1] == (r[0],)
    assert r[0].shape == (16, 8, 6, 6) and r[0].passes == 1 and r[0].status == 'ok' and r[1].kind == 'Linear'
    assert r.ok and r.left_alone == '' and r.order == 'std mean' and r.n_passes == 3
    assert r.pairs == [(x.mean, x.std) for x in r] and all(abs(m) < 1e-3 and abs(s - 1) < 1e-3 for m, s in r.pairs)
    for x in r:
        assert x.std_range == pytest.approx((0.9, 1.1)) and abs(x.std_before - 1) > 0.1
        assert x.mean_range == pytest.approx((-0.75, 0.75))  # of 16 samples: 3/sqrt(16)
    with pytest.raises(IndexError): r[2]


def test_per_channel_rows_are_those_of_the_channels():
    r = lsuv_init(nn.Sequential(nn.Linear(8, 4)), torch.randn(64, 8), per_channel=True, preinit=None)
    assert r.pairs == [pytest.approx((0, 1), abs=1e-3)]


def test_a_status_is_a_word_and_two_of_them_are_ok():
    assert list(STATUSES) == [s.value for s in Status] and Status('tied') is Status.TIED == 'tied'
    assert f'{Status.OK}' == str(Status.OK) == 'ok' and {'alike', 'off'} & {Status.ALIKE} == {'alike'}
    assert ADVICE.keys() == STATUSES.keys() - {'ok'}
    for s in STATUSES: assert run('ok', s).ok == (s in ('ok', 'no bias')) == (run(s).left_alone == '')
    assert run('ok', 'not called', 'frozen').pairs == [(0., 1.), (0., 1.)]  # of what ran


def test_df_and_table_have_the_baseline_only_if_it_was_asked_for():
    columns = ['name', 'kind', 'shape', 'mean', 'std', 'passes', 'status', 'gain', 'mean_range', 'std_range', 'weights']
    df = run('ok', 'frozen').df()
    assert list(df.columns) == columns and df['status'].tolist() == ['ok', 'frozen']
    r = run(row(0, before=(0.5, 2.)))
    assert list(r.df().columns) == columns[:5] + ['mean_before', 'std_before'] + columns[5:]
    assert r.df()['std_before'][0] == 2 and list(LSUVReport([]).df().columns)[:2] == ['name', 'kind']
    assert re.split('  +', str(r).splitlines()[2].strip()) == [
        'layer', 'kind', 'output', 'mean before', 'mean', 'std before', 'std', 'gain', 'passes', 'status']


# --- what it says (test_messages.py has the words)

def test_left_alone_names_five_layers_and_counts_the_rest():
    head,frozen,tied = run(*['ok']*3, *['frozen']*7, 'tied', 'no bias').left_alone.splitlines()
    assert head == 'LSUV did not normalize 8 of 12 layers:' and tied.startswith('- tied: blocks.10.conv. It')
    names = 'blocks.3.conv, blocks.4.conv, blocks.5.conv, blocks.6.conv, blocks.7.conv and 2 more'
    assert frozen.startswith(f'- frozen: {names}. Its weight is or was frozen')


def test_one_warning_and_it_points_here():
    model, batch = NETWORKS['hand/parametrized']()
    with pytest.warns(UserWarning) as said:
        r = lsuv_init(model, batch)
    assert [str(w.message) for w in said if 'LSUV' in str(w.message)] == [r.left_alone] and said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        lsuv_init(cnn(3, 8, 8), torch.randn(8, 3, 8, 8))


HALF = dict(std_range=(0.45, 0.55), mean_range=(-0.2, 0.2))


@pytest.mark.parametrize('report, says', [
    (run(row(0, **HALF), row(1, 'no bias', **HALF), row(2, 'off', **HALF)), "2 of 3 layers at std 0.5 (2 passes)."),
    (run(row(0, **HALF), order='mean'), "1 of 1 layer at mean 0 (2 passes)."),
    (run(row(0, **RANGES), row(1, **HALF), loss=(1., 2.), loss_note='a note'),
     "2 of 2 layers at the target std (2 passes). Loss 1.00 -> 2.00 (a note)."),
    (run(row(0, **RANGES), n_passes=1, loss_note='ValueError: no'), "1 of 1 layer at std 1 (1 pass)."),
    (run(row(0, **RANGES), loss=(2.3016, 1e-3)), "1 of 1 layer at std 1 (2 passes). Loss 2.30 -> 0.001."),
    (run(row(0, **RANGES), loss=(nan, 3.5e8)), "1 of 1 layer at std 1 (2 passes). Loss nan -> 3.5e+08."),
    (run(row(0, **RANGES), loss=(-1.5, 0.)), "1 of 1 layer at std 1 (2 passes). Loss -1.50 -> 0."),
])
def test_a_summary_names_its_target_and_the_loss(report, says):
    assert report.summary == f'LSUV: {says}'


WHY = 'the training loss is 9 after LSUV; it was 1 before'
OUT = {'tok.weight': 'embedding', 'pos.weight': 'embedding', 'rnn.weight_ih_l0': 'recurrent'}
WIDE = dict(std_range=(0.9, 1.1), mean_range=(-0.75, 0.75))


@pytest.mark.parametrize('report, says', [
    (run(row(0, gain=400.)), ['blocks.0.conv by 400']),
    (run('ok', unusual='its samples are alike'), ['its samples are alike']),
    (run('ok', loss_note='ValueError: no'), ['the training loss (ValueError: no)']),
    (run('undone', 'frozen', loss=(1., 9.), undone=WHY, unusual='its std is 0.001'),
     [WHY, 'put the weights back', 'unusual', 'or was frozen', 'Leave layers out']),
    (run('ok', outside=OUT, coverage=0.5),
     ['50 % of the weights', 'tok.weight, pos.weight (embedding: it is', '; rnn.weight_ih_l0 (recurrent: a recurrent']),
    (run('ok', outside=OUT, coverage=0.992), ['0.8 % of the weights']),
    (run('ok', outside={'7.weight': 'not selected'}, coverage=0.5), ['modules', 'exclude', 'leaves it out']),
    (run(row(0, mean=-0.2, **WIDE)), ['ok: here a mean may be up to 0.75 off its target']),
    (run(row(0, mean=0.2, **WIDE)), ['ok: here a mean may be up to 0.75 off its target']),
], ids=['gain', 'unusual', 'no loss', 'undone', 'outside', 'little outside', 'chosen', 'mean below', 'mean above'])
def test_text_and_html_say_each_remark_once(report, says):
    text,html = str(report),soup_of(report).get_text()
    for words in says: assert text.count(words) == 1 == html.count(words.removeprefix('ok: ')), words
    assert all(remark in text.splitlines() and remark in report.warning.splitlines() for remark in report.remarks)
    assert 'far worse' not in report.warning and '% of the weights' not in report.warning


@pytest.mark.parametrize('outside, coverage, share', [
    (OUT, 0.5, '50'),
    (OUT, 0.989, '1.1'),
    (OUT, 0., '100'),
    (OUT, 0.992, None),
    ({'7.weight': 'not selected'}, 0.5, None),  # the user has left it out
])
def test_a_summary_tells_the_share_of_the_weights_outside_unless_it_is_little(outside, coverage, share):
    words = f' {share} % of the weights are outside these layers (see `report.outside`).' if share else ''
    assert run('ok', outside=outside, coverage=coverage).summary == run('ok').summary + words


def test_the_tolerance_of_a_mean_is_told_only_where_it_is_met():
    small,off = run(row(0, mean=0.09, **WIDE)),run(row(0, 'off', mean=0.9, **WIDE))
    for r in (small, off, LSUVReport([row(0, mean=0.2, **WIDE)])):  # the last is a look
        assert 'here a mean' not in str(r) and 'outside' not in str(r)


# --- the table

def test_table_of_a_few_rows():
    rows = [
        row(0, mean=-3e-9, std=0.99999),
        row(1, 'off', mean=-0.5, std=3.2e-6),
        row(2, 'constant', std=0., shape=(8, 4), kind='Linear'),
        row(3, 'not called'),
        row(4, 'non-finite', mean=nan, std=inf),
        row(5, mean=12345.678, std=1),
    ]
    r = run(*rows)
    lines = str(r).splitlines()
    assert lines[0] == "LSUV: 2 of 6 layers at the target std (2 passes)."
    assert [l.split() for l in lines[2:3] + lines[4:10]] == [
        ['layer', 'kind', 'output', 'mean', 'std', 'gain', 'passes', 'status'],
        ['blocks.0.conv', 'Conv2d', '32x64x8x8', '0.0000', '1.0000', '1', '1', 'ok'],
        ['blocks.1.conv', 'Conv2d', '32x64x8x8', '-0.5000', '3.2e-06', '1', '1', 'off'],
        ['blocks.2.conv', 'Linear', '8x4', '0.0000', '0.0000', '1', '0', 'constant'],
        ['blocks.3.conv', 'Conv2d', '1', '0', 'not', 'called'],
        ['blocks.4.conv', 'Conv2d', '32x64x8x8', 'nan', 'inf', '1', '0', 'non-finite'],
        ['blocks.5.conv', 'Conv2d', '32x64x8x8', '1.23e+04', '1.0000', '1', '1', 'ok'],
    ]
    assert len({l.index('Conv2d') for l in lines if 'Conv2d' in l}) == 1 and repr(r) == str(r)  # columns line up
    assert lines[10] == '' and lines[11] == f"off: {STATUSES['off']}. {ADVICE['off']}"
    assert [l.split(':')[0] for l in lines[11:]] == ['off', 'constant', 'not called', 'non-finite']  # what they mean


@pytest.mark.parametrize('statuses', [
    ['ok']*300,
    ['ok', 'no bias', 'constant']*100,
    ['ok']*100 + ['frozen']*5 + ['ok']*195,
    ['ok']*41,
    ['frozen']*60 + ['ok']*60,
], ids=['alike', 'mixed', 'a few frozen', 'just too long', 'half frozen'])
def test_long_tables_are_folded(statuses):
    r = run(*(row(k, s, std=1 + k/1e4) for k, s in enumerate(statuses)))
    lines = str(r).split('\n\n')[1].splitlines()[2:]
    assert len(lines) <= 46 and max(map(len, lines)) <= 118
    assert 'blocks.0.conv' in lines[0] and f'blocks.{len(statuses) - 1}.conv' in lines[-1]
    folds = [l for l in lines if l.startswith('...')]
    hidden = sum(int(l.split()[1]) for l in folds)
    assert folds and hidden + len(lines) - len(folds) == len(statuses)  # every row is shown or counted
    for s in set(statuses):
        assert any(s in l and not l.startswith('...') for l in lines), f'no {s} row is shown'
    if statuses.count('frozen') == 5:
        assert all(f'blocks.{k}.conv' in '\n'.join(lines) for k in range(100, 105))  # what is rare is shown
    assert '...' not in str(run(*statuses[:40]))


def test_a_fold_says_what_it_holds():
    r = run(*(row(k, 'ok' if k % 3 else 'no bias', mean=k/1000, std=1 + k/1e4) for k in range(60)))
    before,fold = str(r).split('\n...')[0].splitlines()[-1],str(r).split('\n...')[1].splitlines()[0]
    first = int(before.split('.')[1]) + 1
    last = first + int(fold.split()[0]) - 1
    assert f'{first/1000:.4f} to {last/1000:.4f}' in fold and f'{1 + first/1e4:.4f} to {1 + last/1e4:.4f}' in fold
    assert re.search(r'\d+ ok, \d+ no bias|\d+ no bias, \d+ ok', fold)
    look = LSUVReport([row(k, 'off' if k % 2 else 'ok') for k in range(60)])
    assert '22 near 1, 22 not near 1\n' in str(look) and 'passes' not in str(look)
    assert str(look).startswith(look.summary)


@pytest.mark.parametrize('status, std, says', [
    ('ok', 1.02, '✓ near 1'),
    ('off', 0.31, '– not near 1'),
    ('off', 999., '– not near 1'),
    ('off', 1001., '! exploding'),
    ('off', 9e-4, '! vanishing'),
    ('constant', 0., '! constant'),
    ('non-finite', nan, '✗ non-finite'),
    ('not called', nan, '– not called'),
    ('outlier', 3., '! outlier'),
])
def test_a_look_judges_no_std_unless_it_is_extreme(status, std, says):
    r = LSUVReport([row(0, status, std=std, std_range=(0.9, 1.1))])
    page = soup_of(r)
    assert page.tbody.tr.find_all('td')[-1].get_text() == says
    assert not any(words in p.get_text() for p in page.find_all('p')[1:] for words in ('near 1', 'scaled', 'left as'))
    assert r[0].status == r.df()['status'][0] == status  # rows keep their words


# --- HTML

def test_html_is_escaped():
    html = run(row(0, name='<b>&', kind='<script>'), loss=(1., 2.))._repr_html_()
    assert '&lt;b&gt;&amp;' in html and '&lt;script&gt;' in html and '<script>' not in html and html.count('<tr>') == 2
    assert 'Loss 1.00 -&gt; 2.00' in html


def test_html_folds_a_long_table_and_keeps_all_of_it():
    page = soup_of(run(*['ok']*300))
    assert len(page.table.find_all('tr')) <= 47 and 'details' not in soup_of(run(*['ok']*40)).decode()
    assert page.details.summary.get_text() == 'All 300 layers'
    names = [tr.td.get_text() for tr in page.details.tbody.find_all('tr')]
    assert names == [f'blocks.{k}.conv' for k in range(300)]


def test_html_says_each_status_in_words_and_what_it_means():
    page = soup_of(run(*STATUSES))
    pills = dict(zip(STATUSES, (tr.find_all('td')[-1].get_text() for tr in page.tbody.find_all('tr'))))
    assert [p.split(' ', 1)[1] for p in pills.values()] == list(STATUSES)
    assert {p[0] for p in pills.values()} == set('✓–!✗')  # a mark beside the colour
    # Names are in the type of code. A remark tells of "undone".
    assert [p.get_text() for p in page.find_all('p')][1:] == [
        f'{pills[s]} {meaning}. {ADVICE[s]}'.replace('`', '') for s, meaning in STATUSES.items()
        if s not in ('ok', 'undone')]
    assert [c.get_text() for c in page.find_all('code')].count('max_iter') == 1


@pytest.mark.parametrize('std, width, beyond', [(0., 0, False), (0.5, 25, False), (1., 50, False), (1.9, 95, False),
                                                (40., 100, True), (inf, 100, True), (nan, None, None)])
def test_html_has_a_bar_for_each_std(std, width, beyond):
    page = soup_of(run(row(0, std=1., before=(0., std), std_range=(0.9, 1.1))))
    assert page.select_one('.bar.after').i['style'] == 'width:50%'
    before = page.select_one('.bar.before')
    assert (before is None) == (width is None)
    if before is not None: assert before.i['style'] == f'width:{width}%' and ('beyond' in before['class']) == beyond
    assert soup_of(run(row(0), order='mean')).select_one('.bar') is None  # nothing to compare it with


# --- the plot

def lines_of(ax): return {line.get_label(): line for line in ax.get_lines()}
def texts_of(texts): return [t.get_text() for t in texts]


def test_plot_has_before_and_after_on_one_scale():
    statuses = ['ok', 'not called', 'off', 'no bias']
    std,mean = run(*(row(k, s, mean=k/10, std=1 + k, before=(k, 100 + k)) for k, s in enumerate(statuses))).plot()
    lines = lines_of(std)
    assert list(lines['before'].get_xdata()) == [100, 102, 103] and list(lines['after'].get_xdata()) == [1, 3, 4]
    assert list(lines['not normalized'].get_ydata()) == [1] and list(lines['not normalized'].get_xdata()) == [3]
    assert list(lines_of(mean)['after'].get_xdata()) == [0, 0.2, pytest.approx(0.3)]
    assert std.get_xscale() == 'log' and std.get_xlabel() == 'std' and mean.get_xlabel() == 'mean'
    assert texts_of(std.get_yticklabels()) == [f'blocks.{k}.conv Conv2d' for k in (0, 2, 3)]
    assert std.get_ylim() == (2.5, -0.5)  # the first layer is on top
    assert texts_of(mean.texts) == ['off'] and mean.texts[0].get_position()[1] == 1
    assert texts_of(std.figure.legends[0].get_texts()) == ['before', 'after', 'not normalized']


def test_plot_shows_the_target_and_what_counts_as_at_it():
    small = {**RANGES, 'std_range': (0.18, 0.22)}
    std,mean = run(row(0, std=0.99, **RANGES), row(1, std=0.985, **small)).plot()
    assert sorted({round(float(x), 9) for x in lines_of(std)['target'].get_xdata()}) == [0.2, 1.]
    assert set(lines_of(mean)['target'].get_xdata()) == {0.}
    band = std.collections[0].get_paths()[0].vertices
    assert {round(float(x), 2) for x, _ in band} == {0.9, 1.1, 0.18, 0.22}
    low,high = std.get_xlim()
    assert low == 0 and high >= 1.1 and mean.get_xlim() == (-1.1, 1.1)  # no zoom into 0.985 to 0.99
    std,mean = run(row(0, std_range=(0.9, 1.1)), order='std').plot()
    assert 'target' in lines_of(std) and 'target' not in lines_of(mean)


def test_plot_of_what_no_axis_holds():
    std,mean = run(
        row(0, std=1e-3, before=(900., 5e3)), row(1, 'constant', std=0., before=(0., 0.)),
        row(2, 'non-finite', mean=nan, std=nan, before=(nan, nan)), row(3, 'non-finite', mean=-inf, std=inf)).plot()
    low,high = std.get_xlim()
    assert 0 < low < 1e-3 and 5e3 < high < 1e4 and mean.get_xscale() == 'symlog' and mean.get_xlim()[1] > 900
    assert list(lines_of(std)['not normalized'].get_xdata()) == [low, high, high]
    assert list(lines_of(mean)['not normalized'].get_xdata()) == [0, mean.get_xlim()[1], mean.get_xlim()[0]]
    assert texts_of(mean.texts) == ['constant', 'non-finite', 'non-finite']
    assert len(run('not called').plot()) == 2


def test_plot_of_many_layers_names_some():
    statuses = ['ok']*300
    statuses[100], statuses[101], statuses[250] = 'off', 'off', 'tied'
    std,mean = run(*statuses).plot()
    ticks = list(std.get_yticks())
    assert len(ticks) <= 50 and np.diff(ticks).min() >= 6 and {0, 100, 250} <= set(ticks)
    bold = [t.get_text() for t in std.get_yticklabels() if t.get_fontweight() == 'bold']
    assert bold == ['blocks.100.conv Conv2d', 'blocks.250.conv Conv2d']
    assert texts_of(mean.texts) == ['off', 'tied'] and std.figure.get_size_inches()[1] == 10
    assert run(*['ok']*5).plot()[0].figure.get_size_inches()[1] < 3
    assert texts_of(run(row(0, name='a'*50)).plot()[0].get_yticklabels()) == ['…' + 'a'*24 + ' Conv2d']


def test_plot_on_axes_of_the_user_and_of_layer_stats():
    import matplotlib.pyplot as plt
    axs = plt.subplots(2, 1)[1]
    assert run('ok').plot(axs=axs) is axs and axs[0].get_legend() is not None
    assert [texts_of(a.get_yticklabels()) for a in axs] == [['blocks.0.conv Conv2d']]*2
    std,mean = LSUVReport([row(0), row(1, 'off')]).plot()
    assert list(lines_of(std)) == ['as it is'] and not mean.texts and std.get_xscale() == 'linear'
    assert run('ok').plot(figsize=(5, 3))[0].figure.get_size_inches().tolist() == [5, 3]
