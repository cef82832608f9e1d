"""Side-by-side measurements: ours, the plain route, and peers, on one machine in one run. One command each: `python -m benchmarks.NAME`."""
