"""What a graph records that plain ``torch.fx`` would lose. What it declines is tested in ``test_plan.py``."""

from __future__ import annotations

import copy
import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fusedres import select
from fusedres.patch import patch
from fusedres.patch.trace import IN_PLACE_OPERATORS, Untraceable, survey, trace

from .blocks import Layers, check_patched, images, settled


def module(forward) -> nn.Module:
    return type("Traced", (nn.Module,), {"forward": forward})()


def everything(_: nn.Module) -> bool:
    return True


@pytest.mark.parametrize("target", IN_PLACE_OPERATORS, ids=lambda f: f.__name__)
def test_in_place_operators_stay_in_place(target):
    graph = trace(module(lambda self, x, y: target(x, y)), everything).graph
    assert [node.target for node in graph.nodes if node.op == "call_function"] == [target]


def test_augmented_assignment_is_in_place():
    def forward(self, x, y):
        x += y
        return x

    graph = trace(module(forward), everything).graph
    assert operator.iadd in {node.target for node in graph.nodes}


def test_defaults_are_fixed_and_the_signature_kept():
    traced = trace(module(lambda self, x, n=2, *, flag=False: x if flag else x * n), everything)
    assert [node.name for node in traced.graph.nodes if node.op == "placeholder"] == ["x"]
    assert str(traced.signature) == "(x, n=2, *, flag=False)"


def test_a_submodule_is_inlined_called_or_called_because_it_must_be():
    plain = nn.Sequential(module(lambda self, x: x * 2))
    branching = nn.Sequential(module(lambda self, x: x if x.sum() > 0 else -x))
    assert len(trace(plain, everything).inlined) == 1
    for model, inline in ((plain, lambda _: False), (branching, everything)):
        traced = trace(model, inline)
        assert traced.inlined == frozenset()
        assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["0"]


def test_survey_looks_at_eval_mode_alone():
    model = module(lambda self, x: x * 2 if self.training else x)
    assert len(survey(model, everything).graph.nodes) == 2
    with pytest.raises(Untraceable, match="train and in eval"):
        trace(model, everything)


def test_a_submodule_that_differs_between_the_modes_spoils_only_what_inlines_it():
    model = nn.Sequential(module(lambda self, x: x * 2 if self.training else x))
    with pytest.raises(Untraceable, match="train and in eval"):
        trace(model, everything)
    assert trace(model, lambda _: False).inlined == frozenset()


def test_constants_are_not_stored_on_the_module():
    model = module(lambda self, x: x + torch.ones(3))
    with pytest.raises(Untraceable, match="constant tensor"):
        trace(model, everything)
    assert not [name for name in model.__dict__ if "constant" in name]


# -- what a forward asks of the type of its arguments ------------------------------------------------------------------


def asks(self, x):
    return self.branch(x) if isinstance(x, torch.Tensor) else self.branch(x[0])


def asks_torch(self, x):
    return self.branch(x) if torch.is_tensor(x) else self.branch(x[0])


def asks_for_lists(self, x):
    x = torch.cat(x, 0) if isinstance(x, (list, tuple)) else x
    return self.branch(x)


def asks_behind_a_layer(self, x):
    x = self.conv1(x)
    return torch.relu(self.bn1(x[0] if isinstance(x, (list, tuple)) else x)) + self.bn2(self.conv2(x))


@pytest.mark.parametrize("forward", [asks, asks_torch, asks_for_lists])
def test_an_argument_is_taken_for_a_tensor_and_asked_at_every_call(forward):
    model = type("Asking", (Layers,), {"forward": forward})()
    report = check_patched(model)
    assert report.coverage == 1.0
    assert "not isinstance(x, Tensor)" in report.source("")
    patch(model)
    torch.testing.assert_close(model.eval()([images()]), model(images()), rtol=1e-9, atol=1e-11)


def test_what_a_layer_makes_is_a_tensor():
    report = check_patched(type("Asking", (Layers,), {"forward": asks_behind_a_layer})())
    assert report.coverage > 0
    assert "isinstance" not in report.source("")


# -- what a forward asks of the sizes of its arguments -----------------------------------------------------------------


def asserts(self, x):
    assert x.shape[1] == 4
    assert x.dim() == 4, "images"
    assert x.size(2) % 2 == 0 and x.size()[3] >= 2 * 2
    return torch.relu(self.branch(x) + x)


def raises(self, x):
    if x.ndim != 4 or x.size(1) != 4:
        raise ValueError("not for this")
    return torch.relu(self.branch(x) + x)


def adds_a_dimension(self, x):
    if x.dim() == 3:
        x = x[None]
    return torch.relu(self.branch(x) + x)


