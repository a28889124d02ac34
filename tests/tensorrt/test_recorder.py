"""The recorder itself: it takes what each recorded version takes, and catches the mistakes that it is there for."""

from __future__ import annotations

import numpy as np
import pytest

from tests.tensorrt.recorder import PRODUCTS, Absent, Recorder, Refused

BOTH = ("tensorrt_10", "tensorrt_11")


@pytest.fixture(params=PRODUCTS)
def recorder(request: pytest.FixtureRequest) -> Recorder:
    return Recorder(request.param)


def network(recorder: Recorder):
    trt = recorder.module
    builder = trt.Builder(trt.Logger(trt.Logger.WARNING))
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    return builder, builder.create_network(flags), builder.create_builder_config()


def test_a_network_is_built_as_in_the_real_module(recorder):
    trt = recorder.module
    builder, net, config = network(recorder)
    x = net.add_input("x", trt.float16, (-1, 64))
    layer = net.add_elementwise(x, x, trt.ElementWiseOperation.SUM)
    net.mark_output(layer.get_output(0))
    profile = builder.create_optimization_profile()
    profile.set_shape("x", (1, 64), (1, 64), (512, 64))
    config.add_optimization_profile(profile)
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, 1 << 30)
    config.set_flag(trt.BuilderFlag.STRIP_PLAN)
    plan = recorder.make("IHostMemory")
    plan.extend(b"plan")
    recorder.answer("Builder.build_serialized_network", plan)
    assert bytes(memoryview(builder.build_serialized_network(net, config))) == b"plan"
    (call,) = recorder.named("INetworkDefinition.add_elementwise")
    assert call.arguments == {"input1": x, "input2": x, "op": trt.ElementWiseOperation.SUM}
    assert [call.name for call in recorder.calls][:3] == ["Logger", "Builder", "Builder.create_network"]


@pytest.mark.parametrize(
    ("product", "old"),
    [
        ("tensorrt_11", lambda trt: trt.BuilderFlag.FP16),
        ("tensorrt_rtx_1", lambda trt: trt.BuilderFlag.FP16),
        ("tensorrt_11", lambda trt: trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH),
        ("tensorrt_11", lambda trt: trt.IInt8EntropyCalibrator2),
        ("tensorrt_10", lambda trt: trt.CausalMaskKind),
        ("tensorrt_10", lambda trt: trt.INetworkDefinition.add_attention_v2),
        ("tensorrt_10", lambda trt: trt.Refitter.release_refit_resources),
        ("tensorrt_11", lambda trt: trt.Runtime.get_engine_validity),
        ("tensorrt_rtx_1", lambda trt: trt.INetworkDefinition.add_plugin_v3),
        ("tensorrt_10", lambda trt: trt.ComputeCapability),
        ("tensorrt_10", lambda trt: trt.Biulder),
        ("tensorrt_11", lambda trt: trt.DataType.FP17),
    ],
)
def test_what_a_version_lacks_is_told(product, old):
    with pytest.raises(AttributeError):
        old(Recorder(product).module)


def test_what_only_one_major_has():
    assert int(Recorder("tensorrt_10").module.BuilderFlag.FP16) == 0
    assert Recorder("tensorrt_11").module.CausalMaskKind.LOWER_RIGHT.name == "LOWER_RIGHT"
    assert Recorder("tensorrt_rtx_1").module.ComputeCapability.SM89.name == "SM89"


