"""What the browser runs, as ONNX graphs: a model with a switch before every neuron, and the importance of every neuron for a request.

Weights are stored in half precision where that loses nothing, and computed with in single.
"""

import copy
import logging
import warnings
from functools import partial

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from safetyneuron import NeuronSet
from safetyneuron.detectors.effects import READ_AT
from safetyneuron.errors import SafetyNeuronError
from safetyneuron.importance import exact
from safetyneuron.importance.attending import attending
from safetyneuron.neurons.architecture import COLUMN_PROJECTIONS, Architecture
from safetyneuron.organism.tokenizer import CONTEXT

FIRES = 0.95  # a neuron fires above this quantile of its largest activations on general prompts
BATCH = 64  # requests that the graph takes at once, at most
LENGTH = torch.export.Dim("length", min=2, max=CONTEXT)

# The exporter names each package that it can do without.
logging.getLogger("torch.onnx").setLevel(logging.ERROR)


class Switches(torch.nn.Module):
    """A model whose neurons have switches, a few tokens at a time.

    From tokens (batch, n), on (layers, neurons of a layer) and the keys and values of the m tokens before, past (2, layers, batch,
    heads, m, width), to the last logits, peaks or which fired, past with these tokens, and where the last token of the first
    request looks (layers, m + n), a mean over heads. A neuron's peak is the largest size of its output over the tokens. The neurons of a layer lie in the order of the kinds. For models in which every head has its own keys and values; use it inside
    `attending(model, switches.attend)`.
    """

    def __init__(self, model):
        super().__init__()
        self.model, self.threshold = model, None
        self.run = {}  # inputs, peaks, keys and values of the forward pass under way
        architecture = Architecture(model)
        kinds = NeuronSet.empty(model).units().kinds
        self.layers, self.heads = len(architecture.layers), model.config.num_attention_heads
        self.head_width = architecture.attention(0).head_dim
        self.widths = {kind: mask.shape[1] for kind, mask in kinds.items()}
        self.width = sum(self.widths.values())
        for layer in range(self.layers):
            start = 0
            for kind, width in self.widths.items():
                switched = partial(
                    self._switched, layer, kind, slice(start, start := start + width)
                )
                self._hook(architecture.place(layer, READ_AT[kind]).module, switched, READ_AT[kind])

    def _hook(self, module, switched, projection):
        if projection in COLUMN_PROJECTIONS:
            module.register_forward_pre_hook(lambda _, inputs: (switched(inputs[0]),))
        else:
            module.register_forward_hook(lambda _, inputs, output: switched(output))

    def _switched(self, layer, kind, channels, values):
        values = values * self.run["on"][layer, channels]
        self.run[layer, kind] = values.abs().amax((0, 1))
        return values

    def attend(self, module, query, key, value, attention_mask, scaling, **_):
        """Attention to the tokens before, too (an attention interface function)."""
        layer, before = module.layer_idx, self.run["past"]
        key, value = (torch.cat((old, new), 2) for old, new in zip(before[:, layer], (key, value)))
        self.run[layer, "past"] = torch.stack((key, value))
        after = torch.arange(key.shape[2]) > self.run["positions"][0, :, None]
        weights = torch.softmax((query @ key.mT * scaling).masked_fill(after, -torch.inf), -1)
        self.run[layer, "attention"] = weights[0, :, -1].mean(0)
        return (weights @ value).transpose(1, 2).contiguous(), None

    def forward(self, tokens, on, past):
        """Run once."""
        positions = past.shape[4] + torch.arange(tokens.shape[1])[None]
        self.run |= {"on": on, "past": past, "positions": positions}
        found = self.model(
            input_ids=tokens, position_ids=positions, use_cache=False, logits_to_keep=1
        )
        run, layers = self.run, range(self.layers)
        peaks = torch.stack([torch.cat([run[l, kind] for kind in self.widths]) for l in layers])
        present = torch.stack([run[l, "past"] for l in layers], 1)
        attention = torch.stack([run[l, "attention"] for l in layers])
        fired = peaks if self.threshold is None else (peaks > self.threshold).float()
        self.run = {}
        return found.logits[:, -1], fired, present, attention

    def inputs(self, batch=2, length=8, before=3):
        """Inputs with every neuron on, in the order of `forward`."""
        tokens = torch.ones(batch, length, dtype=torch.long)
        past = torch.zeros(2, self.layers, batch, self.heads, before, self.head_width)
        return tokens, torch.ones(self.layers, self.width), past

    def read(self, requests, on):
        """All outputs for requests of one length: lists of token ids."""
        past = self.inputs(len(requests), before=0)[2]
        with torch.no_grad(), attending(self.model, self.attend):
            return self(torch.tensor(requests), on, past)

    def place(self, unit):
        """The flat place (layer · width + channel) of a (kind, layer, channel)."""
        kind, layer, channel = unit
        kinds = list(self.widths)
        return (
            layer * self.width + sum(self.widths[k] for k in kinds[: kinds.index(kind)]) + channel
        )