@pytest.mark.parametrize("forward", [asserts, raises, adds_a_dimension])
def test_questions_about_sizes_are_asked_at_every_call(forward):
    stock = settled(type("Asking", (Layers,), {"forward": forward})())
    model = copy.deepcopy(stock)
    report = check_patched(copy.deepcopy(stock))
    assert report.coverage == 1.0
    assert report.fused[0].pattern.startswith("post-activation residual")
    patch(model)
    for x in (images(3), images()[0], images(size=5)):
        expected, found = (_outcome(m.eval(), x) for m in (stock, model))
        assert type(found) is type(expected)
        if isinstance(expected, torch.Tensor):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
        else:
            assert str(found) == str(expected)


def _outcome(model: nn.Module, x: torch.Tensor) -> torch.Tensor | Exception:
    try:
        return model(x)
    except (AssertionError, IndexError, RuntimeError, ValueError) as error:
        return error


def asks_for_height(self, x):
    return torch.relu(self.branch(x) + x) if x.shape[2] == 6 else x


def asks_behind_a_write(self, x):
    x.unsqueeze_(0)
    assert x.dim() == 4
    return torch.relu(self.branch(x) + x)


def asks_for_more(self, x):
    out = self.branch(x)
    return torch.relu(out + x) if out.shape == x.shape else out


@pytest.mark.parametrize("forward", [asks_for_height, asks_behind_a_write, asks_for_more])
def test_questions_without_an_answer_to_be_expected_are_declined(forward):
    report = patch(settled(type("Asking", (Layers,), {"forward": forward})()))
    assert report.fused == ()
    assert "branches on data" in report.declined[0].reason


# -- arguments without names -------------------------------------------------------------------------------------------


def takes_more(self, x, *more, **options):
    out = torch.relu(self.branch(x) + x)
    return sum(more, out) * options.get("scale", 1)


def takes_options(self, x, *, flag=False, **options):
    return torch.relu(self.branch(x) + x) * (2 if flag or options else 1)


@pytest.mark.parametrize(
    "forward, args, options",
    [(takes_more, (1,), {}), (takes_more, (), {"scale": 2}), (takes_options, (), {"flag": True, "scale": 3})],
)
def test_more_arguments_are_for_the_stock_forward(forward, args, options):
    stock = settled(type("Taking", (Layers,), {"forward": forward})())
    model = copy.deepcopy(stock)
    assert check_patched(copy.deepcopy(stock)).coverage == 1.0
    patch(model)
    found, expected = (m.eval()(images(), *args, **options) for m in (model, stock))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    assert not torch.allclose(found, stock(images()))


# -- layers that are made on the way -----------------------------------------------------------------------------------


def test_a_layer_that_is_made_on_the_way_is_what_it_does():
    model = type("Making", (Layers,), {"forward": lambda self, x: nn.ReLU(inplace=True)(self.branch(x) + x)})()
    report = check_patched(model)
    assert [site.pattern for site in report.fused] == ["post-activation residual (identity)"]


def test_a_layer_that_is_kept_in_a_list_is_left():
    model = type("Keeping", (Layers,), {"forward": lambda self, x: self.acts[0](self.branch(x) + x)})()
    model.acts = [nn.ReLU()]
    report = check_patched(model)
    assert "not registered as a submodule" in report.declined[0].reason


# -- modules that override __call__ ------------------------------------------------------------------------------------


class DoublingNorm(nn.BatchNorm2d):
    def __call__(self, x):
        return super().__call__(x) * 2


class DoublingPool(nn.MaxPool2d):
    def __call__(self, x):
        return super().__call__(x) * 2


class DoublingBlock(Layers):
    def __call__(self, x):
        return super().__call__(x) * 2


class Mixin:
    def __call__(self, x):
        return super().__call__(x) * 2


class DoublingConv(Mixin, nn.Conv2d):
    pass


@pytest.mark.parametrize(
    "make",
    [
        lambda: DoublingNorm(4),
        lambda: DoublingPool(1),
        lambda: DoublingBlock(),
        lambda: DoublingConv(4, 4, 1),
        lambda: nn.Sequential(DoublingBlock(), DoublingNorm(4)),
    ],
    ids=["norm", "pool", "block", "mixin", "nested"],
)
def test_a_module_that_overrides_call_does_it_once(make):
    class Block(Layers):
        def __init__(self):
            super().__init__()
            self.inner = make()

        def forward(self, x):
            return torch.relu(self.inner(self.branch(x)) + x)

    assert check_patched(Block()).covered >= 2
    assert "__call__" in vars(DoublingBlock)
    assert "__call__" not in vars(DoublingConv)


def test_such_a_module_is_called_whatever_is_inlined():
    traced = trace(nn.Sequential(DoublingBlock()), everything)
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "output"]


# -- functions that are called from the graph --------------------------------------------------------------------------


def pad_to_even(x):
    """As TensorFlow's "same" padding: it branches on the size of the image."""
    height = x.shape[-2]
    return F.pad(x, (0, 0, 0, 1)) if height % 2 else x


def pad_layer(x, layer):
    return pad_to_even(x) if layer.stride == (1, 1) else x


