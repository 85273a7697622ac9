"""Side-by-side measurements of batchnorm_ext against torch: `python -m benchmarks --help`."""
