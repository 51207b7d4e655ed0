"Weights that mean something are not overwritten. Each case says so in one line, and can be overridden."
import pickle
from contextlib import nullcontext
from copy import deepcopy
from functools import partial

import fastai.callback.schedule  # noqa: F401  gives Learners `fit_one_cycle` and `lr_find`
import pytest
import torch
import torchvision.models
from fastai.basics import Adam, DataLoaders, Learner, OptimWrapper, SGD, TfmdDL, load_learner, params, set_seed
from fastai.vision.all import resnet18, unet_learner, vision_learner
from fastai.vision.learner import model_meta
from learners import *
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from fastai_lsuv import LSUVCallback, lsuv_init

AS_IT_WAS = 'LSUV left the model as it is: '
EARLIER,TRAINED,LOADED = 'it was initialized before an earlier fit','it has been trained','its weights were loaded'


def made(model=None, dls=None, **options):
    "A Learner with an LSUVCallback of these options."
    return learner(dls, model, cbs=LSUVCallback(**options))


def after_lsuv(learn, fit=None):
    "The weights that training starts with."
    seen = []
    see = Around(lambda learn: seen.append(weights(learn.model)), 11)
    fit(see) if fit else learn.fit(1, 0., cbs=see)
    return seen[-1]


def left(learn, why, fit=None):
    "Assert that the next fit leaves every weight, and says why in one line."
    learn.lines.clear()
    w = weights(learn.model)
    assert same(after_lsuv(learn, fit), w)
    assert said(learn) == [f'{AS_IT_WAS}{why}. `learn.lsuv_init()` initializes it anyway.']


def initialized(learn, fit=None, kept=()):
    "Assert that the next fit initializes the model, but for the parameters `kept`, and says so in one line."
    learn.lines.clear()
    ids = {id(p) for p in kept}
    torch.rand(9)  # or the same orthonormal weights would be drawn again
    w,names = weights(learn.model),[n for n, _ in learn.model.named_parameters()]
    now = after_lsuv(learn, fit)
    assert len(said(learn)) == 1 and ' at std 1' in said(learn)[0], learn.lines
    units = {id(p) for p in unit_parameters(learn.model) if p.dim() > 1}
    for n, p, a, b in zip(names, learn.model.parameters(), w, now):
        if p.dim() > 1: assert torch.equal(a, b) == (id(p) not in units or id(p) in ids), n


# --- once

def test_the_first_fit_and_no_other_until_it_is_asked_to():
    learn = made(preinit='orthogonal')
    initialized(learn)
    left(learn, EARLIER)
    left(learn, EARLIER, lambda cb: learn.fit_one_cycle(1, cbs=cb))
    learn.lsuv.reset()
    initialized(learn)
    left(learn, EARLIER)
    report = learn.lsuv_init()
    assert report is learn.lsuv.report and report.ok
    learn.lsuv.every_fit = True
    for _ in range(2): initialized(learn)


def test_a_callback_for_each_fit():
    learn = learner()
    first,second = LSUVCallback(),LSUVCallback()
    learn.fit_one_cycle(1, cbs=first)
    assert first.report.ok and learn.lsuv is first and not learn.cbs.filter(lambda cb: cb is first)
    left(learn, EARLIER, lambda cb: learn.fit_one_cycle(1, cbs=[second, cb]))
    assert not second.report and repr(second.report) == said(learn)[-1]
    initialized(learn, lambda cb: learn.fit(1, cbs=[LSUVCallback(every_fit=True), cb]))


def test_a_second_callback_is_refused_and_the_first_stays():
    with pytest.raises(ValueError, match='cbs: got a second LSUVCallback'):
        learner(cbs=[LSUVCallback(), LSUVCallback()])
    learn = made(order='std')
    first = learn.lsuv
    with pytest.raises(ValueError, match=r"the Learner has LSUVCallback\(order='std'\) already.*learn.remove_cb"):
        learn.add_cb(LSUVCallback())
    assert learn.lsuv is first and [cb for cb in learn.cbs if isinstance(cb, LSUVCallback)] == [first]
    initialized(learn)


