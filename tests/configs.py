"""Settings that several tests share."""

REFERENCE = {f"{name}_impl": "reference" for name in ("loss", "embed", "residual", "qk", "xsa", "mlp")}
"""For GPTConfig: no kernel, whose interpreted Triton code takes seconds a step; the kernels have tests of their own."""

KERNELS = dict.fromkeys(REFERENCE, "kernel")
"""For GPTConfig: every kernel (the loss without the head)."""
