"""Embedded Representation Warmup: SiT, REPA and ERW in one engine."""

__version__ = "0.1.0"
