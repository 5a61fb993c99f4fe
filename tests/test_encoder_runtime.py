"""The execution options of the encoder compared with the defaults, and FP8 layers with float64 arithmetic."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from fasttrain import encoder_runtime
from fasttrain.backbones import load_backbone
from fasttrain.cuda_graph import CapturedCall
from fasttrain.encoder_runtime import (
    COMPILE_OPTIONS,
    FLOAT8_MARGIN,
    GPU_OPTIONS,
    LARGEST,
    EncoderRuntime,
    Float8Linear,
    GeluLinear,
    float8_scale,
    fold_layer_scale,
    fuse_gelu,
    quantize,
    use_float8,
)
from fasttrain.normalization import IMAGENET_MEAN, IMAGENET_STD, Triple
from fasttrain.recipe import EncoderRecipe

CPU = torch.device("cpu")
TINY: dict[str, Any] = {"image_size": 64, "patch_size": 16, "embed_dim": 128, "depth": 2, "num_heads": 2}
# The relative rounding error of e4m3, which stores three bits of the mantissa.
E4M3_ROUNDING = 2.0**-4


def views(
    dtype: torch.dtype = torch.float32, name: str = "dinov2", device: torch.device = CPU, **options: Any
) -> Tensor:
    encoder = load_backbone(name, **TINY)
    runtime = EncoderRuntime(encoder, EncoderRecipe(**options), dtype=dtype, device=device)
    frames = torch.randn(3, 3, 3, 64, 64, generator=torch.Generator().manual_seed(0)).to(device)
    positions = encoder.asymmetric_positions(offset=(3, 5))
    if runtime.awaits_calibration:
        runtime.quantise(runtime.calibrate(frames, positions))
    return runtime.training_views(frames, positions)


def relative_error(value: Tensor, expected: Tensor) -> float:
    return ((value.double() - expected.double()).norm() / expected.double().norm()).item()


# In float32, the options only change the order of sums.
@pytest.mark.parametrize("name", ["dinov2", "ijepa"])
@pytest.mark.parametrize(
    "options",
    [
        {"batch_views": False},
        {"chunk": 2},
        {"chunk": 1},
        {"cast_weights": False},
        {"attention": "math"},
        {"attention": "flash"},
    ],
    ids=str,
)
def test_options_do_not_change_the_tokens(name: str, options: dict[str, Any]) -> None:
    tokens = views(name=name, **options)
    assert tokens.shape == (3, 4, 16, 128)
    assert relative_error(tokens, views(name=name, compile="none")) < 1e-6


@pytest.mark.parametrize(
    ("device", "dtype", "options"),
    [
        ("cpu", torch.float32, {}),
        ("cpu", torch.float32, {"chunk": 2}),
        ("cpu", torch.float32, {"batch_views": False}),
        ("cpu", torch.float32, {"compile": "default"}),
        ("cpu", torch.bfloat16, {}),
        ("cpu", torch.bfloat16, {"cast_weights": False}),
        pytest.param("cuda", torch.bfloat16, {}, marks=pytest.mark.gpu),
    ],
    ids=str,
)
def test_the_encoder_receives_frames_with_its_own_mean_and_std(
    device: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    mean, std = (0.5, 0.4, 0.6), (0.5, 0.25, 0.3)
    pixels = torch.randint(256, (2, 3, 3, 64, 64), generator=torch.Generator().manual_seed(0)) / 255

    def normalised(mean: Triple, std: Triple) -> Tensor:
        return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)

    # One block is enough.
    tiny = TINY | {"depth": 1}
    exact = load_backbone("dino", **tiny, mean=mean, std=std)
    expected = exact.training_views(normalised(mean, std), exact.asymmetric_positions(offset=(3, 5)))
    encoder = load_backbone("dino", **tiny, mean=mean, std=std)
    runtime = EncoderRuntime(encoder, EncoderRecipe(**options), dtype=dtype, device=torch.device(device))
    frames = normalised(IMAGENET_MEAN, IMAGENET_STD).to(device)
    positions, encode = encoder.asymmetric_positions(offset=(3, 5)), runtime.training_views
    if device == "cuda":
        encode = CapturedCall(encode, (torch.zeros_like(frames), positions))
    tokens = encode(frames, positions).cpu()
    assert tokens.dtype == dtype
    assert relative_error(tokens, expected) < (1e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps)


def test_frames_are_not_copied_for_an_encoder_with_the_mean_and_std_of_imagenet(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoder, frames = load_backbone("dino", **TINY), torch.randn(2, 3, 3, 64, 64)
    assert (encoder.mean, encoder.std) == (IMAGENET_MEAN, IMAGENET_STD)
    received: list[Tensor] = []
    monkeypatch.setattr(encoder, "training_views", lambda frames, _: received.append(frames) or frames)
    EncoderRuntime(encoder, EncoderRecipe(), dtype=torch.float32, device=CPU).training_views(frames, frames)
    assert received[0] is frames


@pytest.mark.usefixtures("no_code_generation")
def test_several_kinds_of_encoders_are_compiled_in_one_process() -> None:
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        for name in ("dinov2", "ijepa"):
            assert relative_error(views(name=name, compile="default"), views(name=name)) < 1e-6


@pytest.mark.parametrize(
    ("dtype", "options", "image_size", "fused"),
    [
        (torch.bfloat16, {}, 64, False),
        (torch.bfloat16, {}, 256, True),
        (torch.float32, {}, 64, True),
        (torch.bfloat16, {"attention": "flash"}, 64, True),
    ],
)
def test_attention_is_unfused_on_a_cpu_for_few_tokens_in_half_precision(
    dtype: torch.dtype, options: dict[str, Any], image_size: int, fused: bool
) -> None:
    """A kernel that the recipe selects takes precedence."""
    encoder = load_backbone("dino", **(TINY | {"image_size": image_size}))
    runtime = EncoderRuntime(encoder, EncoderRecipe(**options), dtype=dtype, device=CPU)
    assert all(block.attn.fused_attn == fused for block in encoder.blocks)
    assert not runtime.compiled


def test_options_do_not_increase_rounding_errors() -> None:
    exact = views()
    unfused, fused = views(torch.bfloat16), views(torch.bfloat16, attention="flash")
    autocast = views(torch.bfloat16, cast_weights=False)
    assert unfused.dtype == autocast.dtype == torch.bfloat16
    assert relative_error(unfused, exact) < 2 * relative_error(fused, exact)
    # Autocast keeps norms and the residual stream in float32, so it must not be less accurate.
    assert relative_error(autocast, exact) <= 1.1 * relative_error(unfused, exact)
    assert relative_error(unfused, exact) < 4 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("mode", list(COMPILE_OPTIONS))
def test_the_installed_pytorch_knows_the_options_of_the_compiler(mode: str) -> None:
    encoder_runtime.compile_fixed(lambda frames, _: frames, COMPILE_OPTIONS[mode] | GPU_OPTIONS)


def test_each_attention_kernel_has_its_own_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile does not guard on a kernel that is selected outside of the compiled function."""
    programs: list[torch.fx.GraphModule] = []

    def record(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        programs.append(graph)
        return graph.forward

    monkeypatch.setattr(
        encoder_runtime,
        "compile_fixed",
        lambda function, options: torch.compile(function, backend=record, dynamic=False),
    )
    counts = []
    for attention in ("math", "flash", "math", "auto"):
        views(compile="default", attention=attention)
        counts.append(len(programs))
    assert counts == [1, 2, 2, 3]


@pytest.mark.parametrize("name", ["dinov2", "vit_small_patch16_dinov3"])
def test_folding_layer_scale_does_not_change_the_tokens(name: str) -> None:
    encoder = load_backbone(name, **TINY)
    torch.manual_seed(0)
    scales = [p for key, p in encoder.blocks.named_parameters() if "gamma" in key]
    assert len(scales) == 4
    for scale in scales:
        nn.init.uniform_(scale, 0.1, 2)
    images = torch.randn(2, 3, 64, 64)
    expected = encoder.tokens(images)
    fold_layer_scale(encoder.blocks)
    assert not [key for key, _ in encoder.blocks.named_parameters() if "gamma" in key]
    assert relative_error(encoder.tokens(images), expected) < 1e-6


@pytest.mark.parametrize(
    ("name", "options", "count"),
    [("dino", {}, 2), ("mae", {"activation": "gelu_tanh"}, 2), ("clip", {}, 0)],
)
def test_gelu_is_computed_by_the_linear_layer(name: str, options: dict[str, Any], count: int) -> None:
    encoder = load_backbone(name, **TINY, **options)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = encoder.tokens(images)
    fuse_gelu(encoder.blocks)
    assert sum(isinstance(module, GeluLinear) for module in encoder.modules()) == count
    # On a CPU, PyTorch computes the exact GELU in both cases.
    assert relative_error(encoder.tokens(images), expected) < (1e-3 if options else 1e-6)


def test_the_tanh_approximation_of_gelu_is_more_accurate_than_half_precision() -> None:
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    exact, approximate = (
        load_backbone("dino", **TINY, activation=name).tokens(images) for name in ("gelu", "gelu_tanh")
    )
    half = load_backbone("dino", **TINY).bfloat16().tokens(images.bfloat16())
    assert 0 < relative_error(approximate, exact) < 0.1 * relative_error(half, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layers_of_an_encoder_on_a_cpu_are_unchanged(dtype: torch.dtype) -> None:
    encoder = load_backbone("dinov2", **TINY)
    names = [name for name, _ in encoder.named_modules()]
    EncoderRuntime(encoder, EncoderRecipe(), dtype=dtype, device=CPU)
    assert [name for name, _ in encoder.named_modules()] == names


def test_the_error_of_fp8_is_bounded() -> None:
    exact = views()
    error = relative_error(views(torch.bfloat16, precision="fp8"), exact)
    assert relative_error(views(torch.bfloat16), exact) < error < E4M3_ROUNDING


def test_calibration_records_the_largest_input_of_each_layer() -> None:
    encoder = load_backbone("dino", **TINY)
    runtime = EncoderRuntime(encoder, EncoderRecipe(precision="fp8"), dtype=torch.float32, device=CPU)
    frames, positions = torch.randn(2, 2, 3, 64, 64), encoder.asymmetric_positions(offset=(3, 5))
    before = runtime.training_views(frames, positions)
    assert runtime.awaits_calibration
    largest = runtime.calibrate(frames, positions)
    # Calibration alone changes nothing.
    assert torch.equal(runtime.training_views(frames, positions), before)
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert set(largest) == {f"{block}.{layer}" for block in (0, 1) for layer in layers}
    seen = []
    encoder.blocks[1].mlp.fc2.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].abs().max()))
    runtime.training_views(frames, positions)
    assert largest["1.mlp.fc2"] == max(seen).item()
    runtime.quantise(largest)
    assert not runtime.awaits_calibration
    assert isinstance(encoder.blocks[1].mlp.fc2, Float8Linear)


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=8), st.floats(1e-3, 1e4))
def test_the_error_of_quantised_values_is_bounded(numbers: list[float], largest: float) -> None:
    values, scale = torch.tensor(numbers), float8_scale(largest)
    dequantised = quantize(values, scale).double() * scale.double()
    expected = values.double().clamp(-LARGEST * scale.double(), LARGEST * scale.double())
    # Below the smallest normal value, 2^-6, the spacing is a fixed 2^-9 of the scale.
    bound = (expected.abs() * E4M3_ROUNDING).maximum(scale.double() * 2.0**-10) * (1 + 1e-6)
    assert ((dequantised - expected).abs() <= bound).all()


