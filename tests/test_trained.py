"Weights that mean something are not overwritten. Each case says so in one line, and can be overridden."
import pickle
from contextlib import nullcontext
from copy import deepcopy
from functools import partial

import fastai.callback.schedule  # noqa: F401  gives Learners `fit_one_cycle` and `lr_find`
import pytest
import torch
from fastai.basics import Adam, DataLoaders, OptimWrapper, SGD, TfmdDL, load_learner, params, set_seed
from fastai.vision.all import resnet18, unet_learner, vision_learner
from learners import *

from fastai_lsuv import LSUVCallback, lsuv_init

AS_IT_WAS = 'LSUV left the model as it is: '


def after_lsuv(learn, fit=None):
    "The weights that training starts with."
    seen = []
    see = Around(lambda learn: seen.append(weights(learn.model)), 11)
    if fit is None:
        learn.fit(1, 0., cbs=see)
    else:
        fit(see)
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
        if id(p) in units:
            assert torch.equal(a, b) == (id(p) in ids), n
        elif p.dim() > 1:
            assert torch.equal(a, b), n


# --- once

def test_the_first_fit_and_no_other():
    learn = learner(cbs=LSUVCallback())
    initialized(learn)
    left(learn, 'it was initialized before an earlier fit')
    learn.fit_one_cycle(1)
    assert len(said(learn)) == 2


def test_silent_without_logging():
    learn = learner(cbs=LSUVCallback())
    with learn.no_logging():
        for _ in range(2):
            learn.fit(1)
    assert learn.lines == [] and learn.lsuv.report.ok


def test_reset_and_every_fit_and_lsuv_init():
    learn = learner(cbs=LSUVCallback(preinit='orthogonal'))
    learn.fit(1)
    learn.lsuv.reset()
    initialized(learn)
    left(learn, 'it was initialized before an earlier fit')
    report = learn.lsuv_init()
    assert report is learn.lsuv.report and report.ok
    learn.lsuv.every_fit = True
    initialized(learn)
    initialized(learn)


def test_a_callback_for_each_fit():
    learn = learner()
    first,second = LSUVCallback(),LSUVCallback()
    learn.fit_one_cycle(1, cbs=first)
    assert first.report.ok and learn.lsuv is first and not learn.cbs.filter(lambda cb: cb is first)
    left(learn, 'it was initialized before an earlier fit', lambda cb: learn.fit_one_cycle(1, cbs=[second, cb]))
    assert not second.report and repr(second.report) == said(learn)[-1]
    initialized(learn, lambda cb: learn.fit(1, cbs=[LSUVCallback(every_fit=True), cb]))


def test_a_second_callback_is_refused_and_the_first_stays():
    with pytest.raises(ValueError, match='cbs: got a second LSUVCallback'):
        learner(cbs=[LSUVCallback(), LSUVCallback()])
    learn = learner(cbs=LSUVCallback(order='std'))
    first = learn.lsuv
    with pytest.raises(ValueError, match=r"the Learner has LSUVCallback\(order='std'\) already.*learn.remove_cb"):
        learn.add_cb(LSUVCallback())
    assert learn.lsuv is first and [cb for cb in learn.cbs if isinstance(cb, LSUVCallback)] == [first]
    learn.fit(1)
    assert learn.lsuv.report.ok and len(said(learn)) == 1


@pytest.mark.parametrize('opt_func', [
    pytest.param(SGD, id='sgd'),
    pytest.param(partial(SGD, mom=0.9), id='momentum'),
    pytest.param(Adam, id='adam'),
    pytest.param(partial(OptimWrapper, opt=torch.optim.SGD), id='torch sgd'),
    pytest.param(partial(OptimWrapper, opt=torch.optim.AdamW), id='torch adamw'),
])
def test_trained_before_it_was_attached(opt_func):
    learn = learner(opt_func=opt_func)
    learn.fit(1)
    learn.add_cb(LSUVCallback())
    left(learn, 'it has been trained')
    learn.lsuv.reset()
    initialized(learn)


def test_trained_by_another_learner():
    "This happens where a model is trained on at a larger size."
    model = cnn()
    learner(model=model).fit(1)
    left(learner(model=model, cbs=LSUVCallback()), 'it has been trained')
    initialized(learner(model=model, cbs=LSUVCallback(force=True)))
    left(learner(model=model, cbs=LSUVCallback(force=True)), 'it was initialized before an earlier fit')


