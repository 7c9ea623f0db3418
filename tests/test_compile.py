"""Under torch.compile: a scale that changes recompiles nothing, and the compiled step executes it.

torch's optimizers break the graph at their own boundary: the step hooks run outside of the one graph that a step is,
in eager mode, compiled or not. What is compiled here mostly runs on a backend that counts graphs and interprets them,
so that a test takes a second; one real inductor run is among the slow tests.
"""

import contextlib
import shutil
import warnings

import pytest
import torch
import torch._dynamo as dynamo
from torch._dynamo.utils import counters

from lbw_rl import Action, Authority, Controller, Directive, Governor

WIDE = Authority(lr_scale=(1e-3, 100.0), momentum_scale=(0.5, 2.0), slew_up=1e6)
STEPS = 8
SCALES = [1.0, 0.5, 0.25, 2.0, 0.125, 3.0, 1.5, 0.75]


class Scripted(Controller):
    """Proposes the given learning-rate scales (or actions) in order, then leaves the run alone."""

    name = "scripted"

    def __init__(self, *script):
        self.script, self.seen = list(script), []

    def reset(self, context):
        pass

    def act(self, telemetry):
        self.seen.append(telemetry)
        proposed = self.script.pop(0) if self.script else 1.0
        return proposed if isinstance(proposed, Action) else Action(lr_scale=proposed)


class Counting:
    """A compiler backend that counts the graphs it is given and runs them as they are."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def _fresh_compiler():
    dynamo.reset()
    counters.clear()
    yield
    dynamo.reset()


def make_model():
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(8, 12), torch.nn.Tanh(), torch.nn.Linear(12, 3))


def backward(model, step):
    model.zero_grad()
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
    model(x).square().mean().backward()


COMPILED = {
    "function": lambda optimizer, backend: torch.compile(lambda: optimizer.step(), backend=backend),
    "method": lambda optimizer, backend: torch.compile(optimizer.step, backend=backend),
}

OPTIMIZERS = {
    "adamw": lambda groups, lr: torch.optim.AdamW(groups, lr=lr),
    "adamw-capturable": lambda groups, lr: torch.optim.AdamW(groups, lr=lr, capturable=True),
    "adamw-foreach": lambda groups, lr: torch.optim.AdamW(groups, lr=lr, foreach=True, capturable=True),
    "sgd": lambda groups, lr: torch.optim.SGD(groups, lr=lr, momentum=0.9),
}


class Run:
    """A loop with a compiled step, governed, scaled by hand, or left alone."""

    def __init__(self, optimizer, how, controller=None, by_hand=None, lr=0.01, tensor=True, backend=None, groups=1):
        dynamo.reset()  # what one run compiled must not serve the next
        self.model = make_model()
        layers = [self.model] if groups == 1 else [self.model[0], self.model[2]]
        parameters = [{"params": list(layer.parameters())} for layer in layers]
        self.optimizer = OPTIMIZERS[optimizer](parameters, torch.tensor(lr) if tensor else lr)
        self.governor = Governor(self.optimizer, controller, authority=WIDE) if controller is not None else None
        self.backend = backend or Counting()
        self.step = COMPILED[how](self.optimizer, self.backend) if how else self.optimizer.step
        self.by_hand = by_hand
        self.graphs = []  # compiled so far, after each step

    def advance(self, steps=STEPS):
        for step in range(steps):
            backward(self.model, step)
            lr = self.optimizer.param_groups[0]["lr"]
            if self.by_hand is not None:
                self.scale_by_hand(self.by_hand[step])
            with quiet():
                self.step()
            if self.by_hand is not None:
                self.restore(lr)
            self.graphs.append(getattr(self.backend, "graphs", None))
        return self

    def scale_by_hand(self, scale):
        lr = self.optimizer.param_groups[0]["lr"]  # one tensor for all groups
        if isinstance(lr, torch.Tensor):
            self.base = lr.clone()
            lr.mul_(scale)
        else:
            for group in self.optimizer.param_groups:
                group["lr"] = lr * scale

    def restore(self, lr):
        if isinstance(lr, torch.Tensor):
            lr.copy_(self.base)
        else:
            for group in self.optimizer.param_groups:
                group["lr"] = lr

    def weights(self):
        return [p.detach().clone() for p in self.model.parameters()]


@contextlib.contextmanager
def quiet():
    """Dynamo's notes on profiler functions and on a capturable CPU optimizer are none of our business."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.weights(), b.weights(), strict=True))


