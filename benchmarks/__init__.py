"""How to run and read the microbenchmarks, and results; the code is in bmtard/benchmarks."""
