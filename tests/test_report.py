"The report: rows, tables, warning, plot."
import inspect
import math
import re
import typing
import warnings

import numpy as np
import pytest
import torch
from networks import NETWORKS, cnn
from torch import nn

import fastai_lsuv
from fastai_lsuv import LSUVReport, layer_stats, lsuv_init
from fastai_lsuv.report import tables
from fastai_lsuv.report.report import STATUSES, Row
from fastai_lsuv.statuses import ADVICE, DONE, MARKS, OUTSIDE, Status

nan = float('nan')


def row(k, status='ok', mean=0., std=1., before=(None, None), **kwargs):
    if status == 'not called':
        mean = std = nan
    fields = dict(
        name=f'blocks.{k}.conv',
        kind='Conv2d',
        shape=(32, 64, 8, 8) if status != 'not called' else (),
        mean=mean,
        std=std,
        mean_before=before[0],
        std_before=before[1],
        passes=int(status in ('ok', 'off')),
        status=status,
    )
    return Row(**{**fields, **kwargs})


def report(*statuses, order='std mean', **kwargs):
    return LSUVReport([row(k, s, **kwargs) for k, s in enumerate(statuses)], order=order, n_passes=2)


def test_rows_of_a_real_report():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8*36, 4))
    r = lsuv_init(model, torch.randn(16, 3, 8, 8), baseline=True)
    assert len(r) == 2 and [x.name for x in r] == ['0', '3'] and r[0] is r['0'] is r[-2] and r[1].kind == 'Linear'
    assert r[0].shape == (16, 8, 6, 6) and r[0].passes == 1 and r[0].status == 'ok' and r.ok and r.left_alone == ''
    assert r.pairs == [(x.mean, x.std) for x in r] and all(abs(m) < 1e-3 and abs(s - 1) < 1e-3 for m, s in r.pairs)
    assert all(x.std_range == pytest.approx((0.9, 1.1)) for x in r)
    assert r[0].mean_range == r[1].mean_range == pytest.approx((-0.75, 0.75))  # of 16 samples: 3/sqrt(16)
    assert all(abs(x.std_before - 1) > 0.1 for x in r) and r.order == 'std mean' and r.n_passes == 3
    with pytest.raises(KeyError, match="'head' is not a layer of this report; its layers are 0, 3"):
        r['head']
    with pytest.raises(IndexError):
        r[2]
    assert r[:1] == (r[0],)


def test_ok_is_only_what_is_done():
    assert report('ok', 'no bias').ok and DONE == ('ok', 'no bias')
    for s in STATUSES:
        assert report('ok', s).ok == (s in DONE) == (report(s).left_alone == '')


def test_a_status_is_a_word_and_one_entry_of_the_table():
    assert list(STATUSES) == [s.value for s in Status] and Status('tied') is Status.TIED == 'tied'
    assert f'{Status.OK}' == str(Status.OK) == 'ok' and {'alike', 'off'} & {Status.ALIKE} == {'alike'}
    assert ADVICE.keys() == STATUSES.keys() - {'ok'} and {s.tone for s in Status} == MARKS.keys()
    assert not any(text.endswith('.') for text in (*STATUSES.values(), *OUTSIDE.values()))
    assert all(text.endswith('.') for text in ADVICE.values())


def test_the_package_shows_its_five_names():
    assert dir(fastai_lsuv) == sorted(fastai_lsuv.__all__) and len(dir(fastai_lsuv)) == 5


def test_pairs_leave_out_what_did_not_run():
    assert report('ok', 'not called', 'frozen').pairs == [(0., 1.), (0., 1.)]


def test_left_alone_is_one_line_by_status():
    r = report(*['ok']*3, *['frozen']*7, 'tied', 'not called', 'no bias', 'ok')
    head, frozen, tied, not_called = r.left_alone.splitlines()
    assert head == 'LSUV did not normalize 9 of 14 layers:'
    names = 'blocks.3.conv, blocks.4.conv, blocks.5.conv, blocks.6.conv, blocks.7.conv and 2 more'
    assert frozen.startswith(f'- frozen: {names}. Its weight is or was frozen')
    assert tied == '- tied: blocks.10.conv. I' + STATUSES['tied'][1:] + '.'
    assert not_called == '- not called: blocks.11.conv. Not used in this forward pass; left as it was.'
    assert report('tied').left_alone.startswith('LSUV did not normalize 1 of 1 layer:')


