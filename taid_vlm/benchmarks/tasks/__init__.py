"""One file per benchmark, each with its `BENCHMARK`."""