@pytest.mark.parametrize('look', [
    pytest.param(lambda learn: learn.validate(), id='validate'),
    pytest.param(lambda learn: learn.get_preds(), id='get_preds'),
    pytest.param(lambda learn: learn.summary(), id='summary'),
    pytest.param(lambda learn: learn.get_preds(ds_idx=0), id='of training data'),
    pytest.param(lambda learn: learn.tta(), id='tta'),
])
@pytest.mark.parametrize('how', [dict(), dict(force=True), dict(every_fit=True)], ids=str)
def test_a_look_at_the_model_is_no_fit(look, how):
    dls = DataLoaders.from_dsets(Split(images()), Split(images()), bs=16)
    learn = learner(dls, cbs=LSUVCallback(preinit='orthogonal', **how))
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


class Split(list):
    "Items as a dataset with a split, for `tta`."
    def set_split_idx(self, i): return nullcontext()


def test_validation_within_a_fit():
    class Validates(Callback):
        def before_train(self):
            self.report = self.learn.lsuv.report
            self.learn.validate()
    learn = learner(cbs=[LSUVCallback(every_fit=True), Validates()])
    initialized(learn)
    assert learn.validates.report is learn.lsuv.report  # the same weights may be drawn twice


# --- weights that came with the model

def learned(m):
    "What training makes of norm layers."
    if 'Norm' in type(m).__name__:
        m.weight.data += 0.1*torch.randn_like(m.weight)
        m.bias.data += 0.1*torch.randn_like(m.bias)


def test_a_pretrained_model_in_a_plain_learner():
    left(learner(model=cnn().apply(learned), cbs=LSUVCallback()), "its norm layer '1' has been trained")
    initialized(learner(model=cnn().apply(learned), cbs=LSUVCallback(force=True)))


def test_a_new_head_on_a_frozen_pretrained_model():
    model = cnn().apply(learned)
    for m in model[:-1]:
        if not isinstance(m, nn.BatchNorm2d):
            m.requires_grad_(False)
    initialized(learner(model=model, cbs=LSUVCallback()), kept=model[:-1].parameters())


def test_a_pretrained_model_whose_norms_have_no_bias():
    def mlp(): return nn.Sequential(nn.Flatten(), nn.Linear(432, 32), nn.RMSNorm(32), nn.ReLU(), nn.Linear(32, 4))
    model = mlp()
    nn.init.normal_(model[2].weight, 1., 0.1)
    left(learner(model=model, cbs=LSUVCallback()), "its norm layer '2' has been trained")
    initialized(learner(model=mlp(), cbs=LSUVCallback()))


def test_norms_that_look_learned_and_are_not():
    "DCGAN's start from normal weights and zero biases. A model that was run in training mode has statistics."
    model = cnn()
    nn.init.normal_(model[1].weight, 1., 0.02)
    model(torch.randn(8, 3, 12, 12))
    initialized(learner(model=model, cbs=LSUVCallback()))


def test_a_backward_pass_is_no_training():
    learn = learner(cbs=LSUVCallback())
    learn.model(torch.randn(2, 3, 12, 12)).sum().backward()
    initialized(learn)


def test_a_new_optimizer_forgets_nothing():
    learn = learner()
    learn.fit(1)
    left(learn, 'it has been trained', lambda cb: learn.fit(1, reset_opt=True, cbs=[LSUVCallback(), cb]))


def test_another_model_is_another_matter():
    learn = learner(cbs=LSUVCallback())
    learn.fit(1)
    learn.model,learn.opt = cnn(),None
    initialized(learn)


def test_start_epoch():
    learn = learner(cbs=LSUVCallback())
    left(learn, 'training starts at epoch 2', lambda cb: learn.fit(3, 0., start_epoch=2, cbs=cb))
    forced = learner(cbs=LSUVCallback(force=True))
    initialized(forced, lambda cb: forced.fit(3, 0., start_epoch=2, cbs=cb))


# --- lr_find

@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def expected(make=None):
    "What LSUV makes of the model by itself."
    learn = (make or learner)(cbs=LSUVCallback())
    set_seed(5)
    learn.lsuv_init()
    return weights(learn.model)


OPTS = [Adam, SGD, partial(OptimWrapper, opt=torch.optim.SGD)]


