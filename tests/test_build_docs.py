"`scripts/build_docs.py` finds the faults that it names."
import json
import shutil

import pytest
from test_docs import ROOT, script

nbformat = pytest.importorskip('nbformat')
new = nbformat.v4
text_cell = new.new_markdown_cell


@pytest.fixture(scope='module')
def docs(): return script('build_docs')


def test_broken_links_of_the_repository(docs, tmp_path):
    (tmp_path/'nbs').mkdir()
    links = '[here](#one) [pages](nbs) [gone](nbs/gone.ipynb) [nowhere](#two)'
    (tmp_path/'README.md').write_text(f'# One\n\n{links}\n\n```\n[code](code.md)\n```\n')
    assert docs.broken_in_repository(tmp_path) == [
        'README.md: nbs/gone.ipynb leads nowhere', 'README.md: #two leads nowhere']


# Quarto's anchors of headings
HEADINGS = {'What batches may be': 'what-batches-may-be', 'torch.compile': 'torch.compile', 'lsuv_init': 'lsuv_init',
            '1. First, things': 'first-things', "What differs from fastai's x": 'what-differs-from-fastais-x'}
SOUND = '\n\n'.join(f'## {heading}\n\n[down](#{anchor}) and $a_c^2$' for heading, anchor in HEADINGS.items())
BROKEN = '[gone](gone.ipynb) ![gone](gone.png) [part](#part) [c](index.ipynb#c) [out](https://x.org/y) `[no](a.md)`'
ERROR = new.new_output('error', ename='ZeroDivisionError', evalue='division by zero', traceback=[])


@pytest.mark.parametrize('cell, sidebar, said', [
    (text_cell(SOUND), None, []),
    (text_cell(BROKEN), None,
     ['index.html: gone.html leads nowhere', 'index.html: gone.png leads nowhere', 'index.html: #part leads nowhere',
      'index.html: index.html#c leads nowhere', 'index.html.md: gone.html.md leads nowhere',
      'index.html.md: gone.png leads nowhere']),
    (new.new_code_cell('1/0', outputs=[ERROR]), None,
     ['index.html: a cell ended in ZeroDivisionError: division by zero']),
    (text_cell(''), ['other.ipynb'],
     ['index.html: not in the sidebar (nbs/sidebar.yml)', 'sidebar: other.html is no page',
      'index.html: other.html leads nowhere']),
], ids=['sound', 'links', 'error', 'sidebar'])
def test_the_build_fails_on_a_fault(docs, tmp_path, monkeypatch, capsys, cell, sidebar, said):
    (tmp_path/'nbs').mkdir()
    (tmp_path/'pyproject.toml').write_text('[tool.nbdev]\nlib_path = "x"\n')
    if sidebar: (tmp_path/'nbs'/'sidebar.yml').write_text(json.dumps({'website': {'sidebar': {'contents': sidebar}}}))
    kernel = dict(display_name='python3', language='python', name='python3')
    nb = new.new_notebook(cells=[text_cell('# Title\n\n> Summary'), cell], metadata=dict(kernelspec=kernel))
    nbformat.write(nb, tmp_path/'nbs'/'index.ipynb')
    monkeypatch.chdir(tmp_path)
    assert docs.main(tmp_path) == int(bool(said))
    out = capsys.readouterr().out.splitlines()
    assert [line.removeprefix('broken: ') for line in out if line.startswith('broken: ')] == said
    page = (tmp_path/'_site'/'index.html').read_text()
    assert '<h1 id="title">Title</h1>' in page and (not said) == ('<math' in page)


def test_a_name_without_a_page_and_a_show_doc_that_shows_nothing_are_faults(docs, tmp_path):
    nbs,processed = tmp_path/'nbs',tmp_path/'proc'
    for folder in (nbs, processed): shutil.copytree(ROOT/'nbs'/'api', folder/'api')
    assert not [w for w in docs.build(processed, nbs, tmp_path/'site') if 'show' in w]
    file = processed/'api'/'callback.ipynb'
    nb = nbformat.read(file, 4)
    nb.cells = [c for c in nb.cells if not c.source.startswith('show_doc(LSUVCallback.reset')]
    next(c for c in nb.cells if c.source == 'show_doc(Learner.lsuv_init)').outputs = []
    nbformat.write(nb, file)
    assert [w for w in docs.build(processed, nbs, tmp_path/'site') if 'show' in w] == [
        'api/callback.html: show_doc(Learner.lsuv_init) shows nothing',
        'LSUVCallback.reset: no page shows it; add `show_doc(LSUVCallback.reset)`',
        'Learner.lsuv_init: no page shows it; add `show_doc(Learner.lsuv_init)`']


@pytest.mark.parametrize('text, page, href', [
    ('lsuv_init', 'a.html', 'api/init.html#lsuv_init'),
    ('lsuv_init', 'api/b.html', 'init.html#lsuv_init'),
    ('lsuv_init(model, batch)', 'a.html', 'api/init.html#lsuv_init'),
    ('learn.lsuv_init()', 'a.html', 'api/callback.html#learner.lsuv_init'),
    ('learn.lsuv.report', 'a.html', 'api/report.html#lsuvreport'),
    ('learn.lsuv.report.plot()', 'a.html', 'api/report.html#lsuvreport.plot'),
    ('learn.lsuv.reset()', 'a.html', 'api/callback.html#lsuvcallback.reset'),
    ('.plot()', 'a.html', 'api/report.html#lsuvreport.plot'),
    ('df()', 'recorder.html', 'api/recorder.html#activationstatsrecorder.df'),  # the page's own, of two classes
    ('df()', 'index.html', None),
    ('ok', 'a.html', None),  # a status, and no property
    ('model', 'a.html', None),
    ('f(lsuv_init)', 'a.html', None),
])
def test_names_in_prose_are_links(docs, text, page, href):
    names = docs.ApiNames()
    names.add({'lsuv_init'}, 'api/init.html')
    names.add({'LSUVCallback', 'LSUVCallback.reset', 'Learner.lsuv_init'}, 'api/callback.html')
    names.add({'LSUVReport', 'LSUVReport.df', 'LSUVReport.plot', 'LSUVReport.ok'}, 'api/report.html')
    names.add({'ActivationStatsRecorder.df'}, 'api/recorder.html')
    code = f'<code>{text}</code>'
    no_prose = f'<pre>{code}</pre><h3>{code}</h3><a href="x">{code}</a>'
    own = f'<h2>lsuv_init</h2><p>{code}</p>' if text == 'lsuv_init' else ''  # the page shows the name itself
    soup = docs.BeautifulSoup(f'{no_prose}{own}<h2>Other</h2><p>{code}</p>', 'html.parser')
    names.link(soup, page)
    assert [a['href'] for a in soup.find_all('a')] == ['x', href][:1 + bool(href)]
