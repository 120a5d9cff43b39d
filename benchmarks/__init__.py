"""Tasks on real data, the comparison runner, reports and micro-benchmarks."""