@pytest.mark.parametrize('opt_func', OPTS, ids=['adam', 'sgd', 'torch sgd'])
def test_lr_find_leaves_the_lsuv_network(here, opt_func):
    learn = learner(cbs=LSUVCallback(), opt_func=opt_func)
    set_seed(5)
    learn.lr_find(num_it=8, show_plot=False)
    assert learn.lsuv.report.ok and same(weights(learn.model), expected()) and said(learn) == []
    learn.lines.clear()
    w = weights(learn.model)
    assert same(after_lsuv(learn), w)
    assert said(learn) == [f'{learn.lsuv.report.summary} This was done before an earlier fit without a log, '
                           'such as `lr_find`.']
    left(learn, 'it was initialized before an earlier fit')


@pytest.mark.parametrize('opt_func', OPTS, ids=['adam', 'sgd', 'torch sgd'])
def test_lr_find_before_it_is_attached(here, opt_func):
    learn = learner(opt_func=opt_func)
    learn.lr_find(num_it=8, show_plot=False)
    initialized(learn, lambda cb: learn.fit_one_cycle(1, 0., cbs=[LSUVCallback(), cb]))


# --- frozen, pretrained

def test_frozen_weights():
    learn = learner(cbs=LSUVCallback())
    frozen = learn.model[3]
    for p in frozen.parameters():
        p.requires_grad_(False)
    initialized(learn, kept=frozen.parameters())
    assert learn.lsuv.report['3'].status == 'frozen' and "frozen" in said(learn)[0]


def split(model): return [params(model[:4]), params(model[4:])]


def test_a_frozen_group():
    learn = learner(splitter=split, cbs=LSUVCallback())
    learn.freeze()
    initialized(learn, kept=learn.model[:4].parameters())


def test_frozen_when_it_was_attached():
    "A body that was frozen means something, even once it is unfrozen."
    learn = learner(splitter=split)
    learn.freeze()
    learn.add_cb(LSUVCallback())
    learn.unfreeze()
    initialized(learn, kept=learn.model[:4].parameters())


@pytest.fixture
def hub(monkeypatch):
    "Pretrained weights, without a network."
    import torchvision.models
    def load(*args, **kwargs): return pretrained_weights(torchvision.models.resnet18())
    monkeypatch.setattr('torchvision.models._api.load_state_dict_from_url', load)


def small_images(n=8):
    train = TfmdDL(images(n, size=32), bs=4, shuffle=True, num_workers=0, after_batch=[])
    return DataLoaders(train, TfmdDL(images(4, size=32), bs=4, num_workers=0))


def test_vision_learner_pretrained(hub, monkeypatch):
    "torchvision's own path; the body is not looked at, so the first block will do."
    from fastai.vision.learner import model_meta
    monkeypatch.setitem(model_meta, resnet18, {**model_meta[resnet18], 'cut': -5})
    def make(**kwargs):
        options = dict(n_out=4, lin_ftrs=[16], loss_func=CrossEntropyLossFlat())
        return quiet(vision_learner(small_images(), resnet18, cbs=LSUVCallback(**kwargs), **options))
    initialized(learn := make(), kept=learn.model[0].parameters())
    learn = make()
    learn.unfreeze()
    initialized(learn, kept=learn.model[0].parameters())


@pytest.mark.parametrize('pretrained', [True, False])
@pytest.mark.parametrize('factory', [vision_learner, unet_learner])
def test_vision_factories(factory, pretrained):
    def make(**kwargs):
        set_seed(0)
        head = dict(lin_ftrs=[16]) if factory is vision_learner else {}
        def loss(p, y): return (1 - p.float()).square().mean()
        return quiet(factory(small_images(), body, n_out=4, pretrained=pretrained, cbs=LSUVCallback(**kwargs),
                             loss_func=loss, **head))
    for unfrozen in False, True:
        learn = make()
        if unfrozen:
            learn.unfreeze()
        initialized(learn, kept=learn.model[0].parameters() if pretrained else ())
    learn = make(force=True)
    learn.unfreeze()
    initialized(learn)


def test_fine_tune(hub):
    set_seed(0)
    options = dict(n_out=4, lin_ftrs=[16], loss_func=CrossEntropyLossFlat())
    learn = quiet(vision_learner(small_images(), body, cbs=LSUVCallback(), **options))
    seen = []
    w = weights(learn.model[0])
    learn.fine_tune(1, cbs=Around(lambda l: seen.append(weights(l.model[0]))))
    first,second = said(learn)
    assert ' at std 1' in first and second.startswith(AS_IT_WAS) and same(seen[0], w)
    assert {r.name.split('.')[0] for r in learn.lsuv.report if r.status != 'frozen'} == {'1'}


