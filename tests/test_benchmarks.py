"The benchmarks run on the CPU and name what they measure."
import csv
import importlib.util
import sys
from inspect import signature
from pathlib import Path

import pytest
import torch
from torch import nn

BENCHMARKS = Path(__file__).parent.parent/'benchmarks'
pytestmark = pytest.mark.usefixtures('axes')


@pytest.fixture
def benchmark(monkeypatch, tmp_path):
    "Loads a benchmark, which writes its results into a folder of the test."
    monkeypatch.syspath_prepend(BENCHMARKS)

    def load(name):
        spec = importlib.util.spec_from_file_location(name, BENCHMARKS/f'{name}.py')
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)  # dataclasses look it up there
        spec.loader.exec_module(module)
        for folder in 'RESULTS', 'IMAGES': monkeypatch.setattr(module, folder, tmp_path, raising=False)
        return module
    yield load
    sys.modules.pop('_common', None)


@pytest.fixture
def init_cost(benchmark, monkeypatch):
    "The benchmark with a model of each kind, small enough for a test."
    module = benchmark('init_cost')

    def language_model(setting): return module.LanguageModel(tokens=50, length=16, width=16, layers=2, heads=2)

    def text(setting): return torch.randint(0, 50, (4, 16))
    models = {'cnn': module.MODELS['cnn10'], 'lm': module.Model('language model', language_model, text)}
    monkeypatch.setattr(module, 'MODELS', models)
    return module


def rows(file):
    with open(file, newline='') as f: return list(csv.DictReader(f))


def test_init_cost_measures_time_passes_and_memory(init_cost, tmp_path, capsys):
    init_cost.main(models='cnn,lm', rounds=1, no_peers=True, batch=4, size=8, width=8, device='cpu')
    written = rows(tmp_path/'init_cost.csv')
    assert [(r['model'], r['contestant'], r['passes_begun']) for r in written] == [
        (model, contestant, passes) for model in ('10-layer CNN', 'language model') for contestant, passes in
        (('a correcting pass alone', '1'), ('lsuv_init', '2'), ('orthogonal', '2'), ('mirrored', '5'))]
    assert all(float(r['seconds']) > 0 and float(r['forwards']) > 0.5 for r in written)
    said = capsys.readouterr().out
    assert 'Peak memory' in said and '| 10-layer CNN | 10 |' in said and 'Times faster' not in said
    assert (tmp_path/'init_cost.png').stat().st_size > 5000


@pytest.mark.slow
def test_init_cost_measures_the_peers(init_cost, tmp_path, capsys):
    for peer in ('lsuv', 'anyinit'): pytest.importorskip(peer)
    init_cost.main(models='cnn', rounds=1, batch=4, size=8, width=8, device='cpu')
    passes = {r['contestant']: int(r['passes_begun']) for r in rows(tmp_path/'init_cost.csv')}
    assert passes['lsuv'] > 10 and passes['anyinit, empirical'] > 10
    assert 'Times faster' in capsys.readouterr().out


def test_a_peer_that_fails_is_named(init_cost, monkeypatch, capsys):
    def fails(model, x): raise ValueError('no such layer')
    monkeypatch.setattr(init_cost, 'installed', list)
    monkeypatch.setattr(init_cost, 'label', lambda package: package)
    monkeypatch.setitem(init_cost.CONTESTANTS, 'lsuv', init_cost.Contestant('lsuv', 'C0', fails, peer='lsuv'))
    for other in ('lsuv_keep', 'anyinit'): monkeypatch.delitem(init_cost.CONTESTANTS, other)
    init_cost.main(models='lm', rounds=1, device='cpu', no_save=True)
    said = capsys.readouterr().out
    assert 'language model: lsuv fails. ValueError: no such layer' in said and '| fails |' in said


def test_the_models_have_the_sizes_that_they_name(benchmark):
    init_cost = benchmark('init_cost')
    assert list(init_cost.MODELS) == ['cnn10', 'cnn30', 'cnn100', 'resnet50', 'vit_ti', 'vgg16', 'lm125m']
    with torch.device('meta'):
        sizes = {k: sum(p.numel() for p in init_cost.MODELS[k].make(None).parameters()) for k in ('vgg16', 'lm125m')}
    assert sizes == {'vgg16': 138_357_544, 'lm125m': 124_439_808}


def test_the_language_model_sees_the_past_alone(init_cost):
    model,x = init_cost.MODELS['lm'].make(None),torch.randint(0, 50, (4, 16))
    other = torch.cat([x[:, :10], (x[:, 10:] + 1) % 50], 1)
    with torch.no_grad(): same = torch.isclose(model(x), model(other), atol=1e-6).all(-1)
    assert same[:, :10].all() and not same[:, 10:].any()


def test_peak_bytes_sees_what_is_held_for_a_moment(init_cost):
    held = init_cost.peak_bytes(lambda: torch.zeros(2**20).sum(), torch.device('cpu'))
    assert 4*2**20 <= held < 5*2**20


@pytest.mark.slow
def test_reach_judges_from_outside(benchmark, tmp_path, capsys):
    pytest.importorskip('timm')
    reach = benchmark('reach')
    reach.main(only='torchvision/resnet18,hand/tied_embedding', packages='fastai_lsuv', device='cpu')
    columns = 'outcome', 'layers', 'reached', 'passes_begun', 'elements', 'elements_reached'
    found = {r['network']: [r[c] for c in columns] for r in rows(tmp_path/'reach.csv')}
    assert found['torchvision/resnet18'][:4] == ['ended', '21', '21', '2'] and len(found) == 2
    # The decoder shares the weight of the embedding.
    assert found['hand/tied_embedding'] == ['ended', '2', '1', '2', '1056', '256']
    assert '22 of 23 (95.7 %)' in capsys.readouterr().out