def test_one_warning_and_it_points_here():
    model, batch = NETWORKS['hand/parametrized']()
    with pytest.warns(UserWarning) as said:
        r = lsuv_init(model, batch)
    assert [str(w.message) for w in said if 'LSUV' in str(w.message)] == [r.left_alone] and said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        lsuv_init(cnn(3, 8, 8), torch.randn(8, 3, 8, 8))


def test_table_of_a_few_rows():
    rows = [
        row(0, mean=-3e-9, std=0.99999),
        row(1, 'off', mean=-0.5, std=3.2e-6),
        row(2, 'constant', std=0., shape=(8, 4), kind='Linear'),
        row(3, 'not called'),
        row(4, 'non-finite', mean=nan, std=float('inf')),
        row(5, mean=12345.678, std=1),
    ]
    r = LSUVReport(rows, order='std mean', n_passes=2)
    lines = str(r).splitlines()
    assert lines[0] == "LSUV: 2 of 6 layers at the target std (2 passes)."
    assert lines[2].split() == ['layer', 'kind', 'output', 'mean', 'std', 'gain', 'passes', 'status']
    assert lines[4].split() == ['blocks.0.conv', 'Conv2d', '32x64x8x8', '0.0000', '1.0000', '1', '1', 'ok']
    assert lines[5].split() == ['blocks.1.conv', 'Conv2d', '32x64x8x8', '-0.5000', '3.2e-06', '1', '1', 'off']
    assert lines[6].split() == ['blocks.2.conv', 'Linear', '8x4', '0.0000', '0.0000', '1', '0', 'constant']
    assert lines[7].split() == ['blocks.3.conv', 'Conv2d', '1', '0', 'not', 'called']
    assert lines[8].split() == ['blocks.4.conv', 'Conv2d', '32x64x8x8', 'nan', 'inf', '1', '0', 'non-finite']
    assert '1.23e+04' in lines[9] and lines[10] == '' and repr(r) == str(r)
    assert len({l.index('Conv2d') for l in lines if 'Conv2d' in l}) == 1  # columns line up
    assert [l.split(':')[0] for l in lines[11:]] == ['off', 'constant', 'not called', 'non-finite']  # what they mean
    assert lines[11] == f"off: {STATUSES['off']}. {ADVICE['off']}"


def test_ten_rows_are_all_shown():
    assert len(str(report(*['ok']*10)).splitlines()) == 4 + 10 and '...' not in str(report(*['ok']*10))


@pytest.mark.parametrize('statuses', [
    ['ok']*300,
    ['ok', 'no bias']*150,
    ['ok', 'no bias', 'constant']*100,
    ['ok']*100 + ['frozen']*5 + ['ok']*195,
    ['constant', 'unresponsive']*150,
    ['ok']*41,
    ['frozen']*60 + ['ok']*60,
    (['ok']*9 + ['off'])*30,
])
def test_long_tables_are_folded(statuses):
    r = LSUVReport([row(k, s, std=1 + k/1e4) for k, s in enumerate(statuses)], order='std mean', n_passes=2)
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


def test_a_fold_says_what_it_holds():
    rows = [row(k, 'ok' if k % 3 else 'no bias', mean=k/1000, std=1 + k/1e4) for k in range(60)]
    r = LSUVReport(rows, order='std', n_passes=2)
    fold = next(l for l in str(r).splitlines() if l.startswith('...'))
    first = int(str(r).split('\n...')[0].splitlines()[-1].split('.')[1]) + 1
    n = int(fold.split()[1])
    last = first + n - 1
    assert f'{first/1000:.4f} to {last/1000:.4f}' in fold and f'{1 + first/1e4:.4f} to {1 + last/1e4:.4f}' in fold
    assert 'ok' in fold and 'no bias' in fold


def soup_of(r):
    bs4 = pytest.importorskip('bs4')
    return bs4.BeautifulSoup(r._repr_html_(), 'html.parser')


def test_html_is_escaped():
    html = LSUVReport([row(0, name='<b>&', kind='<script>')], order='std')._repr_html_()
    assert '&lt;b&gt;&amp;' in html and '&lt;script&gt;' in html and '<script>' not in html and html.count('<tr>') == 2
    assert 'Loss 1.00 -&gt; 2.00' in LSUVReport([row(0)], 'std', loss=(1., 2.))._repr_html_()