def doubled_where_positive(x):
    """Writes into its argument, where that is large."""
    if x.sum() > 0:
        x *= 2
    return x


def view_of_the_second(x, y):
    return y if x.sum() > 1e9 else y.view(y.shape)


@pytest.mark.parametrize("size", [5, 6])
def test_a_function_that_cannot_be_traced_is_called(size):
    model = type("Padded", (Layers,), {"forward": lambda self, x: self.branch(pad_layer(x, self.conv1))})()
    report = check_patched(model, images(size=size))
    assert report.coverage == 1.0
    assert "pad_to_even(x)" in report.source("")


def test_the_function_is_there_again_after_tracing():
    before = pad_to_even
    test_a_function_that_cannot_be_traced_is_called(6)
    assert globals()["pad_to_even"] is before


def test_a_function_that_cannot_even_be_called_is_a_reason():
    model = type("Lost", (Layers,), {"forward": lambda self, x: self.branch(x) if pad_to_even(x).sum() > 0 else x})()
    report = patch(model)
    assert report.fused == ()
    assert "branches on data" in report.declined[0].reason


def writes_between(self, x):
    out = self.bn1(self.conv1(x))
    y = doubled_where_positive(x)
    return torch.relu(out + x), y


def writes_through_another(self, x):
    out = self.bn1(self.conv1(x))
    y = view_of_the_second(out, x)
    y *= 3
    return torch.relu(self.bn2(self.conv2(out)) + x)


@pytest.mark.parametrize("forward", [writes_between, writes_through_another])
def test_what_such_a_function_may_write_to_is_kept_in_order(forward):
    model = settled(type("Writing", (Layers,), {"forward": forward})()).eval()
    stock = copy.deepcopy(model)
    patch(model)
    with torch.no_grad():
        ours, theirs = model(images()), stock(images())
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


# -- convolutions with a forward of their own --------------------------------------------------------------------------


class PaddedConv(nn.Conv2d):
    """Pads by itself, as the ports of TensorFlow's networks do."""

    def forward(self, x):
        return F.conv2d(pad_to_even(x), self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class StandardizedConv(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight - self.weight.mean(), self.bias, padding=self.padding)


class WiderConv(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight, self.bias, self.stride, 1, self.dilation, self.groups)


def own_conv(cls: type[nn.Conv2d], **options) -> Layers:
    model = Layers()
    model.conv1 = cls(4, 4, 3, padding=1, **options)
    return model


@pytest.mark.parametrize("bias", [False, True])
def test_the_convolution_behind_a_padding_of_its_own(bias):
    class Block(Layers):
        def forward(self, x):
            return torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))

    model = Block()
    model.conv1 = PaddedConv(4, 4, 3, padding=1, bias=bias)
    report = check_patched(model, images(size=5))
    assert report.coverage == 1.0
    assert [site.pattern for site in report.fused] == ["conv-bn-relu x 2"]
    assert "self.conv1.weight" not in report.source("")


def test_a_convolution_with_other_weights_or_settings_is_left():
    for cls, coverage in ((StandardizedConv, 0.5), (WiderConv, 1.0)):
        assert check_patched(own_conv(cls)).coverage == coverage
    model = own_conv(WiderConv)
    model.conv1.padding = (2, 2)
    report = check_patched(model)
    assert report.coverage == 0.5
    assert "which has a forward of its own" in report.declined[0].reason


def test_changes_of_a_convolution_with_a_forward_of_its_own():
    model = settled(own_conv(PaddedConv)).eval()
    stock = copy.deepcopy(model)
    assert patch(model).coverage == 1.0
    seen = []
    for m in (model, stock):
        m.conv1.padding = (2, 2)
        m.conv1.register_forward_hook(lambda *_: seen.append(1))
        m.conv2.padding = (0, 0)
    torch.testing.assert_close(model(images()), stock(images()), rtol=1e-9, atol=1e-11)
    assert len(seen) == 2


def test_it_runs_as_it_is_where_the_engine_does_not():
    model = settled(own_conv(PaddedConv)).eval()
    expected = model(images())
    patch(model)
    ours = torch.func.functional_call(model, {}, (images(),))
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(torch.func.vmap(model)(images()[None])[0], expected, rtol=1e-9, atol=1e-11)


def test_small_inputs_are_padded_once(monkeypatch):
    class Chain(Layers):
        def forward(self, x):
            return torch.relu(self.bn1(self.conv1(x)))

    model = Chain()
    model.conv1 = PaddedConv(4, 4, 3)
    settled(model).eval()
    expected = model(images(size=5))
    patch(model)
    for mode in select.FEWEST_ELEMENTS:
        monkeypatch.setitem(select.FEWEST_ELEMENTS, mode, 10**9)
    torch.testing.assert_close(model(images(size=5)), expected, rtol=1e-9, atol=1e-11)