class Split(list):
    "Items as a dataset with a split, for `tta`."
    def set_split_idx(self, i): return nullcontext()


LOOKS = {name: getattr(Learner, name) for name in ('validate', 'get_preds', 'summary', 'tta')}
LOOKS['of training data'] = partial(Learner.get_preds, ds_idx=0)


@pytest.mark.parametrize('look', LOOKS.values(), ids=LOOKS)
@pytest.mark.parametrize('how', [dict(), dict(force=True), dict(every_fit=True)], ids=str)
def test_a_look_at_the_model_is_no_fit(look, how):
    dls = DataLoaders.from_dsets(Split(images()), Split(images()), bs=16, num_workers=0)
    learn = made(dls=dls, preinit='orthogonal', **how)
    def looks():
        was,report = weights(learn.model),learn.lsuv.report
        look(learn)
        assert same(weights(learn.model), was) and learn.lsuv.report is report
    looks()
    assert not learn.lsuv.report
    learn.create_opt()
    looks()
    initialized(learn)
    looks()
    learn.lsuv.reset()
    looks()
    initialized(learn)


def test_validation_within_a_fit():
    learn,seen = made(every_fit=True),[]
    def validate(cb): seen.extend([learn.lsuv.report, learn.validate(), learn.lsuv.report])
    initialized(learn, lambda cb: learn.fit(1, cbs=[Callback(before_train=validate), cb]))
    assert seen[0] is seen[2]  # the same weights may be drawn twice


# --- trained, or not

OPTS = {
    'sgd': SGD,
    'momentum': partial(SGD, mom=0.9),
    'adam': Adam,
    'torch sgd': partial(OptimWrapper, opt=torch.optim.SGD),
    'torch adamw': partial(OptimWrapper, opt=torch.optim.AdamW),
}
with_each_optimizer = pytest.mark.parametrize('opt_func', OPTS.values(), ids=OPTS)


@with_each_optimizer
def test_trained_before_it_was_attached(opt_func):
    learn = learner(opt_func=opt_func)
    learn.fit(1)
    learn.add_cb(LSUVCallback())
    left(learn, TRAINED)
    assert repr(learn.lsuv.report) == said(learn)[-1]
    learn.lsuv.reset()
    initialized(learn)
    report = learn.lsuv.report
    left(learn, EARLIER)
    assert learn.lsuv.report is report


def test_trained_by_another_learner_or_optimizer():
    "This happens where a model is trained on at a larger size."
    model = cnn()
    learn = learner(model=model)
    learn.fit(1)
    left(learn, TRAINED, lambda cb: learn.fit(1, 0., reset_opt=True, cbs=[LSUVCallback(), cb]))
    left(made(model), TRAINED)
    initialized(made(model, force=True))
    left(made(model, force=True), EARLIER)


def test_a_later_start_epoch():
    learn,forced = made(),made(force=True)
    left(learn, 'training starts at epoch 2', lambda cb: learn.fit(3, 0., start_epoch=2, cbs=cb))
    initialized(forced, lambda cb: forced.fit(3, 0., start_epoch=2, cbs=cb))


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@with_each_optimizer
def test_lr_find_leaves_the_lsuv_network(here, opt_func):
    expected = made()
    set_seed(5)
    expected.lsuv_init()
    learn = learner(cbs=LSUVCallback(), opt_func=opt_func)
    set_seed(5)
    learn.lr_find(num_it=8, show_plot=False)
    assert learn.lsuv.report.ok and same(weights(learn.model), weights(expected.model)) and said(learn) == []
    assert same(after_lsuv(learn), weights(expected.model))
    assert said(learn) == [f'{learn.lsuv.report.summary} This was done before an earlier fit without a log, '
                           'such as `lr_find`.']
    left(learn, EARLIER)


@with_each_optimizer
def test_lr_find_before_it_is_attached(here, opt_func):
    learn = learner(opt_func=opt_func)
    learn.lr_find(num_it=8, show_plot=False)
    initialized(learn, lambda cb: learn.fit_one_cycle(1, 0., cbs=[LSUVCallback(), cb]))


