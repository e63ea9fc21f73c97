"""Speed, memory and size of natively quantized layers beside nn.Linear and bitsandbytes' NF4 and int8.

All layers of one case take turns in the same run, so that what else the machine does falls on all of them alike.
``--quick`` takes about a minute on two cores.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from peft_autoqra.quant.affine import quantize_affine
from peft_autoqra.quant.compiled_decode import compile_decoding
from peft_autoqra.quant.linear import QuantLinear
from peft_autoqra.quant.nf4 import NF4Linear
from peft_autoqra.quant.packing import NATIVE_BITS
from peft_autoqra.quant.quantized_weight import fit_group_size

SHAPES = ((576, 1536), (4096, 4096), (4096, 14336))  # in x out features: SmolLM2-135M, Llama 7B and 8B
GROUP_SIZES = {2: 64, 3: 64, 4: 128, 8: 128}
FORWARD_TOKENS = 1
SLOW_CASE = 2**31  # weights x tokens from which two rounds must do


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One layer in one case; a ratio above 1 means slower than the other layer of the same run."""

    layer: str
    in_features: int
    out_features: int
    dtype: str
    num_tokens: int
    backward: bool
    min_ms: float
    median_ms: float
    min_ratio_to_nf4: float
    median_ratio_to_nf4: float
    min_ratio_to_plain: float
    median_ratio_to_plain: float


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes of one layer: its tensors, what autograd keeps beside them, and the most it allocates on the way."""

    layer: str
    in_features: int
    out_features: int
    dtype: str
    tensor_bytes: int
    closed_form_bytes: int | None
    saved_bytes: int
    peak_extra_bytes: int
    quantize_seconds_per_million_weights: float | None


def int8_linear(linear: nn.Linear, device: torch.device) -> nn.Module:
    """Int8 of bitsandbytes; in train mode its CPU path quantizes weights only."""
    layer = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, bias=False, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(linear.weight.detach().clone().cpu(), has_fp16_weights=False, requires_grad=False)
    return layer.to(device).train()


def make_layers(linear: nn.Linear, device: torch.device) -> tuple[dict[str, nn.Module], dict[str, float]]:
    """Every kind of layer of one weight, and the native ones' quantization seconds per million weights."""
    layers: dict[str, nn.Module] = {"plain": linear, "nf4": NF4Linear(linear), "int8": int8_linear(linear, device)}
    seconds = {}
    moment = torch.rand(linear.in_features, device=device) + 0.5
    for bits in NATIVE_BITS:
        start = time.perf_counter()
        group_size = fit_group_size(GROUP_SIZES[bits], linear.in_features, "linear")
        weight = quantize_affine(linear.weight.detach(), bits=bits, group_size=group_size, input_second_moment=moment)
        synchronize(device)
        seconds[f"{bits} bits"] = (time.perf_counter() - start) / linear.weight.numel() * 1e6
        layers[f"{bits} bits"] = QuantLinear(weight, None, linear.weight.dtype)
    return {name: layer.requires_grad_(False) for name, layer in layers.items()}, seconds


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def one_pass(layer: nn.Module, x: Tensor, gradient: Tensor | None) -> None:
    """Forward alone without gradients, or forward and backward."""
    if gradient is None:
        with torch.no_grad():
            layer(x)
    else:
        x.grad = None
        layer(x).backward(gradient)