@pytest.fixture
def wiki(tmp_path, monkeypatch):
    "The files that the text factories would download."
    def save(learn):
        (tmp_path/'wt').mkdir()
        torch.save(pretrained_weights(learn.model), tmp_path/'wt'/'m.pth')
        (tmp_path/'wt'/'m.pkl').write_bytes(pickle.dumps(['xxunk', 'xxpad', *WORDS]))
        monkeypatch.setattr('fastai.text.learner.untar_data', lambda *args, **kwargs: tmp_path/'wt')
    return save


def test_language_model_pretrained(wiki):
    wiki(language())
    learn = language(LSUVCallback(), pretrained=True)
    learn.unfreeze()
    left(learn, 'its weights were loaded')
    initialized(language(LSUVCallback(force=True), pretrained=True))
    initialized(language(LSUVCallback()))


def test_text_classifier_pretrained(wiki):
    wiki(language())
    learn = classifier(LSUVCallback(), pretrained=True)
    learn.unfreeze()
    body = weights(learn.model[0])
    initialized(learn)  # the head: the body has no units
    assert same(weights(learn.model[0]), body) and learn.lsuv.report


# --- loaded

@pytest.mark.parametrize('with_opt', [True, False])
@pytest.mark.parametrize('trained', [True, False])
def test_load(here, with_opt, trained):
    a = learner()
    if trained:
        a.fit(1)
    else:
        a.create_opt()
    a.save('a', with_opt=with_opt)
    learn = learner(cbs=LSUVCallback())
    learn.load('a', **({} if with_opt else dict(with_opt=False)))
    left(learn, 'it has been trained' if trained and with_opt else 'its weights were loaded')
    for anyway in [lambda l: setattr(l.lsuv, 'force', True), lambda l: l.lsuv.reset()]:
        learn = learner(cbs=LSUVCallback())
        learn.load('a')
        anyway(learn)
        initialized(learn)
    learn = learner(cbs=LSUVCallback())
    learn.load('a')
    assert learn.lsuv_init().ok
    left(learn, 'it was initialized before an earlier fit')


def test_load_a_part(here):
    learn = learner(cbs=LSUVCallback())
    learn.model.load_state_dict({k: v for k, v in cnn().state_dict().items() if k.startswith('0.')}, strict=False)
    initialized(learn, kept=learn.model[0].parameters())
    assert [r.status for r in learn.lsuv.report][0] == 'frozen'


def test_loaded_then_copied(here):
    learn = learner(cbs=LSUVCallback())
    learn.model.load_state_dict(cnn().state_dict())
    learn = deepcopy(learn)
    learn.logger = learn.lines.append
    left(learn, 'its weights were loaded')
    fresh = deepcopy(learner(cbs=LSUVCallback()))
    fresh.logger = fresh.lines.append
    initialized(fresh)
    again = deepcopy(fresh)
    again.logger = again.lines.append
    left(again, 'it was initialized before an earlier fit')


@pytest.mark.parametrize('preinit', ['orthogonal', None])
def test_initialized_by_hand(preinit):
    "What the user has made of the weights is not made again. An attempt that failed has made nothing."
    def mlp(): return nn.Sequential(nn.Flatten(), nn.Linear(432, 32), nn.ReLU(), nn.Linear(32, 4))
    learn = learner(model=mlp(), cbs=LSUVCallback())
    lsuv_init(learn.model, learn.dls.train, preinit=preinit)
    left(learn, 'its weights were loaded')
    learn = learner(model=mlp(), cbs=LSUVCallback())
    lsuv_init(learn.model[:3], learn.dls.train, preinit=preinit)
    initialized(learn, kept=learn.model[1].parameters())
    learn = learner(model=mlp(), cbs=LSUVCallback())
    hook = learn.model[-1].register_forward_hook(raises)
    with pytest.raises(RuntimeError, match='hook'):
        lsuv_init(learn.model, learn.dls.train, preinit=preinit)
    hook.remove()
    initialized(learn)


def test_a_failed_pass_loads_nothing():
    "Weights that were put back are not taken for loaded ones."
    learn = learner(cbs=LSUVCallback())
    hook = learn.model[-1].register_forward_hook(raises)
    with pytest.raises(RuntimeError, match='hook'):
        learn.fit(1)
    hook.remove()
    initialized(learn)


