"""The recorder itself: it takes what each recorded version takes, and catches the mistakes that it is there for."""

from __future__ import annotations

import numpy as np
import pytest

from tests.tensorrt.reached import REFRESH
from tests.tensorrt.recorder import PRODUCTS, Absent, Recorder, Refused


@pytest.fixture(params=PRODUCTS)
def recorder(request: pytest.FixtureRequest) -> Recorder:
    return Recorder(request.param)


def listener(recorder: Recorder):
    trt = recorder.module

    class Listener(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.said: list[str] = []

        def log(self, severity, message):
            self.said.append(message)

    return Listener()


def network(recorder: Recorder):
    trt = recorder.module
    builder = trt.Builder(listener(recorder))
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    return builder, builder.create_network(flags), builder.create_builder_config()


def test_a_network_is_built_as_in_the_real_module(recorder):
    trt = recorder.module
    builder, net, config = network(recorder)
    assert trt.OnnxParser(net, listener(recorder)).parse_from_file("text.onnx") is True
    profile = builder.create_optimization_profile()
    profile.set_shape("x", (1, 64), trt.Dims([1, 64]), (512, 64))
    config.add_optimization_profile(profile)
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, 1 << 30)
    config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    config.create_timing_cache(np.zeros(4, np.uint8))
    plan = recorder.make("IHostMemory")
    plan.extend(b"plan")
    recorder.answer("Builder.build_serialized_network", plan)
    assert bytes(memoryview(builder.build_serialized_network(net, config))) == b"plan"
    (call,) = recorder.named("IBuilderConfig.set_flag")
    assert (call.on, call.arguments) == (config, {"flag": trt.BuilderFlag.WEIGHT_STREAMING})
    assert [call.name for call in recorder.calls][:3] == ["ILogger", "Builder", "Builder.create_network"]


@pytest.mark.parametrize(
    ("product", "other"),
    [
        ("tensorrt_11", lambda trt: trt.BuilderFlag.FP16),
        ("tensorrt_11", lambda trt: trt.ComputeCapability),
        ("tensorrt_10", lambda trt: trt.CudaGraphStrategy),
        ("tensorrt_10", lambda trt: trt.IBuilderConfig.set_compute_capability),
        ("tensorrt_11", lambda trt: trt.IExecutionContext.is_stream_capturable),
        ("tensorrt_rtx_1", lambda trt: trt.QuickPluginCreationRequest),
        ("tensorrt_10", lambda trt: trt.Biulder),
        ("tensorrt_11", lambda trt: trt.DataType.FP17),
    ],
)
def test_what_a_version_lacks_is_told(product, other):
    with pytest.raises(AttributeError):
        other(Recorder(product).module)


def test_what_only_one_product_has():
    assert Recorder("tensorrt_rtx_1").module.ComputeCapability.SM89.name == "SM89"
    assert Recorder("tensorrt_rtx_1").module.CudaGraphStrategy.DISABLED.name == "DISABLED"
    assert Recorder("tensorrt_10").module.QuickPluginCreationRequest


@pytest.mark.parametrize(
    ("mistake", "told"),
    [
        (lambda trt, config, engine: config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE), "pool_size missing"),
        (lambda trt, config, engine: config.set_memory_pool_limit(0, 1), "not MemoryPoolType"),
        (lambda trt, config, engine: config.set_memory_pool_limit(trt.BuilderFlag.TF32, 1), "not MemoryPoolType"),
        (
            lambda trt, config, engine: config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, 1.5),
            r"pool_size is 1.5 \(float\), not SupportsInt",
        ),
        (lambda trt, config, engine: config.set_flag(trt.BuilderFlag.TF32, 1), "2 arguments are too many"),
        (lambda trt, config, engine: config.set_flag(trt.BuilderFlag.TF32, flag=1), "'flag' is given twice"),
        (lambda trt, config, engine: config.set_flag(flag=trt.BuilderFlag.TF32, on=1), "no argument 'on'"),
        (lambda trt, config, engine: config.add_optimization_profile(None), "profile is None"),
        (lambda trt, config, engine: config.create_timing_cache("none"), "not Buffer"),
        (lambda trt, config, engine: config.set_timing_cache(config.create_timing_cache(b""), 1), "not bool"),
        (lambda trt, config, engine: engine.get_tensor_mode(3), "name is 3"),
        (lambda trt, config, engine: engine.create_execution_context("static"), "not ExecutionContextAllocation"),
        (lambda trt, config, engine: trt.Dims([1, "many"]), "holds one that is 'many'"),
        (lambda trt, config, engine: trt.Dims(4), "not Sequence"),
        (lambda trt, config, engine: trt.Runtime("log"), "not ILogger"),
        (lambda trt, config, engine: trt.INetworkDefinition(), "no constructor"),
    ],
)
def test_a_wrong_call_is_refused_with_what_is_wrong(recorder, mistake, told):
    _, _, config = network(recorder)
    with pytest.raises(Refused, match=told):
        mistake(recorder.module, config, recorder.make("ICudaEngine"))


def test_a_call_is_held_against_every_form_of_the_function(recorder):
    context = recorder.make("IExecutionContext")
    for shape in ((1, 2), [1, 2], recorder.module.Dims([1, 2])):
        assert context.set_input_shape("x", shape) is True
    with pytest.raises(Refused, match=r"not tuple \| .*not list \| .*not Dims"):
        context.set_input_shape("x", 3)


def test_attributes_are_those_of_the_class(recorder):
    _, _, config = network(recorder)
    verbosity = recorder.module.ProfilingVerbosity.DETAILED
    config.profiling_verbosity = verbosity
    assert config.profiling_verbosity == verbosity
    with pytest.raises(Absent, match=f"no profiling_verbosty to set.*{REFRESH}"):
        config.profiling_verbosty = verbosity
    with pytest.raises(Absent, match=f"no optimization_levels.*{REFRESH}"):
        _ = config.optimization_levels
    with pytest.raises(Refused, match="not ProfilingVerbosity"):
        config.profiling_verbosity = "high"
    with pytest.raises(Absent, match="num_io_tensors cannot be set"):
        recorder.make("ICudaEngine").num_io_tensors = 4


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
        Recorder("tensorrt_11").answer("IExecutionContext.is_stream_capturable", True)
    with pytest.raises(AssertionError, match="not in cuda"):
        Recorder("cuda_13").answer("cudaMallocs", 0)