def test_html_folds_a_long_table_and_keeps_all_of_it():
    page = soup_of(report(*['ok']*300))
    assert len(page.table.find_all('tr')) <= 47 and 'details' not in soup_of(report(*['ok']*40)).decode()
    assert page.details.summary.get_text() == 'All 300 layers' and len(page.details.find_all('tr')) == 301
    names = [tr.td.get_text() for tr in page.details.tbody.find_all('tr')]
    assert names == [f'blocks.{k}.conv' for k in range(300)]


def test_html_says_each_status_in_words_and_what_it_means():
    page = soup_of(report(*STATUSES))
    pills = [tr.find_all('td')[-1].get_text() for tr in page.tbody.find_all('tr')]
    assert [p.split(' ', 1)[1] for p in pills] == list(STATUSES)
    assert {p[0] for p in pills} == set('✓–!✗')  # a mark beside the colour
    notes = [p.get_text() for p in page.find_all('p')][1:]
    told = {s: meaning for s, meaning in STATUSES.items() if s not in ('ok', 'undone')}  # a remark tells of "undone"
    assert len(notes) == len(told)
    for note, (status, meaning) in zip(notes, told.items()):
        words = f'{pills[list(STATUSES).index(status)]} {meaning}. {ADVICE[status]}'
        assert note == words.replace('`', '')  # names are in the type of code
    assert [c.get_text() for c in page.find_all('code')].count('max_iter') == 1


@pytest.mark.parametrize('std, width, beyond', [(0., 0, False), (0.5, 25, False), (1., 50, False), (1.9, 95, False),
                                                (40., 100, True), (float('inf'), 100, True), (nan, None, None)])
def test_html_has_a_bar_for_each_std(std, width, beyond):
    page = soup_of(LSUVReport([row(0, std=1., before=(0., std), std_range=(0.9, 1.1))], order='std'))
    after = page.select_one('.bar.after')
    assert after.i['style'] == 'width:50%'
    before = page.select_one('.bar.before')
    assert (before is None) == (width is None)
    if before is not None: assert before.i['style'] == f'width:{width}%' and ('beyond' in before['class']) == beyond
    assert soup_of(LSUVReport([row(0)], order='mean')).select_one('.bar') is None  # nothing to compare it with


def test_df():
    r = report('ok', 'frozen')
    assert list(r.df().columns) == ['name', 'kind', 'shape', 'mean', 'std', 'passes', 'status', 'gain',
                                    'mean_range', 'std_range', 'weights']
    assert len(r.df()) == 2 and r.df()['status'].tolist() == ['ok', 'frozen']
    r = report('ok', before=(0.5, 2.))
    assert list(r.df().columns) == ['name', 'kind', 'shape', 'mean', 'std', 'mean_before', 'std_before', 'passes',
                                    'status', 'gain', 'mean_range', 'std_range', 'weights']
    assert r.df()['std_before'][0] == 2
    assert list(LSUVReport([]).df().columns)[:2] == ['name', 'kind']
    assert inspect.signature(LSUVReport.df, eval_str=True).return_annotation.__name__ == 'DataFrame'
    assert typing.get_type_hints(LSUVReport.df)['return'].__name__ == 'DataFrame'


def test_baseline_columns_in_the_table():
    head = str(report('ok', before=(0.5, 2.))).splitlines()[2]
    assert [h.strip() for h in head.split('  ') if h.strip()] == [
        'layer', 'kind', 'output', 'mean before', 'mean', 'std before', 'std', 'gain', 'passes', 'status']
    assert 'before' not in str(report('ok')).splitlines()[2]


def test_summary_of_layer_stats():
    model = cnn(3, 8, 8)
    s = layer_stats(model, torch.randn(8, 3, 8, 8))
    assert re.fullmatch(r'The std is within 0.1 of 1 in 0 of 2 layers, and goes from 0.\d+ to 0.\d+\.', s.summary)
    assert str(s).startswith(s.summary) and str(s).endswith('not near 1') and 'passes' not in str(s)
    lsuv_init(model, torch.randn(8, 3, 8, 8))
    assert LSUVReport([row(0)]).summary == 'The std is within 0.1 of 1 in 1 of 1 layer.'


