"""The reasons for batch norm as experiments: `python -m benchmarks train`."""