def threshold(switches, encoded):
    """The `FIRES` quantile of every neuron's peaks over general requests: (layers, neurons of a layer)."""
    on = switches.inputs()[1]
    peaks = torch.stack([switches.read([ids], on)[1] for ids in encoded])
    return peaks.quantile(FIRES, dim=0)


class Importance(torch.nn.Module):
    """Importance of every neuron for one request (Eq 1): tokens (1, n) to scores (layers, channels of q, k, v, o and the feed-forward block).

    The closed forms of `importance.exact`, over whole attention maps: requests of organisms are short. For models in which every
    head has its own keys and values; use it inside `attending(model, importance.attend)`.
    """

    def __init__(self, model):
        super().__init__()
        self.model, self.run = model, {}
        place, layers = Architecture(model).place, range(len(Architecture(model).layers))
        heads = model.config.num_attention_heads
        of_o = [place(layer, "o").weight.detach() for layer in layers]
        self.factors = [exact.OutputFactors.of(weight, heads, 1) for weight in of_o]
        self.norms = [place(layer, "down").weight.detach().norm(dim=1) for layer in layers]
        for layer in layers:
            before = partial(self._before_down, layer)
            place(layer, "down").module.register_forward_pre_hook(before)
            attention = Architecture(model).attention(layer)
            attention.register_forward_pre_hook(self._before_attention, with_kwargs=True)

    def _before_attention(self, module, inputs, named):
        self.run["rotation"] = named["position_embeddings"]

    def _before_down(self, layer, module, inputs):
        real = torch.ones_like(inputs[0][..., 0])
        self.run[layer] += [exact.feed_forward(inputs[0], self.norms[layer], real)]

    def attend(self, module, query, key, value, attention_mask, scaling, **_):
        """Attention with the model's own numbers, measured on the way (an attention interface function)."""
        n, layer = query.shape[2], module.layer_idx
        allowed = torch.ones(n, n, dtype=torch.bool).tril()
        heads = torch.softmax(exact.masked(query @ key.mT * scaling, allowed), -1) @ value
        real = torch.ones_like(query[:, 0, :, 0])
        attention = exact.Attention(
            query, key, value, heads, allowed, real, scaling, *self.run["rotation"]
        )
        factors = self.factors[layer]
        inside = [exact.query_removal(attention), exact.key_removal(attention)]
        scores = [change_of_output(attention, factors, removal) for removal in inside]
        scores += [score(heads, factors, real) for score in (exact.value, exact.output)]
        self.run[layer] = scores
        return heads.transpose(1, 2).contiguous(), None

    def forward(self, tokens):
        """Run once."""
        self.model.get_decoder()(input_ids=tokens, use_cache=False)
        layers = range(len(self.factors))
        scores = torch.stack([torch.cat(self.run[layer], 1)[0] for layer in layers])
        self.run.clear()
        return scores

    def constants(self):
        """All that the graph holds of the model: its weights, and what was computed from them."""
        found = constants_of(self.model)
        for layer, (norms, factors) in enumerate(zip(self.norms, self.factors)):
            made = {"down": norms, "norms": factors.norms, "inner": factors.inner}
            made["single"] = factors.single
            found |= {f"{name} {layer}": made[name].numpy() for name in made}
        return found