def test_a_look_judges_no_std_unless_it_is_extreme():
    found = [('ok', 1.02), ('off', 0.31), ('off', 999.), ('off', 1001.), ('off', 9e-4), ('constant', 0.),
             ('non-finite', nan), ('not called', nan), ('outlier', 3.)]
    r = LSUVReport([row(k, s, std=std, std_range=(0.9, 1.1)) for k, (s, std) in enumerate(found)])
    page = soup_of(r)
    assert [tr.find_all('td')[-1].get_text() for tr in page.tbody.find_all('tr')] == [
        '✓ near 1', '– not near 1', '– not near 1', '! exploding', '! vanishing', '! constant', '✗ non-finite',
        '– not called', '! outlier']
    notes = [p.get_text() for p in page.find_all('p')][1:]
    assert notes[:2] == ['! exploding its std is above 1000.', '! vanishing its std is below 0.001.']
    assert not any('near 1' in n or 'scaled' in n or 'left as it was' in n for n in notes)
    assert [x.status for x in r] == r.df()['status'].tolist() == [s for s, _ in found]  # rows keep their words
    fold = str(LSUVReport([row(k, 'off' if k % 2 else 'ok') for k in range(60)])).split('\n... ')[1].splitlines()[0]
    assert fold.endswith('22 near 1, 22 not near 1')


def test_a_column_is_an_entry_of_one_table(monkeypatch):
    column = tables.Column('grads', 'grad_std', lambda v: f'<{v}>', lambda values: f'{len(values)} grads', left=True)
    monkeypatch.setattr(tables, 'COLUMNS', (*tables.COLUMNS[:2], column, *tables.COLUMNS[-1:]))
    r = report(*['ok']*60, grad_std=2.)
    lines = str(r).splitlines()[2:]
    assert lines[0].split() == ['layer', 'kind', 'grads', 'status'] and lines[2].split()[2] == '<2.0>'
    assert next(l for l in lines if l.startswith('...')).split()[3:5] == ['44', 'grads']
    cells = soup_of(r).tbody.tr.find_all('td')
    assert cells[2].get_text() == '<2.0>' and cells[2]['class'] == ['word']
    assert 'grads' not in str(report('ok')) and '<td></td>' not in report('ok')._repr_html_()


def test_the_tolerance_of_a_mean_is_told_where_it_is_met():
    note = ('ok: here a mean may be up to 0.75 off its target. On a fresh mini-batch, its tolerance is `batch_tol` or '
            '3/sqrt(samples) stds, whichever is larger.')
    ranges = dict(std_range=(0.9, 1.1), mean_range=(-0.75, 0.75))
    assert note in str(report('ok', mean=-0.2, **ranges)) and note[4:].replace('`', '') in soup_of(
        report('ok', mean=0.2, **ranges)).get_text()
    assert 'here a mean' not in str(report('ok', mean=0.09, **ranges))
    assert 'here a mean' not in str(report('off', mean=0.9, **ranges))
    assert 'here a mean' not in str(LSUVReport([row(0, mean=0.2, **ranges)]))  # a look
    assert '3/sqrt(samples)' in LSUVReport.__doc__


def lines_of(ax):
    return {line.get_label(): line for line in ax.get_lines()}


@pytest.mark.usefixtures('axes')
def test_plot_has_before_and_after_on_one_scale():
    statuses = ['ok', 'not called', 'off', 'no bias']
    rows = [row(k, s, mean=k/10, std=1 + k, before=(k, 100 + k)) for k, s in enumerate(statuses)]
    std, mean = LSUVReport(rows, order='std mean').plot()
    lines = lines_of(std)
    assert list(lines['before'].get_xdata()) == [100, 102, 103] and list(lines['after'].get_xdata()) == [1, 3, 4]
    assert list(lines['not normalized'].get_ydata()) == [1] and list(lines['not normalized'].get_xdata()) == [3]
    assert list(lines_of(mean)['after'].get_xdata()) == [0, 0.2, pytest.approx(0.3)]
    assert std.get_xscale() == 'log' and std.get_xlabel() == 'std' and mean.get_xlabel() == 'mean'
    names = [t.get_text() for t in std.get_yticklabels()]
    assert names == [f'blocks.{k}.conv Conv2d' for k in (0, 2, 3)]
    assert std.get_ylim() == (2.5, -0.5)  # the first layer is on top
    assert [t.get_text() for t in mean.texts] == ['off'] and mean.texts[0].get_position()[1] == 1
    legend = [t.get_text() for t in std.figure.legends[0].get_texts()]
    assert legend == ['before', 'after', 'not normalized']