def raises(*args):
    raise RuntimeError('hook')


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
    sizes = {}
    for name, cbs in [('with', LSUVCallback()), ('without', None)]:
        learn = vision(cbs)
        learn.path = here
        learn.fit(1)
        learn.lines.clear()
        learn.export()
        sizes[name] = (here/'export.pkl').stat().st_size
        if cbs:
            report = len(pickle.dumps(learn.lsuv.report))
    assert sizes['with'] - sizes['without'] < report + 1000, (sizes, report)


def test_pickle_and_copy():
    cb = LSUVCallback(order='mean std', tol=0.01)
    learner(cbs=cb).fit(1)
    cb.learn = None
    for new in pickle.loads(pickle.dumps(cb)), deepcopy(cb):
        assert new.options == cb.options and list(new.report) == list(cb.report) and repr(new) == repr(cb)


# --- loaded by another road, or before the callback was attached

def by_data(m, state):
    for k, p in m.named_parameters(): p.data = state[k].clone()


def by_module(m, state):
    for i, layer in enumerate(m):
        for k in layer._parameters: setattr(layer, k, nn.Parameter(state[f'{i}.{k}'].clone()))


ROADS = {
    'assign': lambda m, state: m.load_state_dict({k: v.clone() for k, v in state.items()}, assign=True),
    'data': by_data,
    'a new parameter': by_module,
    'one vector': lambda m, state: torch.nn.utils.vector_to_parameters(
        torch.nn.utils.parameters_to_vector(state[k] for k, _ in m.named_parameters()), m.parameters()),
}


@pytest.mark.parametrize('road', ROADS)
def test_loaded_by_any_road(road):
    set_seed(7)
    state = cnn().state_dict()
    learn = learner(cbs=LSUVCallback())
    ROADS[road](learn.model, state)
    left(learn, 'its weights were loaded')
    learn = learner(cbs=LSUVCallback())
    ROADS[road](learn.model[:1], {k: v for k, v in state.items() if k.startswith('0.')})
    initialized(learn, kept=learn.model[0].parameters())


def test_a_move_is_no_load():
    "`Module.to` writes through `.data`, and may round."
    learn = learner(cbs=LSUVCallback())
    learn.model.to(torch.bfloat16).to(memory_format=torch.channels_last).float()
    initialized(learn)


def test_a_new_head_by_hand():
    learn = learner(cbs=LSUVCallback())
    learn.model.load_state_dict(cnn().state_dict())
    body = list(learn.model[:8].parameters())
    learn.model[8] = nn.Linear(8, 4)
    initialized(learn, kept=body)


def deep():
    hidden = [nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(64, 4))


def easy(n=128):
    x = torch.randn(n, 3, 4, 4)
    return loaders(list(zip(x, (x.mean((1, 2, 3))*4).round().clip(-1, 2).long() + 1)), bs=32)


@pytest.fixture
def well_trained():
    "A model without norm layers, and what it was trained on."
    learn = learner(easy(), deep())
    with learn.no_logging(): learn.fit(12, 1e-2)
    model = deep()
    model.load_state_dict(learn.model.state_dict())
    return model, learn.dls


def test_a_trained_model_without_norm_layers(well_trained):
    model,dls = well_trained
    learn = learner(dls, model, cbs=LSUVCallback())
    was = weights(model)
    assert same(after_lsuv(learn), was)
    line, = said(learn)
    assert line.startswith(f'{AS_IT_WAS}it looks trained: its loss is 0.') and "a constant answer's" in line
    assert line.endswith('`learn.lsuv_init()` initializes it anyway.')
    initialized(learner(dls, model, cbs=LSUVCallback(force=True)))
    initialized(learner(dls, deep(), cbs=LSUVCallback()))


def test_a_trained_body_with_a_new_head(well_trained):
    model,dls = well_trained
    model[5] = nn.Linear(64, 4)
    learn = learner(dls, deepcopy(model), cbs=LSUVCallback())
    learn.fit(1, 0.)
    line, = said(learn)
    assert "LSUV cannot tell whether '1' is new" in line and 'at std 1' in line
    for p in model[:4].parameters(): p.requires_grad_(False)
    learn = learner(dls, model, cbs=LSUVCallback())
    initialized(learn, kept=model[:4].parameters())
    assert 'cannot tell' not in said(learn)[0] and 'look new' not in said(learn)[0]
