"What is normalized: units, the weights and biases that they are made of, and which of them a model has."
from .coverage import Coverage
from .kinds import EMBEDDINGS, LAYERS, is_layer, is_plain, whole_of
from .refs import Property, Ref, Refs
from .selection import (NothingToDo, Selection, is_named, loose_of, names_in, names_module, select_modules,
                        sources_of)
from .unit import Plan, Unit, layer_unit, view_unit
from .views import Copy, Layout, Source, Sources, View

__all__ = ['Copy', 'Coverage', 'EMBEDDINGS', 'LAYERS', 'Layout', 'NothingToDo', 'Plan', 'Property', 'Ref', 'Refs',
           'Selection', 'Source', 'Sources', 'Unit', 'View', 'is_layer', 'is_named', 'is_plain', 'layer_unit',
           'loose_of', 'names_in', 'names_module', 'select_modules', 'sources_of', 'view_unit', 'whole_of']
