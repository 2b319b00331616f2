"""Kernels on encoded residuals. The PyTorch reference defines what each one means."""
