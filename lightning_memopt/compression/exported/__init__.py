"""Static int8 by PyTorch's own quantization of exported graphs (PT2E), for the parts of a module that export."""

from lightning_memopt.compression.exported.quantize import quantize_exported

__all__ = ["quantize_exported"]
