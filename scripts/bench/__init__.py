"""Parts of `bench_objective.py`: the problem, the implementations, the measures, the output."""