@pytest.mark.parametrize("largest", [0.0, 1e-30, 3e4, 1e30])
def test_the_largest_value_is_exact_at_any_magnitude(largest: float) -> None:
    scale = float8_scale(largest)
    quantised = quantize(torch.full((4,), largest), scale)
    assert torch.allclose(quantised.float() * scale, torch.full((4,), largest), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bias", [True, False])
def test_float8_linear_equals_the_dequantised_product(bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 48, bias=bias)
    tokens = torch.randn(2, 5, 64)
    layer = Float8Linear(linear, tokens.abs().max().item())
    weight = layer.weight_OK.double() * layer.weight_scale.double()
    expected = quantize(tokens, layer.input_scale).double() * layer.input_scale.double() @ weight.t()
    if bias:
        expected += linear.bias.double()
    # The product is returned in bfloat16.
    assert relative_error(layer(tokens), expected) < torch.finfo(torch.bfloat16).eps
    exact = tokens.double() @ linear.weight.double().t() + (linear.bias.double() if bias else 0)
    assert relative_error(layer(tokens), exact) < E4M3_ROUNDING


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pytorch_accepts_the_operands_of_float8_linear_on_a_gpu(dtype: torch.dtype, bias: bool) -> None:
    """On pretended GPU tensors, which pass PyTorch's checks of strides, scales and dtypes."""
    layer = Float8Linear(nn.Linear(64, 48, bias=bias), 1.0)
    with FakeTensorMode():
        buffers = {
            name: torch.empty_strided(buffer.shape, buffer.stride(), dtype=buffer.dtype, device="cuda")
            for name, buffer in layer.named_buffers()
        }
        out = functional_call(layer, buffers, torch.empty(2, 5, 64, dtype=dtype, device="cuda"))
    assert (out.device.type, out.dtype, out.shape) == ("cuda", dtype, (2, 5, 48))


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_float8_linear_on_a_gpu_equals_its_emulation(bias: bool, compiled: bool) -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("FP8 needs compute capability 8.9")
    torch.manual_seed(0)
    layer, tokens = Float8Linear(nn.Linear(768, 3072, bias=bias), 5.0), torch.randn(2, 197, 768).bfloat16()
    expected = layer(tokens)
    layer.cuda()
    out = (torch.compile(layer, dynamic=False) if compiled else layer)(tokens.cuda())
    # The product is returned in bfloat16. Fast accumulation keeps about 14 bits of partial sums.
    assert relative_error(out.cpu(), expected) < torch.finfo(torch.bfloat16).eps


def test_inputs_beyond_the_margin_are_clamped() -> None:
    module = nn.Sequential(nn.Linear(16, 16, bias=False))
    nn.init.eye_(module[0].weight)
    use_float8(module, {"0": 1.0})
    tokens = torch.tensor([0.5, FLOAT8_MARGIN, 100 * FLOAT8_MARGIN, 0.0]).repeat(2, 4)
    tokens[1, 3] = float("nan")
    out = module(tokens)
    assert out[0, :4].tolist() == [0.5, FLOAT8_MARGIN, FLOAT8_MARGIN, 0.0]
    # A NaN is not hidden.
    assert out[1].isnan().all()


def test_only_calibrated_layers_whose_sizes_are_multiples_of_16_are_replaced() -> None:
    module = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 10), nn.Linear(16, 16))
    use_float8(module, {"0": 1.0, "2": 1.0})
    assert isinstance(module[0], Float8Linear)
    assert module[0].weight_OK.element_size() == 1
    assert all(isinstance(module[i], nn.Linear) for i in (2, 3))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("clip", {"compile": "none"}),
        ("vit_small_patch16_dinov3", {"compile": "none"}),
        ("dinov2", {"compile": "none"}),
        ("dinov2", {"compile": "none", "cast_weights": False}),
        ("dinov2", {"compile": "none", "attention": "cudnn"}),
        ("dinov2", {"compile": "default"}),
        ("dinov2", {"precision": "fp8"}),
    ],
    ids=str,
)
def test_options_on_a_gpu(name: str, options: dict[str, Any]) -> None:
    """The bf16 tokens of a ViT with 64 channels per head agree with float32 on the CPU."""
    if "precision" in options and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("FP8 needs compute capability 8.9")
    tokens = views(torch.bfloat16, name, torch.device("cuda"), **options)
    bound = E4M3_ROUNDING if "precision" in options else 4 * torch.finfo(torch.bfloat16).eps
    assert relative_error(tokens.cpu(), views(name=name)) < bound