def close(a, b):
    for x, y in zip(a.weights(), b.weights(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


HOW = pytest.mark.parametrize("how", COMPILED)


# ---- the optimizer's step is compiled


@HOW
@pytest.mark.parametrize(("optimizer", "groups"), [(name, 2) for name in OPTIMIZERS] + [("adamw", 1)])
def test_a_tensor_rate_that_changes_at_every_step_recompiles_nothing(optimizer, how, groups):
    """As many graphs as without governor; weights equal those of a compiled loop that scales by hand, bit for bit,
    and those of an eager one but for rounding. Two groups share one tensor, as torch hands it out."""
    governed = Run(optimizer, how, Scripted(*SCALES), groups=groups).advance()
    by_hand = Run(optimizer, how, by_hand=SCALES, groups=groups).advance()
    # SGD is compiled again at its second step, governed or not: its momentum buffers have come into being.
    expected = [1] + [2] * (STEPS - 1) if optimizer == "sgd" else [1] * STEPS
    assert governed.graphs == by_hand.graphs == expected
    assert same(governed, by_hand)
    if "capturable" not in optimizer and "foreach" not in optimizer:  # which a CPU runs compiled only
        close(governed, Run(optimizer, None, by_hand=SCALES, groups=groups).advance())
    assert [float(g["lr"]) for g in governed.optimizer.param_groups] == pytest.approx([0.01] * groups, rel=1e-7)
    assert governed.governor.summary()["faults"] == {}
    assert governed.governor.step == STEPS


@HOW
@pytest.mark.parametrize("tensor", [True, False], ids=["tensor", "float"])
def test_an_idle_governor_leaves_every_bit_of_a_compiled_step_and_adds_no_graph(how, tensor):
    plain = Run("adamw", how, tensor=tensor).advance()
    idle = Run("adamw", how, "constant", tensor=tensor).advance()
    assert same(idle, plain)
    assert idle.graphs == plain.graphs == [1] * STEPS
    assert idle.governor.summary()["faults"] == {}


@HOW
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_float_rate_that_changes_recompiles_once_and_computes_right(optimizer, how):
    """Dynamo bakes the first rate in; at the second it compiles the rate as an input, as it does without governor."""
    governed = Run(optimizer, how, Scripted(*SCALES), tensor=False).advance()
    by_hand = Run(optimizer, how, by_hand=SCALES, tensor=False).advance()
    # Its momentum buffers make SGD compile again at the second step anyway: two reasons, one compilation.
    assert governed.graphs == by_hand.graphs == [1] + [2] * (STEPS - 1)
    assert same(governed, by_hand)
    close(governed, Run(optimizer, None, by_hand=SCALES, tensor=False).advance())
    assert governed.optimizer.param_groups[0]["lr"] == 0.01
    assert governed.governor.summary()["faults"] == {}


@HOW
def test_hooks_stay_out_of_the_graph_and_break_it_nowhere_within(how):
    """Graph breaks: none inside the update. Those at the optimizer's boundary are torch's own, or the hook's call
    there; what governance does (host transfers, numpy, clocks) dynamo never sees."""
    run = Run("adamw", how, Scripted(*SCALES)).advance()
    assert run.graphs[-1] == 1
    reasons = " ".join(counters["graph_break"])
    for traced in ("lbw_rl/probe.py", "lbw_rl/observer.py", "perf_counter", "sys._getframe", "Tensor.item"):
        assert traced not in reasons
    assert sum(counters["graph_break"].values()) <= 2


@HOW
def test_telemetry_of_a_compiled_step_is_that_of_an_eager_one(how):
    compiled, eager = Scripted(*SCALES), Scripted(*SCALES)
    Run("adamw", how, compiled).advance()
    Run("adamw", None, eager).advance()
    for a, b in zip(compiled.seen, eager.seen, strict=True):
        for name in ("grad_norm", "update_ratio", "grad_cosine", "grad_entropy", "surprise", "weight_rms"):
            assert getattr(a, name) == pytest.approx(getattr(b, name), rel=1e-3, nan_ok=True)
        assert (a.lr_scale, a.step) == (b.lr_scale, b.step)


@HOW
@pytest.mark.parametrize("tensor", [True, False], ids=["tensor", "float"])
def test_a_skip_of_a_compiled_step_changes_nothing(how, tensor):
    """Withheld gradients are another graph (of nothing); the steps after run the first one again."""
    script = [1.0, 1.0, Action(directive=Directive.SKIP), 1.0]
    run = Run("adamw", how, Scripted(*script), tensor=tensor).advance(2)
    before = run.weights()
    backward(run.model, 7)
    with quiet():
        run.step()
    assert all(torch.equal(a, b) for a, b in zip(run.weights(), before, strict=True))
    assert all(p.grad is not None for p in run.model.parameters())
    graphs = run.backend.graphs
    backward(run.model, 8)
    with quiet():
        run.step()
    assert not all(torch.equal(a, b) for a, b in zip(run.weights(), before, strict=True))
    assert run.backend.graphs == graphs
    assert run.governor.summary()["skips"] == 1
    assert run.governor.summary()["faults"] == {}


@HOW
def test_a_scheduler_drives_a_compiled_governed_step_without_recompiling(how):
    """The recipe of torch's documentation: a tensor rate, filled in place by the scheduler."""

    def scheduled(controller):
        run = Run("adamw", how, controller)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(run.optimizer, T_max=STEPS)
        rates = []
        for step in range(STEPS):
            rates.append(float(run.optimizer.param_groups[0]["lr"]))
            backward(run.model, step)
            with quiet():
                run.step()
                scheduler.step()
        return rates, run.backend.graphs

    plain = scheduled(None)
    assert scheduled(Scripted(*SCALES)) == plain
    assert plain[1] == 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None and shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@HOW
def test_inductor_executes_the_scale_without_recompiling(how):
    """The same on the real compiler: one frame compiled, whatever the rate does, equal to eager but for rounding."""
    from torch._dynamo.testing import CompileCounterWithBackend

    def run(controller=None, by_hand=None):
        backend = CompileCounterWithBackend("inductor")
        return Run("adamw", how, controller, by_hand, backend=backend).advance(), backend.frame_count

    governed, frames = run(Scripted(*SCALES))
    assert frames == 1
    by_hand, _ = run(by_hand=SCALES)
    assert same(governed, by_hand)
    close(governed, Run("adamw", None, by_hand=SCALES).advance())
    assert governed.governor.summary()["faults"] == {}


# ---- the model is compiled


@pytest.fixture
def make_llama():
    transformers = pytest.importorskip("transformers", reason="needs the extra lbw-rl[hf]")
    config = transformers.LlamaConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
    )

    def make():
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config).train()

    return make


