"""Benchmarks: `python -m benchmarks.bench_record --help`."""