@pytest.mark.gpu
@pytest.mark.parametrize(("compile", "chunk"), [("none", 1), ("none", 2), ("default", 2)])
def test_chunks_on_a_gpu(compile: str, chunk: int) -> None:
    cuda = torch.device("cuda")
    whole, chunked = (views(torch.bfloat16, "dino", cuda, compile=compile, chunk=size) for size in (0, chunk))
    assert relative_error(chunked, whole) < 2 * torch.finfo(torch.bfloat16).eps


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_product_with_gelu_on_a_gpu(dtype: torch.dtype) -> None:
    """One kernel computes it, and its error is at most a rounding and the tanh approximation."""
    torch.manual_seed(0)
    linear = nn.Linear(768, 3072)
    tokens = torch.randn(2, 196, 768).to(dtype)
    expected = nn.functional.gelu(linear.to(dtype).double()(tokens.double()))
    layer = GeluLinear(linear.to("cuda", dtype))
    tokens = tokens.cuda()
    layer(tokens)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        out = layer(tokens)
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type.name == "CUDA"]
    assert kernels
    assert not any("gelu" in name.lower() and "elementwise" in name for name in kernels), kernels
    assert relative_error(out.cpu(), expected) < max(torch.finfo(dtype).eps, 1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "scales", "gelus"), [("dinov2", 0, 2), ("clip", 0, 0)])
def test_layers_are_merged_on_a_gpu_in_half_precision(name: str, scales: int, gelus: int) -> None:
    cuda, kept = torch.device("cuda"), load_backbone("dinov2", **TINY)
    EncoderRuntime(kept, EncoderRecipe(), dtype=torch.float32, device=cuda)
    assert any("gamma" in key for key, _ in kept.named_parameters())
    encoder = load_backbone(name, **TINY)
    weights_hash = encoder.weights_hash
    EncoderRuntime(encoder, EncoderRecipe(), dtype=torch.bfloat16, device=cuda)
    assert sum("gamma" in key for key, _ in encoder.named_parameters()) == scales
    assert sum(isinstance(module, GeluLinear) for module in encoder.modules()) == gelus
    assert encoder.weights_hash == weights_hash