# --- what the weights tell

def mlp(norm=nn.Identity): return nn.Sequential(nn.Flatten(), nn.Linear(432, 32), norm(32), nn.ReLU(), nn.Linear(32, 4))


def learned(model):
    "Do what training does to norm layers."
    for m in model.modules():
        if 'Norm' in type(m).__name__:
            for p in m.parameters(): p.data += 0.1*torch.randn_like(p)
    return model


@pytest.mark.parametrize('make, norm', [(cnn, '1'), (partial(mlp, nn.RMSNorm), '2')], ids=['bn', 'no bias'])
def test_a_model_whose_norm_layers_have_learned(make, norm):
    left(made(learned(make())), f"its norm layer '{norm}' has been trained")
    initialized(made(learned(make()), force=True))
    initialized(made(make()))


def test_a_new_head_on_a_frozen_pretrained_model():
    model = learned(cnn())
    for m in model[:-1]: m.requires_grad_(isinstance(m, nn.BatchNorm2d))
    initialized(made(model), kept=model[:-1].parameters())


def dcgan(model):
    "Normal weights and zero biases; and statistics of a run in training mode."
    nn.init.normal_(model[1].weight, 1., 0.02)
    model(torch.randn(8, 3, 12, 12))


@pytest.mark.parametrize('do', [
    pytest.param(dcgan, id='norms that look learned'),
    pytest.param(lambda model: model(torch.randn(2, 3, 12, 12)).sum().backward(), id='a backward pass'),
    # `Module.to` writes through `.data`, and may round.
    pytest.param(lambda m: m.to(torch.bfloat16).to(memory_format=torch.channels_last).float(), id='a move'),
])
def test_what_is_no_training(do):
    learn = made()
    do(learn.model)
    initialized(learn)


@pytest.fixture
def well_trained():
    "A function that makes a model without norm layers, the same trained, and what it was trained on."
    def deep():
        hidden = [nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()]
        return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(64, 4))
    x = torch.randn(128, 3, 4, 4)
    learn = learner(loaders(list(zip(x, (x.mean((1, 2, 3))*4).round().clip(-1, 2).long() + 1)), bs=32), deep())
    with learn.no_logging(): learn.fit(12, 1e-2)
    model = deep()
    model.load_state_dict(learn.model.state_dict())
    return deep, model, learn.dls


def test_a_trained_model_without_norm_layers(well_trained):
    deep,model,dls = well_trained
    learn,was = made(model, dls),weights(model)
    assert same(after_lsuv(learn), was)
    line, = said(learn)
    assert line.startswith(f'{AS_IT_WAS}it looks trained: its loss is 0.') and "a constant answer's" in line
    assert line.endswith('`learn.lsuv_init()` initializes it anyway.')
    initialized(made(model, dls, force=True))
    initialized(made(deep(), dls))


def test_a_trained_body_with_a_new_head(well_trained):
    _,model,dls = well_trained
    model[5] = nn.Linear(64, 4)
    learn = made(deepcopy(model), dls)
    learn.fit(1, 0.)
    line, = said(learn)
    assert "LSUV cannot tell whether '1' is new" in line and 'at std 1' in line
    model[:4].requires_grad_(False)
    learn = made(model, dls)
    initialized(learn, kept=model[:4].parameters())
    assert 'cannot tell' not in said(learn)[0] and 'look new' not in said(learn)[0]


# --- frozen, pretrained

def test_frozen_weights():
    learn = made()
    frozen = learn.model[3].requires_grad_(False)
    initialized(learn, kept=frozen.parameters())
    assert learn.lsuv.report['3'].status == 'frozen' and "frozen" in said(learn)[0]


@pytest.mark.parametrize('unfrozen', [False, True], ids=['frozen still', 'unfrozen since'])
def test_a_group_that_was_frozen_when_it_was_attached(unfrozen):
    learn = learner(splitter=lambda model: [params(model[:4]), params(model[4:])])
    learn.freeze()
    learn.add_cb(LSUVCallback())
    if unfrozen: learn.unfreeze()
    initialized(learn, kept=learn.model[:4].parameters())