def train_lm(model, optimizer, governed_model=None, micro_batches=1, steps=4):
    """Returns the controller of a governed loop and each step's mean loss."""
    controller, losses = Scripted(*SCALES), []
    governor = None
    if governed_model is not None:
        governor = Governor(optimizer, controller, model=governed_model, authority=WIDE)
    for step in range(steps):
        total = 0.0
        for micro in range(micro_batches):
            ids = torch.randint(48, (2, 8), generator=torch.Generator().manual_seed(100 * step + micro))
            loss = model(input_ids=ids, labels=ids).loss
            (loss / micro_batches).backward()
            total += loss.item() / micro_batches
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    if governor is not None:
        assert governor.summary()["faults"] == {}
        governor.close()
    return controller, losses


@pytest.mark.parametrize("given", ["compiled", "original", "compiled-in-place"])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_a_compiled_model_tells_its_loss_and_tokens_in_one_graph(given, micro_batches, make_llama):
    """Governor(model=…) takes the compiled model or the one that it was compiled from; neither is compiled anew."""
    model, backend = make_llama(), Counting()
    if given == "compiled-in-place":
        model.compile(backend=backend)
        compiled = model
    else:
        compiled = torch.compile(model, backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with quiet():
        controller, losses = train_lm(compiled, optimizer, model if given == "original" else compiled, micro_batches)
    assert backend.graphs == 1  # as many as without governor
    assert counters["graph_break"] == {}
    assert [t.loss for t in controller.seen] == pytest.approx(losses, rel=1e-6)
    tokens = [t.tokens_per_second * t.step_seconds for t in controller.seen[1:]]
    assert tokens == pytest.approx([16 * micro_batches] * 3)


def test_governing_a_compiled_model_trains_as_governing_the_eager_one(make_llama):
    """Same losses, same actions: a backend that interprets the graph gives the same numbers."""
    losses = {}
    for compiled in (False, True):
        model = make_llama()
        run = torch.compile(model, backend=Counting()) if compiled else model
        with quiet():
            _, losses[compiled] = train_lm(run, torch.optim.AdamW(model.parameters(), lr=0.05), run)
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)


def test_a_model_compiled_before_the_governor_came_is_heard_all_the_same(make_llama):
    """Dynamo need not notice hooks on a module that it has compiled: ours hangs where it runs outside the graph."""
    for late in ("compiled", "original"):
        model, backend = make_llama(), Counting()
        compiled = torch.compile(model, backend=backend)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with quiet():
            train_lm(compiled, optimizer, steps=2)
            controller, losses = train_lm(compiled, optimizer, compiled if late == "compiled" else model)
        assert [t.loss for t in controller.seen] == pytest.approx(losses, rel=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None and shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_everything_compiled_with_inductor_is_governed(make_llama):
    """Model and step on the real compiler at once: the loss is read, the scale is executed."""
    losses = {}
    for compiled in (False, True):
        model = make_llama()
        optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.02))
        run = torch.compile(model) if compiled else model
        controller = Scripted(*SCALES)
        with Governor(optimizer, controller, model=run, authority=WIDE) as governor, quiet():
            step = torch.compile(optimizer.step) if compiled else optimizer.step
            losses[compiled] = []
            for i in range(4):
                ids = torch.randint(48, (2, 8), generator=torch.Generator().manual_seed(i))
                loss = run(input_ids=ids, labels=ids).loss
                loss.backward()
                step()
                optimizer.zero_grad()
                losses[compiled].append(loss.item())
        assert [t.loss for t in controller.seen] == pytest.approx(losses[compiled], rel=1e-6)
        assert governor.summary()["faults"] == {}
    assert losses[True] == pytest.approx(losses[False], rel=1e-3)
