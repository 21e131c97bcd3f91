"""PyTorch's attention on a GPU, at the shapes that `cargo bench --bench kernels -- attention` has: fused by cuDNN, and as two batched products
with a softmax between them. bf16, one head; forward, and forward with backward; medians of CUDA event times."""

import statistics

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

# Images, tokens, channels of the head.
SHAPES = [(128, 256, 256), (16, 256, 512), (16, 1024, 64), (4, 4096, 128)]
WARM_UPS, ROUNDS, REPETITIONS = 3, 21, 20


def products(q, k, v):
    return torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1) @ v


def fused(q, k, v):
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return scaled_dot_product_attention(q, k, v)


def microseconds(work):
    times = []
    for _ in range(WARM_UPS + ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(REPETITIONS):
            work()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / REPETITIONS)
    return statistics.median(times[WARM_UPS:])


def cell(work):
    # One captured graph: what Python takes for a call is not the GPU's time.
    try:
        warm_up = torch.cuda.Stream()
        with torch.cuda.stream(warm_up):
            work()
        torch.cuda.current_stream().wait_stream(warm_up)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return f"{microseconds(graph.replay):.1f}"
    except RuntimeError as error:
        return f"refused: {str(error).splitlines()[0]}"


def main():
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}\n")
    print("| attention | images×tokens×channels | forward µs | forward and backward µs |\n|---|---|---|---|")
    for images, tokens, channels in SHAPES:
        new = lambda: torch.randn(images, 1, tokens, channels, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        q, k, v = new(), new(), new()
        do = torch.randn(images, 1, tokens, channels, device="cuda", dtype=torch.bfloat16)
        for name, attention in [("cuDNN, fused", fused), ("products and softmax", products)]:

            def both():
                torch.autograd.grad(attention(q, k, v), (q, k, v), do)

            def forward():
                with torch.no_grad():
                    attention(q, k, v)

            cells = [cell(work) for work in (forward, both)]
            print(f"| {name} | {images}×{tokens}×{channels} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