def interleaved_ms(passes: dict[str, Callable[[], None]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Milliseconds of each pass in each round, after one round to warm up."""
    taken: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(rounds + 1):
        for name, run in passes.items():
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            taken[name].append((time.perf_counter() - start) * 1e3)
    return {name: values[1:] for name, values in taken.items()}


def time_case(layers: dict[str, nn.Module], linear: nn.Linear, num_tokens: int, rounds: int) -> list[Timing]:
    """Forward and backward, or the forward pass alone for one token."""
    weight = linear.weight
    backward = num_tokens != FORWARD_TOKENS
    x = torch.randn(num_tokens, linear.in_features, dtype=weight.dtype, device=weight.device, requires_grad=backward)
    gradient = weight.new_ones(num_tokens, linear.out_features) if backward else None
    passes = {name: (lambda layer=layer: one_pass(layer, x, gradient)) for name, layer in layers.items()}
    taken = interleaved_ms(passes, 2 if num_tokens * weight.numel() >= SLOW_CASE else rounds, weight.device)
    lowest = {name: min(values) for name, values in taken.items()}
    middle = {name: statistics.median(values) for name, values in taken.items()}
    return [
        Timing(
            layer=name,
            in_features=linear.in_features,
            out_features=linear.out_features,
            dtype=str(weight.dtype).removeprefix("torch."),
            num_tokens=num_tokens,
            backward=backward,
            min_ms=lowest[name],
            median_ms=middle[name],
            min_ratio_to_nf4=lowest[name] / lowest["nf4"],
            median_ratio_to_nf4=middle[name] / middle["nf4"],
            min_ratio_to_plain=lowest[name] / lowest["plain"],
            median_ratio_to_plain=middle[name] / middle["plain"],
        )
        for name in layers
    ]


def peak_extra_bytes(run: Callable[[], None], device: torch.device) -> int:
    """Most bytes held at once during ``run`` beyond those before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def layer_tensors(layer: nn.Module) -> list[Tensor]:
    """Every tensor of a quantized weight, those that bitsandbytes keeps beside the parameters too."""
    tensors = [*layer.parameters(), *layer.buffers()]
    state = getattr(getattr(layer, "weight", None), "quant_state", None)
    if state is not None:
        tensors += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    statistics_of_rows = getattr(getattr(layer, "weight", None), "SCB", None)
    return tensors if statistics_of_rows is None else [*tensors, statistics_of_rows]


def footprint(name: str, layer: nn.Module, linear: nn.Linear, seconds: float | None) -> Footprint:
    """Bytes of forward and backward over 64 tokens."""
    x = torch.randn(64, linear.in_features, dtype=linear.weight.dtype, device=linear.weight.device, requires_grad=True)
    own = {tensor.data_ptr() for tensor in layer_tensors(layer)}
    saved: list[Tensor] = []
    with saved_tensors_hooks(lambda tensor: (saved.append(tensor), tensor)[1], lambda tensor: tensor):
        layer(x)
    beside_own = {tensor.data_ptr(): tensor.nbytes for tensor in saved if tensor.data_ptr() not in own}
    weight_format = layer.weight_format if isinstance(layer, QuantLinear) else None
    gradient = linear.weight.new_ones(64, linear.out_features)
    return Footprint(
        layer=name,
        in_features=linear.in_features,
        out_features=linear.out_features,
        dtype=str(linear.weight.dtype).removeprefix("torch."),
        tensor_bytes=sum(tensor.nbytes for tensor in layer_tensors(layer)),
        closed_form_bytes=weight_format and weight_format.weight_bytes + weight_format.metadata_bytes,
        saved_bytes=sum(beside_own.values()),
        peak_extra_bytes=peak_extra_bytes(lambda: one_pass(layer, x, gradient), x.device),
        quantize_seconds_per_million_weights=seconds,
    )


def print_timings(rows: list[Timing]) -> None:
    """One line per layer: milliseconds and ratios, each as least / median."""
    first = rows[0]
    what = "forward+backward" if first.backward else "forward"
    print(f"\n{first.in_features}x{first.out_features} {first.dtype}, {first.num_tokens} tokens, {what}")
    for row in rows:
        print(
            f"  {row.layer:8s} {row.min_ms:9.2f} / {row.median_ms:9.2f} ms   "
            f"of NF4 {row.min_ratio_to_nf4:5.2f} / {row.median_ratio_to_nf4:5.2f}   "
            f"of plain {row.min_ratio_to_plain:6.2f} / {row.median_ratio_to_plain:6.2f}",
            flush=True,
        )


def print_footprints(rows: list[Footprint]) -> None:
    """One line per layer."""
    for row in rows:
        seconds = row.quantize_seconds_per_million_weights
        print(
            f"  {row.layer:8s} {row.tensor_bytes:>11,} B (closed form {row.closed_form_bytes or 0:>10,}), autograd "
            f"keeps {row.saved_bytes:>9,} B, peak +{row.peak_extra_bytes:>11,} B"
            + (f", quantized in {seconds:.3f} s per million weights" if seconds else ""),
            flush=True,
        )


def environment(device: torch.device) -> dict[str, str | int]:
    """What the figures depend on."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device)
        if cuda
        else f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "num_threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "bitsandbytes": bnb.__version__,
        "python": platform.python_version(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def main() -> None:
    """Run all cases and write them down."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two shapes, bf16, at most 512 tokens; writes no file")
    parser.add_argument(
        "--no_compile", action="store_true", help="on a CPU, decode large layers by PyTorch's own operations too"
    )
    parser.add_argument("--rounds", type=int, default=5, help="repetitions of each case that is not slow")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/layers-<device>.json")
    arguments = parser.parse_args()
    compile_decoding(False if arguments.no_compile else None)
    torch.manual_seed(0)
    timings: list[Timing] = []
    footprints: list[Footprint] = []
    for in_features, out_features in SHAPES[:2] if arguments.quick else SHAPES:
        for dtype in (torch.bfloat16,) if arguments.quick else (torch.bfloat16, torch.float32):
            linear = nn.Linear(in_features, out_features, bias=False, dtype=dtype, device=arguments.device)
            layers, seconds = make_layers(linear, arguments.device)
            for num_tokens in (1, 64, 512) if arguments.quick else (1, 64, 512, 4096):
                rows = time_case(layers, linear, num_tokens, arguments.rounds)
                print_timings(rows)
                timings += rows
            rows_of_bytes = [footprint(name, layer, linear, seconds.get(name)) for name, layer in layers.items()]
            print_footprints(rows_of_bytes)
            footprints += rows_of_bytes
            del linear, layers
            gc.collect()
    if arguments.quick and arguments.output is None:  # the results that are kept are whole ones
        return
    output = arguments.output or Path(f"benchmarks/results/layers-{arguments.device.type}.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    rows_as_json = {"timings": [asdict(row) for row in timings], "footprints": [asdict(row) for row in footprints]}
    settings = {"no_compile": arguments.no_compile, "quick": arguments.quick, "rounds": arguments.rounds}
    output.write_text(json.dumps(environment(arguments.device) | settings | rows_as_json, indent=1) + "\n")
    print(f"\nwritten to {output}")


if __name__ == "__main__":
    main()