@pytest.fixture
def hub(monkeypatch):
    "Pretrained weights, without a network; the body is not looked at, so the first block of a ResNet will do."
    def load(*args, **kwargs): return pretrained_weights(torchvision.models.resnet18())
    monkeypatch.setattr('torchvision.models._api.load_state_dict_from_url', load)
    monkeypatch.setitem(model_meta, resnet18, {**model_meta[resnet18], 'cut': -5})


def from_factory(factory, arch, pretrained=True, **options):
    set_seed(0)
    train = TfmdDL(images(8, size=32), bs=4, shuffle=True, num_workers=0, after_batch=[])
    dls = DataLoaders(train, TfmdDL(images(4, size=32), bs=4, num_workers=0))
    head = dict(lin_ftrs=[16]) if factory is vision_learner else {}
    def loss(p, y): return (1 - p.float()).square().mean()
    options = dict(n_out=4, loss_func=loss, cbs=LSUVCallback(**options))
    return quiet(factory(dls, arch, pretrained=pretrained, **options, **head))


@pytest.mark.parametrize('factory, arch, pretrained', [
    (vision_learner, resnet18, True),  # torchvision's own path
    (vision_learner, body, True),
    (vision_learner, body, False),
    (unet_learner, body, True),
    (unet_learner, body, False),
], ids=lambda v: getattr(v, '__name__', f'pretrained={v}'))
def test_the_body_of_a_pretrained_learner_is_kept(hub, factory, arch, pretrained):
    for unfrozen in False, True:
        learn = from_factory(factory, arch, pretrained)
        if unfrozen: learn.unfreeze()
        initialized(learn, kept=learn.model[0].parameters() if pretrained else ())
    learn = from_factory(factory, arch, pretrained, force=True)
    learn.unfreeze()
    initialized(learn)


def test_fine_tune():
    learn,seen = from_factory(vision_learner, body),[]
    w = weights(learn.model[0])
    learn.fine_tune(1, cbs=Around(lambda l: seen.append(weights(l.model[0]))))
    first,second = said(learn)
    assert ' at std 1' in first and second.startswith(AS_IT_WAS) and same(seen[0], w)
    assert {r.name.split('.')[0] for r in learn.lsuv.report if r.status != 'frozen'} == {'1'}


@pytest.fixture
def wiki(tmp_path, monkeypatch):
    "The files that the text factories would download."
    torch.save(pretrained_weights(language().model), tmp_path/'m.pth')
    (tmp_path/'m.pkl').write_bytes(pickle.dumps(['xxunk', 'xxpad', *WORDS]))
    monkeypatch.setattr('fastai.text.learner.untar_data', lambda *args, **kwargs: tmp_path)


def test_pretrained_language_models_and_classifiers(wiki):
    learn = language(LSUVCallback(), pretrained=True)
    learn.unfreeze()
    left(learn, LOADED)
    initialized(language(LSUVCallback(force=True), pretrained=True))
    initialized(language(LSUVCallback()))
    learn = classifier(LSUVCallback(), pretrained=True)
    learn.unfreeze()
    encoder = weights(learn.model[0])
    initialized(learn)  # the head: the encoder has no units
    assert same(weights(learn.model[0]), encoder)


# --- loaded

@pytest.mark.parametrize('with_opt', [True, False])
@pytest.mark.parametrize('trained', [True, False])
def test_load(here, with_opt, trained):
    saved = learner()
    saved.fit(1) if trained else saved.create_opt()
    saved.save('a', with_opt=with_opt)
    def loaded(**options): return made(**options).load('a', with_opt=with_opt)
    left(loaded(), TRAINED if trained and with_opt else LOADED)
    initialized(loaded(force=True))
    learn = loaded()
    learn.lsuv.reset()
    initialized(learn)
    learn = loaded()
    assert learn.lsuv_init().ok
    left(learn, EARLIER)