@pytest.mark.parametrize(
    ("mistake", "told"),
    [
        (
            lambda trt, net, x: net.add_elementwise(x, 3, trt.ElementWiseOperation.SUM),
            r"input2 is 3 \(int\), not ITensor",
        ),
        (lambda trt, net, x: net.add_elementwise(x, None, trt.ElementWiseOperation.SUM), "input2 is None"),
        (lambda trt, net, x: net.add_elementwise(x, x), "op missing"),
        (lambda trt, net, x: net.add_elementwise(x, x, trt.UnaryOperation.EXP), "not ElementWiseOperation"),
        (lambda trt, net, x: net.add_elementwise(x, x, 0), "not ElementWiseOperation"),
        (lambda trt, net, x: net.add_elementwise(x, x, op=trt.ElementWiseOperation.SUM, axis=1), "no argument 'axis'"),
        (lambda trt, net, x: net.add_concatenation([x, 5]), "holds one that is 5"),
        (lambda trt, net, x: net.add_input("y", "float16", (1,)), "dtype is 'float16'"),
        (lambda trt, net, x: net.add_input("y", trt.float16, 4), "not Dims"),
        (lambda trt, net, x: net.add_constant((2,), [1.0, 2.0]), "not Weights"),
        (lambda trt, net, x: net.mark_output(net.add_identity(x)), "not ITensor"),
        (lambda trt, net, x: trt.Runtime("log"), "not ILogger"),
        (lambda trt, net, x: trt.INetworkDefinition(), "no constructor"),
        (lambda trt, net, x: net.get_layer(1.5), "not SupportsInt"),
    ],
)
def test_a_wrong_call_is_refused_with_what_is_wrong(recorder, mistake, told):
    _, net, _ = network(recorder)
    x = net.add_input("x", recorder.module.float32, (1, 4))
    with pytest.raises(Refused, match=told):
        mistake(recorder.module, net, x)


def test_arrays_become_weights_as_pybind_does_it(recorder):
    _, net, _ = network(recorder)
    net.add_constant((2,), np.ones(2, np.float32))
    net.add_constant(recorder.module.Dims([2]), recorder.module.Weights(np.ones(2, np.float32)))


def test_attributes_are_those_of_the_class(recorder):
    _, _, config = network(recorder)
    config.builder_optimization_level = 3
    assert config.builder_optimization_level == 3
    with pytest.raises(Absent, match="no builder_optimisation_level to set"):
        config.builder_optimisation_level = 3
    with pytest.raises(Absent, match="no optimization_levels"):
        _ = config.optimization_levels
    with pytest.raises(Refused, match="not SupportsInt"):
        config.builder_optimization_level = "high"
    with pytest.raises(Absent, match="num_layers cannot be set"):
        recorder.make("ICudaEngine").num_layers = 4


def test_classes_to_fill_in_are_checked(recorder):
    trt = recorder.module

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.done: list[str] = []

        def phase_start(self, phase_name, parent_phase, num_steps):
            self.done.append(phase_name)

        def phase_finish(self, phase_name):
            pass

        def step_complete(self, phase_name, step):
            return True

    _, _, config = network(recorder)
    config.progress_monitor = Monitor()
    with pytest.raises(Absent, match="no method phase_begin"):

        class Misspelt(trt.IProgressMonitor):
            def phase_begin(self, phase_name, parent_phase, num_steps):
                pass

    with pytest.raises(Refused, match="not 1 arguments"):

        class Short(trt.IProgressMonitor):
            def step_complete(self, phase_name):
                return True


def test_answers_must_be_of_the_version():
    with pytest.raises(AssertionError, match="not in tensorrt"):
        Recorder("tensorrt_10").answer("Refitter.release_refit_resources", True)
    with pytest.raises(AssertionError, match="not in tensorrt"):
        Recorder("tensorrt_11").make("ITensor", dynamic_range=1)


@pytest.mark.parametrize("product", BOTH)
def test_causal_attention_of_both_majors(product):
    _, net, _ = network(recorder := Recorder(product))
    trt = recorder.module
    x = net.add_input("x", trt.float16, (1, 2, 4, 8))
    if product == "tensorrt_11":
        net.add_attention_v2(x, x, x, trt.AttentionNormalizationOp.SOFTMAX, trt.CausalMaskKind.LOWER_RIGHT)
    net.add_attention(x, x, x, trt.AttentionNormalizationOp.SOFTMAX, False)
    with pytest.raises(Refused, match="causal"):
        net.add_attention(x, x, x, trt.AttentionNormalizationOp.SOFTMAX, 2)