def test_reach_counts_the_weights_that_operations_take_and_pools_the_calls_of_a_layer(benchmark):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.w,self.unused = nn.Parameter(torch.randn(3, 8, 4)),nn.Parameter(torch.randn(5, 2))
            self.w.data[0] /= 8**0.5
            self.layer = nn.Linear(4, 4)

        def forward(self, x): return self.layer(3*self.layer(x @ self.w[0] + x @ self.w[1] + x @ self.w[2]))
    reach,model,x,outs = benchmark('reach'),Net(),torch.randn(4000, 8),[]
    assert reach.matrices(model, x, 0.3) == (106 + 16, 32)
    hook = model.layer.register_forward_hook(lambda m, a, out: outs.append(out.detach()))
    model(x)
    hook.remove()
    assert reach.stds(model, x)['layer'] == pytest.approx(torch.cat(outs).std(correction=0).item(), rel=1e-5)


def test_fresh_judges_on_a_mini_batch_that_was_not_seen(benchmark, tmp_path, capsys):
    fresh = benchmark('fresh')
    name = 'hand/tied_embedding,hand/pruned,hand/slices_of_a_parameter'
    seen = fresh.networks()['hand/pruned']()[1]
    assert not torch.equal(seen, fresh.fresh_batch(fresh.networks()['hand/pruned'], 1))
    fresh.main(only=name, tol=0.5, device='cpu')
    found = {r['network']: (r['elements_used'], r['elements_right']) for r in rows(tmp_path/'fresh.csv')}
    assert found == {'hand/tied_embedding': ('1056', '256'), 'hand/pruned': ('768', '768'),
                     'hand/slices_of_a_parameter': ('1056', '1056')}
    said = capsys.readouterr().out
    assert '| **all** | 3 |' in said and '72.22 %' in said and '(tied) |' in said
    fresh.main(only=name, tol=1e-6, device='cpu', no_save=True)
    assert '**0.00 % of the elements' in capsys.readouterr().out


def test_harm_names_what_a_bad_batch_does(benchmark, tmp_path, capsys):
    harm = benchmark('harm')
    harm.main(only='hand/pruned,hand/tied_embedding', kinds='tiny*,padding,sorted*', device='cpu')
    found = {(r['network'], r['kind']): r for r in rows(tmp_path/'harm.csv')}
    kinds = [kind for network, kind in found if network == 'hand/tied_embedding']
    assert kinds == ['good', 'sorted by class', 'padding']
    good,tiny = found['hand/pruned', 'good'], found['hand/pruned', 'tiny (1e-4)']
    assert float(good['ratio']) < 2 and float(good['right']) == 1 and good['said'] == ''
    assert float(tiny['ratio']) > 2 and tiny['violation'] == '0'
    assert tiny['said'] == '0: unresponsive; 2 by 1e+2; mini-batch: its std is 9.9e-05'
    assert found['hand/pruned', 'padding']['said'] == (
        '0: alike; 2: alike; mini-batch: its samples are alike and its std is 0')
    assert '| **tiny (1e-4)** | 1 | 0 |' in capsys.readouterr().out


@pytest.mark.filterwarnings('ignore:LSUV scaled')
def test_harm_counts_what_is_not_said_and_tells_layers_kept_back_in_vain(benchmark, monkeypatch, tmp_path):
    harm = benchmark('harm')
    subject = harm.Subject(harm.networks()['hand/pruned'], None, 0, torch.device('cpu'))
    batch = subject.data.bad(harm.KINDS['good'])
    assert harm.in_vain(subject, batch, ['0'], 0) == ['0'] and harm.in_vain(subject, 1e-4*batch, ['0'], 0) == []
    monkeypatch.setattr(harm, 'said', lambda report: [])
    harm.main(only='hand/pruned', kinds='tiny*', device='cpu')
    assert [r['violation'] for r in rows(tmp_path/'harm.csv')] == ['0', '1']
    assert '| hand/pruned | tiny (1e-4) |' in (tmp_path/'harm.md').read_text()


@pytest.mark.slow
def test_features_of_this_package(benchmark, tmp_path, monkeypatch):
    features = benchmark('features')
    monkeypatch.setattr(features, 'installed', lambda names: [n for n in names if n == 'fastai_lsuv'])
    features.main(out=str(tmp_path/'features.md'), device='cpu')
    tables = [line.split('|')[1:-1] for line in (tmp_path/'features.md').read_text().splitlines() if line[:1] == '|']
    ours = {cells[0].strip(): cells[1].strip() for cells in tables if cells[0][0] == ' '}
    assert ours.pop('forward passes, 20 layers') == '2'
    assert {ours.pop('initialization'), ours.pop('recording')} == {features.label('fastai_lsuv')}
    assert len(ours) == len(features.INITIALIZATION) + len(features.RECORDING) - 1 and set(ours.values()) == {'yes'}


@pytest.mark.parametrize('name', ['features', 'fresh', 'harm', 'init_cost', 'reach', 'recorder_cost'])
def test_every_benchmark_takes_a_device(benchmark, name):
    device = signature(benchmark(name).main).parameters['device']
    assert device.default == 'cpu' or name == 'recorder_cost'