def by_data(m, state):
    for k, p in m.named_parameters(): p.data = state[k].clone()


def by_module(m, state):
    for i, layer in enumerate(m):
        for k in layer._parameters: setattr(layer, k, nn.Parameter(state[f'{i}.{k}'].clone()))


ROADS = {
    'a state': lambda m, state: m.load_state_dict(state),
    'assign': lambda m, state: m.load_state_dict({k: v.clone() for k, v in state.items()}, assign=True),
    'data': by_data,
    'a new parameter': by_module,
    'one vector': lambda m, state: vector_to_parameters(
        parameters_to_vector(state[k] for k, _ in m.named_parameters()), m.parameters()),
}


@pytest.mark.parametrize('road', ROADS)
def test_loaded_by_any_road_in_whole_or_in_part(road):
    set_seed(7)
    state = cnn().state_dict()
    learn = made()
    ROADS[road](learn.model, state)
    left(learn, LOADED)
    learn = made()
    ROADS[road](learn.model[:1], {k: v for k, v in state.items() if k.startswith('0.')})
    initialized(learn, kept=learn.model[0].parameters())
    assert learn.lsuv.report[0].status == 'frozen'


def test_a_new_head_by_hand():
    learn = made()
    learn.model.load_state_dict(cnn().state_dict())
    learn.model[8] = nn.Linear(8, 4)
    initialized(learn, kept=list(learn.model[:8].parameters()))


def test_a_copy_knows_what_its_origin_knows():
    def copied(learn):
        learn = deepcopy(learn)
        learn.logger = learn.lines.append
        return learn
    loaded = made()
    loaded.model.load_state_dict(cnn().state_dict())
    left(copied(loaded), LOADED)
    fresh = copied(made())
    initialized(fresh)
    left(copied(fresh), EARLIER)


@pytest.mark.parametrize('preinit', ['orthogonal', None])
def test_what_was_initialized_by_hand_is_kept(preinit):
    learn = made(mlp())
    lsuv_init(learn.model, learn.dls.train, preinit=preinit)
    left(learn, LOADED)
    learn = made(mlp())
    lsuv_init(learn.model[:3], learn.dls.train, preinit=preinit)
    initialized(learn, kept=learn.model[1].parameters())


@pytest.mark.parametrize('attempt', [
    lambda learn: learn.fit(1),
    lambda learn: lsuv_init(learn.model, learn.dls.train),
    lambda learn: lsuv_init(learn.model, learn.dls.train, preinit='orthogonal'),
], ids=['fit', 'by hand', 'orthogonal'])
def test_an_attempt_that_failed_has_loaded_nothing(attempt):
    def fail(*args): raise RuntimeError('hook')
    learn = made()
    hook = learn.model[-1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match='hook'): attempt(learn)
    hook.remove()
    initialized(learn)


# --- files and copies

def test_load_learner(here):
    learn = vision(LSUVCallback(preinit='orthogonal'))
    learn.path = here
    learn.export('before.pkl')
    learn.fit(1)
    learn.export('after.pkl')
    for file in 'before.pkl', 'after.pkl':
        new = load_learner(here/file)
        new.dls,new.lines = loaders(),[]
        new.logger = new.lines.append
        left(new, 'it was loaded from a file')
        assert (not new.lsuv.report) == (file == 'before.pkl')
        new.lsuv.reset()
        initialized(new)


def test_the_exported_file_grows_by_the_report_alone(here):
    def size(learn):
        learn.path = here
        learn.fit(1)
        learn.lines.clear()
        learn.export()
        return (here/'export.pkl').stat().st_size
    learn = vision(LSUVCallback())
    assert size(learn) - size(vision()) < len(pickle.dumps(learn.lsuv.report)) + 1000


def test_pickle_and_copy():
    cb = LSUVCallback(order='mean std', tol=0.01)
    learner(cbs=cb).fit(1)
    cb.learn = None
    for new in pickle.loads(pickle.dumps(cb)), deepcopy(cb):
        assert new.options == cb.options and list(new.report) == list(cb.report) and repr(new) == repr(cb)