@pytest.mark.usefixtures('axes')
def test_plot_shows_the_target_and_what_counts_as_at_it():
    ranges = dict(std_range=(0.9, 1.1), mean_range=(-0.2, 0.2))
    rows = [row(0, std=0.99, **ranges), row(1, std=0.985, **{**ranges, 'std_range': (0.18, 0.22)})]
    std, mean = LSUVReport(rows, order='std mean').plot()
    target = lines_of(std)['target']
    assert sorted({round(float(x), 9) for x in target.get_xdata()}) == [0.2, 1.]
    assert set(lines_of(mean)['target'].get_xdata()) == {0.}
    band = std.collections[0].get_paths()[0].vertices
    assert {round(float(x), 2) for x, _ in band} == {0.9, 1.1, 0.18, 0.22}
    low, high = std.get_xlim()
    assert low == 0 and high >= 1.1 and mean.get_xlim() == (-1.1, 1.1)  # no zoom into 0.985 to 0.99
    std, mean = LSUVReport([row(0, std_range=(0.9, 1.1))], order='std').plot()
    assert 'target' in lines_of(std) and 'target' not in lines_of(mean)


@pytest.mark.usefixtures('axes')
def test_plot_of_what_no_axis_holds():
    before = (900., 5e3)
    rows = [row(0, std=1e-3, before=before), row(1, 'constant', std=0., before=(0., 0.)),
            row(2, 'non-finite', mean=nan, std=nan, before=(nan, nan)),
            row(3, 'non-finite', mean=-float('inf'), std=float('inf'))]
    std, mean = LSUVReport(rows, order='std mean').plot()
    low, high = std.get_xlim()
    assert 0 < low < 1e-3 and 5e3 < high < 1e4 and mean.get_xscale() == 'symlog' and mean.get_xlim()[1] > 900
    assert list(lines_of(std)['not normalized'].get_xdata()) == [low, high, high]
    assert list(lines_of(mean)['not normalized'].get_xdata()) == [0, mean.get_xlim()[1], mean.get_xlim()[0]]
    assert [t.get_text() for t in mean.texts] == ['constant', 'non-finite', 'non-finite']
    assert len(LSUVReport([row(0, 'not called')], order='std mean').plot()) == 2


@pytest.mark.usefixtures('axes')
def test_plot_of_many_layers_names_some():
    statuses = ['ok']*300
    statuses[100], statuses[101], statuses[250] = 'off', 'off', 'tied'
    std, mean = report(*statuses).plot()
    ticks = list(std.get_yticks())
    assert len(ticks) <= 50 and np.diff(ticks).min() >= 6 and {0, 100, 250} <= set(ticks)
    bold = [t.get_text() for t in std.get_yticklabels() if t.get_fontweight() == 'bold']
    assert bold == ['blocks.100.conv Conv2d', 'blocks.250.conv Conv2d']
    assert [t.get_text() for t in mean.texts] == ['off', 'tied'] and std.figure.get_size_inches()[1] == 10
    assert report(*['ok']*5).plot()[0].figure.get_size_inches()[1] < 3
    long = report('ok', name='a'*50).plot()[0].get_yticklabels()[0].get_text()
    assert long == '…' + 'a'*24 + ' Conv2d'


@pytest.mark.usefixtures('axes')
def test_plot_on_axes_of_the_user_and_of_layer_stats():
    import matplotlib.pyplot as plt
    axs = plt.subplots(2, 1)[1]
    assert report('ok').plot(axs=axs) is axs and axs[0].get_legend() is not None
    assert [t.get_text() for a in axs for t in a.get_yticklabels()] == ['blocks.0.conv Conv2d']*2
    std, mean = LSUVReport([row(0), row(1, 'off')]).plot()
    assert list(lines_of(std)) == ['as it is'] and not mean.texts and std.get_xscale() == 'linear'
    assert report('ok').plot(figsize=(5, 3))[0].figure.get_size_inches().tolist() == [5, 3]


