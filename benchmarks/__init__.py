"""Speed, memory, host time and build cost of flash_attn beside its peers: `python -m benchmarks --help`."""
