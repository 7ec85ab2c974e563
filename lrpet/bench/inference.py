def bench_inference(device="cpu"):
    """x."""