def test_a_summary_names_its_target():
    ranges = dict(std_range=(0.45, 0.55), mean_range=(-0.2, 0.2))
    assert report('ok', 'no bias', 'off', **ranges).summary == "LSUV: 2 of 3 layers at std 0.5 (2 passes)."
    assert ' at mean 0 (' in report('ok', order='mean', **ranges).summary
    r = LSUVReport([row(0, std_range=(0.9, 1.1)), row(1, std_range=(0.45, 0.55))], 'std', 2, (1., 2.), '', 'a note')
    assert r.summary == "LSUV: 2 of 2 layers at the target std (2 passes). Loss 1.00 -> 2.00 (a note)."
    r = LSUVReport([row(0, std_range=(0.9, 1.1))], 'std', 1, loss_note='ValueError: no')
    assert r.summary == "LSUV: 1 of 1 layer at std 1 (1 pass)."
    why = "LSUV could not take the training loss (ValueError: no)"
    assert r.warning == f"{why}, so it did not compare before and after."
    for loss, said in [((2.3016, 1e-3), '2.30 -> 0.001'), ((nan, 3.5e8), 'nan -> 3.5e+08'), ((-1.5, 0.), '-1.50 -> 0')]:
        assert LSUVReport([row(0)], 'std', loss=loss).summary.endswith(f' Loss {said}.')


def test_the_table_ends_with_what_else_to_look_at():
    r = LSUVReport([row(0, gain=400.)], order='std', unusual='its samples are alike')
    assert str(r).splitlines()[-2:] == r.remarks and len(r.remarks) == 2
    assert 'blocks.0.conv by 400' in r.remarks[0] and 'its samples are alike' in r.remarks[1]
    assert r.warning == '\n'.join(r.remarks)
    assert all(remark.replace('`', '') in soup_of(r).get_text() for remark in r.remarks)


def test_weights_in_no_row_are_named_with_the_reason():
    outside = {'tok.weight': 'embedding', 'pos.weight': 'embedding', 'rnn.weight_ih_l0': 'recurrent'}
    r = LSUVReport([row(0)], order='std', outside=outside, coverage=0.5)
    words = ('50 % of the weights are outside these layers, and LSUV does not change them: tok.weight, pos.weight '
             '(embedding: it is looked up or added; no input is multiplied by it); rnn.weight_ih_l0 (recurrent: a '
             'recurrent layer applies it internally).')
    assert str(r).splitlines()[-1] == words and words in soup_of(r).get_text() and words not in r.warning
    chosen = LSUVReport([row(0)], order='std', outside={'7.weight': 'not selected'}, coverage=0.5)
    assert '<code>modules</code> or <code>exclude</code> leaves it out' in chosen._repr_html_()
    told = ' 50 % of the weights are outside these layers (see `report.outside`).'
    assert r.summary.endswith(told) and str(r).count('% of the weights') == 1  # the report's own text says it once
    assert '% of the weights' not in chosen.summary  # the user has left it out himself
    few = LSUVReport([row(0)], order='std', outside=outside, coverage=0.992)
    assert '%' not in few.summary and '0.8 % of the weights are outside' in str(few)
    assert LSUVReport([row(0)], order='std', outside=outside, coverage=0.989).summary.count(' 1.1 % of the weights')
    assert ' 100 % of the weights' in LSUVReport([row(0)], order='std', outside=outside, coverage=0.).summary
    assert 'outside' not in str(report('ok'))


def test_each_problem_is_said_once():
    why = 'the training loss is 9 after LSUV; it was 1 before'
    r = LSUVReport([row(0, 'undone'), row(1, 'frozen')], 'std', 4, (1., 9.), why, unusual='its std is 0.001')
    for text in (str(r), soup_of(r).get_text()):
        for words in ('put the weights back', 'put back', 'far worse', 'unusual', 'or was frozen', 'leave layers out'):
            assert text.lower().count(words) <= 1, words
        assert why in text
    assert 'far worse' not in r.warning and r.warning.count('\n') == 1


def test_per_channel_rows_are_those_of_the_channels():
    model = nn.Sequential(nn.Linear(8, 4))
    r = lsuv_init(model, torch.randn(64, 8), per_channel=True, preinit=None)
    assert math.isclose(r[0].std, 1, abs_tol=1e-3) and abs(r[0].mean) < 1e-3


def test_an_order_without_a_std_loop_speaks_of_the_mean():
    report = lsuv_init(nn.Linear(16, 8), 20*torch.randn(64, 16), order='mean', preinit=None)
    assert report[0].std > 5 and report.summary == "LSUV: 1 of 1 layer at mean 0 (2 passes)."