def change_of_output(attention, factors, removal):
    """Importance of each channel of q or k, whose removal changes the logits of its own head: (1, channels)."""
    logits = exact.logits_of(attention)
    before = torch.softmax(exact.masked(logits, attention.allowed), -1)
    terms = zip(removal.left, removal.right)  # (1, heads, n, d) each, to maps (1, heads, d, n, n)
    taken = sum(left.mT[..., None] * right.mT[..., None, :] for left, right in terms)
    after = torch.softmax(exact.masked(logits[:, :, None] - taken, attention.allowed), -1)
    values = attention.value @ factors.single
    return (
        ((after - before[:, :, None]) @ values[:, :, None]).square().sum((-2, -1)).sqrt().flatten(1)
    )


class SwitchGraph:
    """The graph of models with switches: exported from one of them, which takes seconds, for all of its architecture."""

    def __init__(self, switches):
        batch = torch.export.Dim("batch", min=1, max=BATCH)
        past = torch.export.Dim(
            "before", min=2, max=CONTEXT
        )  # none before is as good, outside of Python
        lengths = {"tokens": {0: batch, 1: LENGTH}, "on": None, "past": {2: batch, 4: past}}
        outputs = ["logits", "fired", "present", "attention"]
        with attending(switches.model, switches.attend):
            self.graph = export(switches, switches.inputs(), lengths, outputs)
        constants = self._constants(switches)
        self.places = find_constants(self.graph, constants)
        if missing := {*constants} - {name for name, _ in self.places.values()}:
            raise SafetyNeuronError(f"the exported graph does not hold {', '.join(missing)}")

    def _constants(self, switches):
        return constants_of(switches.model) | {"threshold": switches.threshold.numpy()}

    def write(self, switches, path, delta=None):
        """Write the graph of another model, and the strength of a repair as an input if there is one."""
        model = filled(self.graph, self.places, self._constants(switches))
        if delta:
            add_repair(model.graph, switches.model, delta, self.places)
        save(model, path)


class ImportanceGraph:
    """The graph of the importance of every neuron: exported from one model, which takes most of a minute, for all of its architecture."""

    def __init__(self, model):
        importance, tokens = Importance(model), torch.ones(1, 8, dtype=torch.long)
        with attending(model, importance.attend):
            self.graph = export(importance, (tokens,), {"tokens": {1: LENGTH}}, ["scores"])
        self.places = find_constants(self.graph, importance.constants())

    def write(self, model, path):
        """Write the graph of another model."""
        save(filled(self.graph, self.places, Importance(model).constants()), path)


def constants_of(model):
    """The weights of a model by name."""
    return {name: weight.detach().numpy() for name, weight in model.named_parameters()}


def find_constants(exported, constants):
    """Where a graph holds what belongs to its model: name of its own to name of the constant, and whether the exporter has turned the matrix."""
    known = {array.tobytes(): (name, False) for name, array in constants.items()}
    turned = {name: array.T for name, array in constants.items() if array.ndim == 2}
    known = {array.tobytes(): (name, True) for name, array in turned.items()} | known
    smallest, found = min(array.size for array in constants.values()), {}
    for held in exported.graph.initializer:
        array, name = numpy_helper.to_array(held), held.name.removeprefix("model.")
        place = (name, False) if name in constants else known.get(array.tobytes())
        if place:
            found[held.name] = place
        elif array.dtype == np.float32 and array.size >= smallest:
            raise SafetyNeuronError(
                f"the exported graph holds {held.name}, and it is not known of which weight it was made"
            )
    return found


def filled(exported, places, constants):
    """The graph with the constants of another model."""
    model = copy.deepcopy(exported)
    for held in model.graph.initializer:
        if held.name in places:
            name, turned = places[held.name]
            array = constants[name].T if turned else constants[name]
            array = np.ascontiguousarray(array).reshape(held.dims)
            held.CopyFrom(numpy_helper.from_array(array, held.name))
    return model


def add_repair(graph, model, delta, places):
    """Add as much of a change of rows and columns as an input `strength` says, behind every matrix that it changes."""
    graph.input.append(helper.make_tensor_value_info("strength", TensorProto.FLOAT, [1]))
    names = {id(weight): name for name, weight in model.named_parameters()}
    held = {name: place for place, (name, _) in places.items()}
    for (projection, layer), value in delta.values.items():
        place = Architecture(model).place(layer, projection)
        name = held[names[id(place.module.weight)]]
        channels = delta.neurons.masks[projection][layer].nonzero().flatten().numpy()
        add_change(graph, name, projection in COLUMN_PROJECTIONS, channels, value.numpy())


def add_change(graph, weight, columns, channels, value):
    """Add `strength` times the change of some rows, or columns, to what the product with a weight gives. value: (channels, width)."""
    (at,) = [i for i, n in enumerate(graph.node) if n.op_type == "MatMul" and n.input[1] == weight]
    product = graph.node[at]
    given, result = product.input[0], product.output[0]
    constants = {"change": value if columns else value.T.copy()}
    if columns:
        constants["channels"] = channels
        steps = [("Gather", [given, "channels"], {"axis": -1}), ("MatMul", ["", "change"], {})]
    else:
        (held,) = [one for one in graph.initializer if one.name == weight]
        constants["places"] = np.eye(held.dims[1], dtype=np.float32)[channels]
        steps = [("MatMul", [given, "change"], {}), ("MatMul", ["", "places"], {})]
    steps += [("Mul", ["", "strength"], {}), ("Add", ["", "whole"], {})]
    product.output[0] = f"{result}.whole"
    new, last = [], ""
    for i, (kind, inputs, options) in enumerate(steps):
        named = {"": last, "whole": product.output[0]} | {c: f"{weight}.{c}" for c in constants}
        last = result if kind == "Add" else f"{result}.{i}"
        new.append(helper.make_node(kind, [named.get(n, n) for n in inputs], [last], **options))
    graph.initializer.extend(
        numpy_helper.from_array(c, f"{weight}.{n}") for n, c in constants.items()
    )
    for node in reversed(new):
        graph.node.insert(at + 1, node)


def export(module, inputs, lengths, outputs):
    """The graph of a module. lengths: the dimensions of each input that vary."""
    options = dict(dynamic_shapes=lengths, input_names=list(lengths), output_names=outputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns of itself
        exported = torch.onnx.export(
            module.eval(), inputs, dynamo=True, verbose=False, **options
        ).model_proto
    for node in exported.graph.node:
        node.ClearField("metadata_props")  # where in Python it came from, half of the file
    return exported


def save(model, path):
    """Write a graph, with weights in half precision."""
    halve(model.graph)
    onnx.save(model, path)


def halve(graph):
    """Store single-precision weights in half precision, each with a cast before its use, where that loses nothing."""
    for weight in [
        w for w in graph.initializer if w.data_type == TensorProto.FLOAT and np.prod(w.dims) > 1000
    ]:
        name, values = weight.name, numpy_helper.to_array(weight)
        half = values.astype(np.float16)
        if (half == values).all():
            weight.CopyFrom(numpy_helper.from_array(half, f"{name}.half"))
            cast = helper.make_node("Cast", [f"{name}.half"], [name], to=TensorProto.FLOAT)
            graph.node.insert(0, cast)
